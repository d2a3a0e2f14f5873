"""The head's three products in 8-bit floats, and the choice between them and bf16.

Scales are fixed: the head's input is normalised (at most sqrt(D), 27.7 for 768 channels), its weights stay small, and
the gradient of a cross-entropy is bounded. Forward, e4m3 inputs and weights give bf16 or e4m3 logits, with the tensor
cores' fast accumulation. Backward, the e5m2 logit gradient gives the input's gradient in bf16 and the weights' gradient
in fp32, rounded once to bf16 (with e4m3 logits by the product itself), both with full accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.gpus import FP8, Needs, meets
from nanogpt.kernels.e4m3_head import e4m3_cross_entropy

Precision = Literal["bf16", "fp8"]

X_SCALE = 100 / 448  # e4m3 scale of the head's input
W_SCALE = 1.6 / 448  # e4m3 scale of the head's weights
GRAD_SCALE = 0.75 / 448  # e5m2 scale of the logit gradient, for an incoming gradient of 1


class Fp8Scales(NamedTuple):
    """The head's fixed scales, and whether logits are rounded to e4m3, unscaled (from 16 on in steps of 2)."""

    x: float = X_SCALE
    weight: float = W_SCALE
    gradient: float = GRAD_SCALE
    logits8: bool = False


def select_head_precision(
    requested: str,
    capability: tuple[int, int] | None,
    products_work: Callable[[], bool] | None = None,
    *,
    key: str = "head_precision",
    kernels: Needs = FP8,
) -> tuple[Precision, str]:
    """Which precision the training head runs in, and why: `("fp8", "compute capability 9.0")`.

    Args:
        requested: "auto", "fp8" or "bf16".
        capability: of the GPU, as `torch.cuda.get_device_capability()` gives it; None on a CPU, or where
            activations are not bf16.
        products_work: tries the FP8 products; `fp8_products_work` by default, which needs the GPU.
        key: the setting's name, for messages; the MLP's precision is chosen in the same way.
        kernels: what the kernels that make FP8 worthwhile need. Without them "fp8" rounds in plain PyTorch.

    "auto" takes fp8 where its products work and the GPU meets `kernels`, else bf16. "fp8" on a CPU is emulated, with
    the same roundings.

    Raises:
        InputError: an unknown request, or fp8 requested on a GPU that cannot do it.
    """
    if requested not in ("auto", "fp8", "bf16"):
        raise InputError(f"{key}: {requested!r} is unknown; expected auto, fp8 or bf16")
    if requested == "bf16":
        return "bf16", "requested"
    if capability is None:
        if requested == "fp8":
            return "fp8", "requested; emulated on a CPU"
        return "bf16", "FP8 needs a GPU and bf16 activations"
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if requested == "auto" and meets(FP8, capability) and not meets(kernels, capability):
        return "bf16", f"{shown}, for which there are no FP8 kernels"
    if not meets(FP8, capability):
        obstacle = f"{shown}, and FP8 products need 8.9 (Ada) or newer"
    elif not (products_work or fp8_products_work)():
        obstacle = f"{shown}, but a trial of PyTorch's FP8 products failed"
    else:
        return "fp8", shown
    if requested == "fp8":
        raise InputError(f"{key}: fp8 was requested, but this GPU has {obstacle}; use auto or bf16")
    return "bf16", obstacle


def fp8_products_work(device: torch.device | str = "cuda") -> bool:
    """Whether small products like the head's run on this GPU with this PyTorch and come out right."""
    e4m3, e5m2, bf16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
    kinds = ((e4m3, e4m3, bf16, True), (e5m2, e4m3, bf16, False), (e4m3, e5m2, torch.float32, False))
    try:
        for left, right, out_dtype, fast in kinds:
            a, b = torch.ones(32, 64, device=device).to(left), torch.ones(16, 64, device=device).to(right)
            out = scaled_product(a, 0.5, b, 0.25, out_dtype=out_dtype, fast=fast)
            if not bool((out == 8).all()):
                return False
    except (RuntimeError, AssertionError, AttributeError, TypeError):
        return False
    return True


def scaled_product(
    a: Tensor,  # (M, K), 8-bit
    a_scale: Tensor | float,
    b: Tensor,  # (N, K), 8-bit
    b_scale: Tensor | float,
    *,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """`(a_scale a) (b_scale b)^T` of two 8-bit matrices that are contiguous along K: (M, N) in `out_dtype`."""
    # Each scale has storage of its own: cuBLAS refuses one that is not aligned to 16 bytes.
    a_scale, b_scale = (
        s if isinstance(s, Tensor) else torch.full((), s, dtype=torch.float32, device=a.device)
        for s in (a_scale, b_scale)
    )
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=out_dtype, use_fast_accum=fast)


