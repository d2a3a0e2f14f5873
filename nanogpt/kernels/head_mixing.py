"""The DC correction: attention heads that mix their weights inside a short window, added to ordinary attention.

After "Improving Transformers with Dynamically Composable Multi-Head Attention" (Xiao et al., 2024), in the form of
public record 85. For head h, query t and the `window` tokens s = t - window + 1 .. t of t's own document:

    P_h(t, s) = softmax over s of scale * q_h(t) . k_h(s)      the window alone sums to 1
    A(t, s)   = sum_h w1_h(t) P_h(t, s)                        one mixture for all heads
    y_h(t)   += w2_h(t) * sum_s A(t, s) v_h(s)

Scores, softmax and A are fp32 (fp64 for fp64 inputs); `w2 A`, and in the backward pass the gradient of the scores, are
rounded to the inputs' dtype before their matrix products; y is added in fp32 and the sum rounded once.

The backward pass sums each key's gradient over the queries that see it, in a fixed order: it is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanogpt.kernels.attention_plain import first_visible_key
from nanogpt.kernels.dispatch import run_time_number, runs_kernel

WEIGHT_EPS = 1e-6
_CHUNK_BLOCKS = 64  # blocks of `window` queries processed at a time: bounds the memory of the plain implementation


def normalized_weights(w1: Tensor) -> Tensor:
    """w1 (T, H) divided by its root mean square over the heads, in at least fp32; the result has w1's dtype."""
    wide = w1.to(torch.promote_types(w1.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + WEIGHT_EPS).rsqrt()).to(w1.dtype)


def mix_heads(
    y: Tensor,  # (T, H, D) attention's output
    q: Tensor,  # (T, H, D), as attention took them
    k: Tensor,
    v: Tensor,
    w1: Tensor,  # (T, H), normalised: see normalized_weights
    w2: Tensor,  # (T, H)
    cu_seqlens: Tensor,  # (n,) int32
    *,
    window: int,  # tokens, the query's own included
    scale: float | Tensor,
    plain: bool = False,
) -> Tensor:
    """`y` with the correction added, (T, H, D). Differentiable in the first six arguments.

    bf16 on a GPU takes the Triton kernels where the window and the heads suit them (112 and 128).
    """
    q, k, v, w1, w2 = (x.contiguous() for x in (q, k, v, w1, w2))
    first = first_visible_key(cu_seqlens, q.shape[0], window - 1)
    fast = not plain and runs_kernel(q, k, v, w1, w2) and window == 112 and q.shape[2] == 128
    number = run_time_number(scale, torch.float64)
    correction = _mix_heads(q, k, v, w1, w2, first, number, window, fast)[0]
    return (y.to(correction.dtype) + correction).to(y.dtype)


# ---------------------------------------------------------------- one operation, two implementations


@torch.library.custom_op("nanogpt::mix_heads", mutates_args=())
def _mix_heads(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, first: Tensor, scale: Tensor, window: int, fast: bool
) -> tuple[Tensor, Tensor]:
    """(correction (T, H, D), logsumexp of the scores (T, H)), both fp32 (fp64 for fp64 inputs).

    `first` (T,) int32: the first key that each query sees. `scale` () fp64, on the CPU.
    """
    if fast:
        from nanogpt.kernels.head_mixing_triton import forward

        return forward(q, k, v, w1, w2, first, window, float(scale))
    return _plain_forward(q, k, v, w1, w2, first, window, float(scale))


