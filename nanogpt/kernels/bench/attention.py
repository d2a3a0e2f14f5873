"""Timing attention at the shapes of the record, on the backend that `auto` takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.kernels.attention import attention, select_attention_backend
from nanogpt.kernels.bench import BenchCase, document_ends
from nanogpt.kernels.dispatch import device_capability

# (tokens, heads, longest document, window, widths of keys and of values): the records' stages on one of eight slots,
# unpaired short, paired short, and long windows; then record 92's narrow keys, paired, and values.
STAGES = ((16_384, 128, 384), (32_768, 384, 896), (49_152, 640, 1_408))
SHAPES = (
    *(
        shape
        for tokens, short, long in STAGES
        for shape in (
            (tokens, 6, 2_048, short, (128, 128)),
            (2 * tokens, 3, 4_096, short, (128, 128)),
            (tokens, 6, 2_048, long, (128, 128)),
        )
    ),
    *(
        shape
        for tokens, short, _ in STAGES
        for shape in ((2 * tokens, 3, 4_096, short, (64, 128)), (tokens, 6, 2_048, short, (64, 64)))
    ),
)


def bench_cases(device: torch.device | str = "cuda", backends: tuple[str, ...] | None = None) -> Iterator[BenchCase]:
    """Forward, and forward with backward, at the shapes of the record; `backends` defaults to what `auto` takes."""
    if backends is None:
        capability = device_capability(torch.device(device))
        backends = (select_attention_backend("auto", capability, head_dim=128, dtype=torch.bfloat16).backend,)
    for (tokens, heads, longest, window, (key, value)), backend in itertools.product(SHAPES, backends):
        ends = [
            end * (2 if heads == 3 else 1)
            for end in document_ends(tokens * heads // 6, 2_048, -(-(tokens * heads // 6) // 38_400) * 128 - 1)
        ]
        pairs = visible_pairs(ends, window)
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        q, k, v, grad = (
            torch.randn(tokens, heads, width, device=device, dtype=torch.bfloat16) for width in (key, key, value, value)
        )
        q, k = (torch.nn.functional.rms_norm(x, (key,)).requires_grad_() for x in (q, k))
        v.requires_grad_()

        def run(
            backend: str,
            train: bool,
            inputs: tuple[Tensor, Tensor, Tensor] = (q, k, v),
            cu_seqlens: Tensor = cu_seqlens,
            max_seqlen: int = longest,
            window: int = window,
            grad: Tensor = grad,
        ) -> object:
            with torch.set_grad_enabled(train):
                out = attention(*inputs, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=0.1, backend=backend)
            return torch.autograd.grad(out, inputs, grad) if train else out

        shape = f"{tokens:,} x {heads} x {key if key == value else f'({key}, {value})'}, window {window:,}"
        # Numbers per pair and head. Forward: scores, output. Backward: scores, their gradient and those of v, q and k.
        forward, backward = key + value, 3 * key + 2 * value
        for train, name, products, tensors in (
            (False, "forward", forward, 2 * forward),
            (True, "forward + backward", forward + backward, 6 * forward),
        ):
            yield BenchCase(
                f"attention {backend}, {name}",
                shape,
                functools.partial(run, backend, train),
                None if backend == "plain" else functools.partial(run, "plain", train),
                flops=2 * products * pairs * heads,
                bytes=tensors * tokens * heads * 2,
            )


def visible_pairs(ends: list[int], window: int) -> int:
    """How many query-key pairs the window leaves in documents that end at `ends`."""
    pairs, start = 0, 0
    for end in ends:
        length, start = end - start, end
        full = min(length, window + 1)
        pairs += full * (full + 1) // 2 + (length - full) * (window + 1)
    return pairs