def fake_quantize(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Round `values / scale` to the 8-bit float `dtype` and multiply back; computed and returned in fp32.

    e4m3 saturates at its largest number, as the GPU's conversion does. e5m2 is not clamped.
    """
    scaled = values.float() * (1 / scale)
    if dtype == torch.float8_e4m3fn:
        scaled = scaled.clamp(-448.0, 448.0)
    return scaled.to(dtype).float() * scale


def round_to_e4m3(values: Tensor) -> Tensor:
    """`values` rounded to e4m3, which saturates, in their own dtype."""
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(values.dtype)


@torch.library.custom_op("nanogpt::fp8_head_loss", mutates_args=())
def fp8_head_loss(
    x: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    prefixes: Tensor | None = None,
    prefix_weight: Tensor | None = None,
    *,
    cap: float,
    shift: float,
    scale: float,
    x_scale: float,
    w_scale: float,
    grad_scale: float,
    logits8: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and for the backward pass bytes: the logit gradient (T, V), with `logits8` its transpose (V, T),
    x^T (D, T) and lm_head (D, V).

    x (T, D), lm_head (D, V) bf16; T, D and V multiples of 16. The bytes are empty unless `need_grad`.
    """
    from nanogpt.kernels.cross_entropy_triton import loss_and_gradient
    from nanogpt.kernels.fp8_head_triton import quantize_both_ways

    x8, x8_t = quantize_both_ways(x.contiguous(), x_scale)
    w8, w8_t = quantize_both_ways(lm_head.contiguous(), w_scale)
    dtype = torch.float8_e4m3fn if logits8 else torch.bfloat16
    logits = scaled_product(x8, x_scale, w8_t, w_scale, out_dtype=dtype, fast=True)
    options: dict[str, Any] = {"prefixes": prefixes, "prefix_weight": prefix_weight}
    options |= {"cap": cap, "shift": shift, "scale": scale, "grad_factor": 1 / grad_scale}
    if logits8:
        losses, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **options, need_grad=need_grad)
    else:
        grad, transposed = torch.empty_like(logits, dtype=torch.float8_e5m2) if need_grad else None, None
        losses = loss_and_gradient(logits, targets, weights, grad, **options)
    kept = (grad, transposed, x8_t, w8) if need_grad else (None,) * 4
    a, b, c, d = (x.new_empty(0, dtype=torch.uint8) if t is None else t.view(torch.uint8) for t in kept)
    return losses.sum(), a, b, c, d


@fp8_head_loss.register_fake
def _(
    x: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    prefixes: Tensor | None = None,
    prefix_weight: Tensor | None = None,
    *,
    cap: float,
    shift: float,
    scale: float,
    x_scale: float,
    w_scale: float,
    grad_scale: float,
    logits8: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, width), vocab = x.shape, lm_head.shape[1]
    transposed = (vocab, tokens) if logits8 else (0,)
    shapes = ((tokens, vocab), transposed, (width, tokens), (width, vocab)) if need_grad else ((0,),) * 4
    a, b, c, d = (x.new_empty(shape, dtype=torch.uint8) for shape in shapes)
    return x.new_empty((), dtype=torch.float32), a, b, c, d


@torch.library.custom_op("nanogpt::fp8_head_backward", mutates_args=())
def _fp8_head_backward(
    incoming: Tensor,  # () fp32
    grad: Tensor,  # (T, V) bytes of e5m2
    transposed: Tensor,  # (V, T), or empty
    x8_t: Tensor,  # (D, T) bytes of e4m3
    w8: Tensor,  # (D, V) bytes of e4m3
    x_scale: float,
    w_scale: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of x (T, D) and lm_head (D, V), bf16. The incoming gradient enters through the e5m2 scale."""
    from nanogpt.kernels.fp8_head_triton import transpose_bytes

    dtype = torch.bfloat16
    if not transposed.numel():
        transposed, dtype = transpose_bytes(grad), torch.float32
    grad, transposed = grad.view(torch.float8_e5m2), transposed.view(torch.float8_e5m2)
    x8_t, w8 = x8_t.view(torch.float8_e4m3fn), w8.view(torch.float8_e4m3fn)
    scale = incoming.float() * grad_scale
    dx = scaled_product(grad, scale, w8, w_scale, out_dtype=torch.bfloat16, fast=False)
    dw = scaled_product(x8_t, x_scale, transposed, scale, out_dtype=dtype, fast=False)
    return dx, dw.bfloat16()


@_fp8_head_backward.register_fake
def _(
    incoming: Tensor, grad: Tensor, transposed: Tensor, x8_t: Tensor, w8: Tensor, *scales: float
) -> tuple[Tensor, Tensor]:
    bf16 = torch.bfloat16
    return grad.new_empty((grad.shape[0], w8.shape[0]), dtype=bf16), w8.new_empty(w8.shape, dtype=bf16)


def _setup(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.scales = [keyword_only_inputs[name] for name in ("x_scale", "w_scale", "grad_scale")]


def _backward(ctx: Any, incoming: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if incoming is None:
        return None, None, None, None, None, None
    return (*_fp8_head_backward(incoming, *ctx.saved_tensors, *ctx.scales), None, None, None, None)


fp8_head_loss.register_autograd(_backward, setup_context=_setup)
