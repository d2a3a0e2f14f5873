"""What the specs of the public records' models share. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from nanogpt.layers.specs import RotarySpec, SoftcapSpec
from nanogpt.models.model_spec import BaseModelSpec, RowTableSpec, Slot, SlotExtras
from nanogpt.parameters import Values
from nanogpt.spec_fields import NOT_COMPILED, Count, Few, Index, Layers, Padding, Positive, Problem, Size, Strict

BIGRAM_ROWS = "bigram rows"  # the batch's extra


class SkipSpec(Strict):
    """A gated connection from the output of one layer to the input of a later one."""

    from_layer: Index
    to_layer: Index


class Column(NamedTuple):
    """One or more numbers that a small net computes for each token."""

    name: str
    layer: int
    start: float
    width: int = 1


def most_numbers(nets: Sequence[Sequence[Column]]) -> int:
    """The most numbers per token that any of the nets computes."""
    return max(sum(column.width for column in net) for net in nets)


def column_biases(nets: Sequence[Sequence[Column]], scale: float) -> Values:
    """The biases with which every column starts at its value, (nets, most_numbers), padded with zeros.

    scale: the factor of a net's numbers.
    """
    starts = [[column.start for column in net for _ in range(column.width)] for net in nets]
    return Values([row + [0.0] * (most_numbers(nets) - len(row)) for row in starts], divisor=scale)


class RecordModelSpec(BaseModelSpec):
    """What the record models share: sizes, layer sets, rotary, the softcapped head."""

    fp8_head: ClassVar[bool] = True
    canonical_mask: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    head_dim: Size
    mlp_bank_padding: Padding = Field(description="unused entries of the MLP bank, so that its matrices shard evenly")
    attention_free_layers: Layers
    long_window_layers: Layers
    paired_layers: Layers = Field(description="layers whose heads are joined in pairs of twice the length")
    value_embed_layers: Layers = Field(description="layers with a value embedding, in the order of its tables")
    skip: SkipSpec
    gate_inputs: Size = Field(description="leading channels read by the gates")
    rotary: RotarySpec
    softcap: SoftcapSpec
    init_bound: Annotated[Positive, NOT_COMPILED] = Field(
        description="matrices start uniform in +-sqrt(3) * init_bound / sqrt(width)"
    )
    head_init_std: Annotated[Positive, NOT_COMPILED]

    @property
    def attention_layers(self) -> list[int]:
        """Layers that have attention, in order: row r of the attention bank belongs to the r-th of them."""
        return [i for i in range(self.layers) if i not in self.attention_free_layers]

    @property
    def rotated_channels(self) -> int:
        """Leading channels of a head that rotary embedding rotates."""
        return 2 * self.rotary.frequencies

    @property
    def matrix_start(self) -> float:
        """Bound of the matrices' uniform start."""
        return math.sqrt(3) * self.init_bound / math.sqrt(self.width)

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        if self.width != self.heads * self.head_dim:
            yield (
                ("width",),
                f"is {self.width}, must be heads * head_dim = {self.heads} * {self.head_dim}"
                f" = {self.heads * self.head_dim}",
            )
        yield from super().problems()
        if self.rotated_channels > self.head_dim:
            yield (
                ("rotary", "frequencies"),
                f"{self.rotary.frequencies} frequencies rotate {self.rotated_channels} channels,"
                f" a head has {self.head_dim}",
            )
        if self.rotary.yarn_low >= self.rotary.yarn_high:
            yield (
                ("rotary", "yarn_low"),
                f"is {self.rotary.yarn_low}, must be below yarn_high {self.rotary.yarn_high}",
            )
        if self.gate_inputs > self.width:
            yield ("gate_inputs",), f"is {self.gate_inputs}, more than width {self.width}"
        if self.paired_layers and self.heads % 2:
            yield ("paired_layers",), f"needs an even number of heads, heads is {self.heads}"
        yield from self._layer_problems("attention_free_layers", needs_attention=False)
        for key in ("long_window_layers", "paired_layers", "value_embed_layers"):
            yield from self._layer_problems(key)
        for layer in set(self.paired_layers) & set(self.long_window_layers):
            yield (
                ("paired_layers", self.paired_layers.index(layer)),
                f"layer {layer} is a long-window layer too: the key shift has no meaning in a paired layer",
            )
        if not self.skip.from_layer < self.skip.to_layer < self.layers:
            yield (
                ("skip",),
                f"goes from layer {self.skip.from_layer} to {self.skip.to_layer}; needs from < to < {self.layers}",
            )

    def _layer_problems(self, key: str, *, needs_attention: bool = True) -> Iterator[Problem]:
        """Check the list of layers `key`: each once, in the model and, if `needs_attention`, one with attention."""
        layers: list[int] = getattr(self, key)
        if len(set(layers)) != len(layers):
            yield (key,), f"names a layer twice: {layers}"
        for position, layer in enumerate(layers):
            if layer >= self.layers:
                yield (key, position), f"is layer {layer}, but the model has layers 0..{self.layers - 1}"
            elif needs_attention and layer in self.attention_free_layers:
                yield (key, position), f"is layer {layer}, which has no attention (attention_free_layers)"


class BigramModelSpec(RecordModelSpec):
    """The records with one kind of layer, MLPs a multiple of the width, and a hashed table of bigrams."""

    mlp_expansion: Few
    bigram_rows: Annotated[int, Field(ge=2, le=2**31 - 1)]
    bigram_multipliers: Annotated[tuple[Count, Count], Field(strict=False)] = Field(
        description="hash multipliers of the token and of the previous one"
    )
    attention_scale: Annotated[Positive, NOT_COMPILED] = Field(
        description="softmax scale at the start; YaRN steps change it"
    )

    def batch_extras(self, slot: Slot) -> SlotExtras:
        """The row of the bigram table for each token and its predecessor.

        `((m0 * tok[t]) xor (m1 * tok[t-1])) mod (rows - 1)`; the last row is for token 0, which has none.
        """
        import numpy as np

        wide = slot.inputs.astype(np.int64)
        rows = np.full(wide.shape, self.bigram_rows - 1, dtype=np.int64)
        own, before = self.bigram_multipliers
        rows[1:] = (own * wide[1:] ^ before * wide[:-1]) % (self.bigram_rows - 1)
        return SlotExtras({BIGRAM_ROWS: rows})

    def row_tables(self) -> tuple[RowTableSpec, ...]:
        """The bigram table: a rank's tokens touch few of its rows between two updates."""
        return (RowTableSpec("bigram_embed", self.bigram_rows, BIGRAM_ROWS),)

    def training_flops(self, tokens: int, *, short: int, long: int) -> float:
        """See the base. A paired layer has twice the queries over half the heads: the same product."""
        matrices = self.width * self.padded_vocab_size + self.layers * 2 * self.mlp_expansion * self.width**2
        matrices += 4 * self.width**2 * len(self.attention_layers) + self.further_matrices
        reach = sum(long if layer in self.long_window_layers else short for layer in self.attention_layers)
        return 6.0 * tokens * matrices + 12.0 * tokens * (reach + self.further_reach) * self.width

    @property
    def further_matrices(self) -> int:
        """Further weights that every token is multiplied by, besides attention, MLPs and head."""
        return 0

    @property
    def further_reach(self) -> int:
        """Tokens that a query sees besides its windows."""
        return 0
