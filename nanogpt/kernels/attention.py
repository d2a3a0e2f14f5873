"""Attention as one operation: causal inside documents, over a sliding window, with interchangeable backends."""

from __future__ import annotations

from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.kernels.attention_plain import attention_plain


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int,
    scale: float,
    backend: str = "plain",
) -> Tensor:
    """Attention of every query to the keys of its own document, itself and at most `window` tokens before it.

    q, k, v: (T, H, D), one flat stream of documents. `cu_seqlens`: (n,) int32, 0, the running ends of the
    documents, then T up to the fixed length n. `max_seqlen`: an upper bound of a document's length in tokens.
    `window`: in tokens, larger than any document for none. `scale` multiplies the scores before the softmax (it is
    not 1 / sqrt(D)). Returns (T, H, D) in the dtype of q. Differentiable in q, k and v.

    Raises InputError for a backend that does not exist.
    """
    if backend == "plain":
        return attention_plain(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=scale)
    raise InputError(f"attention backend {backend!r} does not exist; use plain")
