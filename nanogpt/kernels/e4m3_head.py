"""The cross-entropy of logits in e4m3, with the e5m2 gradient in both layouts that the backward products want.

For T tokens and V columns, from e4m3 logits, which 8-bit products write unscaled:

    z      = cap * sigmoid((logits + shift) / scale)  fp32 from here on
    lse    = cap + log(sum exp(z - cap))              (T,); the maximum is fixed, as z stays below cap
    losses = sum_k weights[k] * (lse - z[t, targets[t + k]])
    grad   = e5m2(grad_factor * the gradient of their sum in the logits), (T, V) and (V, T)

with the terms, and the optional one of prefixes, of `nanogpt.kernels.cross_entropy`. The input's gradient sums over
columns and wants grad (T, V); the weight's sums over tokens and wants (V, T). e4m3 logits and the fixed maximum are
from the public record (number 92, PR #360).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.gpus import FP8
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.transpose import transposed_8bit_plain

Losses = tuple[Tensor, Tensor | None, Tensor | None]  # losses (T,) fp32, gradient (T, V) and (V, T) e5m2 where wanted


def e4m3_cross_entropy(
    logits: Tensor,  # (T, V) e4m3, contiguous
    targets: Tensor,  # (T,) int64, the next-token targets
    weights: Tensor,  # (K,) fp32
    *,
    prefixes: Tensor | None = None,  # (T,) int64, -1 for none
    prefix_weight: Tensor | None = None,  # () fp32
    cap: float,
    shift: float,
    scale: float,
    grad_factor: float = 1.0,
    need_grad: bool = True,
    plain: bool = False,
) -> Losses:
    """See the module. The gradients are None unless `need_grad`; beyond e5m2's largest number they are infinite.

    A GPU with 8-bit floats takes Triton kernels where T and V are multiples of 16. There, NaN among a row's logits
    makes its loss NaN, and of its gradient the targets' columns alone.
    """
    function = e4m3_cross_entropy_plain
    if (
        not plain
        and runs_kernel(logits, needs=FP8, dtype=torch.float8_e4m3fn)
        and not any(n % 16 for n in logits.shape)
    ):
        from nanogpt.kernels.e4m3_head_triton import losses_and_gradients as function
    return function(
        logits,
        targets,
        weights,
        prefixes=prefixes,
        prefix_weight=prefix_weight,
        cap=cap,
        shift=shift,
        scale=scale,
        grad_factor=grad_factor,
        need_grad=need_grad,
    )


def e4m3_cross_entropy_plain(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    prefixes: Tensor | None,
    prefix_weight: Tensor | None,
    cap: float,
    shift: float,
    scale: float,
    grad_factor: float,
    need_grad: bool,
) -> Losses:
    """`e4m3_cross_entropy` in plain PyTorch. Holds several (T, V) fp32 tensors."""
    tokens = len(targets)
    ahead = torch.arange(tokens, device=targets.device)[:, None] + torch.arange(len(weights), device=targets.device)
    columns, column_weights = targets[ahead.clamp(max=tokens - 1)], weights * (ahead < tokens)  # (T, K)
    if prefixes is not None and prefix_weight is not None:
        columns = torch.cat((columns, prefixes.clamp(min=0)[:, None]), dim=1)
        column_weights = torch.cat((column_weights, (prefix_weight * (prefixes >= 0))[:, None]), dim=1)
    row_weights = column_weights.sum(1)

    s = torch.sigmoid((logits.float() + shift) / scale)
    e = (cap * (s - 1)).exp()
    total = e.sum(1)
    losses = row_weights * (cap + total.log()) - cap * (column_weights * s.gather(1, columns)).sum(1)
    if not need_grad:
        return losses, None, None
    by_z = (e * (row_weights / total)[:, None]).scatter_add_(1, columns, -column_weights)
    grad = (by_z * s * (1 - s) * (cap / scale * grad_factor)).to(torch.float8_e5m2)
    return losses, grad, transposed_8bit_plain(grad)
