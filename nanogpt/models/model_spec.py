"""What every model's spec answers, so that nobody has to ask which model it is. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from nanogpt.models.stage_loss import StageLoss
from nanogpt.parameters import Parameter
from nanogpt.spec_fields import NOT_COMPILED, Few, Problem, Size, Strict, Vocabulary

if TYPE_CHECKING:  # a spec is read without NumPy
    import numpy as np
    import numpy.typing as npt

    Tokens = npt.NDArray[np.uint16]


class RowTableSpec(NamedTuple):
    """A parameter of which a step reads few rows, so that ranks may exchange those alone."""

    parameter: str
    rows: int
    extra: str  # the batch's extra that has the rows


class BaseModelSpec(Strict):
    """Base of the models' specs."""

    fp8_head: ClassVar[bool] = False  # the head's products can run in 8 bits
    fp8_mlp: ClassVar[bool] = False  # and the MLP's
    capturable: ClassVar[bool] = False  # its compiled micro-steps can be captured as CUDA graphs

    kind: str
    vocab_size: Annotated[Vocabulary, NOT_COMPILED]  # sampling alone reads it
    padded_vocab_size: Vocabulary = Field(
        description="rows of the embeddings and columns of the head; all enter the loss"
    )
    layers: Few
    width: Size
    heads: Few

    def parameters(self) -> tuple[Parameter, ...]:
        """The table of parameters, in the order of reduction."""
        raise NotImplementedError

    @property
    def longest_document(self) -> int | None:
        """Tokens of a document that the model reads as a whole; None: any number."""
        return None

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.vocab_size > self.padded_vocab_size:
            yield ("padded_vocab_size",), f"is {self.padded_vocab_size}, below vocab_size {self.vocab_size}"

    def stage_problems(self, stage: StageLoss) -> Iterator[Problem]:
        """What the model's loss cannot do of a stage; yields (path below the stage, message)."""
        yield from ()

    def training_flops(self, tokens: int, *, short: int, long: int) -> float:
        """Floating-point operations of forward and backward over `tokens` tokens, optimizer left out.

        Six a weight and token for the matrices, and attention's two products over the windows, `short` and `long`
        tokens, at their full reach (documents that are shorter need less).
        """
        raise NotImplementedError

    def batch_extras(self, tokens: Tokens) -> Mapping[str, npt.NDArray[Any]]:
        """What a micro-batch brings besides its tokens (T,), by name: arrays of T numbers.

        Computed on the loader's thread and handed on with the batch, in training and in validation.
        """
        return {}

    def row_tables(self) -> tuple[RowTableSpec, ...]:
        """The parameters whose gradients may be exchanged by the rows that a step has read."""
        return ()
