"""The loss plot: validation and training loss of runs against steps and against training time, as PNG or SVG.

A curve of a million steps is drawn as the lowest and the highest of every few: no more points than can be told apart.

Drawn without a display and without pyplot's global state. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InputError, RunError
from nanogpt.runs.metrics import Records, RunMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
MOST_POINTS = 4_000  # of a curve; a picture is 1,650 pixels wide

# Okabe and Ito's palette: told apart with every kind of colour vision. Its yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE_COLOUR = "#555555"


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
    """Draw the losses of `runs`, label -> run, into `path`; its suffix, .png or .svg, says the format.

    Args:
        runs: drawn in this order.
        path: the picture.
        references: losses to compare with.
        curves: published validation losses, name -> (step, loss); drawn against steps, as their times are of other
            machines.

    Raises:
        InputError: another suffix, or nothing recorded to draw.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    if not any(_points(run.evaluations, "step", "val_loss") for run in runs.values()) and not any(
        _points(run.steps, "step", "train_loss") for run in runs.values()
    ):
        raise InputError(f"{path}: nothing to plot: no loss is recorded yet in {', '.join(runs)}")

    with new_figure(11, 5) as figure:
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        scale, unit = _time_unit(runs)
        _draw(by_step, runs, "step", 1.0)
        _draw(by_time, runs, "train_time_ms", scale)
        by_step.set_xlabel("step")
        by_time.set_xlabel(f"training time ({unit})")
        by_step.set_ylabel("loss (nats a token)")
        for index, (name, points) in enumerate((curves or {}).items()):
            by_step.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=REFERENCE_COLOUR,
                linewidth=1,
                linestyle=("--", ":", "-.")[index % 3],
                marker="x",
                markersize=4,
                label=name,
                zorder=2.5,
            )
        _set_loss_range(by_step, runs, references, [loss for line in (curves or {}).values() for _, loss in line])
        for axes in (by_step, by_time):
            axes.set_xlim(left=0)
            for reference in references:
                axes.axhline(reference.value, color=REFERENCE_COLOUR, linestyle="--", linewidth=1.2, zorder=1)
        for reference in references:
            _label_reference(by_time, reference)
        handles, labels = by_step.get_legend_handles_labels()
        # The legend carries the title: both stand above the plots, and the layout sees one of them only.
        figure.legend(
            handles,
            labels,
            title=_title(*next(iter(runs.items()))) if len(runs) == 1 else None,
            loc="outside upper center",
            ncols=2 if len(handles) in (2, 4) else 3,
        )
        save(figure, path)


def check_suffix(path: Path) -> None:
    """Raises InputError where `path` is not the name of a picture that can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a plot is written as {' or '.join(SUFFIXES)}, found suffix {path.suffix!r}")


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of `width` by `height` inches in the style of all plots; to be drawn and saved inside."""
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
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.title_fontsize": 13,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanogpt",  # the same run gives the same file
}


def _points(records: Records, x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the records that have both, thinned out to `MOST_POINTS`; the extremes and the last stay."""
    import numpy as np

    xs, ys = records.column(x), records.column(y)
    known = ~(np.isnan(xs) | np.isnan(ys))
    xs, ys = xs[known], ys[known]
    if len(xs) > MOST_POINTS:
        size = -(-2 * len(xs) // MOST_POINTS)
        kept = {0, len(xs) - 1}
        for first in range(0, len(xs), size):
            part = ys[first : first + size]
            kept |= {first + int(part.argmin()), first + int(part.argmax())}
        order = sorted(kept)
        xs, ys = xs[order], ys[order]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _draw(axes: Axes, runs: Mapping[str, RunMetrics], x: str, scale: float) -> None:
    only = len(runs) == 1
    for index, (label, run) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        validation = _points(run.evaluations, x, "val_loss")
        if validation:
            axes.plot(
                [point[0] * scale for point in validation],
                [point[1] for point in validation],
                color=colour,
                linewidth=2,
                linestyle=("-", "-.", ":")[index // len(COLOURS) % 3],
                marker="o",
                markersize=4,
                clip_on=False,
                label="validation" if only else label,
                zorder=3,
            )
        training = _points(run.steps, x, "train_loss")
        if training:
            axes.plot(
                [point[0] * scale for point in training],
                [point[1] for point in training],
                color=COLOURS[1] if only else colour,
                alpha=0.8 if only else 0.35,
                linewidth=1,
                zorder=2,
            )
    if any(run.steps for run in runs.values()):
        # An empty line, for the legend alone.
        text = "training (multi-token weights)" if only else "thin: training (multi-token weights)"
        axes.plot([], [], color=COLOURS[1] if only else REFERENCE_COLOUR, linewidth=1, label=text)


def _label_reference(axes: Axes, reference: Reference) -> None:
    """Beside the plot, where no curve runs."""
    axes.annotate(
        f"{reference.label}\n{reference.value:.4g}",
        xy=(1, reference.value),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        color=REFERENCE_COLOUR,
        fontsize=10,
    )


def _set_loss_range(
    axes: Axes, runs: Mapping[str, RunMetrics], references: Sequence[Reference], published: Sequence[float]
) -> None:
    """Show all of validation and of the references; training, whose weighted loss starts far above, may leave the top.

    The scale is logarithmic where the loss falls to less than half, because most of a run happens near its end.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    validation = [point[1] for run in runs.values() for point in _points(run.evaluations, "step", "val_loss")]
    validation += published
    training = [point[1] for run in runs.values() for point in _points(run.steps, "step", "train_loss")]
    low = min(*validation, *training, *(reference.value for reference in references), float("inf"))
    tops = validation if len(validation) > 1 else [*validation, *training]
    high = max(*tops, *(reference.value for reference in references), 0.0)
    if low > 0 and high > 2 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.06, high * 1.06)
        axes.yaxis.set_major_locator(FixedLocator(_LOG_TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


_LOG_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 30, 50, 100)


def _time_unit(runs: Mapping[str, RunMetrics]) -> tuple[float, str]:
    """Factor from milliseconds, and the unit's name."""
    longest = max((float(run.last.get("train_time_ms") or 0) for run in runs.values()), default=0)
    for unit, ms in (("hours", 3_600_000), ("minutes", 60_000)):
        if longest >= 5 * ms:
            return 1 / ms, unit
    return 1 / 1000, "seconds"


def _title(label: str, run: RunMetrics) -> str:
    final = _points(run.evaluations, "step", "val_loss")
    if not final or final[-1][0] != run.evaluations[-1]["step"]:
        return label
    return f"{label}: validation loss {final[-1][1]:.4f} after {final[-1][0]:,.0f} steps"


def save(figure: Figure, path: Path) -> None:
    """Write the picture, whole or not at all. Raises RunError where it cannot be written."""
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
