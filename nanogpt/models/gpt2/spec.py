"""GPT-2's spec and table of parameters. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nanogpt.models.model_spec import BaseModelSpec
from nanogpt.models.stage_loss import StageLoss
from nanogpt.parameters import Decoupled, Normal, Parameter, Values
from nanogpt.spec_fields import NOT_COMPILED, Few, Positive, Problem, Size


class Gpt2ModelSpec(BaseModelSpec):
    """The classic GPT-2 baseline (`nanogpt.models.gpt2.model`)."""

    kind: Literal["gpt2"]
    mlp_expansion: Few
    context: Size = Field(description="learned positions; longer documents are read in pieces of this length")
    init_std: Annotated[Positive, NOT_COMPILED]

    def parameters(self) -> tuple[Parameter, ...]:
        """Matrices normal with init_std, those that write into the residual divided by sqrt(2 layers); biases 0."""
        d, hidden = self.width, self.mlp_expansion * self.width
        start, residual = Normal(self.init_std), Normal(self.init_std / math.sqrt(2 * self.layers))

        def matrix(name: str, rows: int, columns: int, start: Normal = start) -> Parameter:
            return Parameter(name, (rows, columns), Decoupled(True), start)

        def linear(name: str, rows: int, columns: int, start: Normal = start) -> list[Parameter]:
            bias = Parameter(f"{name}.bias", (rows,), Decoupled(False))
            return [matrix(f"{name}.weight", rows, columns, start), bias]

        def layer_norm(name: str) -> list[Parameter]:
            gain = Parameter(f"{name}.weight", (d,), Decoupled(False), Values(1.0))
            return [gain, Parameter(f"{name}.bias", (d,), Decoupled(False))]

        rows = [matrix("embed.weight", self.padded_vocab_size, d), matrix("positions.weight", self.context, d)]
        for block in (f"blocks.{layer}" for layer in range(self.layers)):
            rows += layer_norm(f"{block}.ln_1")
            rows += linear(f"{block}.qkv", 3 * d, d)
            rows += linear(f"{block}.attn_out", d, d, residual)
            rows += layer_norm(f"{block}.ln_2")
            rows += linear(f"{block}.mlp_up", hidden, d)
            rows += linear(f"{block}.mlp_down", d, hidden, residual)
        return (*rows, *layer_norm("ln_f"))

    @property
    def longest_document(self) -> int:
        """The number of learned positions."""
        return self.context

    def problems(self) -> Iterator[Problem]:
        """Cross-checks; yields (path below `model`, message)."""
        yield from super().problems()
        if self.width % self.heads:
            yield ("heads",), f"is {self.heads}, must divide width {self.width}"

    def stage_problems(self, stage: StageLoss) -> Iterator[Problem]:
        """It predicts the next token only."""
        yield from super().stage_problems(stage)
        if stage.token_weights != [1.0]:
            yield ("token_weights",), f"is {stage.token_weights}, {self.kind} predicts the next token only: [1.0]"
        if stage.prefix_weight is not None:
            yield ("prefix_weight",), f"is set, {self.kind} predicts the next token only: null"

    def training_flops(self, tokens: int, *, short: int, long: int) -> float:
        """See the base."""
        matrices = self.width * self.padded_vocab_size + self.layers * (4 + 2 * self.mlp_expansion) * self.width**2
        reach = self.layers * min(long, self.context) * self.width
        return 6.0 * tokens * matrices + 12.0 * tokens * reach
