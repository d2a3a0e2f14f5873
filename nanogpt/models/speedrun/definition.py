"""The speedrun's forward pass as its definition reads: one head, one position, one pair at a time, in fp64.

Shares nothing with the model. Constants that define the model are typed in here; sizes come from the parameters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanogpt.models.definitions import attend, rms_norm, rotate, sigma

LAYERS = 11
ATTENTION_FREE = 6
LONG = (3, 10)
PAIRED = (0, 2, 5, 9)
VALUE_EMBED = (0, 1, 8, 9, 10)
HEADS = 6
GATE_INPUTS = 12


class DenseSpeedrun:
    """`p`: the parameters by label, fp64."""

    def __init__(self, p: dict[str, Tensor], frequencies: list[np.float32], attn_scale: float):
        self.p = p
        self.frequencies = frequencies
        self.attn_scale = attn_scale

    def hidden(self, tokens: list[int], document: list[int], short: int, long: int) -> Tensor:
        """The normalised input of the head, (T, D)."""
        p, T = self.p, len(tokens)
        D = p["embed"].shape[1]
        V = p["embed"].shape[0]
        scalars = list(p["scalars"].unbind())
        resid = scalars[0:11]
        s_in = scalars[11:33:2]
        s_out = scalars[12:33:2]
        bigram_scale = scalars[33:44]
        smear_lambda, backout_lambda, skip_lambda = scalars[44:]

        e = [p["embed"][tok] for tok in tokens]
        smeared = [e[0]]
        for t in range(1, T):
            smeared.append(e[t] + smear_lambda * sigma(p["smear_gate"][0] @ e[t][:GATE_INPUTS]) * e[t - 1])
        x0 = rms_norm(torch.stack(smeared))
        x = x0

        rows = p["bigram_embed"].shape[0]
        h = [rows - 1] + [((36313 * tokens[t]) ^ (27191 * tokens[t - 1])) % (rows - 1) for t in range(1, T)]
        b = torch.stack([p["bigram_embed"][row] for row in h])

        saved3 = saved7 = None
        bank_row = 0
        for i in range(LAYERS):
            if i == 6:
                gate = 2 * sigma(x0[:, :GATE_INPUTS] @ p["skip_gate"][0])
                x = x + sigma(skip_lambda) * gate[:, None] * saved3
            if i == 0:
                x = (resid[0] + p["x0_lambdas"][0]) * x + bigram_scale[0] * b
            else:
                x = resid[i] * x + p["x0_lambdas"][i] * x0 + bigram_scale[i] * b
            if i != ATTENTION_FREE:
                u = rms_norm(x)
                ve = ve_gate = None
                if i in VALUE_EMBED:
                    j = VALUE_EMBED.index(i)
                    ve = torch.stack([p["value_embed"][j * V + tok] for tok in tokens])
                    ve_gate = p["ve_gate_bank"][j]
                weights = p["attn"][bank_row]
                x = x + self.attention(
                    u,
                    s_in[i] * weights[: 3 * D],
                    s_out[i] * weights[3 * D :],
                    p["attn_gate_bank"][bank_row],
                    ve,
                    ve_gate,
                    document,
                    paired=i in PAIRED,
                    shifted=i in LONG,
                    window=long if i in LONG else short,
                )
                bank_row += 1
            up, down = p["mlp"][i]
            x = x + torch.clamp(rms_norm(x) @ up.T, min=0) ** 2 @ down
            if i == 3:
                saved3 = x
            if i == 7:
                saved7 = x
        return rms_norm(x - backout_lambda * saved7)

    def attention(
        self,
        u: Tensor,
        w_qkv: Tensor,
        w_o: Tensor,
        gate: Tensor,
        ve: Tensor | None,
        ve_gate: Tensor | None,
        document: list[int],
        *,
        paired: bool,
        shifted: bool,
        window: int,
    ) -> Tensor:
        T, D = u.shape
        head_dim = D // HEADS
        q, k, v = ((u @ w.T).view(T, HEADS, head_dim) for w in w_qkv.split(D))
        q, k = rms_norm(q), rms_norm(k)
        if ve is not None:
            share = torch.stack([2 * sigma(u[:, :GATE_INPUTS] @ ve_gate[n]) for n in range(HEADS)], dim=1)
            v = v + share[:, :, None] * ve.view(T, HEADS, head_dim)

        def rotated(x: Tensor) -> Tensor:
            heads = []
            for n in range(HEADS):
                positions = [2 * t + n % 2 if paired else t for t in range(T)]
                heads.append(rotate(x[:, n], positions, self.frequencies))
            return torch.stack(heads, dim=1)

        q, k = rotated(q), rotated(k)
        if shifted:
            half = head_dim // 2
            k = torch.stack([torch.cat((k[t, :, :half], k[max(t - 1, 0), :, half:]), dim=-1) for t in range(T)])
        if paired:
            half = HEADS // 2

            def joined(x: Tensor) -> Tensor:
                return torch.stack([row for t in range(T) for row in (x[t, :half], x[t, half:])])

            twice = [d for d in document for _ in range(2)]
            y = attend(joined(q), joined(k), joined(v), twice, window, self.attn_scale)
            y = torch.stack([torch.cat((y[2 * t], y[2 * t + 1])) for t in range(T)])
        else:
            y = attend(q, k, v, document, window, self.attn_scale)
        y = torch.stack([y[:, n] * sigma(u[:, :GATE_INPUTS] @ gate[n])[:, None] for n in range(HEADS)], dim=1)
        return y.reshape(T, D) @ w_o.T

    def losses(self, x: Tensor, targets: list[int]) -> Tensor:
        """CE(z[t], targets[s]) for all t and s, (T, T)."""
        z = 23 * sigma((x @ self.p["lm_head"] + 5) / 7.5)
        return torch.log(torch.exp(z).sum(1))[:, None] - z[:, targets]

    def training_loss(self, x: Tensor, targets: list[int], weights: list[float]) -> Tensor:
        losses, T = self.losses(x, targets), len(targets)
        return sum(w * losses[t, t + k] for t in range(T) for k, w in enumerate(weights) if t + k < T)

    def evaluation_loss(self, x: Tensor, targets: list[int]) -> Tensor:
        losses, T = self.losses(x, targets), len(targets)
        return sum(losses[t, t] for t in range(T)) / T
