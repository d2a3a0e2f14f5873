"""The curves of runs as data for charts.js: no plotting library's terms, no more points than a screen shows."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from nanogpt.runs.curves import Points, last_tenth, points, smoothed_training, stage_starts, time_unit
from nanogpt.runs.loaded import LoadedRun
from nanogpt.runs.plot import COLOURS
from nanogpt.terminal import printable

MOST = 1_200  # points of a curve
PALETTES = {"light": COLOURS, "dark": ("#56B4E9", "#FF8A4C", "#2FC695", "#E79AC4", "#F0B429", "#9FB3FF", "#F5F5F5")}


def run_figures(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """Validation by step and by time, its difference from the first run's, and training by step and by time.

    A figure without a curve is left out. Names contain no markup, which plotly.js would interpret.
    """
    metrics = [run.metrics for run in runs]
    scale, unit = time_unit(metrics)
    axes = (("step", "step", 1.0, "step"), ("train_time_ms", f"training time ({unit})", scale, "time"))
    found = []
    for x, title, factor, by in axes:
        lines = [
            _line(_scaled(points(run.evaluations, x, "val_loss", MOST), factor), name(loaded.label), index, marked=True)
            for index, (loaded, run) in enumerate(zip(runs, metrics, strict=True))
        ]
        longest = max((line["x"][-1] for line in lines if line["x"]), default=0)
        if longest:
            lines += [
                _line([(0, target), (longest, target)], f"target {target:g}", None, quiet=True)
                for target in targets(runs)
            ]
        if x == "step":
            lines += _published(runs)
        found.append(_figure(f"validation-{by}", f"Validation loss by {by}", title, lines, runs, x, factor))
    last = last_tenth(metrics)
    if last is not None and last.from_first_run:
        lines = [
            _line(curve, name(run.label), i, marked=True)
            for i, (curve, run) in enumerate(zip(last.curves, runs, strict=True))
        ]
        heading = f"Validation loss minus that of {runs[0].label}"
        found.append(_figure("difference", heading, "step", lines, runs, "step", 1.0))
    for x, title, factor, by in axes:
        lines = []
        for index, (loaded, run) in enumerate(zip(runs, metrics, strict=True)):
            if len(runs) == 1:
                raw = points(run.steps, x, "train_loss", MOST)
                lines.append(_line(_scaled(raw, factor), name(loaded.label), index, raw=True, quiet=True))
            smooth = smoothed_training(run, x, MOST)
            joined = [point for part in smooth for point in (*_scaled(part, factor), (part[-1][0] * factor, None))]
            lines.append(_line(joined, name(loaded.label), index))
        found.append(_figure(f"training-{by}", f"Training loss by {by}, smoothed", title, lines, runs, x, factor))
    return [figure for figure in found if any(line["run"] is not None and line["x"] for line in figure["lines"])]


def targets(runs: Sequence[LoadedRun]) -> list[float]:
    """The target losses of the runs on FineWeb; for others they mean nothing."""
    return sorted({t for run in runs if run.on_fineweb and (t := run.spec.evaluation.target_loss) is not None})


def name(label: str) -> str:
    """A run's label as text that plotly.js shows unchanged."""
    return html.escape(printable(label), quote=False)


def _published(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    curves = {
        curve.name: curve.points
        for run in runs
        if run.has_reference and run.spec.reference is not None
        for curve in run.spec.reference.curves
    }
    return [_line([(float(x), y) for x, y in curve], name(label), None, marked=True) for label, curve in curves.items()]


def _scaled(curve: Points, factor: float) -> Points:
    return [(x * factor, y) for x, y in curve]


def _line(
    curve: Sequence[tuple[float, float | None]],
    label: str,
    run: int | None,
    *,
    marked: bool = False,
    raw: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """One curve. run: its number, for its colour; None: it belongs to no run. quiet: the pointer shows nothing."""
    return {
        "name": label,
        "run": run,
        "x": [float(f"{x:.7g}") for x, _ in curve],
        "y": [None if y is None else float(f"{y:.7g}") for _, y in curve],
        "marked": marked and len(curve) <= 60,
        "raw": raw,
        "quiet": quiet,
    }


def _figure(
    key: str, title: str, x_title: str, lines: list[dict[str, Any]], runs: Sequence[LoadedRun], x: str, factor: float
) -> dict[str, Any]:
    losses = [y for line in lines for y in line["y"] if y is not None]
    starts = [stage_starts(run.metrics) for run in runs]
    column = 1 if x == "step" else 2
    places = [[start[column] for start in of_run[1:]] for of_run in starts]
    same = all(found == places[0] for found in places)
    return {
        "id": key,
        "title": title,
        "x": x_title,
        "x_format": ",.0f" if x == "step" else ".2f",
        "lines": lines,
        "runs": len(runs),
        "targets": sorted({line["y"][0] for line in lines if line["quiet"] and line["run"] is None}),
        "logarithmic": bool(losses) and min(losses) > 0 and max(losses) > 2 * min(losses),
        "stages": [place * factor for place in places[0] if place is not None] if same else [],
    }
