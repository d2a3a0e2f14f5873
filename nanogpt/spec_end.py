"""What can happen at the end of a run: the entries of `training.end`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from nanogpt.parameters import Parameter
from nanogpt.spec_fields import Count, Fraction, Index, Name, Names, Problem, Strict


class EndEntry(Strict):
    """Base of the entries of `training.end`."""

    def problems(self, total_steps: int, rows: Sequence[Parameter]) -> Iterator[Problem]:
        """Cross-checks with the run's steps and the model's table; yields (path below the entry, message)."""
        yield from ()

    def averaged(self) -> Iterator[str]:
        """The parameters it keeps fp32 averages of, once for each average."""
        yield from ()

    def shortened(self, scaled: Callable[..., int], before: int, after: int) -> dict[str, Any]:
        """The entry for a run of `after` steps instead of `before`; `scaled(steps, at_least)` scales and rounds."""
        return self.model_dump()

    def describe(self, total_steps: int) -> list[str]:
        """Lines for the log and the record."""
        raise NotImplementedError


class TailAverage(Strict):
    """A running fp32 average of parameters, updated after some of the last steps, its ticks; the first tick copies.

    Ticks count back from the run's last step, 0, so that they mean the same in runs of any length.
    """

    blend: dict[Name, Fraction] = Field(
        min_length=1,
        max_length=1024,
        description="by parameter, how far it moves from its last value to its average: lerp(last, average, blend)",
    )
    window_steps: Count = Field(description="the ticks are within this many last steps of the run")
    every: Count = Field(description="steps between ticks; --steps leaves it, since optimizers have their own cadence")
    last: Index = Field(default=0, description="the last of these ticks, in steps before the run's last step")
    also: list[Index] = Field(
        default=[], max_length=100, description="further ticks, in steps before the run's last step"
    )
    rate: Fraction = Field(description="at a tick: average = lerp(average, weights, rate)")
    last_rate: Fraction | None = Field(default=None, description="at the last tick; null: rate")

    def ticks(self, total_steps: int) -> dict[int, float]:
        """The rates by step, ascending; the first has no meaning, as that tick copies."""
        before_end = {*range(self.last, self.window_steps, self.every), *self.also}
        rates = {total_steps - 1 - each: self.rate for each in sorted(before_end, reverse=True)}
        if self.last_rate is not None:
            rates[max(rates)] = self.last_rate
        return rates

    def shortened(self, scaled: Callable[..., int], before: int, after: int) -> dict[str, Any]:
        """The same share of the run; fewer ticks at higher rates forget as much."""

        def rate(given: float) -> float:
            return float(1 - (1 - given) ** (before / after))

        window = scaled(self.window_steps, at_least=1)
        return {
            **self.model_dump(),
            "window_steps": window,
            "last": min(scaled(self.last), window - 1),
            "also": [min(scaled(each), after - 1) for each in self.also],
            "rate": rate(self.rate),
            "last_rate": None if self.last_rate is None else rate(self.last_rate),
        }


class TailAverages(EndEntry):
    """Parameters move to, or towards, averages of their last values; some then get their norms back.

    Averages are applied in order: a parameter may be in several.
    """

    kind: Literal["tail_averages"]
    averages: list[TailAverage] = Field(min_length=1, max_length=100)
    keep_norms: Names = Field(
        default=[], description="parameters that are rescaled to their Frobenius norm before averaging"
    )

    def problems(self, total_steps: int, rows: Sequence[Parameter]) -> Iterator[Problem]:
        """Unknown parameters, steps outside the run, norms of parameters that are not averaged."""
        known = {row.name for row in rows}
        averaged = set(self.averaged())
        for index, average in enumerate(self.averages):
            path = ("averages", index)
            for name in average.blend.keys() - known:
                yield (*path, "blend", name), "is not a parameter of the model"
            if average.window_steps > total_steps:
                yield (*path, "window_steps"), f"is {average.window_steps}, the run has {total_steps} steps"
            if average.last >= average.window_steps:
                yield (*path, "last"), f"is {average.last}, outside the last {average.window_steps} steps"
            if any(each >= total_steps for each in average.also):
                yield (*path, "also"), f"has {max(average.also)}, the run has {total_steps} steps"
        for index, name in enumerate(self.keep_norms):
            if name not in averaged:
                yield ("keep_norms", index), f"{name} is not averaged"
            elif name in self.keep_norms[:index]:
                yield ("keep_norms", index), f"{name} is there twice"

    def averaged(self) -> Iterator[str]:
        """Those of each average."""
        for average in self.averages:
            yield from average.blend

    def shortened(self, scaled: Callable[..., int], before: int, after: int) -> dict[str, Any]:
        """Each average's share of the run."""
        averages = [average.shortened(scaled, before, after) for average in self.averages]
        return {**self.model_dump(), "averages": averages}

    def describe(self, total_steps: int) -> list[str]:
        """A line for each average, in order, and one for the norms."""
        lines = []
        for average in self.averages:
            ticks = average.ticks(total_steps)
            blends = ", ".join(f"{name} {blend:g}" for name, blend in average.blend.items())
            lines.append(
                f"{blends} of the way to a running average; ticks: {len(ticks)}, after steps {min(ticks)} to"
                f" {max(ticks)}; rate {average.rate:.6g}"
            )
        return [*lines, f"norms as before: {', '.join(self.keep_norms)}"] if self.keep_norms else lines


class CanonicalMask(EndEntry):
    """The last validation rules out tokens that GPT-2's tokenizer never produces after the previous one."""

    kind: Literal["canonical_mask"]

    def describe(self, total_steps: int) -> list[str]:
        """A line."""
        return ["the last validation rules out 70,889,701 pairs of tokens that GPT-2's tokenizer never produces"]


End = Annotated[TailAverages | CanonicalMask, Field(discriminator="kind")]


def has_mask(end: Sequence[EndEntry]) -> bool:
    """Whether the last validation has the canonical mask."""
    return any(isinstance(entry, CanonicalMask) for entry in end)
