"""Half-truncated rotary position embedding, its paired form, and YaRN (Peng et al., 2023) for longer windows.

Only the first `rotated` channels of a head are rotated; the rest keep frequency 0. Channels are paired as neighbours
(2j, 2j+1). Positions run over the flat stream of a micro-batch and never restart at a document.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.layers.specs import RotarySpec


class Rotary(nn.Module):
    """Tables of cos and sin for positions 0 .. 2 * max_tokens - 1, and the attention scale, which YaRN also changes.

    An unpaired head at token t uses row t. Joined heads use rows 2t and 2t + 1, which is why there are twice as many
    rows as tokens.
    """

    cos: Tensor  # (2 * max_tokens, rotated), model dtype
    signed_sin: Tensor  # the same shape: +sin in even channels, -sin in odd ones
    frequency: Tensor  # (rotated // 2,), fp32, radians per position

    def __init__(self, spec: RotarySpec, *, max_tokens: int, attention_scale: float, dtype: torch.dtype):
        super().__init__()
        self.spec = spec
        self.rows = 2 * max_tokens
        self.start_scale = attention_scale
        self.attention_scale = attention_scale
        # The same number for compiled code: () fp64 on the CPU, changed in place. Not a buffer, so that it stays there.
        self.run_time_scale = torch.tensor(attention_scale, dtype=torch.float64, device="cpu")
        self.dtype = dtype
        self.rotated = rotated = 2 * spec.frequencies
        self.register_buffer("frequency", torch.empty(spec.frequencies), persistent=False)
        self.register_buffer("cos", torch.empty(self.rows, rotated, dtype=dtype), persistent=False)
        self.register_buffer("signed_sin", torch.empty(self.rows, rotated, dtype=dtype), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Reset frequencies and attention scale to the run's start."""
        self.attention_scale = self.start_scale
        n = self.spec.frequencies
        exponent = torch.arange(n, dtype=torch.float32, device=self.frequency.device) / max(n - 1, 1)
        self.frequency.copy_((1 / self.spec.base) ** exponent)
        self._fill_tables()

    def extend_window(self, old: int, new: int) -> None:
        """YaRN's step when the long window changes from `old` to `new` tokens; cumulative.

        Frequencies that turn fewer than `yarn_low` times in the old window are interpolated by old/new, those that
        turn more than `yarn_high` times are left alone, and the others lie in between.
        """
        spec = self.spec
        rotations = old * self.frequency / (2 * math.pi)
        keep = ((rotations - spec.yarn_low) / (spec.yarn_high - spec.yarn_low)).clamp(0, 1)
        ratio = old / new
        self.frequency.mul_(ratio + keep * (1 - ratio))
        self.attention_scale *= 1 + spec.yarn_temperature * math.log(new / old)
        self._fill_tables()

    def _fill_tables(self) -> None:
        self.run_time_scale.fill_(self.attention_scale)
        position = torch.arange(self.rows, dtype=torch.float32, device=self.frequency.device)
        angle = torch.outer(position, self.frequency)
        self.cos.copy_(angle.cos().repeat_interleave(2, dim=1))
        sin = angle.sin()
        self.signed_sin.copy_(torch.stack((sin, -sin), dim=-1).flatten(1))

    def get_extra_state(self) -> dict[str, Any]:
        """The state that the weights have adapted to: YaRN's frequencies and the attention scale."""
        return {"frequency": self.frequency.tolist(), "attention_scale": self.attention_scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `get_extra_state` and rebuild the tables."""
        self.frequency.copy_(torch.tensor(state["frequency"], dtype=torch.float32))
        self.attention_scale = state["attention_scale"]
        self._fill_tables()

    def forward(self, x: Tensor, *, paired: bool = False, first: int = 0) -> Tensor:
        """Rotate queries or keys, x (T, H, D), of tokens from `first`.

        Paired: heads 0, 2, 4.. at position 2t, heads 1, 3, 5.. at 2t + 1.
        """
        tokens, heads, head_dim = x.shape
        rotated = self.cos.shape[1]
        if paired:
            cos = self.cos[2 * first : 2 * (first + tokens)].view(tokens, 1, 2, rotated)
            sin = self.signed_sin[2 * first : 2 * (first + tokens)].view(tokens, 1, 2, rotated)
            x = x.view(tokens, heads // 2, 2, head_dim)
        else:
            cos = self.cos[first : first + tokens].view(tokens, 1, rotated)
            sin = self.signed_sin[first : first + tokens].view(tokens, 1, rotated)
        leading, still = x[..., :rotated], x[..., rotated:]
        swapped = leading.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.cat((cos * leading + sin * swapped, still), dim=-1).view(tokens, heads, head_dim)


def shift_still_keys(k: Tensor, rotated: int) -> Tensor:
    """Give each key the unrotated channels of the previous key; token 0 keeps its own. k (T, H, D).

    Lets one head look up what followed an earlier occurrence of a token (record of 2025-11, "partial key offset").
    """
    still = k[..., rotated:]
    return torch.cat((k[..., :rotated], torch.cat((still[:1], still[:-1]))), dim=-1)
