"""What every model's spec answers, so that no other code needs to know which model it is. No torch."""

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
    """A parameter of which a step reads only a few rows, so that ranks can exchange just those."""

    parameter: str
    rows: int
    extra: str  # the batch's extra with the rows


class PulledTableSpec(NamedTuple):
    """A table that is not a parameter: ranks keep parts of it and pull the rows they read."""

    rows: int
    width: int
    extras: tuple[str, ...]  # the batch's extras with the rows
    reads: int  # rows that a token reads
    field: str  # the model's field with the number of rows


class Slot(NamedTuple):
    """A micro-batch on the host, as input for its extras."""

    inputs: Tokens  # (T,) uint16
    targets: Tokens  # (T,) uint16
    loss: StageLoss | None = None  # of the stage; None in validation, evaluation and sampling
    number: int = 0  # which of the step's slots, from 0
    slots: int = 1  # of a step, over all ranks
    state: Any = None  # the state this slot's extras returned in the previous step; None at the run's start


class SlotExtras(NamedTuple):
    """What a micro-batch brings besides its tokens."""

    arrays: Mapping[str, npt.NDArray[Any]]  # by name; shape and dtype depend on T and the stage's loss alone
    state: Any = None  # for the slot's next step: JSON-able, or None


class BaseModelSpec(Strict):
    """Base of the models' specs."""

    fp8_head: ClassVar[bool] = False  # the head's products can run in 8 bits
    fp8_mlp: ClassVar[bool] = False  # as can the MLP's
    fp8_projection: ClassVar[bool] = False  # as can the attention's input projection
    sampled_softmax: ClassVar[bool] = False  # a stage may name candidates for its loss
    canonical_mask: ClassVar[bool] = False  # evaluation can rule out classes by the previous token
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
        """The longest document that the model reads as a whole, in tokens; None: any."""
        return None

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.vocab_size > self.padded_vocab_size:
            yield ("padded_vocab_size",), f"is {self.padded_vocab_size}, below vocab_size {self.vocab_size}"

    def stage_problems(self, stage: StageLoss) -> Iterator[Problem]:
        """What in a stage the model's loss does not support; yields (path below the stage, message)."""
        if stage.candidates is None:
            return
        if not self.sampled_softmax:
            yield (
                ("candidates",),
                f"is {stage.candidates}, the softmax of a {self.kind} model is over all classes: null",
            )
        elif stage.candidates > self.padded_vocab_size:
            yield (
                ("candidates",),
                f"is {stage.candidates}, but there are {self.padded_vocab_size} classes (model.padded_vocab_size)",
            )

    def training_flops(self, tokens: int, *, short: int, long: int) -> float:
        """Floating-point operations of forward and backward over `tokens` tokens, without the optimizer.

        Six per weight and token for the matrices, and attention's two products over the windows, `short` and `long`
        tokens, at full reach (shorter documents need less).
        """
        raise NotImplementedError

    def batch_extras(self, slot: Slot) -> SlotExtras:
        """What a micro-batch brings besides its tokens.

        Computed on the loader's thread and passed on with the batch, in training and validation. It depends on the
        slot alone, not on rank or world size. If there is a state, every rank computes the extras of all slots.
        Also called once for each shape of a step, with tokens of 0, to learn the arrays' shapes.
        """
        return SlotExtras({})

    @property
    def token_classes_field(self) -> str | None:
        """The model's field by which `batch_extras` reads the classes of GPT-2's tokens; None: it does not.

        See `nanogpt.data.token_classes`. Other vocabularies are refused.
        """
        return None

    def pulled_tables(self) -> Mapping[str, PulledTableSpec]:
        """Tables besides the parameters, by name; all start at 0 (`nanogpt.optim.pulled_table`)."""
        return {}

    def row_tables(self) -> tuple[RowTableSpec, ...]:
        """The parameters whose gradients may be exchanged by the rows that a step read."""
        return ()
