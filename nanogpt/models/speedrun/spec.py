"""The speedrun's spec and table of parameters. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nanogpt.models.record_spec import BigramModelSpec
from nanogpt.parameters import Adam, Normal, NorMuon, Parameter, TransposeOf, Uniform, Values
from nanogpt.spec_fields import NOT_COMPILED, Finite, Index, Problem, Strict

Start = Annotated[Finite, NOT_COMPILED]


class ScalarInit(Strict):
    """Start values of the speedrun's learned scalars."""

    residual: Start
    attention_in: Start
    attention_out: Start
    bigram: Start
    smear: Start
    backout: Start
    skip: Start


class SpeedrunModelSpec(BigramModelSpec):
    """The speedrun's model (`nanogpt.models.speedrun.model`)."""

    kind: Literal["speedrun"]
    backout_layer: Index = Field(description="layer whose output is subtracted before the head")
    scalars: ScalarInit

    def parameters(self) -> tuple[Parameter, ...]:
        """Row r of `attn` belongs to the r-th layer with attention: q, k, v, o, each (D, D) stored (out, in)."""
        d, v, layers, heads, gates = self.width, self.padded_vocab_size, self.layers, self.heads, self.gate_inputs
        attention, tables = len(self.attention_layers), len(self.value_embed_layers)
        hidden, start = self.mlp_expansion * d, self.scalars
        matrix, up = Uniform(self.matrix_start), Uniform(self.matrix_start, (slice(None), 0))
        scalars = (
            [start.residual] * layers
            + [start.attention_in, start.attention_out] * layers
            + [start.bigram] * layers
            + [start.smear, start.backout, start.skip]
        )
        slow, table, head = (0.9, 0.99), (0.75, 0.95), (0.5, 0.95)
        return (
            Parameter("attn", (attention, 4 * d, d), NorMuon(d), matrix, update=3),
            # [:, 0] up, [:, 1] down
            Parameter(
                "mlp",
                (layers + self.mlp_bank_padding, 2, hidden, d),
                NorMuon(hidden, (1, 2)),
                up,
                3,
                padding="mlp_bank_padding",
            ),
            Parameter("scalars", (4 * layers + 3,), Adam(slow, 5), Values(scalars), dtype="fp32"),
            Parameter("value_embed", (tables * v, d), Adam(table, 75, 5, sharded=True), update=1),
            Parameter("bigram_embed", (self.bigram_rows, d), Adam(table, 75, 5, sharded=True), update=1),
            Parameter("smear_gate", (1, gates), Adam(slow, 0.01)),
            Parameter("skip_gate", (1, gates), Adam(slow, 0.05)),
            Parameter("attn_gate_bank", (attention, heads, gates), Adam(slow, 1, 1)),
            Parameter("ve_gate_bank", (tables, heads, gates), Adam(slow, 1, 1)),
            Parameter("x0_lambdas", (layers,), Adam((0.65, 0.95), 5), dtype="fp32"),
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

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        if self.backout_layer >= self.layers:
            yield (
                ("backout_layer",),
                f"is layer {self.backout_layer}, the model has layers 0..{self.layers - 1}",
            )