@_mix_heads.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, first: Tensor, scale: Tensor, window: int, fast: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("nanogpt::mix_heads_backward", mutates_args=())
def _mix_heads_backward(
    grad: Tensor,  # of the correction, fp32
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    first: Tensor,
    scale: Tensor,
    lse: Tensor,
    window: int,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v (T, H, D) and w1, w2 (T, H), each in its own dtype."""
    if fast:
        from nanogpt.kernels.head_mixing_triton import backward

        return backward(grad, q, k, v, w1, w2, first, lse, window, float(scale))
    return _plain_backward(grad, q, k, v, w1, w2, first, lse, window, float(scale))


@_mix_heads_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    first: Tensor,
    scale: Tensor,
    lse: Tensor,
    window: int,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (q, k, v, w1, w2))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.fast = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _mix_heads_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window, ctx.fast)
    return *grads, None, None, None, None


_mix_heads.register_autograd(_backward, setup_context=_setup)

# ---------------------------------------------------------------- plain implementation


class _Blocks:
    """The stream in blocks of `window` queries, each against its own block of keys and the one before.

    `queries`: (T, ...) to (blocks, window, ...); `keys`: to (blocks, 2 window, ...). Padded with zeros.
    """

    def __init__(self, first: Tensor, window: int):
        self.window = window
        self.tokens = first.shape[0]
        self.count = -(-self.tokens // window)
        position = torch.arange(self.count * window, device=first.device)
        query = position.view(self.count, window, 1)
        key = self.keys(position.view(-1, 1) + 1)[..., 0][:, None] - 1  # -1 before the stream's start
        # A query beyond the stream's end sees itself, so that its softmax is finite; the result is not used.
        start = torch.cat((first, position[self.tokens :].to(first.dtype))).view(self.count, window, 1)
        self.hidden = (key > query) | (key < start)

    def queries(self, x: Tensor) -> Tensor:
        padding = x.new_zeros((self.count * self.window - x.shape[0], *x.shape[1:]))
        return torch.cat((x, padding)).unflatten(0, (self.count, self.window))

    def keys(self, x: Tensor) -> Tensor:
        own = self.queries(x)
        return torch.cat((torch.cat((torch.zeros_like(own[:1]), own[:-1])), own), dim=1)

    def sum_keys(self, x: Tensor) -> Tensor:
        """(blocks, 2 window, ...) to (T, ...): what a key gets from its own block plus what it gets from the next."""
        before, own = x.split(self.window, dim=1)
        return (own + torch.cat((before[1:], torch.zeros_like(before[:1])))).flatten(0, 1)[: self.tokens]

    def tokens_of(self, x: Tensor) -> Tensor:
        """(blocks, window, ...) to (T, ...)."""
        return x.flatten(0, 1)[: self.tokens]

    def chunks(self) -> Iterator[slice]:
        return (slice(i, i + _CHUNK_BLOCKS) for i in range(0, self.count, _CHUNK_BLOCKS))


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, first: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = _Blocks(first, window)
    q, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    w1, w2 = blocks.queries(w1), blocks.queries(w2)
    parts, lses = [], []
    for c in blocks.chunks():
        scores = _scores(q[c], k[c], blocks.hidden[c], scale, wide)
        lse = scores.logsumexp(-1)  # (n, query, head)
        mixture = torch.einsum("nqh,nqhk->nqk", w1[c].to(wide), (scores - lse[..., None]).exp())
        weights = (w2[c].to(wide)[..., None] * mixture[:, :, None]).to(q.dtype).to(wide)
        parts.append(torch.einsum("nqhk,nkhd->nqhd", weights, v[c].to(wide)))
        lses.append(lse)
    correction, lse = (blocks.tokens_of(torch.cat(x)).contiguous() for x in (parts, lses))
    return correction, lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    first: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = _Blocks(first, window)
    narrow, dtypes = q.dtype, [x.dtype for x in (q, k, v, w1, w2)]
    q, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    w1, w2, lse, grad = (blocks.queries(x) for x in (w1, w2, lse, grad))
    grads: list[list[Tensor]] = [[], [], [], [], []]
    for c in blocks.chunks():
        g, mix, gate = grad[c].to(wide), w1[c].to(wide), w2[c].to(wide)
        p = (_scores(q[c], k[c], blocks.hidden[c], scale, wide) - lse[c][..., None]).exp()
        mixture = torch.einsum("nqh,nqhk->nqk", mix, p)
        weights = (gate[..., None] * mixture[:, :, None]).to(narrow).to(wide)
        d_values = torch.einsum("nqhk,nqhd->nkhd", weights, g)
        d_weights = torch.einsum("nqhd,nkhd->nqhk", g, v[c].to(wide))
        d_gate = torch.einsum("nqk,nqhk->nqh", mixture, d_weights)
        d_mixture = torch.einsum("nqh,nqhk->nqk", gate, d_weights)
        d_mix = torch.einsum("nqhk,nqk->nqh", p, d_mixture)
        d_scores = p * mix[..., None] * (d_mixture[:, :, None] - d_mix[..., None])
        d_scores = d_scores.to(narrow).to(wide) * scale
        d_queries = torch.einsum("nqhk,nkhd->nqhd", d_scores, k[c].to(wide))
        d_keys = torch.einsum("nqhk,nqhd->nkhd", d_scores, q[c].to(wide))
        for gathered, part in zip(grads, (d_queries, d_keys, d_values, d_mix, d_gate), strict=True):
            gathered.append(part)
    places = (blocks.tokens_of, blocks.sum_keys, blocks.sum_keys, blocks.tokens_of, blocks.tokens_of)
    whole = [place(torch.cat(parts)) for place, parts in zip(places, grads, strict=True)]
    return tuple(x.to(dtype).contiguous() for x, dtype in zip(whole, dtypes, strict=True))  # type: ignore[return-value]


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """(blocks, query, head, key), scaled, minus infinity where hidden."""
    scores = torch.einsum("nqhd,nkhd->nqhk", q.to(wide), k.to(wide)) * scale
    return scores.masked_fill(hidden[:, :, None], -torch.inf)
