"""What the user sees while work goes on: progress bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from nanogpt.terminal import printable, rich_console

Advance = Callable[[int], None]


def say(message: str) -> None:
    """Print one line to standard error at once (standard output is kept for results)."""
    print(message, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """`1234567` -> `'1.2 MB'` (decimal units, as disks and downloads are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table; cells are written as `str` writes them, without escapes."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


@contextmanager
def progress(
    description: str,
    total: int,
    *,
    bytes_unit: bool = False,
    every_s: float = 10.0,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """A progress bar on a terminal; in a log one plain line every `every_s` seconds and one at the end.

    Yields `advance(n)`, which may be called from several threads. `total` is in bytes where `bytes_unit`,
    else in items.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amount = (DownloadColumn(), TransferSpeedColumn()) if bytes_unit else (MofNCompleteColumn(),)
        with Progress(
            TextColumn("{task.fields[shown]}", markup=False),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
            console=rich_console(stream),
        ) as bar:
            task = bar.add_task("", total=total, shown=printable(description))
            yield lambda n: bar.advance(task, n)
        return

    start = last = time.monotonic()
    done = 0
    lock = threading.Lock()

    def show() -> None:
        amount = f"{human_bytes(done)} of {human_bytes(total)}" if bytes_unit else f"{done} of {total}"
        print(f"{description}: {amount}, {time.monotonic() - start:.0f} s", file=stream, flush=True)

    def advance(n: int) -> None:
        nonlocal done, last
        with lock:
            done += n
            if time.monotonic() - last >= every_s:
                last = time.monotonic()
                show()

    yield advance
    show()
