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
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, tuple[Tensor, Tensor, Tensor]],
    None,
]


class FlashLibrary(NamedTuple):
    """A library's two entry points.

    `forward(q, k, v, cu_seqlens, max_seqlen, window, scale)` returns the output (T, H, D) and the logsumexp
    (H, T) in fp32; `backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, window, scale, (dq, dk, dv))` writes
    the gradients, which are contiguous, as `grad` is.
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
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
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
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        sides: tuple[object, ...] = (window, 0) if two_numbers else ((window, 0),)
        ends = (cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen)
        deterministic = torch.are_deterministic_algorithms_enabled()
        library_backward(grad, q, k, v, out, lse, *ends, *grads, scale, True, *sides, deterministic=deterministic)

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
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
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

    return FlashLibrary(forward, backward)


LOADERS: dict[str, Callable[[], FlashLibrary]] = {"fa4": _load_fa4, "fa3": _load_fa3, "fa2": _load_fa2}


@functools.cache
def flash_library(name: str) -> FlashLibrary:
    """The adapter of `fa4`, `fa3` or `fa2`, importing the library. Raises what its import raises."""
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
    """Attention by a FlashAttention library (`fa4`, `fa3`, `fa2`), bf16 or fp16, on a GPU.

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
    # Allocated here so that they are contiguous, as the fake implementation promises, whatever q's strides are.
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    numbers = int(window), float(scale)
    flash_library(library).backward(grad.contiguous(), q, k, v, out, lse, cu_seqlens, max_seqlen, *numbers, grads)
    return grads


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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
