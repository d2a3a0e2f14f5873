"""The MLP of the speedrun, `relu(u up^T)^2 down`, after Primer (So et al., 2021).

On Hopper the activation is computed in the epilogue of the up-projection, and its derivative in that of the product
which needs it. Only the square is kept for the backward pass: it is what the gradient of `down` needs, and its root
is the ReLU that the derivative needs, closer to it than a bf16 copy of the projection would be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanogpt.bench.kernels import BenchCase
from nanogpt.kernels.dispatch import runs_kernel


def relu_squared_mlp_plain(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down` in plain PyTorch. u (T, D), up (F, D), down (F, D); returns (T, D)."""
    return torch.relu(u @ up.mT).square() @ down


def relu_squared_mlp(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down`. u (T, D), up (F, D), down (F, D), one dtype; returns (T, D). Differentiable.

    bf16 on Hopper or newer, with D and F multiples of 8, takes the fused kernels; anything else the plain ones.
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
    return runs_kernel(x, weight, *others, capability=9) and sizes_fit


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


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Forward, and forward with backward, for D = 768 and F = 3,072 at the record's micro-batches."""
    width, hidden = 768, 3_072
    for tokens in (16_384, 32_768, 49_152):
        u, grad = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        up, down = (0.03 * torch.randn(hidden, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        inputs = tuple(x.requires_grad_() for x in (u, up, down))

        def run(
            mlp: Callable[[Tensor, Tensor, Tensor], Tensor],
            train: bool,
            inputs: tuple[Tensor, ...] = inputs,
            grad: Tensor = grad,
        ) -> object:
            with torch.set_grad_enabled(train):
                out = mlp(*inputs)
            return torch.autograd.grad(out, inputs, grad) if train else out

        weights = 2 * hidden * width
        for train, name, products, numbers in (
            (False, "forward", 2, 2 * tokens * width + weights),
            (True, "forward + backward", 6, 5 * tokens * width + 3 * weights),
        ):
            yield BenchCase(
                f"relu^2 MLP, {name}",
                f"{tokens:,} x {width} x {hidden:,}",
                functools.partial(run, relu_squared_mlp, train),
                functools.partial(run, relu_squared_mlp_plain, train),
                flops=2 * products * tokens * width * hidden,
                bytes=2 * numbers,
            )
