"""FlashAttention libraries behind one pair of custom operations that are opaque to `torch.compile`.

Each library has an adapter of two functions. All of them count a window as `attention` does: a query sees itself and
`window` tokens before it. FlashAttention 4 compiles its kernels at their first use in a process (tens of seconds;
`FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1` keeps them on disk); neither window, scale, head count nor token count is
part of its cache key. With PyTorch's deterministic algorithms on, the queries' gradients are summed in a fixed order.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.kernels.dispatch import device_capability, run_time_number

Gradients = tuple[Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """The arguments of attention, with numbers instead of tensors for window and scale."""

    q: Tensor  # (T, H, D), like k
    k: Tensor
    v: Tensor  # (T, H, E)
    cu_seqlens: Tensor  # (n,) int32
    max_seqlen: int
    window: int
    scale: float

    def empty_gradients(self) -> Gradients:
        """For q, k and v: contiguous, whatever their strides are."""
        return self.q.new_empty(self.q.shape), self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)


class FlashLibrary(NamedTuple):
    """A library's two entry points.

    `forward(call)` returns the output (T, H, E) and the logsumexp (H, T) in fp32; `backward(grad, out, lse, call)` the
    gradients of q, k and v, contiguous, as `grad` is.
    """

    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Call], Gradients]


def _own_places() -> None:
    """Move CuTe's caches away from their default, /tmp/USER/..., which somebody else may have made."""
    names = [n for n in ("CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR") if not os.environ.get(n)]
    if names:  # outside a run: in one, nanogpt.cache has set both
        place = tempfile.mkdtemp(prefix="nanogpt-cute-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ.update({name: os.path.join(place, name) for name in names})  # noqa: PTH118


def _with_padded_keys(library: FlashLibrary) -> FlashLibrary:
    """For a library without kernels for D below E: pads queries and keys with zeros, which change no score."""

    def padded(call: Call) -> Call:
        missing = call.v.shape[-1] - call.q.shape[-1]
        return call._replace(q=F.pad(call.q, (0, missing)), k=F.pad(call.k, (0, missing))) if missing > 0 else call

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        return library.forward(padded(call))

    def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
        dq, dk, dv = library.backward(grad, out, lse, padded(call))
        width = call.q.shape[-1]
        return dq[..., :width].contiguous(), dk[..., :width].contiguous(), dv

    return FlashLibrary(forward, backward)


def _choose_fa4_tiles(interface: Any) -> bool:
    """Let FlashAttention 4 take tiles that fit D <= 64 < E on sm_90; returns whether that worked.

    It chooses by D alone. Its backward tile for 64 needs 248,832 bytes of shared memory where E is 128, and 232,448 are
    there; the tile for 96 fits. No argument sets this tile (4.0.0b36), which is part of its kernels' keys.
    """
    own = getattr(interface, "_tile_size_bwd_sm90", None)
    if own is None or device_capability(torch.device("cuda"))[0] != 9:
        return False

    @functools.wraps(own)
    def tiles(head_dim: int, head_dim_v: int, *args: Any, **kwargs: Any) -> Any:
        return own(96 if head_dim <= 64 < head_dim_v else head_dim, head_dim_v, *args, **kwargs)

    interface._tile_size_bwd_sm90 = tiles
    return True


def _load_fa4() -> FlashLibrary:
    _own_places()
    from flash_attn.cute import interface

    _flash_attn_bwd, _flash_attn_fwd = interface._flash_attn_bwd, interface._flash_attn_fwd
    narrow = _choose_fa4_tiles(interface)
    # It warns at every compilation about an argument that its own code passes.
    warnings.filterwarnings("ignore", message=r"Argument aux_data \(position")

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        # The default is 192 x 128, which is slow where E is 128.
        tile = (128, 128) if narrow and call.q.shape[-1] <= 64 < call.v.shape[-1] else None
        result = _flash_attn_fwd(
            call.q,
            call.k,
            call.v,
            cu_seqlens_q=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens,
            max_seqlen_q=call.max_seqlen,
            max_seqlen_k=call.max_seqlen,
            softmax_scale=call.scale,
            causal=True,
            window_size_left=call.window,
            tile_mn=tile,
            return_lse=True,
        )
        return result[0], result[1]

    def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
        grads = call.empty_gradients()
        _flash_attn_bwd(
            call.q,
            call.k,
            call.v,
            out,
            grad,
            lse,
            softmax_scale=call.scale,
            causal=True,
            window_size_left=call.window,
            cu_seqlens_q=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens,
            max_seqlen_q=call.max_seqlen,
            max_seqlen_k=call.max_seqlen,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
        )
        return grads

    library = FlashLibrary(forward, backward)
    return library if narrow else _with_padded_keys(library)


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

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        left = call.window
        sides = {"window_size_left": left, "window_size_right": 0} if two_numbers else {"window_size": (left, 0)}
        arguments = {
            **required,
            "q": call.q,
            "k": call.k,
            "v": call.v,
            "cu_seqlens_q": call.cu_seqlens,
            "cu_seqlens_k": call.cu_seqlens,
            "max_seqlen_q": call.max_seqlen,
            "max_seqlen_k": call.max_seqlen,
            "softmax_scale": call.scale,
            "causal": True,
            **sides,
        }
        result = library_forward(**arguments)
        return result[0], result[1]

    def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
        grads = call.empty_gradients()
        q, k, v, cu_seqlens, max_seqlen, window, scale = call
        sides: tuple[object, ...] = (window, 0) if two_numbers else ((window, 0),)
        ends = (cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen)
        deterministic = torch.are_deterministic_algorithms_enabled()
        library_backward(grad, q, k, v, out, lse, *ends, *grads, scale, True, *sides, deterministic=deterministic)
        return grads

    return _with_padded_keys(FlashLibrary(forward, backward))


def _load_fa2() -> FlashLibrary:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        result = _flash_attn_varlen_forward(
            call.q,
            call.k,
            call.v,
            cu_seqlens_q=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens,
            max_seqlen_q=call.max_seqlen,
            max_seqlen_k=call.max_seqlen,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=True,
            window_size_left=call.window,
            window_size_right=0,
        )
        return result[0], result[1]

    def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
        grads = call.empty_gradients()
        _flash_attn_varlen_backward(
            grad,
            call.q,
            call.k,
            call.v,
            out,
            lse,
            *grads,
            cu_seqlens_q=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens,
            max_seqlen_q=call.max_seqlen,
            max_seqlen_k=call.max_seqlen,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=True,
            window_size_left=call.window,
            window_size_right=0,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    return _with_padded_keys(FlashLibrary(forward, backward))


def _load_varlen() -> FlashLibrary:
    """PyTorch's own, called directly: in a graph, `torch.nn.attention.varlen` would make windows constants."""
    flash_forward, flash_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward

    def numbers(call: Call) -> dict[str, int | float]:
        return {"scale": call.scale, "window_size_left": call.window, "window_size_right": 0}

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        q, k, v, cu_seqlens, max_seqlen, *_ = call
        ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        # No dropout, and not causal: the window's right side of 0 makes it so.
        result = flash_forward(q, k, v, *ends, 0.0, False, False, **numbers(call))
        return result[0], result[1]

    def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
        q, k, v, cu_seqlens, max_seqlen, *_ = call
        ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        dropout = (0.0, False, torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0))
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, *ends, *dropout, **numbers(call))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    return _with_padded_keys(FlashLibrary(forward, backward))


