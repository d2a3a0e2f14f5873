"""The table of parameters: one row has everything about one parameter. No torch.

From the table come the model's tensors, the optimizer's plans, the spec's cross-checks and the values
that a recipe leaves out. A row's place is its place in the order of reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Part = tuple[slice | int, ...]  # an index into a parameter; () is all of it


@dataclass(frozen=True)
class Zeros:
    """Starts at 0."""


@dataclass(frozen=True)
class Uniform:
    """`part` starts uniform in +-bound, the rest at 0."""

    bound: float
    part: Part = ()


@dataclass(frozen=True)
class Normal:
    """Starts normal with mean 0."""

    std: float


@dataclass(frozen=True)
class Values:
    """Starts at given numbers over `divisor`, nested like the parameter's shape; a single number fills it."""

    values: Any
    divisor: float = 1.0


@dataclass(frozen=True)
class TransposeOf:
    """Starts as another parameter transposed."""

    name: str


@dataclass(frozen=True)
class Adam:
    """Trained by Adam: multipliers of its learning rate and weight decay."""

    betas: tuple[float, float]
    lr_mul: float = 1.0
    wd_mul: float = 0.0
    sharded: bool = False
    cyclic: bool = False  # updated with the tables of rows, if the optimizer gives these their own cadence


@dataclass(frozen=True)
class NorMuon:
    """Trained by NorMuon or ANVIL, as a bank of matrices."""

    rows: int  # of a matrix; its columns are the parameter's last dimension
    lr_muls: tuple[float, ...] = (1.0,)  # of the bank's matrices, repeated in turn; 0 freezes
    sharded: bool = True


@dataclass(frozen=True)
class Decoupled:
    """Trained by an Adam whose weight decay is decoupled, the same for every parameter that decays."""

    decays: bool


@dataclass(frozen=True)
class Parameter:
    """A row."""

    name: str
    shape: tuple[int, ...]
    train: Adam | NorMuon | Decoupled
    start: Zeros | Uniform | Normal | Values | TransposeOf = field(default_factory=Zeros)
    update: int = 0  # in the order of updates: lower first, rows of the same number as they stand in the table
    dtype: Literal["model", "fp32"] = "model"  # the run's dtype, or always fp32
    tied_to: str | None = None  # the parameter whose transpose this one is until they split
    padding: str | None = None  # the field of the model that pads it, so that ranks can share it evenly

    @property
    def units(self) -> int:
        """What ranks divide among themselves: rows, or matrices of a bank."""
        if isinstance(self.train, NorMuon):
            return self.size // (self.train.rows * self.shape[-1])
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)
