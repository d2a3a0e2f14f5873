"""Causal attention inside documents over a sliding window, in plain PyTorch.

`attention_dense` is the definition: one (T, T) mask, for tests. `attention_plain` computes the same function in
blocks of queries against the keys that their windows can reach, so that memory is O(T * (block + window)); it
runs anywhere, keeps nothing but its inputs, its output and one number per row for the backward pass, and is one
opaque operation to `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.kernels.dispatch import run_time_number

CPU_BLOCK = 128
GPU_BLOCK = 1024


def first_visible_key(cu_seqlens: Tensor, tokens: int, window: int) -> Tensor:
    """The first key that each query may see: its document's start, or `window` tokens back if that is later.

    `cu_seqlens` (n,) int32: 0, the ends of the documents, padded with `tokens`. Returns (tokens,) int32.
    """
    position = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True, out_int32=True) - 1
    return torch.maximum(cu_seqlens.to(torch.int32)[document], position - window)


def attention_dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, window: int, scale: float) -> Tensor:
    """The definition of `nanogpt.kernels.attention.attention`, with O(T^2) memory; for tests.

    Computed in fp32, or fp64 for fp64 inputs; the result has the inputs' dtype.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    tokens = q.shape[0]
    key = torch.arange(tokens, dtype=torch.int32, device=q.device)
    visible = (key >= first_visible_key(cu_seqlens, tokens, window)[:, None]) & (key <= key[:, None])
    scores = torch.einsum("qhd,khd->hqk", q.to(compute), k.to(compute)) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(compute)).to(q.dtype)


def attention_to_past(q: Tensor, k: Tensor, v: Tensor, *, start: int, window: int, scale: float) -> Tensor:
    """`attention_dense` for a stream's last rows alone: q (n, H, dq) against all of it, k (m, H, dq) and v (m, H, dv).

    Their document begins at row `start`. Returns (n, H, dv).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    key = torch.arange(k.shape[0], device=k.device)
    query = key[-q.shape[0] :, None]
    visible = (key >= (query - window).clamp(min=start)) & (key <= query)
    scores = torch.einsum("qhd,khd->hqk", q.to(compute), k.to(compute)) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(compute)).to(q.dtype)


def attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | Tensor,
    scale: float | Tensor,
) -> Tensor:
    """The blocked equivalent of `attention_dense`; arguments as for `nanogpt.kernels.attention.attention`.

    Softmax and accumulation are in fp32 (fp64 for fp64 inputs), even for bf16 inputs. A document longer
    than `max_seqlen` is not an error here: its queries then see at most `max_seqlen` tokens.
    """
    numbers = run_time_number(window, torch.int64), run_time_number(scale, torch.float64)
    return _attention(q, k, v, cu_seqlens, max_seqlen, *numbers)[0]


class _Blocks:
    """Head-major (H, T, D) views in the computing dtype, and the blocks of queries with the keys they reach."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
    ) -> None:
        self.compute = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (self.head_major(x) for x in (q, k, v))
        self.tokens = q.shape[0]
        self.reach = min(window, max_seqlen - 1, self.tokens - 1)
        self.block = CPU_BLOCK if q.device.type == "cpu" else GPU_BLOCK
        self.first = first_visible_key(cu_seqlens, self.tokens, self.reach)
        self.position = torch.arange(self.tokens, dtype=torch.int32, device=q.device)
        self.scale = scale

    def head_major(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).to(self.compute)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries, the keys they reach, and their scaled and masked scores (H, queries, keys)."""
        for start in range(0, self.tokens, self.block):
            end = min(start + self.block, self.tokens)
            queries, keys = slice(start, end), slice(max(0, start - self.reach), end)
            key = self.position[keys]
            hidden = (key < self.first[queries, None]) | (key > self.position[queries, None])
            scores = torch.bmm(self.q[:, queries], self.k[:, keys].transpose(1, 2)).mul_(self.scale)
            yield queries, keys, scores.masked_fill_(hidden, -torch.inf)


@torch.library.custom_op("nanogpt::attention_plain", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the output (T, H, D) and the logsumexp of each row's scores (H, T)."""
    blocks = _Blocks(q, k, v, cu_seqlens, max_seqlen, int(window), float(scale))
    out = v.new_empty(v.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=blocks.compute)
    for queries, keys, scores in blocks:
        lse[:, queries] = scores.logsumexp(dim=-1)
        weights = scores.sub_(lse[:, queries, None]).exp_()
        out[queries] = torch.bmm(weights, blocks.v[:, keys]).transpose(0, 1)
    return out, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute)


@torch.library.custom_op("nanogpt::attention_plain_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, recomputing the weights from the saved logsumexp block by block."""
    blocks = _Blocks(q, k, v, cu_seqlens, max_seqlen, int(window), float(scale))
    head_grad = blocks.head_major(grad)
    dot = (head_grad * blocks.head_major(out)).sum(dim=-1, keepdim=True)
    grad_q = torch.empty_like(blocks.q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(blocks.k, memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(blocks.v, memory_format=torch.contiguous_format)
    for queries, keys, scores in blocks:
        weights = scores.sub_(lse[:, queries, None]).exp_()
        grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), head_grad[:, queries])
        grad_weights = torch.bmm(head_grad[:, queries], blocks.v[:, keys].transpose(1, 2))
        grad_scores = grad_weights.sub_(dot[:, queries]).mul_(weights).mul_(blocks.scale)
        grad_q[:, queries] = torch.bmm(grad_scores, blocks.k[:, keys])
        grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), blocks.q[:, queries])
    return tuple(x.transpose(0, 1).to(q.dtype).contiguous() for x in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.max_seqlen, window, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, window, scale)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens, window, scale = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, window, scale)
    return *grads, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