LOADERS: dict[str, Callable[[], FlashLibrary]] = {
    "fa4": _load_fa4,
    "fa3": _load_fa3,
    "fa2": _load_fa2,
    "varlen": _load_varlen,
}


@functools.cache
def flash_library(name: str) -> FlashLibrary:
    """The adapter for a name in LOADERS; imports the library, and raises whatever that import raises."""
    return LOADERS[name]()


_skipped: dict[str, Callable[..., Any]] = {}  # instead of a library's functions
_ZEROS: dict[str, Callable[..., Any]] = {
    "forward": lambda call: (torch.zeros_like(call.v), call.q.new_zeros(call.q.shape[1::-1], dtype=torch.float32)),
    "backward": lambda grad, out, lse, call: tuple(empty.zero_() for empty in call.empty_gradients()),
}


@contextmanager
def skipping(which: str) -> Iterator[None]:
    """While it lasts the "forward" or "backward" pass gives zeros without a kernel. For having others compiled."""
    _skipped[which] = _ZEROS[which]
    try:
        yield
    finally:
        del _skipped[which]


def _library(name: str) -> FlashLibrary:
    return flash_library(name)._replace(**_skipped)


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

    Arguments as for `nanogpt.kernels.attention.attention`. `max_seqlen` bounds the launch, so it must hold and should
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
    """Returns the output (T, H, E) and the logsumexp of each row's scores (H, T), fp32."""
    return _library(library).forward(Call(q, k, v, cu_seqlens, max_seqlen, int(window), float(scale)))


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
    return v.new_empty(v.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


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
    call = Call(q, k, v, cu_seqlens, max_seqlen, int(window), float(scale))
    return _library(library).backward(grad.contiguous(), out, lse, call)


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
