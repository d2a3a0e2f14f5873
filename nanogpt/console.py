"""What the user sees: tables, and progress bars on a terminal or plain lines in a log."""

from __future__ import annotations

import io
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from nanogpt.terminal import printable, rich_console

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Advance = Callable[[int], None]
_BAR = re.compile(r"(?<!\\)\|")  # between cells


def say(message: str, stream: TextIO | None = None) -> None:
    """Print one line at once, whole beside other ranks'. Standard error by default: standard output is for results."""
    print(f"{message}\n", end="", file=stream or sys.stderr, flush=True)  # one write, with PYTHONUNBUFFERED too


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


def new_table(*columns: str, left: int = 1, wrap: Sequence[str] = (), spare: Sequence[str] = ()) -> Table:
    """An empty table in the one style that commands print; fill it with `add_row`.

    Args:
        columns: headings.
        left: how many of the first columns are aligned to the left; the others go to the right.
        wrap: columns that are also on the left, and wrap on a narrow terminal.
        spare: columns that a narrow terminal drops, in this order.
    """
    from rich import box
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table

    class _Table(Table):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            self.box, self.padding = (box.SIMPLE_HEAD, (0, 1, 0, 0)) if console.is_terminal else (None, (0, 2, 0, 0))
            for heading in spare:
                if Measurement.get(console, options.update(max_width=10_000), self).maximum <= options.max_width:
                    break
                self.columns = [column for column in self.columns if column.header != heading]
            yield from super().__rich_console__(console, options)

    table = _Table(pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        wraps = column in wrap
        table.add_column(
            column, justify="left" if index < left or wraps else "right", no_wrap=not wraps, overflow="fold"
        )
    return table


def print_table(*parts: RenderableType) -> None:
    """Print tables and text to standard output.

    On a terminal they fit its width; in a file or a pipe they are plain, one line per row, as wide as needed.
    """
    console = rich_console(highlight=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
    else:
        print(plain_text(*parts), end="")


def plain_text(*parts: RenderableType) -> str:
    """Tables and text as lines without colours or trailing blanks, each with its newline."""
    console = rich_console(io.StringIO(), highlight=False, width=10_000, force_terminal=False)
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    return "".join(f"{line.rstrip()}\n" for line in captured.get().rstrip("\n").split("\n"))


def print_report(lines: Iterable[str]) -> None:
    """Print lines to standard output, with Markdown tables among them in the style of `print_table`."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for is_table, group in itertools.groupby("\n".join(lines).split("\n"), lambda line: line.startswith("| ")):
        block = list(group)
        cells = [[cell.strip() for cell in _BAR.split(line)[1:-1]] for line in block] if is_table else []
        if len({*map(len, cells)}) != 1 or cells[1:2] != [["---"] * len(cells[0])]:
            parts.append(Text("\n".join(map(printable, block))))
            continue
        head, _, *rows = cells
        numbers = [all(re.match(r"[-+\d.]|$", row[column]) for row in rows) for column in range(len(head))]
        table = new_table(*head, left=0, wrap=[name for name, number in zip(head, numbers, strict=True) if not number])
        for row in rows:
            table.add_row(*(Text(printable(cell.replace("\\|", "|"))) for cell in row))
        parts.append(table)
    print_table(*parts)


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

    Yields `advance(n)`, which may be called from several threads. `total` is in bytes if `bytes_unit`,
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
        say(f"{description}: {amount}, {time.monotonic() - start:.0f} s", stream)

    def advance(n: int) -> None:
        nonlocal done, last
        with lock:
            done += n
            if time.monotonic() - last >= every_s:
                last = time.monotonic()
                show()

    yield advance
    show()
