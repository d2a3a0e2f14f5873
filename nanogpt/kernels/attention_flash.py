"""FlashAttention libraries behind one pair of custom operations, which `torch.compile` takes as opaque.

Each library is an adapter of two functions. All of them count a window as `attention` does: a query sees itself and
`window` tokens before it. FlashAttention 4 compiles its kernels at their first use in a process (tens of seconds;
`FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1` keeps them on disk); neither window, scale, head count nor token count is
part of its cache key. Where PyTorch's deterministic algorithms are on, the gradients of the queries have one order.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.kernels.dispatch import run_time_number

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, float], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Gradients]


class FlashLibrary(NamedTuple):
    """A library's two entry points.

    `forward(q, k, v, cu_seqlens, max_seqlen, window, scale)` returns the output (T, H, D) and the logsumexp
    (H, T) in fp32; `backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, window, scale)` returns the gradients of
    q, k and v, contiguous, as `grad` is.
    """

    forward: Forward
    backward: Backward


def _load_fa4() -> FlashLibrary:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    # Said at every compilation, of an argument that its own code passes.
    warnings.filterwarnings("ignore", message=r"Argument aux_data \(position")

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = _flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=True,
            window_size_left=window,
            return_lse=True,
        )
        return result[0], result[1]

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        window: int,
        scale: float,
    ) -> Gradients:
        grads = _empty_gradients(q, k, v)
        _flash_attn_bwd(
            q,
            k,
            v,
            out,
            grad,
            lse,
            softmax_scale=scale,
            causal=True,
            window_size_left=window,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
        )
        return grads

    return FlashLibrary(forward, backward)


def _load_fa3() -> FlashLibrary:
    try:
        import flash_attn_interface as library
    except ModuleNotFoundError:
        from flash_attn_3 import flash_attn_interface as library  # type: ignore[import-not-found]

    library_forward = library._flash_attn_forward
    library_backward = library._flash_attn_backward
    # Releases differ in how they take the window, and in which arguments have defaults.
    parameters = inspect.signature(getattr(library_forward, "_init_fn", library_forward)).parameters
    required = {p.name: None for p in parameters.values() if p.default is inspect.Parameter.empty}
    two_numbers = "window_size_left" in parameters

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        sides = {"window_size_left": window, "window_size_right": 0} if two_numbers else {"window_size": (window, 0)}
        arguments = {
            **required,
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
            "softmax_scale": scale,
            "causal": True,
            **sides,
        }
        result = library_forward(**arguments)
        return result[0], result[1]

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        window: int,
        scale: float,
    ) -> Gradients:
        grads = _empty_gradients(q, k, v)
        sides: tuple[object, ...] = (window, 0) if two_numbers else ((window, 0),)
        ends = (cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen)
        deterministic = torch.are_deterministic_algorithms_enabled()
        library_backward(grad, q, k, v, out, lse, *ends, *grads, scale, True, *sides, deterministic=deterministic)
        return grads

    return FlashLibrary(forward, backward)


def _load_fa2() -> FlashLibrary:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = _flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=window,
            window_size_right=0,
        )
        return result[0], result[1]

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        window: int,
        scale: float,
    ) -> Gradients:
        grads = _empty_gradients(q, k, v)
        _flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=window,
            window_size_right=0,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    return FlashLibrary(forward, backward)


def _load_varlen() -> FlashLibrary:
    """PyTorch's own, as `torch.nn.attention.varlen` calls it: in a graph, that would take windows as constants."""
    flash_forward, flash_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward

    def sides(window: int, scale: float) -> dict[str, int | float]:
        return {"scale": scale, "window_size_left": window, "window_size_right": 0}

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        # No dropout, and not causal: the window's right side is.
        result = flash_forward(q, k, v, *ends, 0.0, False, False, **sides(window, scale))
        return result[0], result[1]

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        window: int,
        scale: float,
    ) -> Gradients:
        ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        dropout = (0.0, False, torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0))
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, *ends, *dropout, **sides(window, scale))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    return FlashLibrary(forward, backward)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Contiguous, whatever the strides of q, k and v are."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


LOADERS: dict[str, Callable[[], FlashLibrary]] = {
    "fa4": _load_fa4,
    "fa3": _load_fa3,
    "fa2": _load_fa2,
    "varlen": _load_varlen,
}


@functools.cache
def flash_library(name: str) -> FlashLibrary:
    """The adapter of a name in LOADERS, importing the library. Raises what its import raises."""
    return LOADERS[name]()


def attention_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | Tensor,
    scale: float | Tensor,
    library: str,
) -> Tensor:
    """Attention by a FlashAttention library, a name in LOADERS, bf16 or fp16, on a GPU.

    Arguments as `nanogpt.kernels.attention.attention`. `max_seqlen` bounds the launch, so it must be true and should
    be tight.
    """
    numbers = run_time_number(window, torch.int64), run_time_number(scale, torch.float64)
    return _flash(q, k, v, cu_seqlens, max_seqlen, *numbers, library)[0]


@torch.library.custom_op("nanogpt::flash_attention", mutates_args=())
def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
    library: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output (T, H, D) and the logsumexp of each row's scores (H, T), fp32."""
    return flash_library(library).forward(q, k, v, cu_seqlens, max_seqlen, int(window), float(scale))


@_flash.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
    library: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("nanogpt::flash_attention_backward", mutates_args=())
def _flash_backward(
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
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = int(window), float(scale)
    return flash_library(library).backward(grad.contiguous(), q, k, v, out, lse, cu_seqlens, max_seqlen, *numbers)


@_flash_backward.register_fake
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
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.max_seqlen, window, scale, ctx.library = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, window, scale)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens, window, scale = ctx.saved_tensors
    grads = _flash_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, window, scale, ctx.library)
    return *grads, None, None, None, None, None


_flash.register_autograd(_backward, setup_context=_setup_context)
