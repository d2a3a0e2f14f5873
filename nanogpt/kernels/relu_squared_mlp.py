"""The MLP of the speedrun, `relu(u up^T)^2 down`, after Primer (So et al., 2021).

On a GPU with room for its tiles the activation is computed in the epilogue of the up-projection, and its derivative in
that of the product which needs it. Only the square is kept for the backward pass: it is what the gradient of `down`
needs, and its root is the ReLU that the derivative needs, closer to it than a bf16 copy of the projection would be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.gpus import Needs
from nanogpt.kernels.dispatch import runs_kernel

NEEDS = Needs((9, 0), shared=229_424)  # as compiled for sm_100, the largest


def relu_squared_mlp_plain(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down` in plain PyTorch. u (T, D), up (F, D), down (F, D); returns (T, D)."""
    return torch.relu(u @ up.mT).square() @ down


def relu_squared_mlp(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down`. u (T, D), up (F, D), down (F, D), one dtype; returns (T, D). Differentiable.

    bf16 with D and F multiples of 8 takes the fused kernels on a GPU that meets `NEEDS`, anything else the plain ones.
    """
    if _runs_kernel(u, up, down):
        return _FusedMLP.apply(u, up, down)
    return relu_squared_mlp_plain(u, up, down)


def relu_squared_backward(grad: Tensor, down: Tensor, post: Tensor, *, plain: bool = False) -> Tensor:
    """The gradient before the activation, `2 sqrt(post) * (grad @ down.T)`, (T, F), from the kept square.

    grad (T, D), down (F, D), post (T, F). Fused where `relu_squared_mlp` is, unless `plain`.
    """
    if not plain and _runs_kernel(grad, down, post):
        return _relu_squared_backward(grad, down, post)
    root = post.to(torch.promote_types(post.dtype, torch.float32)).sqrt()
    return (2 * (grad @ down.mT) * root).to(post.dtype)


def _runs_kernel(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    sizes_fit = x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0
    return runs_kernel(x, weight, *others, needs=NEEDS) and sizes_fit


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        post = _relu_squared_up(u, up)
        ctx.save_for_backward(u, up, down, post)
        return post @ down

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        u, up, down, post = ctx.saved_tensors
        grad_pre = _relu_squared_backward(grad, down, post)
        return grad_pre @ up, grad_pre.mT @ u, post.mT @ grad


@torch.library.custom_op("nanogpt::relu_squared_up", mutates_args=())
def _relu_squared_up(u: Tensor, up: Tensor) -> Tensor:
    """`relu(u @ up.T)**2`: u (T, D), up (F, D); returns (T, F)."""
    from nanogpt.kernels.relu_squared_mlp_triton import FORWARD, matmul_with_epilogue

    return matmul_with_epilogue(u.contiguous(), up.contiguous(), None, FORWARD)


@_relu_squared_up.register_fake
def _(u: Tensor, up: Tensor) -> Tensor:
    return u.new_empty((u.shape[0], up.shape[0]))


@torch.library.custom_op("nanogpt::relu_squared_backward", mutates_args=())
def _relu_squared_backward(grad: Tensor, down: Tensor, post: Tensor) -> Tensor:
    """The gradient before the activation: `2 sqrt(post) * (grad @ down.T)`; grad (T, D), down (F, D), post (T, F)."""
    from nanogpt.kernels.relu_squared_mlp_triton import BACKWARD, matmul_with_epilogue

    return matmul_with_epilogue(grad.contiguous(), down.contiguous(), post.contiguous(), BACKWARD)


@_relu_squared_backward.register_fake
def _(grad: Tensor, down: Tensor, post: Tensor) -> Tensor:
    return post.new_empty(post.shape)
