"""The loss plot: validation, smoothed training loss and the last tenth of runs, as PNG or SVG.

Needs neither a display nor pyplot's global state. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InputError, RunError
from nanogpt.runs.curves import (
    LastTenth,
    Points,
    between,
    last_tenth,
    points,
    smoothed_training,
    stage_starts,
    time_unit,
)
from nanogpt.runs.metrics import RunMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

# Okabe and Ito's palette, distinct for every kind of colour vision. Its yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE_COLOUR = "#555555"
FEW_RUNS = 4  # with at most this many runs, single steps and stages are drawn too
LABEL_CHARACTERS = 30  # of a run's name at the end of its line
LABEL_INCHES = 0.16  # from one label to the next
MOST_LABELS = 60  # the lowest


@dataclass(frozen=True)
class Reference:
    """A loss to compare with, drawn as a dashed line across the plot."""

    value: float
    label: str


def plot_loss(
    runs: Mapping[str, RunMetrics],
    path: Path,
    references: Sequence[Reference] = (),
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Draw the losses of `runs`, label -> run, into `path`; its suffix, .png or .svg, sets the format.

    Above: validation loss against steps and against training time. Below: training loss, a different quantity
    if further tokens count too, and the last tenth of validation.

    Args:
        runs: drawn in this order.
        path: the picture.
        references: losses to compare with.
        curves: published validation losses, name -> (step, loss); drawn against steps, as their times come from
            other machines.

    Raises:
        InputError: another suffix, or nothing recorded to draw.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    lines = [_line(index, label, run) for index, (label, run) in enumerate(runs.items())]
    training = any(line.training for line in lines)
    if not any(line.validation["step"] for line in lines) and not training:
        raise InputError(f"{path}: nothing to plot: no loss has been recorded yet in {', '.join(runs)}")

    last = last_tenth(list(runs.values()))
    below = [name for name, there in (("training", training), ("last", last is not None)) if there]
    # Two columns in each row; a single panel below takes both.
    mosaic = [["step", "time"], *([[below[0], below[-1]]] if below else [])]
    height = max(3.4, 1.2 + LABEL_INCHES * (min(len(lines), MOST_LABELS) + len(references)))
    with new_figure(11, height * len(mosaic) + 0.6) as figure:
        panels = figure.subplot_mosaic(mosaic)  # type: ignore[arg-type]
        scale, unit = time_unit(list(runs.values()))
        for name, x, factor in (("step", "step", 1.0), ("time", "train_time_ms", scale)):
            _draw_validation(panels[name], lines, [line.validation[x] for line in lines], factor)
            _draw_references(panels[name], references)
        _draw_published(panels["step"], curves or {})
        panels["step"].set_ylabel("validation loss (nats per token)")
        panels["step"].set_xlabel("step")
        panels["time"].set_xlabel(f"training time ({unit})")
        published = [loss for points_of in (curves or {}).values() for _, loss in points_of]
        validation = [loss for line in lines for _, loss in line.validation["step"]]
        wanted = [*validation, *published, *(reference.value for reference in references)]
        for name in ("step", "time"):
            _set_range(panels[name], wanted)
            panels[name].set_xlim(left=0)
        if training:
            _draw_training(panels["training"], lines)
        if last is not None:
            near_the_end = () if last.from_first_run else references
            _draw_last(panels["last"], lines, near_the_end, last)
        for name in ("step", "training") if training else ("step",):
            _draw_stages(panels[name], lines, 1, 1.0)
        _draw_stages(panels["time"], lines, 2, scale)
        if len(runs) == 1:
            figure.suptitle(_title(*next(iter(runs.items()))), fontsize=13)
        figure.draw_without_rendering()  # the labels need the panels' sizes
        named = [(line.validation["train_time_ms"], line.short, line) for line in lines]
        _label_ends(panels["time"], named if 1 < len(runs) <= FEW_RUNS or last is None else (), references, scale)
        if last is not None:
            ends = [(curve, _last_label(line, len(runs)), line) for curve, line in zip(last.curves, lines, strict=True)]
            _label_ends(panels["last"], ends, near_the_end, 1.0)
        save(figure, path)


def check_suffix(path: Path) -> None:
    """Raises InputError if `path` cannot be written as a picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: plots are written as {' or '.join(SUFFIXES)}, found suffix {path.suffix!r}")


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of `width` by `height` inches in the style of all plots, to draw and save inside the block."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.title_fontsize": 13,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanogpt",  # the same run gives the same file
}


