"""The 8-bit copies of the MLP bank, and the scales measured at one time and used at the next.

- Input: divided by the largest in this micro-batch, or by a power of two that no output of a norm exceeds.
- Up weights: divided by their own scale, measured when they are rounded.
- Down weights: rounded after each optimizer step with the scale measured at the previous one, times a headroom.
  Over the first steps, when they leave zero, the scale is measured first.
- Activations: each training forward pass measures the largest of a layer; the next one, of whatever micro-batch on the
  same rank, divides by it, times a headroom. Never communicated: ranks may differ.

With gradients in 8 bits the backward pass reads the same weights in the other layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.kernels.fp8_mlp import E4M3_MAX, PEAK_FLOOR, current_scale, fp8_relu_squared_mlp, round_weights
from nanogpt.layers.specs import MlpFp8Spec


class Fp8Mlp(nn.Module):
    """The MLPs of a model, by layer, over a bank (entries, 2, F, D) that the model keeps: [:, 0] up, [:, 1] down.

    Each scale is a separate tensor: slices of one vector lack the alignment that 8-bit products need. With
    `active` False it holds and computes nothing, so that a checkpoint does not depend on the precision.
    """

    up8: Tensor  # (layers, F, D) e4m3
    down8: Tensor  # (layers, D, F) e4m3
    up8_t: Tensor  # (layers, D, F) e4m3, with 8-bit gradients only, like the next
    down8_t: Tensor  # (layers, F, D) e4m3

    def __init__(self, spec: MlpFp8Spec, *, layers: int, hidden: int, width: int, active: bool, plain: bool):
        super().__init__()
        self.spec = spec
        self.layers = layers if active else 0
        self.active = active
        self.gradients8 = active and spec.gradients == "all"
        self.plain = plain
        self._loaded = False  # scales for the coming weights
        self.u_scale: Tensor | None
        bound = 2.0 ** math.ceil(math.log2(math.sqrt(width) / E4M3_MAX))
        scale = torch.tensor(bound) if active and spec.input_scale == "bound" else None
        self.register_buffer("u_scale", scale, persistent=False)
        kinds = ("post_scale", "up_scale", "down_scale", "next_down_scale")
        for layer in range(self.layers):
            for kind in kinds:
                self.register_buffer(f"{kind}_{layer}", torch.ones(()), persistent=False)
        if active:
            e4m3 = torch.float8_e4m3fn
            self.register_buffer("up8", torch.zeros(layers, hidden, width, dtype=e4m3), persistent=False)
            self.register_buffer("down8", torch.zeros(layers, width, hidden, dtype=e4m3), persistent=False)
        if self.gradients8:
            self.register_buffer("up8_t", torch.zeros(layers, width, hidden, dtype=e4m3), persistent=False)
            self.register_buffer("down8_t", torch.zeros(layers, hidden, width, dtype=e4m3), persistent=False)

    def scales(self, kind: str) -> list[Tensor]:
        """`post_scale`, `up_scale`, `down_scale` or `next_down_scale` of each layer, each () fp32."""
        return [getattr(self, f"{kind}_{layer}") for layer in range(self.layers)]

    def forward(
        self,
        layer: int,
        u: Tensor,  # (T, D)
        up: Tensor,  # (F, D)
        down: Tensor,  # (F, D): the bank's, or times a factor
        down_scale: Tensor | None = None,  # () fp32: with a factor, from `down_scales`
    ) -> Tensor:
        """One layer's `relu(u up^T)^2 down`, (T, D); measures the activation for the next call."""
        post_scale: Tensor = getattr(self, f"post_scale_{layer}")
        out, peak = fp8_relu_squared_mlp(
            u,
            up,
            down,
            self.up8[layer],
            getattr(self, f"up_scale_{layer}"),
            self.down8[layer],
            getattr(self, f"down_scale_{layer}") if down_scale is None else down_scale,
            post_scale,
            u_scale=self.u_scale,
            transposed8=(self.up8_t[layer], self.down8_t[layer]) if self.gradients8 else None,
            square8=self.spec.square == "e4m3",
            plain=self.plain,
        )
        with torch.no_grad():
            post_scale.copy_(self.spec.activation_headroom * peak.clamp(min=PEAK_FLOOR) / E4M3_MAX)
        return out

    @torch.no_grad()
    def down_scales(self, factors: list[Tensor]) -> list[Tensor]:
        """By layer, the scale () fp32 with which its 8-bit down weights are those of the bank times its factor ()."""
        return list(torch._foreach_mul(self.scales("down_scale"), factors))

    @torch.no_grad()
    def follow(self, bank: Tensor, step: int) -> None:
        """Round the weights after optimizer step `step`."""
        if not self.active:
            return
        if step < self.spec.bootstrap_steps:
            self._measure_down(bank)
        else:
            torch._foreach_copy_(self.scales("down_scale"), self.scales("next_down_scale"))
        self._round(bank)

    @property
    def settled_step(self) -> int | None:
        """The first step that `follow` does not measure scales after; None: it does nothing."""
        return self.spec.bootstrap_steps if self.active else None

    @torch.no_grad()
    def restart(self, bank: Tensor) -> None:
        """Reset every scale to the start of a run."""
        if not self.active:
            return
        for scale in self.scales("post_scale"):
            scale.fill_(1.0)
        self._measure_down(bank)
        self._round(bank)

    @torch.no_grad()
    def reload(self, bank: Tensor) -> None:
        """Round again with the scales from `set_extra_state`; measure them if it had none."""
        if self.active and self._loaded:
            self._round(bank)
        else:
            self.restart(bank)

    def _measure_down(self, bank: Tensor) -> None:
        measured = current_scale(bank[: self.layers, 1], (1, 2))
        torch._foreach_copy_(self.scales("down_scale"), list(measured.unbind()))

    def _round(self, bank: Tensor) -> None:
        transposed8 = (self.up8_t, self.down8_t) if self.gradients8 else None
        down_scale = torch.stack(self.scales("down_scale"))
        weights8 = (self.up8, self.down8)
        up_scale, down_peak = round_weights(bank[: self.layers], down_scale, *weights8, transposed8, plain=self.plain)
        torch._foreach_copy_(self.scales("up_scale"), list(up_scale.unbind()))
        following = self.spec.weight_headroom * down_peak.clamp(min=PEAK_FLOOR) / E4M3_MAX
        torch._foreach_copy_(self.scales("next_down_scale"), list(following.unbind()))

    def get_extra_state(self) -> dict[str, list[float]]:
        """The scales in use; everything else follows from them and the weights."""
        return {kind: [float(scale) for scale in self.scales(kind)] for kind in ("post_scale", "down_scale")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load `get_extra_state` from a run of either precision; call `reload` once the weights are loaded."""
        self._loaded = len(state["down_scale"]) == self.layers
        for kind in ("post_scale", "down_scale"):
            for scale, value in zip(self.scales(kind), state[kind], strict=False):
                scale.fill_(value)
