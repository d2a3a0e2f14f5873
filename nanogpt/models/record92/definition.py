"""Record 92's forward pass as its definition reads: one head at a time, each layer spelled out, in fp64.

Shares nothing with the model. Constants that define the model are typed in here; sizes come from the parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nanogpt.models.definitions import attend, rms_norm, rotate, sigma

LAYERS, HEADS, SIGMA_INPUTS = 11, 6, 12
BANK_ORDER = (0, 2, 5, 1, 8, 3, 10)
WIDE = (3, 10)
HALF_VALUES = (1, 8)
PAIRED = (0, 2, 5)
PLANES = {1: 0, 2: 1, 8: 2, 10: 3}
XSA = (1, 3)
GROUPS = 12

# Columns of the two gate nets.
EARLY_XSA = {1: 0, 3: 6}
EARLY_OUTPUT = 12
EARLY_X0 = {0: 18, 1: 19, 2: 20}
EARLY_NGRAM = {0: 21, 1: 22}
LATE_OUTPUT = 0
LATE_X0 = {4: 6, 5: 7, 7: 8}
LATE_NGRAM = {4: 9, 5: 10, 9: 11}
LATE_SKIP = 12


def int32(number: int) -> int:
    """The number as 32 bits hold it."""
    return (number + 2**31) % 2**32 - 2**31


def ngram_rows(tokens: list[int], rows: int) -> tuple[list[int], list[int]]:
    """The rows of each token's bigram and trigram."""
    half = rows // 2
    bigrams, trigrams = [], []
    for t, token in enumerate(tokens):
        if t == 0:
            bigrams.append(half - 1)
        else:
            before = tokens[t - 1] if t > 1 else half - 1
            bigrams.append((int32(36313 * token) ^ int32(27191 * before)) % (half - 1))
        if t < 2:
            trigrams.append(rows - 1)
        else:
            mixed = int32(17351 * token) ^ int32(60961 * tokens[t - 1]) ^ int32(45259 * tokens[t - 2])
            trigrams.append(half + mixed % (half - 1))
    return bigrams, trigrams


