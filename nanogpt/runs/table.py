"""A run as tables: its evaluations, and its speed by stage; as plain data, and for the terminal."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from nanogpt.console import new_table
from nanogpt.runs.display import ms_text
from nanogpt.runs.metrics import Record, RunMetrics
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LARGEST_GAP = 10_000  # at most this many steps between two records are counted singly


def run_summary(run: RunMetrics) -> dict[str, Any]:
    """A run's results as JSON data. Unknown values are None.

    - name, state, reason, device, world_size, steps (done), total_steps, tokens, train_time_ms
    - first_val_loss (of step 0), final_val_loss (of the last evaluation)
    - evaluations: step, val_loss, train_time_ms, step_avg_ms of each
    - stages: as `stage_summaries`
    """
    last = run.last
    losses = [record.get("val_loss") for record in run.evaluations]
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.end.get("reason") if run.end else None,
        "device": run.start.get("device"),
        "world_size": run.start.get("world_size"),
        "steps": last.get("step", 0),
        "total_steps": run.total_steps,
        "tokens": last.get("tokens"),
        "train_time_ms": last.get("train_time_ms"),
        "first_val_loss": losses[0] if losses and run.evaluations[0]["step"] == 0 else None,
        "final_val_loss": losses[-1] if losses else None,
        "evaluations": [
            {key: record.get(key) for key in ("step", "val_loss", "train_time_ms", "step_avg_ms")}
            for record in run.evaluations
        ],
        "stages": stage_summaries(run),
    }


def stage_summaries(run: RunMetrics) -> list[dict[str, Any]]:
    """By stage: stage, steps, tokens, ms_per_step (median of pairs), tokens_per_second (at that median).

    Times are between neighbouring step records; evaluations are outside the run's clock. The unit is two
    steps in a row: every other step also has Adam's update and its communication, and a median of single steps would
    reflect one kind alone.
    """
    begin: Record = {"step": 0, "tokens": 0, "train_time_ms": 0.0}
    stages: dict[int, _Stage] = {}
    for before, after in itertools.pairwise(itertools.chain([begin], run.steps)):
        stages.setdefault(int(after.get("stage") or 0), _Stage()).add(before, after)
    return [{"stage": number, **stage.summary()} for number, stage in sorted(stages.items())]


class _Stage:
    """Gathers what happened between the step records of a stage."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.ms: list[float] = []  # one entry per step
        self.tokens_known = True

    def add(self, before: Record, after: Record) -> None:
        steps = int(after["step"]) - int(before["step"])
        self.steps += steps
        if after.get("tokens") is None or before.get("tokens") is None:
            self.tokens_known = False
        else:
            self.tokens += int(after["tokens"]) - int(before["tokens"])
        if after.get("train_time_ms") is not None and before.get("train_time_ms") is not None:
            ms = float(after["train_time_ms"]) - float(before["train_time_ms"])
            self.ms += [ms / steps] * min(steps, LARGEST_GAP)

    def summary(self) -> dict[str, Any]:
        pairs = [(a + b) / 2 for a, b in itertools.pairwise(self.ms)] or self.ms
        median = statistics.median(pairs) if pairs else None
        tokens = self.tokens if self.tokens_known else None
        speed = tokens / self.steps / median * 1000 if tokens is not None and median else None
        return {
            "steps": self.steps,
            "tokens": tokens,
            "ms_per_step": None if median is None else round(median, 3),
            "tokens_per_second": None if speed is None else round(speed),
        }


def run_table(summary: dict[str, Any]) -> RenderableType:
    """`run_summary`'s data for the terminal: a title, the evaluations, the stages."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text(printable(_title(summary)), style="bold"),
        Text(_subtitle(summary)),
        _evaluations(summary),
        _stages(summary),
    )


def _title(summary: dict[str, Any]) -> str:
    total = "" if summary["total_steps"] is None else f" of {summary['total_steps']:,}"
    state = summary["state"] + (f" ({summary['reason']})" if summary["reason"] else "")
    return f"{summary['name']}: {state}, {summary['steps']:,}{total} steps"


def _subtitle(summary: dict[str, Any]) -> str:
    parts = []
    if summary["device"]:
        count = f"{summary['world_size']} x " if (summary["world_size"] or 1) > 1 else ""
        parts.append(f"{count}{summary['device']}")
    if summary["tokens"] is not None:
        parts.append(f"{summary['tokens']:,} tokens")
    if summary["train_time_ms"] is not None:
        parts.append(f"training time {seconds_text(summary['train_time_ms'])}")
    return ", ".join(parts)


def _evaluations(summary: dict[str, Any]) -> Table:
    table = new_table("step", "validation loss", "training time", "ms/step so far", left=0)
    for record in summary["evaluations"]:
        table.add_row(
            f"{record['step']:,}",
            "not finite" if record["val_loss"] is None else f"{record['val_loss']:.4f}",
            seconds_text(record["train_time_ms"]),
            "" if record["step_avg_ms"] is None or record["step"] == 0 else ms_text(record["step_avg_ms"]),
        )
    return table


def _stages(summary: dict[str, Any]) -> Table:
    table = new_table("stage", "steps", "tokens", "ms/step (median of pairs)", "tokens/s", left=0)
    for stage in summary["stages"]:
        table.add_row(
            str(stage["stage"] + 1),
            f"{stage['steps']:,}",
            *("" if stage[key] is None else f"{stage[key]:,}" for key in ("tokens",)),
            "" if stage["ms_per_step"] is None else ms_text(stage["ms_per_step"]),
            "" if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,}",
        )
    return table


def seconds_text(ms: float | None) -> str:
    """Milliseconds as seconds: `93.1 s`; nothing for None."""
    return "" if ms is None else f"{ms / 1000:,.1f} s"
