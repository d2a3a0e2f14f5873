"""What a stage of the schedule says about the loss. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from nanogpt.spec_fields import NOT_COMPILED, Compiled, Count, NonNegative, Strict


class PrefixWeight(Strict):
    """Loss weight of the next token's prefix (its longest beginning that is a token), linear over a stage."""

    first: Annotated[NonNegative, NOT_COMPILED]
    last: Annotated[NonNegative, NOT_COMPILED] = Field(
        description="the value it would reach at the next stage's first step"
    )

    def at(self, progress: float) -> float:
        """The weight after a share `progress` of the stage's steps."""
        return self.first + (self.last - self.first) * progress


class PrefixLevels(Strict):
    """The same weight in steps: constant over equal parts of a stage."""

    levels: Annotated[list[NonNegative], NOT_COMPILED] = Field(min_length=1, max_length=1000)

    def at(self, progress: float) -> float:
        """The weight after a share `progress`, below 1, of the stage's steps."""
        return self.levels[int(len(self.levels) * progress)]


def _form(weight: Any) -> str:
    stepwise = "levels" in weight if isinstance(weight, dict) else isinstance(weight, PrefixLevels)
    return "stepwise" if stepwise else "linear"


class StageLoss(Strict):
    """The terms of the loss in a stage, and their weights."""

    token_weights: Annotated[list[NonNegative], Compiled(len)] = Field(
        min_length=1,
        max_length=8,
        description="loss weights of the next tokens; the last of several falls to 0",
    )
    prefix_weight: (
        Annotated[
            Annotated[PrefixWeight, Tag("linear")] | Annotated[PrefixLevels, Tag("stepwise")], Discriminator(_form)
        ]
        | None
    ) = Field(default=None, description="null: prefixes are not predicted")
    candidates: Count | None = Field(
        default=None,
        description="classes in a micro-batch's softmax, including its targets; null: all",
    )

    def token_weights_at(self, progress: float) -> tuple[float, ...]:
        """The weights after a share `progress` of the stage's steps; the last of several falls linearly to 0."""
        if len(self.token_weights) == 1:
            return tuple(self.token_weights)
        return (*self.token_weights[:-1], self.token_weights[-1] * (1 - progress))

    @property
    def terms(self) -> tuple[int, bool, int | None]:
        """What decides the graph: the number of next tokens, whether there are prefixes, the number of candidates."""
        return len(self.token_weights), self.prefix_weight is not None, self.candidates
