"""What lies between the product that makes queries, keys and values and attention: RMSNorm, rotary and key shift.

For a head's row x of D channels, of which the first `rotated` turn:

    n = x / sqrt(mean(x^2) + eps);  y_j = cos_j n_j + sin_j n_j' for j < rotated, j' its neighbour, and else n_j

where the sine has its sign (`nanogpt.layers.rotary`), and shifted keys take their unrotated channels from the token
before. Backward, g the gradient of y and m its way back through shift and rotation,

    x's gradient = (m - n mean(m n)) / sqrt(mean(x^2) + eps)

which together with that of the values is rounded to e4m3. Everything in between is fp32 (fp64 for fp64 inputs). One
kernel each way, an idea of public record 90 (PR #344): each number is read once, where compiled passes read it for the
norm and again for the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.gpus import FP8
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.fp8_mlp import to_e4m3
from nanogpt.kernels.transpose import transposed_8bit_plain


class Rotation(NamedTuple):
    """What a layer's heads have in common, without their numbers."""

    cos: Tensor  # (positions, rotated)
    sin: Tensor  # the same, with its signs
    paired: bool  # head h of token t is at position 2t + h % 2 instead of t
    shifted: bool  # keys take their unrotated channels from the token before
    eps: float


def norm_and_rotate(qk: Tensor, rotation: Rotation, *, heads: int, plain: bool = False) -> Tensor:
    """Queries and keys as attention takes them, (2, T, H, D) in qk's dtype.

    qk (T, 2 H D): a token's H queries, then its H keys. Not differentiable: see `packed_gradient`. bf16 on a GPU with
    FP8 takes the Triton kernel, where the numbers of rotated and of other channels are powers of two.
    """
    if not plain and _runs_kernel(qk, rotation, qk.shape[1] // (2 * heads)):
        return _norm_and_rotate(qk, *rotation, heads)
    return norm_and_rotate_plain(qk, rotation, heads=heads)


def packed_gradient(
    dq: Tensor,  # (T, H, D)
    dk: Tensor,  # (T, H, D)
    dv: Tensor,  # (T, H, E)
    qk: Tensor,  # (T, 2 H D), as `norm_and_rotate` took it, like the rotation
    rotation: Rotation,
    *,
    factor: float,
    plain: bool = False,
) -> Tensor:
    """`factor` times the gradient of the packed queries, keys and values, e4m3 (T, R), R = H (2 D + E).

    Larger numbers than e4m3 has become its largest. The kernel is chosen as in `norm_and_rotate`, and by E.
    """
    gradients = dq.contiguous(), dk.contiguous(), dv.contiguous()
    if not plain and _runs_kernel(qk, rotation, dq.shape[2]) and _power_of_two(dv.shape[2]):
        return _packed_gradient(*gradients, qk, *rotation, factor)
    return to_e4m3(factor * packed_gradient_plain(*gradients, qk, rotation))


def transposed_8bit(matrix8: Tensor, *, plain: bool = False) -> Tensor:
    """The contiguous transpose (N, T) of an 8-bit matrix (T, N), for a product that sums over tokens.

    The kernel leaves the tokens of every 16 in an order of its own (`paired_transpose`), which such a sum does not see
    if its other factor has it too; T is a multiple of 16.
    """
    return _transposed_8bit(matrix8) if matrix8.is_cuda and not plain else transposed_8bit_plain(matrix8)


def _runs_kernel(qk: Tensor, rotation: Rotation, channels: int) -> bool:
    rotated = rotation.cos.shape[1]
    fits = _power_of_two(rotated) and _power_of_two(channels - rotated)
    return fits and runs_kernel(qk, rotation.cos, needs=FP8)


def _power_of_two(number: int) -> bool:
    """Or zero."""
    return number & (number - 1) == 0


# ---------------------------------------------------------------- kernels


@torch.library.custom_op("nanogpt::norm_and_rotate", mutates_args=())
def _norm_and_rotate(
    qk: Tensor, cos: Tensor, sin: Tensor, paired: bool, shifted: bool, eps: float, heads: int
) -> Tensor:
    from nanogpt.kernels.packed_qkv_triton import forward

    return forward(qk, Rotation(cos, sin, paired, shifted, eps), heads)


@_norm_and_rotate.register_fake
def _(qk: Tensor, cos: Tensor, sin: Tensor, paired: bool, shifted: bool, eps: float, heads: int) -> Tensor:
    return qk.new_empty((2, qk.shape[0], heads, qk.shape[1] // (2 * heads)))


@torch.library.custom_op("nanogpt::packed_qkv_gradient", mutates_args=())
def _packed_gradient(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qk: Tensor,
    cos: Tensor,
    sin: Tensor,
    paired: bool,
    shifted: bool,
    eps: float,
    factor: float,
) -> Tensor:
    from nanogpt.kernels.packed_qkv_triton import backward

    return backward(dq, dk, dv, qk, Rotation(cos, sin, paired, shifted, eps), factor)


@_packed_gradient.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, *others: Tensor | float | bool) -> Tensor:
    rows = sum(x.shape[1] * x.shape[2] for x in (dq, dk, dv))
    return dq.new_empty((dq.shape[0], rows), dtype=torch.float8_e4m3fn)


@torch.library.custom_op("nanogpt::transposed_8bit", mutates_args=())
def _transposed_8bit(matrix8: Tensor) -> Tensor:
    from nanogpt.kernels.fp8_head_triton import paired_transpose

    return paired_transpose(matrix8)


@_transposed_8bit.register_fake
def _(matrix8: Tensor) -> Tensor:
    return matrix8.new_empty(matrix8.shape[::-1])


# ---------------------------------------------------------------- plain implementation


def norm_and_rotate_plain(qk: Tensor, rotation: Rotation, *, heads: int) -> Tensor:
    """`norm_and_rotate` in plain PyTorch."""
    x = _wide(qk).view(len(qk), 2, heads, -1)
    n = x * _inverse_root(x, rotation.eps)
    leading, still = n.tensor_split((rotation.cos.shape[1],), dim=-1)
    cos, sin = _tables(rotation, x)
    if rotation.shifted:
        still = torch.stack((still[:, 0], torch.cat((still[:1, 1], still[:-1, 1]))), dim=1)
    out = torch.cat((cos * leading + sin * _neighbours(leading), still), dim=-1)
    return out.to(qk.dtype).transpose(0, 1).contiguous()


def packed_gradient_plain(dq: Tensor, dk: Tensor, dv: Tensor, qk: Tensor, rotation: Rotation) -> Tensor:
    """The gradient of the packed queries, keys and values, (T, R) in at least fp32, in plain PyTorch."""
    x = _wide(qk).view(len(qk), 2, *dq.shape[1:])
    leading, still = _wide(torch.stack((dq, dk), dim=1)).tensor_split((rotation.cos.shape[1],), dim=-1)
    cos, sin = _tables(rotation, x)
    if rotation.shifted:
        keys = still[:, 1]
        own = torch.cat((keys[:1], torch.zeros_like(keys[1:])))  # the first token's, which it keeps
        following = torch.cat((keys[1:], torch.zeros_like(keys[:1])))
        still = torch.stack((still[:, 0], own + following), dim=1)
    m = torch.cat((cos * leading - sin * _neighbours(leading), still), dim=-1)
    root = _inverse_root(x, rotation.eps)
    n = x * root
    grad = root * (m - n * (m * n).mean(-1, keepdim=True))
    return torch.cat((grad.flatten(1), _wide(dv).flatten(1)), dim=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _tables(rotation: Rotation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for x (T, 2, H, D), each (T, 1, 1 or H, rotated)."""
    tokens, _, heads, _ = x.shape
    positions, copies = (2, heads // 2) if rotation.paired else (1, 1)
    cos, sin = (
        table[: positions * tokens].to(x.dtype).view(tokens, 1, positions, -1).repeat(1, 1, copies, 1)
        for table in rotation[:2]
    )
    return cos, sin


def _neighbours(x: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
