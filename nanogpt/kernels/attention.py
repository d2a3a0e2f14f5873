"""Attention as one operation: causal inside documents, over a sliding window, with interchangeable backends.

Backends: `fa4`, `fa3`, `fa2` (FlashAttention, where installed), `varlen` (the FlashAttention 2 that PyTorch carries)
and `plain` (PyTorch only, any device and dtype). `select_attention_backend` picks one and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.gpus import Needs, meets, runs_on
from nanogpt.kernels.attention_flash import LOADERS, attention_flash, flash_library
from nanogpt.kernels.attention_plain import attention_plain

BACKENDS = ("fa4", "fa3", "fa2", "varlen", "plain")
_WIDE_HEADS = Needs((8, 0), shared=160_000)  # FlashAttention 2's backward pass for heads of more than 192


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | Tensor,
    scale: float | Tensor,
    backend: str = "plain",
) -> Tensor:
    """Attention of every query to the keys of its own document, itself and at most `window` tokens before it.

    q, k: (T, H, D), v: (T, H, E), one flat stream of documents; any strides, as long as the last dimension is
    contiguous.
    `cu_seqlens`: (n,) int32, 0, the running ends of the documents, then T up to the fixed length n. `max_seqlen`: an
    upper bound on a document's length in tokens. `window`: in tokens; larger than any document for no window. `scale`
    multiplies the scores before the softmax (it is not 1 / sqrt(D)). Returns (T, H, E) in the dtype of q.
    Differentiable in q, k and v. All but `plain` need a GPU and bf16 or fp16.

    `window` and `scale` may be CPU tensors () of int64 and float64: a graph compiled with tensors serves all windows
    and scales.

    Raises InputError for a backend that does not exist.
    """
    if backend == "plain":
        return attention_plain(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=scale)
    if backend in LOADERS:
        return attention_flash(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=scale, library=backend)
    raise InputError(f"attention backend {backend!r} does not exist; use one of {', '.join(BACKENDS)}")


class AttentionChoice(NamedTuple):
    """The backend to run, and one sentence for the log that says why."""

    backend: str
    reason: str


def import_failure(backend: str) -> str | None:
    """None where the backend's library can be imported, else why not. Imports it (seconds for FlashAttention 4)."""
    try:
        if backend in LOADERS:
            flash_library(backend)
    except Exception as error:  # a library built for another torch fails with whatever its loader raises
        return f"{type(error).__name__}: {error}"
    return None


def select_attention_backend(
    requested: str,
    capability: tuple[int, int] | None,
    *,
    head_dim: int,
    dtype: torch.dtype,
    import_failure: Callable[[str], str | None] = import_failure,
) -> AttentionChoice:
    """The backend for `requested`, a name of BACKENDS or `auto`.

    `capability`: CUDA compute capability of the device, (9, 0) for an H100 or H200; None for a CPU. `auto` takes the
    first of fa4, fa3, varlen, fa2 that the device, `dtype`, `head_dim` and the installed libraries allow, else
    plain.

    Raises InputError for a name that does not exist, and for a requested backend that cannot run here.
    """
    if requested not in (*BACKENDS, "auto"):
        raise InputError(f"attention backend {requested!r} does not exist; use auto or one of {', '.join(BACKENDS)}")
    if requested == "plain":
        return AttentionChoice("plain", "plain: requested")

    def obstacle(backend: str) -> str | None:
        return _hardware_obstacle(backend, capability, head_dim, dtype) or import_failure(backend)

    if requested != "auto":
        if (why := obstacle(requested)) is not None:
            raise InputError(f"attention backend {requested!r} cannot run here: {why}; use auto")
        return AttentionChoice(requested, f"{requested}: requested")

    device = "a CPU" if capability is None else f"sm_{capability[0]}{capability[1]}"
    passed_over: list[str] = []
    for backend in ("fa4", "fa3", "varlen", "fa2"):
        why = obstacle(backend)
        if why is None:
            rest = f" ({'; '.join(passed_over)})" if passed_over else ""
            return AttentionChoice(backend, f"{backend}: the fastest that runs on {device}{rest}")
        if capability is not None:
            passed_over.append(f"not {backend}: {why}")
    rest = f" ({'; '.join(passed_over)})" if passed_over else ""
    return AttentionChoice("plain", f"plain: the only one for {device}{rest}")


def _hardware_obstacle(
    backend: str, capability: tuple[int, int] | None, head_dim: int, dtype: torch.dtype
) -> str | None:
    if capability is None:
        return "it needs a CUDA GPU"
    if backend == "fa4" and not runs_on("fa4", capability):
        return "its backward pass is for sm_90 and sm_100"
    if backend == "fa3" and not runs_on("fa3", capability):
        return "it needs sm_90"
    if not runs_on(backend, capability):
        return "it needs sm_80 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {dtype}"
    limit = 128 if backend == "fa4" and capability[0] > 9 else 256 if meets(_WIDE_HEADS, capability) else 192
    if head_dim % 8 or head_dim > limit:
        return f"it does not support heads of {head_dim}"
    return None