@dataclass(frozen=True)
class _Line:
    """A run's curves: validation by `step` and by `train_time_ms`, training by step."""

    run: RunMetrics
    short: str
    colour: str
    style: str
    validation: Mapping[str, Points]
    training: list[Points]


def _line(index: int, label: str, run: RunMetrics) -> _Line:
    half = LABEL_CHARACTERS // 2
    return _Line(
        run,
        label if len(label) <= LABEL_CHARACTERS else f"{label[: half - 2]}...{label[1 - half :]}",
        COLOURS[index % len(COLOURS)],
        ("-", "-.", ":")[index // len(COLOURS) % 3],
        {x: points(run.evaluations, x, "val_loss") for x in ("step", "train_time_ms")},
        smoothed_training(run, "step"),
    )


def _draw_validation(axes: Axes, lines: Sequence[_Line], curves: Sequence[Points], scale: float = 1.0) -> None:
    for line, curve in zip(lines, curves, strict=True):
        axes.plot(
            [point[0] * scale for point in curve],
            [point[1] for point in curve],
            color=line.colour,
            linewidth=2 if len(lines) <= FEW_RUNS else 1.3,
            linestyle=line.style,
            marker="o" if len(curve) <= 40 else "",
            markersize=4 if len(lines) <= FEW_RUNS else 3,
            zorder=3,
        )


def _draw_published(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(
            [step for step, _ in curve],
            [loss for _, loss in curve],
            color=REFERENCE_COLOUR,
            linewidth=1,
            linestyle=("--", ":", "-.")[index % 3],
            marker="x",
            markersize=4,
            label=name,
            zorder=2.5,
        )
    if curves:
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93), fontsize=9)


def _draw_references(axes: Axes, references: Sequence[Reference]) -> None:
    for reference in references:
        axes.axhline(reference.value, color=REFERENCE_COLOUR, linestyle="--", linewidth=1.2, zorder=1)


