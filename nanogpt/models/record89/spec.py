"""Record 89's spec and table of parameters. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from nanogpt.layers.specs import MlpFp8Spec, MuddSpec
from nanogpt.models.record_spec import BigramModelSpec, Column, column_biases, most_numbers
from nanogpt.parameters import Adam, Normal, NorMuon, Parameter, TransposeOf, Uniform, Values
from nanogpt.spec_fields import NOT_COMPILED, Finite, Index, Layers, NonNegative, Padding, Problem, Size, Strict

Start = Annotated[Finite, NOT_COMPILED]


class Record89Starts(Strict):
    """Start values of learned numbers, gates and connections. Others start at 0."""

    attention_in: Start
    attention_out: Start
    smear: Start
    skip: Start
    residual: Start = Field(description="scale of the residual before each attention and MLP is added")
    post: Start = Field(description="scale of the output of each attention and MLP")
    output_gate: Start
    bigram_gate: Start
    skip_gate: Start
    dc_scores: Start = Field(description="weight of each head's attention in the mixed attention")
    value_gate: Start = Field(description="gate of the last layer's value embedding")
    backout: Start = Field(description="weight of the saved activation in the head's input, subtracted")


class Record89ModelSpec(BigramModelSpec):
    """The model of public record 89 (`nanogpt.models.record89.model`)."""

    fp8_mlp: ClassVar[bool] = True

    kind: Literal["record89"]
    qk_bank_padding: Padding = Field(description="unused matrices of the bank of q and k, so that it shards evenly")
    vo_bank_padding: Padding = Field(description="unused matrices of the bank of v and o")
    saved_layer: Index = Field(description="layer whose output feeds the attention of every later layer")
    value_embed_init_std: Annotated[NonNegative, NOT_COMPILED]
    bigram_signs: Size = Field(description="sign vectors that tell bigrams of one row apart")
    xsa_layers: Layers = Field(description="layers whose attention output excludes the token's own value")
    output_gate_layers: Layers = Field(description="layers with a gate on the attention output of each head")
    dc_window: Size = Field(description="tokens, itself included, over which the last layer mixes attention heads")
    mudd: MuddSpec
    starts: Record89Starts
    mlp_fp8: MlpFp8Spec

    @property
    def last(self) -> int:
        """The last layer."""
        return self.layers - 1

    def gate_columns(self, *, late: bool) -> list[Column]:
        """Outputs of a gate net: the early one, from x0, serves layers up to `skip.from_layer`, the late one the rest.

        XSA and output gates have a number per head; so do the two weights of the last layer's head mixing.
        """
        start, heads = self.starts, self.heads
        layers = [layer for layer in self.attention_layers if (layer > self.skip.from_layer) == late]
        columns = [Column("xsa", layer, 0.0, heads) for layer in layers if layer in self.xsa_layers]
        columns += [
            Column("output", layer, start.output_gate, heads) for layer in layers if layer in self.output_gate_layers
        ]
        for layer in layers:
            if layer != self.last:
                columns += [Column("x0", layer, 0.0), Column("bigram", layer, start.bigram_gate)]
        if late:
            columns += [
                Column("skip", self.skip.to_layer, start.skip_gate),
                Column("dc_scores", self.last, start.dc_scores, heads),
                Column("dc_output", self.last, 0.0, heads),
            ]
        return columns

    def connection_columns(self, *, after_last: bool) -> list[Column]:
        """Outputs of a MUDD net: before the last layer the weights into it, after it those into the head's input."""
        start, last = self.starts, self.last
        if after_last:
            return [
                Column("from start", last, 0.0),
                Column("from saved", last, -start.backout),
                *(Column(f"from {name}", last, 0.0) for name in ("before", "values", "skipped")),
            ]
        return [
            *(Column(f"value from {name}", last, 0.0) for name in ("start", "saved", "before")),
            *(Column(f"input from {name}", last, 0.0) for name in ("start", "saved", "before")),
            Column("value gate", last, start.value_gate, 2),  # of the first and of the second half of the heads
            Column("attention residual", last, start.residual),
            Column("attention post", last, start.post),
            Column("attention from start", last, 0.0),
            Column("attention from bigram", last, start.bigram_gate),
            Column("mlp residual", last, start.residual),
            Column("mlp post", last, start.post),
        ]

    def parameters(self) -> tuple[Parameter, ...]:
        """The r-th layer with attention owns the H matrices of `qk` from H r on, and 2 r, 2 r + 1 of `vo`: v and o.

        Half of the H are q's and half k's, each (2 head_dim, D) for two neighbouring heads. All are stored (out, in).
        """
        d, v, layers, heads, gates = self.width, self.padded_vocab_size, self.layers, self.heads, self.gate_inputs
        attention, tables = len(self.attention_layers), len(self.value_embed_layers)
        hidden, start, net = self.mlp_expansion * d, self.starts, self.mudd.hidden
        bound, net_start = self.matrix_start, Uniform(1 / math.sqrt(d))
        qk, vo = heads * attention, 2 * attention
        connections = [self.connection_columns(after_last=after_last) for after_last in (False, True)]
        gate_columns = [self.gate_columns(late=late) for late in (False, True)]
        scalars = [start.attention_in, start.attention_out] * layers + [start.smear, start.skip]
        slow, fast, table, head = (0.9, 0.99), (0.9, 0.95), (0.75, 0.95), (0.5, 0.95)
        numbers, into = most_numbers(connections), most_numbers(gate_columns)
        return (
            Parameter(
                "qk",
                (qk + self.qk_bank_padding, 2 * self.head_dim, d),
                NorMuon(2 * self.head_dim),
                Uniform(bound, (slice(qk),)),
                update=8,
                padding="qk_bank_padding",
            ),
            Parameter(
                "vo",
                (vo + self.vo_bank_padding, d, d),
                NorMuon(d),
                Uniform(bound, (slice(vo),)),
                update=8,
                padding="vo_bank_padding",
            ),
            Parameter(  # [:, 0] up, [:, 1] down
                "mlp",
                (layers + self.mlp_bank_padding, 2, hidden, d),
                NorMuon(hidden, (1, 2)),
                Uniform(bound, (slice(None), 0)),
                update=8,
                padding="mlp_bank_padding",
            ),
            Parameter("scalars", (2 * layers + 2,), Adam(slow, 5), Values(scalars), dtype="fp32"),
            Parameter("smear_gate", (1, gates), Adam(slow, 0.01)),
            Parameter("ve_gate_bank", (tables, heads, gates), Adam(slow, 1, 1)),  # the last layer's is never read
            Parameter("lm_head", (d, v), Adam(head, 1, 150, sharded=True), Normal(self.head_init_std), update=7),
            Parameter("bigram_embed", (self.bigram_rows, d), Adam(table, 75, 5, sharded=True), update=5),
            # [:, 0] attention, [:, 1] MLP
            Parameter("post_lambdas", (layers, 2), Adam(fast, 1), Values(start.post), update=2, dtype="fp32"),
            Parameter("resid_lambdas", (layers, 2), Adam(fast, 5), Values(start.residual), update=2, dtype="fp32"),
            Parameter(
                "value_embed",
                (tables * v, d),
                Adam(table, 75, 5, sharded=True),
                Normal(self.value_embed_init_std),
                update=4,
            ),
            Parameter(
                "embed",
                (v, d),
                Adam(head, 1, 150, sharded=True),
                TransposeOf("lm_head"),
                update=7,
                tied_to="lm_head",
            ),
            Parameter("mudd_w1", (2, net, d), Adam(slow, 0.25, 1), net_start, update=6),
            Parameter("mudd_w2", (2, numbers, net), Adam(slow, 0.25, 1), update=3),
            Parameter("mudd_b2", (2, numbers), Adam(slow, 0.25), column_biases(connections, self.mudd.scale), update=1),
            Parameter("mudd_gate_w1", (2, net, d), Adam(slow, 0.1, 1), net_start, update=6),
            Parameter("mudd_gate_w2", (2, into, net), Adam(slow, 0.1, 1), update=3),
            Parameter(
                "mudd_gate_b2", (2, into), Adam(slow, 0.1), column_biases(gate_columns, self.mudd.scale), update=1
            ),
            Parameter("mudd_gate_scale", (), Adam(slow, 0.1), Values(self.mudd.scale), update=1, dtype="fp32"),
        )

    @property
    def further_matrices(self) -> int:
        """The first products of the four small nets; their second ones do not count."""
        return 4 * self.mudd.hidden * self.width

    @property
    def further_reach(self) -> int:
        """The head mixing's window."""
        return self.dc_window

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        yield from self._layer_problems("xsa_layers")
        yield from self._layer_problems("output_gate_layers")
        if self.heads % 2:
            yield ("heads",), f"is {self.heads}, must be even: q and k are banked in pairs of heads"
        if self.gate_inputs % 2:
            yield ("gate_inputs",), f"is {self.gate_inputs}, must be even: half of them are the value embedding's"
        if self.attention_free_layers != [self.skip.to_layer]:
            yield (
                ("attention_free_layers",),
                f"is {self.attention_free_layers}, must be the layer that the skip enters, [{self.skip.to_layer}]",
            )
        last = self.layers - 1
        for key, wanted in (("paired_layers", False), ("value_embed_layers", True), ("output_gate_layers", True)):
            if (last in getattr(self, key)) != wanted:
                verb = "must name" if wanted else "must not name"
                yield (key,), f"{verb} the last layer, {last}"
        if self.mlp_fp8.square == "e4m3" and self.mlp_fp8.gradients != "all":
            yield ("mlp_fp8", "square"), f"is e4m3, which needs gradients: all; found {self.mlp_fp8.gradients}"
        if not self.skip.to_layer <= self.saved_layer < last:
            yield (
                ("saved_layer",),
                f"is {self.saved_layer}, must lie between skip.to_layer {self.skip.to_layer} and the layer before the"
                f" last, {last - 1}",
            )
