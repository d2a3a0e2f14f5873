"""Standard output and error of every command. All text goes through here, where failures are handled.

Inside `terminal()`, `sys.stdout` and `sys.stderr` are `_Stream`s:

- Escape sequences and other control characters, which a terminal would obey, and marks that change the direction of
  writing are shown as `\\x1b`: run names, values, file names and documents may come from others.
- A character that the terminal's encoding lacks is shown as `\\u2028`.
- A failing standard error does not end a run: what cannot be written is lost.
- A failing standard output is an error, reported at the end, when the work is done and kept.

Colours and progress bars need escape sequences; they come from Rich, and `rich_console` makes a console that lets only
these through.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_SHOWN |= {code: f"\\u{code:04x}" for code in _BIDIRECTIONAL}


def printable(text: str) -> str:
    """`text` with every control character shown as its escape; newlines and tabs stay."""
    return text if text.isprintable() else text.translate(_SHOWN)


class _Verbatim:
    """A stream that writes text unchanged: for output that is not text, and for Rich, which escapes by itself."""

    def __init__(self, raw: TextIO | None, *, results: bool):
        self.raw = raw
        self.error: OSError | None = None
        self._results = results  # standard output
        if raw is not None and hasattr(raw, "reconfigure"):
            with suppress(ValueError, OSError):
                raw.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write; the only error that ends the program is a reader of standard output that has gone away."""
        with self._noted():
            if self.raw is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self.error is None:
                self.raw.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, as `write`."""
        with self._noted():
            if self.raw is not None and self.error is None:
                self.raw.flush()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            if self._results and error.errno == errno.EPIPE:
                raise
        except ValueError as error:  # the stream was closed
            self.error = self.error or OSError(errno.EBADF, str(error))

    def give_up(self) -> None:
        """Lose what could not be written: or Python would try again at exit, and complain or change the exit code."""
        with suppress(OSError, ValueError):
            if self.raw is not None:
                _discard(self.raw.fileno())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.raw is not None and self.raw.isatty()

    def __getattr__(self, name: str) -> Any:
        if self.raw is None:
            raise AttributeError(name)
        return getattr(self.raw, name)


class _Stream:
    """A stream that shows control characters; `verbatim` does not."""

    encoding = "utf-8"  # Click would bypass a stream with another encoding; what the real one lacks is shown escaped

    def __init__(self, raw: TextIO | None, *, results: bool):
        self.verbatim = _Verbatim(raw, results=results)

    def write(self, text: str) -> int:
        """Write `text` as `printable` shows it."""
        self.verbatim.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.verbatim, name)


class Terminal:
    """What `terminal` yields."""

    def __init__(self, out: _Stream):
        self._out = out

    def problem(self) -> str | None:
        """Why standard output is incomplete; None: it is complete, or its reader left and knows."""
        with suppress(BrokenPipeError):
            self._out.flush()
        error = self._out.verbatim.error
        if error is None:
            return None
        self._out.verbatim.give_up()
        if error.errno == errno.EPIPE:
            return None
        why = "is closed" if error.errno == errno.EBADF else f"cannot be written: {error.strerror}"
        return f"standard output {why}: the output is lost; redirect it to a file on a disk with free space"


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Standard output and error as described in the module, to the end of the block."""
    _keep_descriptors_apart()
    before = sys.stdout, sys.stderr
    out, err = _Stream(sys.stdout, results=True), _Stream(sys.stderr, results=False)
    sys.stdout, sys.stderr = out, err
    try:
        yield Terminal(out)
    finally:
        sys.stdout, sys.stderr = before
        err.flush()
        if err.verbatim.error is not None:
            err.verbatim.give_up()


def _keep_descriptors_apart() -> None:
    """Open /dev/null for closed standard streams: the next file opened would get their number, and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                _discard(number)


def _discard(number: int) -> None:
    """Make the descriptor one of /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def verbatim(stream: TextIO) -> TextIO:
    """The stream without the escaping of control characters."""
    return getattr(stream, "verbatim", stream)


def speaks_unicode() -> bool:
    """Whether standard output can take any character."""
    return (getattr(verbatim(sys.stdout), "encoding", None) or "utf-8").lower().startswith("utf")


def rich_console(stream: TextIO | None = None, **options: Any) -> Console:
    """A Rich console on `stream`, by default standard output, without markup; it shows control characters.

    A `Text` needs `printable` text, as its width is computed beforehand.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class _Console(Console):
        def render_str(self, text: str, **named: Any) -> Text:
            return super().render_str(printable(text), **named)

        def render(self, *arguments: Any, **named: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **named):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return _Console(file=verbatim(stream or sys.stdout), markup=False, emoji=False, **options)
