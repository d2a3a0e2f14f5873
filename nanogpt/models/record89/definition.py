"""Record 89's forward pass as its definition reads: one head, one layer's own sentence at a time, in fp64.

Shares nothing with the model. Constants that define the model are typed in here; sizes come from the parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nanogpt.models.definitions import attend, rms_norm, rotate, sigma

LAYERS = 11
LONG = (3, 10)
PAIRED = (0, 2, 5, 9)
VALUE_EMBED = (1, 2, 8, 9, 10)
XSA = (1, 3, 4, 7)
WITH_ATTENTION = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
HEADS = 6
SIGMA_INPUTS = 12

# Columns of the two gate nets.
EARLY_XSA = {1: 0, 3: 6}
EARLY_OUTPUT = {3: 12}
EARLY_X0 = {0: 18, 1: 20, 2: 22, 3: 24}
LATE_XSA = {4: 0, 7: 6}
LATE_OUTPUT = {10: 12}
LATE_X0 = {4: 18, 5: 20, 7: 22, 8: 24, 9: 26}
LATE_SKIP, LATE_DC_W1, LATE_DC_W2 = 28, 29, 35


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class DenseRecord89:
    """`p`: the parameters by label, fp64; `signs`: the bigrams' sign vectors; `dc_window`: tokens of the DC window."""

    def __init__(
        self,
        p: dict[str, Tensor],
        signs: Tensor,
        prefixes: list[int],
        frequencies: list[np.float32],
        attn_scale: float,
        dc_window: int,
    ):
        self.p = p
        self.signs = signs
        self.prefixes = prefixes
        self.frequencies = frequencies
        self.attn_scale = attn_scale
        self.dc_window = dc_window

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

        rows, sign_rows = p["bigram_embed"].shape[0], self.signs.shape[0]
        h = [rows - 1] + [((36313 * tokens[t]) ^ (27191 * tokens[t - 1])) % (rows - 1) for t in range(1, T)]
        j = [0] + [(tokens[t - 1] ^ tokens[t]) % sign_rows for t in range(1, T)]
        b = torch.stack([p["bigram_embed"][h[t]] * self.signs[j[t]] for t in range(T)])

        s_g = p["mudd_gate_scale"]
        early = self.net("mudd_gate", 0, x0, s_g)
        late = None
        x = x0 + early[:, [EARLY_X0[0] + 1]] * b
        c0, c3, c7, c9 = x, None, None, None

        for i in range(LAYERS):
            ve = None
            if i in VALUE_EMBED:
                ve = torch.stack([p["value_embed"][VALUE_EMBED.index(i) * V + tok] for tok in tokens])
            r_a, r_m = p["resid_lambdas"][i]
            s_a, s_m = p["post_lambdas"][i]
            window = long if i in LONG else short
            if i == 4:
                late = self.net("mudd_gate", 1, x, s_g)
            if i == 10:
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
                    window,
                    ve=ve,
                    ve_gates=torch.stack([mu[:, 6]] * 3 + [mu[:, 7]] * 3, dim=1),
                    v_add=v_add,
                    dc=(late[:, LATE_DC_W1 : LATE_DC_W1 + 6], late[:, LATE_DC_W2 : LATE_DC_W2 + 6]),
                    output_gate=late[:, LATE_OUTPUT[10] : LATE_OUTPUT[10] + 6],
                )
                x = mu[:, [8]] * x + mu[:, [9]] * y + mu[:, [10]] * c0 + mu[:, [11]] * b
                x = mu[:, [12]] * x + mu[:, [13]] * self.mlp(10, rms_norm(x))
                continue
            if i == 6:
                x = x + sigma(skip_lambda) * late[:, [LATE_SKIP]] * c3
            else:
                gates, xsa, output, x0_column = (
                    (early, EARLY_XSA, EARLY_OUTPUT, EARLY_X0) if i < 4 else (late, LATE_XSA, LATE_OUTPUT, LATE_X0)
                )
                y = self.attention(
                    i,
                    rms_norm(c7 if i in (8, 9) else x),
                    s_in[i],
                    s_out[i],
                    document,
                    window,
                    ve=ve,
                    xsa=gates[:, xsa[i] : xsa[i] + 6] if i in XSA else None,
                    output_gate=gates[:, output[i] : output[i] + 6] if i == 3 else None,
                )
                x = r_a * x + s_a * y + gates[:, [x0_column[i]]] * x0
                if i > 0:
                    x = x + gates[:, [x0_column[i] + 1]] * b
            x = r_m * x + s_m * self.mlp(i, rms_norm(x))
            if i == 3:
                c3 = x
            if i == 7:
                c7 = x
        mu = self.net("mudd", 1, x, 0.1)
        ve1 = torch.stack([p["value_embed"][tok] for tok in tokens])
        x = x + sum(mu[:, [n]] * part for n, part in enumerate((c0, c7, c9, ve1, c3)))
        return rms_norm(x)

    def mlp(self, i: int, u: Tensor) -> Tensor:
        up, down = self.p["mlp"][i]
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
        dc: tuple[Tensor, Tensor] | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        (T, D), head_dim = u.shape, u.shape[1] // HEADS
        r = WITH_ATTENTION.index(i)
        qk, vo = self.p["qk"][6 * r : 6 * r + 6], self.p["vo"][2 * r : 2 * r + 2]
        w_q, w_k = torch.cat(list(qk[:3])), torch.cat(list(qk[3:]))
        q, k, v = ((u @ (s_in * w).T).view(T, HEADS, head_dim) for w in (w_q, w_k, vo[0]))
        q, k = rms_norm(q), rms_norm(k)
        if ve is not None:
            if ve_gates is None:
                half, gate = SIGMA_INPUTS // 2, self.p["ve_gate_bank"][VALUE_EMBED.index(i)]
                read = torch.cat((u[:, :half], ve[:, :half]), dim=1)
                ve_gates = torch.stack([2 * sigma(read @ gate[n]) for n in range(HEADS)], dim=1)
            v = v + ve_gates[:, :, None] * ve.view(T, HEADS, head_dim)
        if v_add is not None:
            v = v + v_add.view(T, HEADS, head_dim)

        def rotated(x: Tensor) -> Tensor:
            heads = []
            for n in range(HEADS):
                positions = [2 * t + n % 2 if i in PAIRED else t for t in range(T)]
                heads.append(rotate(x[:, n], positions, self.frequencies))
            return torch.stack(heads, dim=1)

        q, k = rotated(q), rotated(k)
        if i in LONG:
            half = head_dim // 2
            k = torch.stack([torch.cat((k[t, :, :half], k[max(t - 1, 0), :, half:]), dim=-1) for t in range(T)])
        if i in PAIRED:
            q2, k2, v2 = (torch.stack([row for t in range(T) for row in (x[t, :3], x[t, 3:])]) for x in (q, k, v))
            y = attend(q2, k2, v2, [d for d in document for _ in range(2)], window, self.attn_scale)
            y = torch.stack([torch.cat((y[2 * t], y[2 * t + 1])) for t in range(T)])
        else:
            y = attend(q, k, v, document, window, self.attn_scale)
        if dc is not None:
            y = self.dc(y, q, k, v, *dc, document)
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
        return y.reshape(T, D) @ (s_out * vo[1]).T

    def dc(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, document: list[int]) -> Tensor:
        w1 = w1 / torch.sqrt((w1**2).mean(1, keepdim=True) + 1e-6)
        out = []
        for t in range(len(document)):
            seen = [s for s in range(max(0, t - self.dc_window + 1), t + 1) if document[s] == document[t]]
            mixture = 0.0
            for n in range(HEADS):
                weights = torch.exp(self.attn_scale * (k[seen, n] @ q[t, n]))
                mixture = mixture + w1[t, n] * weights / weights.sum()
            out.append(torch.stack([y[t, n] + w2[t, n] * (mixture @ v[seen, n]) for n in range(HEADS)]))
        return torch.stack(out)

    def losses(self, x: Tensor) -> Tensor:
        """CE(z[t], column) for every column, (T, V)."""
        z = 23 * sigma((x @ self.p["lm_head"] + 5) / 7.5)
        return torch.log(torch.exp(z).sum(1))[:, None] - z

    def training_loss(self, x: Tensor, targets: list[int], weights: list[float], w_p: float) -> Tensor:
        losses, T = self.losses(x), len(targets)
        loss = sum(w * losses[t, targets[t + k]] for t in range(T) for k, w in enumerate(weights) if t + k < T)
        prefixes = [self.prefixes[target] for target in targets]
        return loss + sum(w_p * losses[t, prefixes[t]] for t in range(T) if prefixes[t] >= 0)

    def evaluation_loss(self, x: Tensor, targets: list[int]) -> Tensor:
        losses, T = self.losses(x), len(targets)
        return sum(losses[t, targets[t]] for t in range(T)) / T
