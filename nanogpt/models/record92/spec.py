"""Record 92's spec and table of parameters. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanogpt.layers.specs import MlpFp8Spec, MuddSpec
from nanogpt.models.model_spec import PulledTableSpec, Slot, SlotExtras
from nanogpt.models.record_spec import Column, RecordModelSpec, column_biases, most_numbers
from nanogpt.parameters import Adam, Normal, NorMuon, Parameter, TransposeOf, Uniform, Values
from nanogpt.spec_fields import (
    NOT_COMPILED,
    Finite,
    Index,
    Layers,
    NonNegative,
    Padding,
    Positive,
    Problem,
    Size,
    Strict,
)

if TYPE_CHECKING:
    import numpy.typing as npt

Start = Annotated[Finite, NOT_COMPILED]

# The batch's extras: (2, T) each, bigrams and trigrams, and (classes,).
NGRAM_ROWS, NGRAM_SIGNS, CANDIDATES = "n-gram rows", "n-gram signs", "candidates"
NGRAM_TABLE = "ngrams"

# What is added to the head's input after the last layer, weighted by the second MUDD net.
HEAD_SOURCES = (
    "start", "saved", "before", "values 0", "skipped", "values 1", "values 3", "values 2", "last MLP's input",
    "attended",
)  # fmt: skip


class Record92Starts(Strict):
    """Start values of learned numbers, gates and connections. Those not named start at 0."""

    attention_in: Start
    attention_out: Start
    smear: Start
    skip: Start
    residual: Start = Field(description="scale of the residual before each attention and MLP is added")
    post: Start = Field(description="scale of what each attention and MLP adds")
    output_gate: Start
    ngram_gate: Start
    skip_gate: Start
    value_gate: Start = Field(description="gate of the last layer's value embedding")
    backout: Start = Field(description="weight of the saved activation in the head's input, subtracted")


class AttentionScales(Strict):
    """Softmax scales at the start; YaRN steps change each along with its window."""

    narrow: Annotated[Positive, NOT_COMPILED]
    wide: Annotated[Positive, NOT_COMPILED]


class Record92ModelSpec(RecordModelSpec):
    """The model of public record 92 (`nanogpt.models.record92.model`)."""

    fp8_mlp: ClassVar[bool] = True
    fp8_projection: ClassVar[bool] = True
    sampled_softmax: ClassVar[bool] = True

    kind: Literal["record92"]
    narrow_head_dim: Size = Field(description="channels of a query in short-window layers; all of them rotate")
    half_value_dim: Size = Field(description="channels of a value in half_value_layers")
    half_value_layers: Layers
    mlp_width: Size
    mlp_free_layers: Layers
    second_mlp_layers: Layers = Field(description="layers with a second MLP beside the first, on the same input")
    qk_bank_padding: Padding = Field(description="unused matrices in the bank of q and k, so that it shards evenly")
    vo_bank_padding: Padding = Field(description="unused matrices in the bank of v and o")
    saved_layer: Index = Field(description="layer whose output feeds the attention of every later layer")
    x0_layers: Layers = Field(description="layers to which a gated x0 is added")
    ngram_layers: Layers = Field(description="layers to which gated n-grams are added; 0: before it")
    xsa_layers: Layers = Field(description="layers whose attention output loses the token's own value")
    output_gate_layers: Layers = Field(description="layers whose attention output has a gate for each head")
    group_channels: Size = Field(description="number of neighbouring channels that share weights in the head's input")
    ngram_rows: Annotated[int, Field(ge=8, le=2**31 - 2), NOT_COMPILED] = Field(
        description="rows of the table, half of them for bigrams, half for trigrams"
    )
    ngram_signs: Size = Field(description="sign vectors that tell apart n-grams that share a row")
    normalized_ngrams: Annotated[bool, NOT_COMPILED] = Field(
        default=False, description="n-grams of tokens that differ only in case, accents or blanks are the same"
    )
    value_embed_init_std: Annotated[NonNegative, NOT_COMPILED]
    mudd: MuddSpec
    attention_scales: AttentionScales
    starts: Record92Starts
    mlp_fp8: MlpFp8Spec

    # --- sizes ---

    @property
    def last(self) -> int:
        """The last layer."""
        return self.layers - 1

    @property
    def attention_slots(self) -> list[int]:
        """Layers with attention in the order of the banks: equal shapes lie together, the wide ones last."""
        return sorted(self.attention_layers, key=lambda layer: (self.is_wide(layer), self.is_half(layer), layer))

    def is_wide(self, layer: int) -> bool:
        """Whether the layer's queries have all channels."""
        return layer in self.long_window_layers

    def is_half(self, layer: int) -> bool:
        """Whether the layer's values have only `half_value_dim` channels."""
        return layer in self.half_value_layers

    def qk_dim(self, layer: int) -> int:
        """Channels of a head's queries and keys."""
        return self.head_dim if self.is_wide(layer) else self.narrow_head_dim

    def v_dim(self, layer: int) -> int:
        """Channels of a head's values."""
        return self.half_value_dim if self.is_half(layer) else self.head_dim

    @property
    def gated_value_layers(self) -> list[int]:
        """Layers whose value embedding has gates of its own: the last layer's come from a MUDD net."""
        return [layer for layer in self.value_embed_layers if layer != self.last]

    @property
    def channel_groups(self) -> int:
        """Groups of neighbouring channels in the head's input."""
        return self.width // self.group_channels

    # --- what the small nets make ---

    def gate_columns(self, *, late: bool) -> list[Column]:
        """What a gate net makes: the early one, from x0, for the layers up to `skip.from_layer`; the late one the rest.

        XSA and output gates have one number per head.
        """
        start, heads = self.starts, self.heads

        def chosen(layers: Sequence[int]) -> list[int]:
            return [layer for layer in sorted(layers) if (layer > self.skip.from_layer) == late]

        columns = [Column("xsa", layer, 0.0, heads) for layer in chosen(self.xsa_layers)]
        columns += [Column("output", layer, start.output_gate, heads) for layer in chosen(self.output_gate_layers)]
        columns += [Column("x0", layer, 0.0) for layer in chosen(self.x0_layers)]
        columns += [Column("ngram", layer, start.ngram_gate) for layer in chosen(self.ngram_layers)]
        return [*columns, *([Column("skip", self.skip.to_layer, start.skip_gate)] if late else [])]

    def connection_columns(self, *, after_last: bool) -> list[Column]:
        """What a MUDD net makes: before the last layer the weights into it, after it those into the head's input."""
        start, last = self.starts, self.last
        if after_last:
            return [Column(f"from {name}", last, -start.backout * (name == "saved")) for name in HEAD_SOURCES]
        return [
            *(Column(f"value from {name}", last, 0.0) for name in ("start", "saved", "before")),
            *(Column(f"input from {name}", last, 0.0) for name in ("start", "saved", "before")),
            Column("value gate", last, start.value_gate, 2),  # of the first and of the second half of the heads
            Column("attention residual", last, start.residual),
            Column("attention post", last, start.post),
            Column("attention from start", last, 0.0),
            Column("attention from ngram", last, start.ngram_gate),
            Column("mlp residual", last, start.residual),
            Column("mlp post", last, start.post),
        ]

    # --- parameters ---

    def parameters(self) -> tuple[Parameter, ...]:
        """Slot j of the banks belongs to the j-th of `attention_slots`: H matrices of `qk` from H j on, as record 89's.

        2 j and 2 j + 1 of `vo` are its v and o. All keep full size: a layer of narrower heads reads the first channels
        of each. `mlp` has a layer's MLP in the layer's slot, and the second ones at the end.
        """
        d, v, layers, heads, gates = self.width, self.padded_vocab_size, self.layers, self.heads, self.gate_inputs
        attention, tables = len(self.attention_layers), len(self.value_embed_layers)
        hidden, start, net = self.mlp_width, self.starts, self.mudd.hidden
        bound, net_start = self.matrix_start, Uniform(1 / math.sqrt(d))
        qk, vo = heads * attention, 2 * attention
        mlps = layers + len(self.second_mlp_layers)
        frozen = [layer in self.mlp_free_layers for layer in range(mlps + self.mlp_bank_padding)]
        connections = [self.connection_columns(after_last=after_last) for after_last in (False, True)]
        gate_columns = [self.gate_columns(late=late) for late in (False, True)]
        scalars = [start.attention_in, start.attention_out] * layers + [start.smear, start.skip]
        slow, fast, table, head = (0.9, 0.99), (0.9, 0.95), (0.75, 0.95), (0.5, 0.95)
        numbers, into = most_numbers(connections), most_numbers(gate_columns)
        return (
            Parameter("scalars", (2 * layers + 2,), Adam(slow, 5), Values(scalars), update=4, dtype="fp32"),
            Parameter("smear_gate", (1, gates), Adam(slow, 0.01), update=4),
            Parameter("ve_gate_bank", (len(self.gated_value_layers), heads, gates), Adam(slow, 1, 1), update=4),
            # [:, 0] attention, [:, 1] MLP
            Parameter("post_lambdas", (layers, 2), Adam(fast, 1), Values(start.post), update=4, dtype="fp32"),
            Parameter("resid_lambdas", (layers, 2), Adam(fast, 5), Values(start.residual), update=4, dtype="fp32"),
            Parameter("mudd_w1", (2, net, d), Adam(slow, 0.25, 1), net_start, update=4),
            Parameter("mudd_w2", (2, numbers, net), Adam(slow, 0.25, 1), update=4),
            Parameter("mudd_w2g", (numbers, self.channel_groups, net), Adam(slow, 0.25, 1), update=4),
            Parameter("mudd_b2", (2, numbers), Adam(slow, 0.25), column_biases(connections, self.mudd.scale), update=4),
            Parameter("mudd_gate_w1", (2, net, d), Adam(slow, 0.1, 1), net_start, update=4),
            Parameter("mudd_gate_w2", (2, into, net), Adam(slow, 0.1, 1), update=4),
            Parameter(
                "mudd_gate_b2", (2, into), Adam(slow, 0.1), column_biases(gate_columns, self.mudd.scale), update=4
            ),
            Parameter("mudd_gate_scale", (), Adam(slow, 0.1), Values(self.mudd.scale), update=4, dtype="fp32"),
            Parameter(
                "qk",
                (qk + self.qk_bank_padding, 2 * self.head_dim, d),
                NorMuon(2 * self.head_dim),
                Uniform(bound, (slice(qk),)),
                update=1,
                padding="qk_bank_padding",
            ),
            Parameter(
                "vo",
                (vo + self.vo_bank_padding, d, d),
                NorMuon(d),
                Uniform(bound, (slice(vo),)),
                update=1,
                padding="vo_bank_padding",
            ),
            Parameter(  # [:, 0] up, [:, 1] down
                "mlp",
                (mlps + self.mlp_bank_padding, 2, hidden, d),
                NorMuon(hidden, tuple(m for is_frozen in frozen for m in ((0, 0) if is_frozen else (1, 2)))),
                Uniform(bound, (slice(None), 0)),
                update=5,
                padding="mlp_bank_padding",
            ),
            Parameter(
                "value_embed",
                (tables * v, d),
                Adam(table, 70, 5, sharded=True, cyclic=True),
                Normal(self.value_embed_init_std),
                update=3,
            ),
            Parameter("lm_head", (d, v), Adam(head, 1, 150, sharded=True), Normal(self.head_init_std), update=2),
            Parameter(
                "embed",
                (v, d),
                Adam(head, 1, 150, sharded=True),
                TransposeOf("lm_head"),
                update=2,
                tied_to="lm_head",
            ),
        )

    # --- what a batch brings ---

    def batch_extras(self, slot: Slot) -> SlotExtras:
        """Rows and signs of the n-grams, and in steps with a sampled softmax the classes that it is taken over."""
        from nanogpt.data.token_classes import token_classes
        from nanogpt.models.record92.candidates import candidate_classes, first_offset
        from nanogpt.models.record92.ngrams import ngram_rows, sign_rows

        hashed = token_classes()[slot.inputs] if self.normalized_ngrams else slot.inputs
        rows, signs = ngram_rows(hashed, self.ngram_rows), sign_rows(hashed, self.ngram_signs)
        arrays: dict[str, npt.NDArray[Any]] = {NGRAM_ROWS: rows, NGRAM_SIGNS: signs}
        if slot.loss is None:
            return SlotExtras(arrays)
        classes = self.padded_vocab_size
        offset = first_offset(slot.number, slot.slots, classes) if slot.state is None else slot.state
        if slot.loss.candidates is not None:
            arrays[CANDIDATES], offset = candidate_classes(
                slot.targets, slot.loss.candidates, offset, vocabulary=classes, slot=slot.number
            )
        return SlotExtras(arrays, offset)

    @property
    def token_classes_field(self) -> str | None:
        """See the base."""
        return "normalized_ngrams" if self.normalized_ngrams else None

    def pulled_tables(self) -> Mapping[str, PulledTableSpec]:
        """The n-grams."""
        return {NGRAM_TABLE: PulledTableSpec(self.ngram_rows, self.width, (NGRAM_ROWS,), 2, "ngram_rows")}

    # --- facts and checks ---

    def training_flops(self, tokens: int, *, short: int, long: int) -> float:
        """See the base. The head counts in full, even in stages with a sampled softmax."""
        matrices = self.width * self.padded_vocab_size + 4 * self.mudd.hidden * self.width
        matrices += self.mudd.hidden * len(HEAD_SOURCES) * self.channel_groups
        mlps = self.layers - len(self.mlp_free_layers) + len(self.second_mlp_layers)
        matrices += 2 * self.mlp_width * self.width * mlps
        reach = 0
        for layer in self.attention_layers:
            dims = (self.qk_dim(layer) + self.v_dim(layer)) * self.heads
            matrices += 2 * dims * self.width
            reach += dims * (long if self.is_wide(layer) else short)
        return 6.0 * tokens * matrices + 6.0 * tokens * reach

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        for key in ("half_value_layers", "xsa_layers", "output_gate_layers"):
            yield from self._layer_problems(key)
        for key in ("mlp_free_layers", "second_mlp_layers", "x0_layers", "ngram_layers"):
            yield from self._layer_problems(key, needs_attention=False)
        last = self.last
        if self.rotated_channels != self.narrow_head_dim:
            yield (
                ("narrow_head_dim",),
                f"is {self.narrow_head_dim}, must be the {self.rotated_channels} channels that"
                f" {self.rotary.frequencies} frequencies rotate",
            )
        for key in ("narrow_head_dim", "half_value_dim"):
            if getattr(self, key) > self.head_dim:
                yield (key,), f"is {getattr(self, key)}, more than head_dim {self.head_dim}"
        for layer in set(self.half_value_layers) & set(self.long_window_layers):
            position = self.half_value_layers.index(layer)
            yield ("half_value_layers", position), f"layer {layer} is a long-window layer, whose heads are whole"
        if self.heads % 2:
            yield ("heads",), f"is {self.heads}, must be even: q and k are banked in pairs of heads"
        if self.gate_inputs % 2:
            yield ("gate_inputs",), f"is {self.gate_inputs}, must be even: half of them are the value embedding's"
        if len(self.value_embed_layers) != 4:
            yield ("value_embed_layers",), f"is {self.value_embed_layers}, must name four: all enter the head's input"
        if self.skip.to_layer not in self.attention_free_layers:
            yield ("attention_free_layers",), f"must name the layer that the skip enters, {self.skip.to_layer}"
        if self.skip.to_layer in self.mlp_free_layers:
            yield ("mlp_free_layers",), f"must not name the layer that the skip enters, {self.skip.to_layer}"
        for key, wanted in (
            ("paired_layers", False),
            ("mlp_free_layers", False),
            ("second_mlp_layers", False),
            ("x0_layers", False),
            ("ngram_layers", False),
            ("half_value_layers", False),
            ("long_window_layers", True),
            ("value_embed_layers", True),
            ("output_gate_layers", True),
        ):
            if (last in getattr(self, key)) != wanted:
                verb = "must name" if wanted else "must not name"
                yield (key,), f"{verb} the last layer, {last}"
        if 0 not in self.ngram_layers:
            yield ("ngram_layers",), "must name layer 0, before which n-grams are added"
        for layer in set(self.second_mlp_layers) & set(self.mlp_free_layers):
            yield (
                ("second_mlp_layers", self.second_mlp_layers.index(layer)),
                f"layer {layer} is named in mlp_free_layers",
            )
        if self.width % self.group_channels:
            yield ("group_channels",), f"is {self.group_channels}, must divide width {self.width}"
        if self.ngram_signs & (self.ngram_signs - 1):
            yield ("ngram_signs",), f"is {self.ngram_signs}, must be a power of two"
        if self.ngram_rows % 2:
            yield ("ngram_rows",), f"is {self.ngram_rows}, must be even: half of the rows are bigrams'"
        if not self.skip.to_layer <= self.saved_layer < last:
            yield (
                ("saved_layer",),
                f"is {self.saved_layer}, must lie between skip.to_layer {self.skip.to_layer} and the layer before the"
                f" last, {last - 1}",
            )