def _draw_training(axes: Axes, lines: Sequence[_Line]) -> None:
    for line in lines:
        if len(lines) <= 2:
            raw = points(line.run.steps, "step", "train_loss")
            axes.plot([x for x, _ in raw], [y for _, y in raw], color=line.colour, alpha=0.25, linewidth=0.7)
        for part in line.training:
            axes.plot(
                [x for x, _ in part],
                [y for _, y in part],
                color=line.colour,
                linestyle=line.style,
                linewidth=1.5 if len(lines) <= FEW_RUNS else 1,
                zorder=3,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, smoothed\n(multi-token weights)")
    _set_range(axes, [loss for line in lines for part in line.training for _, loss in part])
    axes.set_xlim(left=0)


def _draw_last(axes: Axes, lines: Sequence[_Line], references: Sequence[Reference], last: LastTenth) -> None:
    """Validation again, near the end, on its own scale."""
    _draw_validation(axes, lines, last.curves)
    found = [y for curve in last.curves for y in between(curve, last.first, last.last)]
    span = max(found) - min(found)
    near = [r for r in references if min(found) - 2 * span <= r.value <= max(found) + 2 * span]
    _draw_references(axes, near)
    values = [*found, *(reference.value for reference in near)]
    margin = 0.08 * (max(values) - min(values)) or 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xlim(last.first, last.last + 0.03 * (last.last - last.first))
    axes.set_xlabel(f"{last.unit}, the last tenth")
    axes.set_ylabel(f"validation loss minus\n{lines[0].short}'s" if last.from_first_run else "validation loss")
    _few_ticks(axes)


def _draw_stages(axes: Axes, lines: Sequence[_Line], column: int, scale: float) -> None:
    """Where stages begin: with numbers if all runs share them, else for a few runs in their colours."""
    of_runs = [[(start[0], start[column]) for start in stage_starts(line.run)] for line in lines]
    if all(found == of_runs[0] for found in of_runs):
        low, high = axes.get_xlim()
        places = [(stage, x * scale) for stage, x in of_runs[0] if x is not None]
        for index, (stage, x) in enumerate(places):
            end = places[index + 1][1] if index + 1 < len(places) else high
            if x > low:
                axes.axvline(x, color="#9A9A9A", linestyle=":", linewidth=1, zorder=1)
            if end - x > 0.02 * (high - low) and len(places) > 1:
                axes.text(
                    (x + end) / 2,
                    0.99,
                    str(stage) if index else f"stage {stage}",
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="top",
                    fontsize=9,
                    color=REFERENCE_COLOUR,
                )
    elif len(lines) <= FEW_RUNS:
        for line, found in zip(lines, of_runs, strict=True):
            for x in (x for _, x in found[1:] if x is not None):
                axes.axvline(x * scale, color=line.colour, linestyle=":", linewidth=1, alpha=0.6, zorder=1)


def _last_label(line: _Line, runs: int) -> str:
    loss = f"{line.validation['step'][-1][1]:.4f}" if line.validation["step"] else ""
    return loss if runs == 1 else f"{loss}  {line.short}"


def _label_ends(
    axes: Axes, ends: Sequence[tuple[Points, str, _Line]], references: Sequence[Reference], scale: float
) -> None:
    """A label to the right of the panel for each curve that ends in it and each reference, one below the other."""
    low, high = axes.get_ylim()
    inverse = axes.transAxes.inverted()

    def height(y: float) -> float:
        return float(inverse.transform(axes.transData.transform((axes.get_xlim()[0], y)))[1])

    # Height wanted, text, colour, the curve's end.
    wanted: list[tuple[float, str, str, tuple[float, float] | None]] = [
        (height(curve[-1][1]), text, line.colour, (curve[-1][0] * scale, curve[-1][1]))
        for curve, text, line in ends
        if curve
    ]
    wanted = sorted(wanted, key=lambda label: label[0])[:MOST_LABELS]
    wanted += [
        (height(reference.value), f"{reference.label} {reference.value:.4g}", REFERENCE_COLOUR, None)
        for reference in references
        if low <= reference.value <= high
    ]
    wanted.sort(key=lambda label: label[0])
    gap = LABEL_INCHES * axes.figure.dpi / axes.get_window_extent().height
    for (_, text, colour, tip), y in zip(wanted, spread([label[0] for label in wanted], gap), strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 1}
        axes.annotate(
            text,
            xy=tip or (1, y),
            xycoords="data" if tip else "axes fraction",
            xytext=(1.06, y),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops=leader if tip else None,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near as possible to those wanted, which are sorted, at least `gap` apart.

    They stay between 0 and 1 as long as there is room.
    """
    groups: list[tuple[float, int]] = []  # centre, size
    for place in wanted:
        centre, size = place, 1
        while True:
            half = gap * (size - 1) / 2
            centre = max(min(centre, 1 - half), half)
            if not groups or groups[-1][0] + gap * (groups[-1][1] + 1) / 2 <= centre - half:
                break
            other, others = groups.pop()
            centre, size = (centre * size + other * others) / (size + others), size + others
        groups.append((centre, size))
    return [centre + gap * (i - (size - 1) / 2) for centre, size in groups for i in range(size)]


def _set_range(axes: Axes, losses: Sequence[float]) -> None:
    """Show all of these. Logarithmic if the loss falls to less than half: most of a run happens near its end."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    _few_ticks(axes)
    if not losses:
        return
    low, high = min(losses), max(losses)
    if low > 0 and high > 2 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.06, high * 1.06)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low / 1.06, high * 1.06)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, the roundest first, at least a ninth of the axis apart."""
    gap = math.log(high / low) / 9
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    chosen: list[float] = []
    for digits in ((1.0,), (2.0, 5.0), (3.0,), (4.0, 7.0), (1.5, 2.5, 3.5, 6.0), (1.2, 4.5, 8.0, 9.0)):
        for tick in (digit * 10.0**decade for decade in decades for digit in digits):
            if low <= tick <= high and all(abs(math.log(tick / other)) >= gap for other in chosen):
                chosen.append(tick)
    return sorted(chosen)


def _title(label: str, run: RunMetrics) -> str:
    final = points(run.evaluations, "step", "val_loss")
    if not final or final[-1][0] != run.evaluations[-1]["step"]:
        return label
    return f"{label}: validation loss {final[-1][1]:.4f} after {final[-1][0]:,.0f} steps"


def save(figure: Figure, path: Path) -> None:
    """Write the picture, completely or not at all. Raises RunError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    suffix = path.suffix.lower().removeprefix(".")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: the plot cannot be written: {error.strerror}; name another file with --out") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
