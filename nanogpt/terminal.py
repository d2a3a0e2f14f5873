"""Standard output and error of every command: all text goes through here, where failures are handled.

Inside `terminal()`, `sys.stdout` and `sys.stderr` are `_Stream`s:

- What a terminal would obey (escape sequences and other control characters) or be confused by (marks that change the
  direction of writing) is shown as `\\x1b`: run names, values, file names and documents are other people's.
- A character that the terminal's encoding lacks is shown as `\\u2028`.
- Standard error that takes no more is no reason to end a run: what it does not take is lost.
- Standard output that takes no more is an error, told at the end, when the work is done and kept.

Colours and progress bars, which need escape sequences of their own, are Rich's: `rich_console` makes a console that
shows those of others.
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
    """`text` with every character that a terminal would obey shown as its escape; newlines and tabs stay."""
    return text if text.isprintable() else text.translate(_SHOWN)


class _Verbatim:
    """A stream's text as it is: for what is not text of a terminal, and for Rich, which escapes by itself."""

    def __init__(self, raw: TextIO | None, *, results: bool):
        self.raw = raw
        self.error: OSError | None = None
        self._results = results  # standard output
        if raw is not None and hasattr(raw, "reconfigure"):
            with suppress(ValueError, OSError):
                raw.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write; of errors only a reader that has gone away ends the program, and only where results go."""
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

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.raw is not None and self.raw.isatty()

    def __getattr__(self, name: str) -> Any:
        if self.raw is None:
            raise AttributeError(name)
        return getattr(self.raw, name)


class _Stream:
    """A stream that shows control characters; `verbatim` is the same without."""

    encoding = "utf-8"  # Click would go round a stream of another one; what the real one lacks is shown escaped

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
        """Why not all of standard output has arrived; None: it has, or its reader left, who knows."""
        with suppress(BrokenPipeError):
            self._out.flush()
        error = self._out.verbatim.error
        if error is None:
            return None
        raw = self._out.verbatim.raw
        with suppress(OSError, ValueError):  # or Python would try again, and say so, at its end
            if raw is not None:
                _discard(raw.fileno())
        if error.errno == errno.EPIPE:
            return None
        why = "is closed" if error.errno == errno.EBADF else f"cannot be written: {error.strerror}"
        return f"standard output {why}: what should stand there is lost; direct it to a file on a disk that has room"


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Standard output and error as the module says, to the end of the block."""
    _keep_descriptors_apart()
    before = sys.stdout, sys.stderr
    out = _Stream(sys.stdout, results=True)
    sys.stdout, sys.stderr = out, _Stream(sys.stderr, results=False)
    try:
        yield Terminal(out)
    finally:
        sys.stdout, sys.stderr = before


def _keep_descriptors_apart() -> None:
    """Put nothing where a standard stream is closed: the next file to be opened would take its number, and its text."""
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
    """A Rich console on `stream`, standard output by default, that takes text as it is, and shows control characters.

    Where they stand in a `Text`, its width is calculated without: give it `printable` text.
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