def sign_rows(tokens: list[int], count: int) -> tuple[list[int], list[int]]:
    """The sign vectors of each token's bigram and trigram; the record has 8,192 of them."""
    bigrams, trigrams = [], []
    for t, token in enumerate(tokens):
        bigrams.append(0 if t < 1 else (int32(48271 * token) ^ int32(30011 * tokens[t - 1])) % count)
        trigram = 0
        if t >= 2:
            trigram = (int32(58699 * token) ^ int32(39779 * tokens[t - 1]) ^ int32(26801 * tokens[t - 2])) % count
        trigrams.append(trigram)
    return bigrams, trigrams


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class DenseRecord92:
    """`p`: the parameters by label, fp64, and `table`, the n-grams' rows; frequencies and scales by width."""

    def __init__(
        self,
        p: dict[str, Tensor],
        signs: Tensor,
        prefixes: list[int],
        frequencies: dict[str, list[np.float32]],
        attn_scales: dict[str, float],
        narrow_dim: int,
        half_dim: int,
    ):
        self.p = p
        self.signs = signs
        self.prefixes = prefixes
        self.frequencies = frequencies
        self.attn_scales = attn_scales
        self.narrow_dim = narrow_dim
        self.half_dim = half_dim

    def net(self, name: str, j: int, x: Tensor, scale: Tensor | float) -> Tensor:
        w1, w2, b2 = (self.p[f"{name}_{part}"][j] for part in ("w1", "w2", "b2"))
        return scale * (gelu(x @ w1.T) @ w2.T + b2)

    def hidden(self, tokens: list[int], document: list[int], short: int, long: int) -> Tensor:
        """The normalised input of the head, (T, D)."""
        p, T = self.p, len(tokens)
        V = p["embed"].shape[0]
        s_in, s_out = p["scalars"][0:22:2], p["scalars"][1:22:2]
        smear_lambda, skip_lambda = p["scalars"][22], p["scalars"][23]

        e = [p["embed"][tok] for tok in tokens]
        smeared = [e[0]]
        for t in range(1, T):
            smeared.append(e[t] + smear_lambda * sigma(p["smear_gate"][0] @ e[t][:12]) * e[t - 1])
        x0 = rms_norm(torch.stack(smeared))

        bigrams, trigrams = ngram_rows(tokens, p["table"].shape[0])
        bigram_signs, trigram_signs = sign_rows(tokens, self.signs.shape[0])
        b = torch.stack(
            [
                p["table"][bigrams[t]] * self.signs[bigram_signs[t]]
                + p["table"][trigrams[t]] * self.signs[trigram_signs[t]]
                for t in range(T)
            ]
        )
        planes = [torch.stack([p["value_embed"][plane * V + tok] for tok in tokens]) for plane in range(4)]

        s_g = p["mudd_gate_scale"]
        early = self.net("mudd_gate", 0, x0, s_g)
        x = x0 + early[:, [EARLY_NGRAM[0]]] * b
        c0, c3, c7 = x, None, None
        for i in range(10):
            r_a, r_m = p["resid_lambdas"][i]
            s_a, s_m = p["post_lambdas"][i]
            window = long if i in WIDE else short
            if i == 4:
                late = self.net("mudd_gate", 1, x, s_g)
            gates, x0_columns, ngram_columns = (early, EARLY_X0, EARLY_NGRAM) if i < 4 else (late, LATE_X0, LATE_NGRAM)
            if i == 6:
                x = x + sigma(skip_lambda) * late[:, [LATE_SKIP]] * c3
            else:
                total = r_a * x
                if i in BANK_ORDER:
                    y = self.attention(
                        i,
                        rms_norm(c7 if i == 8 else x),
                        s_in[i],
                        s_out[i],
                        document,
                        window,
                        ve=planes[PLANES[i]] if i in PLANES else None,
                        xsa=early[:, EARLY_XSA[i] : EARLY_XSA[i] + 6] if i in XSA else None,
                        output_gate=early[:, EARLY_OUTPUT : EARLY_OUTPUT + 6] if i == 3 else None,
                    )
                    total = total + s_a * y
                if i in x0_columns:
                    total = total + gates[:, [x0_columns[i]]] * x0
                if i in ngram_columns and i > 0:
                    total = total + gates[:, [ngram_columns[i]]] * b
                x = total
            if i == 7:
                x = r_m * x
            elif i == 8:
                v = rms_norm(x)
                x = r_m * x + s_m * self.mlp(8, v) + s_m * self.mlp(11, v)
            else:
                x = r_m * x + s_m * self.mlp(i, rms_norm(x))
            if i == 3:
                c3 = x
            if i == 7:
                c7 = x
        c9 = x
        mu = self.net("mudd", 0, x, 0.1)
        v_add = mu[:, [0]] * c0 + mu[:, [1]] * c7 + mu[:, [2]] * x
        x = (1 + mu[:, [5]]) * x + mu[:, [3]] * c0 + mu[:, [4]] * c7
        y = self.attention(
            10,
            rms_norm(c7),
            s_in[10],
            s_out[10],
            document,
            long,
            ve=planes[3],
            ve_gates=torch.stack([mu[:, 6]] * 3 + [mu[:, 7]] * 3, dim=1),
            v_add=v_add,
            output_gate=late[:, LATE_OUTPUT : LATE_OUTPUT + 6],
        )
        x = mu[:, [8]] * x + mu[:, [9]] * y + mu[:, [10]] * c0 + mu[:, [11]] * b
        read = rms_norm(x)
        x = mu[:, [12]] * x + mu[:, [13]] * self.mlp(10, read)

        sources = (c0, c7, c9, planes[0], c3, planes[1], planes[3], planes[2], read, rms_norm(c7))
        h = gelu(x @ p["mudd_w1"][1].T)
        out = x.clone()
        width = x.shape[1] // GROUPS
        for k, source in enumerate(sources):
            mu_k = 0.1 * (h @ p["mudd_w2"][1, k] + p["mudd_b2"][1, k])
            for g in range(GROUPS):
                channels = slice(g * width, (g + 1) * width)
                d_kg = 0.1 * (h @ p["mudd_w2g"][k, g])
                out[:, channels] = out[:, channels] + (mu_k + d_kg)[:, None] * source[:, channels]
        return rms_norm(out)

    def mlp(self, slot: int, u: Tensor) -> Tensor:
        up, down = self.p["mlp"][slot]
        return torch.clamp(u @ up.T, min=0) ** 2 @ down

    def attention(
        self,
        i: int,
        u: Tensor,
        s_in: Tensor,
        s_out: Tensor,
        document: list[int],
        window: int,
        *,
        ve: Tensor | None = None,
        ve_gates: Tensor | None = None,
        v_add: Tensor | None = None,
        xsa: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        (T, D), whole = u.shape, u.shape[1] // HEADS
        slot = BANK_ORDER.index(i)
        kind = "wide" if i in WIDE else "narrow"
        dq = whole if i in WIDE else self.narrow_dim
        dv = self.half_dim if i in HALF_VALUES else whole
        qk, (w_v, w_o) = self.p["qk"][6 * slot : 6 * slot + 6], self.p["vo"][2 * slot : 2 * slot + 2]
        w_qk = qk.reshape(2 * HEADS, whole, D)  # six heads of q, then six of k
        q = torch.stack([u @ (s_in * w_qk[n, :dq]).T for n in range(HEADS)], dim=1)
        k = torch.stack([u @ (s_in * w_qk[HEADS + n, :dq]).T for n in range(HEADS)], dim=1)
        v = torch.stack([u @ (s_in * w_v[n * whole : n * whole + dv]).T for n in range(HEADS)], dim=1)
        q, k = rms_norm(q), rms_norm(k)
        if ve is not None:
            if ve_gates is None:
                half, gate = SIGMA_INPUTS // 2, self.p["ve_gate_bank"][PLANES[i]]
                read = torch.cat((u[:, :half], ve[:, :half]), dim=1)
                ve_gates = torch.stack([2 * sigma(read @ gate[n]) for n in range(HEADS)], dim=1)
            v = v + ve_gates[:, :, None] * ve.view(T, HEADS, whole)[:, :, :dv]
        if v_add is not None:
            v = v + v_add.view(T, HEADS, dv)

        def rotated(x: Tensor) -> Tensor:
            heads = []
            for n in range(HEADS):
                positions = [2 * t + n % 2 if i in PAIRED else t for t in range(T)]
                heads.append(rotate(x[:, n], positions, self.frequencies[kind]))
            return torch.stack(heads, dim=1)

        q, k = rotated(q), rotated(k)
        scale = self.attn_scales[kind]
        if i in WIDE:
            rotary = 2 * len(self.frequencies[kind])
            k = torch.stack([torch.cat((k[t, :, :rotary], k[max(t - 1, 0), :, rotary:]), dim=-1) for t in range(T)])
        if i in PAIRED:
            q2, k2, v2 = (torch.stack([row for t in range(T) for row in (x[t, :3], x[t, 3:])]) for x in (q, k, v))
            y = attend(q2, k2, v2, [d for d in document for _ in range(2)], window, scale)
            y = torch.stack([torch.cat((y[2 * t], y[2 * t + 1])) for t in range(T)])
        else:
            y = attend(q, k, v, document, window, scale)
        if xsa is not None:
            a = torch.tanh(xsa)
            heads = []
            for n in range(HEADS):
                dot = (y[:, n] * v[:, n]).sum(1)
                square = torch.clamp((v[:, n] ** 2).sum(1), min=1e-8)
                heads.append(y[:, n] - (a[:, n] * dot / square)[:, None] * v[:, n])
            y = torch.stack(heads, dim=1)
        if output_gate is not None:
            y = y * output_gate[:, :, None]
        return sum(y[:, n] @ (s_out * w_o[:, n * whole : n * whole + dv]).T for n in range(HEADS))

    def training_loss(
        self, x: Tensor, targets: list[int], weights: list[float], w_p: float, classes: list[int]
    ) -> Tensor:
        """The sum over tokens of the weighted cross-entropies over `classes`, the whole vocabulary or a sample."""
        z = 23 * sigma((x @ self.p["lm_head"][:, classes] + 5) / 7.5)
        lse, T = torch.log(torch.exp(z).sum(1)), len(targets)
        place = {c: n for n, c in enumerate(classes)}
        loss = sum(
            w * (lse[t] - z[t, place[targets[t + k]]]) for t in range(T) for k, w in enumerate(weights) if t + k < T
        )
        for t in range(T):
            prefix = self.prefixes[targets[t]]
            if prefix in place:
                loss = loss + w_p * (lse[t] - z[t, place[prefix]])
        return loss

    def evaluation_loss(self, x: Tensor, targets: list[int]) -> Tensor:
        """The mean cross-entropy of the next token over the whole vocabulary."""
        z = 23 * sigma((x @ self.p["lm_head"] + 5) / 7.5)
        lse, T = torch.log(torch.exp(z).sum(1)), len(targets)
        return sum(lse[t] - z[t, targets[t]] for t in range(T)) / T
