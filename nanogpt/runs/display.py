"""What the user sees while a run trains: a progress bar on a terminal, plain lines in a job's log.

The bar is drawn inside `step`, at most `REDRAWS_PER_SECOND` times a second, and not by a separate thread, which would
take the interpreter from the one that launches kernels, within the measured time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from nanogpt.console import say
from nanogpt.terminal import rich_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REDRAWS_PER_SECOND = 4
AVERAGED_STEPS = 20


class StepDisplay:
    """Progress of a run's steps on `stream` (standard error by default).

    Args:
        stream: a terminal gets a bar, anything else plain lines.
        every_s: without a bar, the least number of seconds between step lines. Evaluations are always shown.
        clock: monotonic seconds.

    Only rank 0 has one. `log.txt` has every line anyway.
    """

    def __init__(
        self, stream: TextIO | None = None, *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ):
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._train_loss: float | None = None
        self._val_loss: float | None = None
        self._shown_at = -float("inf")
        self._last: tuple[int, float] | None = None  # step, time of the last `step` call
        self._ms_per_step: float | None = None

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Begin a run of `total_steps`, of which `first_step` are done (0, or where it resumes)."""
        self._total = total_steps
        self._last = (first_step, self._clock())
        stream = self._stream or sys.stderr
        if not stream.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(separator="/"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            console=rich_console(stream),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("step", total=total_steps, completed=first_step, losses="", speed="")
        self._progress.start()
        self._progress.refresh()

    def step(self, step: int, text_line: str, train_loss: float | None = None) -> None:
        """Show that `step` steps are done; `text_line` is the log's line, `train_loss` the newest loss, if any."""
        now = self._clock()
        self._measure(step, now)
        if train_loss is not None:
            self._train_loss = train_loss
        last = step >= self._total
        due = 1 / REDRAWS_PER_SECOND if self._progress else self._every_s
        if not last and now - self._shown_at < due:
            return
        self._shown_at = now
        if self._progress:
            self._draw(step)
        else:
            self._print(text_line)

    def evaluation(self, step: int, text_line: str, val_loss: float) -> None:
        """Show a validation after `step` steps; its line stays on the screen."""
        self._val_loss = val_loss
        self._print(text_line)
        if self._progress:
            self._draw(step)
        # The validation's time does not belong to a step.
        self._last = (step, self._clock())

    def close(self) -> None:
        """Finish the bar and leave its last state on the screen. May be called again."""
        if self._progress:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> StepDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, line: str) -> None:
        if self._progress:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line, self._stream)

    def _measure(self, step: int, now: float) -> None:
        if self._last is not None and step > self._last[0]:
            ms = 1000 * (now - self._last[1]) / (step - self._last[0])
            if self._ms_per_step is None:
                self._ms_per_step = ms
            else:
                self._ms_per_step += (ms - self._ms_per_step) / AVERAGED_STEPS
        self._last = (step, now)

    def _draw(self, step: int) -> None:
        assert self._progress is not None and self._task is not None
        losses = [
            f"{name} {value:.4f}"
            for name, value in (("loss", self._train_loss), ("val", self._val_loss))
            if value is not None
        ]
        speed = ""
        if self._ms_per_step is not None:
            left = max(0, self._total - step) * self._ms_per_step / 1000
            speed = f"{ms_text(self._ms_per_step)} ms/step, {_clock_time(left)} left"
        self._progress.update(self._task, completed=step, losses="  ".join(losses), speed=speed)
        self._progress.refresh()


def ms_text(ms: float) -> str:
    """Milliseconds with three digits, or whole: `33.4`, `431`, `12,345`."""
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def _clock_time(seconds: float) -> str:
    """`75` -> `'1:15'`, `3700` -> `'1:01:40'`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
