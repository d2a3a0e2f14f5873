"""What a model keeps of the tokens it has read, so that it can read just the next ones: the cache for sampling.

The first call reads a whole stream and stores in a `Past` what later tokens look back at: keys and values, and the
last rows of whatever is mixed between tokens. Each later call reads the tokens that follow in the last document.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from nanogpt.kernels.attention_plain import attention_to_past


class Past:
    """One per text. `start`: where the text's document begins in the first call's stream."""

    def __init__(self, start: int):
        self.start = start
        self.length = 0  # tokens read by earlier calls
        self._rows: dict[Hashable, Tensor] = {}

    def joined(self, name: Hashable, x: Tensor, reach: int | None = None) -> Tensor:
        """x (T, ...) after the last `reach` rows (None: all) that earlier calls stored under `name`."""
        both = torch.cat((self._rows[name], x)) if name in self._rows else x
        self._rows[name] = both if reach is None else both[-reach:]
        return both

    def attention(
        self,
        layer: int,
        q: Tensor,  # (T, H, dq), as attention takes them
        k: Tensor,
        v: Tensor,  # (T, H, dv)
        *,
        window: int | Tensor,
        scale: float | Tensor,
        paired: bool = False,
    ) -> Tensor | None:
        """The tokens' attention to their document so far, (T, H, dv); None in the first call, which needs no past."""
        keys, values = self.joined(("keys", layer), k), self.joined(("values", layer), v)
        if not self.length:
            return None
        start, shape = self.start, v.shape
        if paired:
            q, keys, values = (x.reshape(2 * x.shape[0], x.shape[1] // 2, x.shape[2]) for x in (q, keys, values))
            start *= 2
        y = attention_to_past(q, keys, values, start=start, window=int(window), scale=float(scale))
        return y.reshape(shape)

    def recent(self, layer: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last `count` keys and values of a layer, (m, H, D), and their `cu_seqlens`, (3,) int32."""
        keys, values = (self._rows[name, layer] for name in ("keys", "values"))
        first = max(0, len(keys) - count)
        bounds = torch.tensor([0, max(0, self.start - first), len(keys) - first], dtype=torch.int32, device=keys.device)
        return keys[first:], values[first:], bounds

    def advance(self, tokens: int) -> None:
        """Note that a call has read this many tokens."""
        self.length += tokens
