"""Runs side by side: time, loss, speed by stage, and their differences. As data, and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanogpt.runs.display import ms_text
from nanogpt.runs.loaded import LoadedRun, differences, require, show
from nanogpt.runs.table import run_summary
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

OWN_KEYS = ("name", "description", "output", "reference")


def comparison_data(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """Results and differences of two or more runs, as JSON data. Unknown values are None.

    - runs: for each `label` (A, B, ...), `run_summary`'s fields (with the directory's name as `run`), val_loss (after
      the last step), train_seconds, ms_per_step, seed, interruptions, and code: commit, clean, source_sha256
    - differences: part (spec, code, hardware or data), key, values in the order of the runs

    Raises `InputError` for fewer than two runs.
    """
    require(runs, 2, "compare")
    return {
        "runs": [{"label": letter(index), **_facts(run)} for index, run in enumerate(runs)],
        "differences": [
            {"part": found.part, "key": found.key, "values": list(found.values)}
            for found in differences(runs, ignore=OWN_KEYS)
        ],
    }


def _facts(run: LoadedRun) -> dict[str, Any]:
    summary = run_summary(run.metrics)
    seconds, steps, record = run.train_seconds, summary["steps"], run.record
    return {
        "run": run.label,
        "path": str(run.path),
        **summary,
        "state": run.state,
        "val_loss": run.final_loss,
        "train_seconds": seconds,
        "ms_per_step": None if seconds is None or not steps else 1000 * seconds / steps,
        "seed": run.spec.training.seed,
        "interruptions": None if record is None else record.interruptions,
        "code": {
            "commit": None if record is None else record.code.commit,
            "clean": None if record is None else record.code.clean,
            "source_sha256": None if record is None else record.code.source_sha256,
        },
    }


def comparison_table(data: dict[str, Any]) -> RenderableType:
    """`comparison_data` as tables.

    Runs have letters, which a legend explains; numbers come with their difference from run A's.
    """
    from rich.console import Group
    from rich.text import Text

    from nanogpt.console import new_table

    runs = data["runs"]
    letters = [letter(index) for index in range(len(runs))]
    legend = Text("\n".join(f"{name} = {printable(run['run'])}" for name, run in zip(letters, runs, strict=True)))
    table = new_table("", *letters)
    table.add_row("state", *(run["state"] for run in runs))
    table.add_row("hardware", *(_hardware(run) for run in runs))
    table.add_row("commit", *(_commit(run["code"]) for run in runs))
    table.add_row("source", *(show(run["code"]["source_sha256"]) for run in runs))
    table.add_row("seed", *(str(run["seed"]) for run in runs))
    table.add_row("steps", *(_steps(run) for run in runs))
    _numbers(table, "training time (s)", [run["train_seconds"] for run in runs], "{:,.2f}".format, "{:+.2f}")
    _numbers(table, "final loss", [run["val_loss"] for run in runs], "{:.4f}".format, "{:+.4f}")
    _numbers(table, "ms/step", [run["ms_per_step"] for run in runs], ms_text, "{:+.2f}")
    for stage in sorted({stage["stage"] for run in runs for stage in run["stages"]}):
        found = [next((s["ms_per_step"] for s in run["stages"] if s["stage"] == stage), None) for run in runs]
        _numbers(table, f"ms/step, stage {stage + 1}", found, ms_text, "{:+.2f}")
    losses = [{evaluation["step"]: evaluation["val_loss"] for evaluation in run["evaluations"]} for run in runs]
    for step in sorted(set().union(*losses)):
        found = [of_run.get(step) for of_run in losses]
        _numbers(table, f"loss at step {step:,}", found, "{:.4f}".format, "{:+.4f}")
    if any(run["interruptions"] for run in runs):
        table.add_row("interruptions", *(show(run["interruptions"]) for run in runs))

    if not data["differences"]:
        return Group(legend, table, Text("No difference in spec, code, hardware or data."))
    apart = new_table("differs", "key", *letters, wrap=("key", *letters))
    for found in data["differences"]:
        apart.add_row(found["part"], *(Text(printable(text)) for text in (found["key"], *map(show, found["values"]))))
    return Group(legend, table, apart)


def letter(index: int) -> str:
    """0 -> `A`, 25 -> `Z`, 26 -> `AA`: a run's name in the table."""
    before, last = divmod(index, 26)
    return (letter(before - 1) if before else "") + chr(ord("A") + last)


def _numbers(table: Any, name: str, values: list[float | None], text: Callable[[float], str], delta: str) -> None:
    first, *others = values
    cells = ["-" if first is None else text(first)]
    for value in others:
        if value is None:
            cells.append("-")
        else:
            cells.append(text(value) + ("" if first is None else f" ({delta.format(value - first)})"))
    table.add_row(name, *cells)


def _hardware(run: dict[str, Any]) -> str:
    return f"{run['world_size'] or '?'} x {run['device'] or '?'}"


def _commit(code: dict[str, Any]) -> str:
    if code["commit"] is None:
        return "-"
    return str(code["commit"])[:12] + {True: "", False: " with changes", None: " (clean?)"}[code["clean"]]


def _steps(run: dict[str, Any]) -> str:
    total = run["total_steps"]
    return f"{run['steps']:,}" + ("" if total in (None, run["steps"]) else f" of {total:,}")
