"""Read any number of records from a file, plain or compressed, in blocks of bounded size.

Whatever a file holds, no step returns more than a few megabytes, and what is held is bounded by the longest record
that is wanted: a small file can stand for terabytes.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

READ_BYTES = 512 * 1024  # of a plain file at a time
FEED_BYTES = 4096  # of compressed bytes at a time: at most these before a damaged place go unread
ZSTD_FEED_BYTES = 256  # the library has no limit of its own: 4 bytes can give 128 KiB, so these give at most 8 MiB
PIECE_BYTES = 1 << 20  # decompressed bytes at a time
MAX_DEPTH = 1000  # of nested JSON, as in Python's parser
MAX_WINDOW = 128 << 20  # that a decompressor may hold: as much as `zstd --long` and `xz -9` need, and no more

Block = tuple[bytes, int]  # (contents, bytes of the file read so far)

MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))),  # skippable frames
}
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class DamagedFileError(Exception):
    """A file ends early or is not what its name says. Everything before that has been returned."""


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, if a text that starts with `head` has its byte order mark."""
    return next((name for mark, name in WIDE_MARKS if head.startswith(mark)), None)


def peek(blocks: Iterator[Block], limit: int, wanted: Callable[[bytes], bool] = bool) -> tuple[bytes, Iterator[Block]]:
    """The contents up to a block that is `wanted`, or up to `limit` bytes; and all blocks again.

    An error in `blocks` is raised when the returned blocks reach it.
    """
    held: list[Block] = []
    length = 0
    failed: Exception | None = None
    try:
        for block in blocks:
            held.append(block)
            length += len(block[0])
            if length >= limit or wanted(block[0]):
                break
    except (DamagedFileError, OSError) as error:
        failed = error

    def rest() -> Iterator[Block]:
        if failed:
            raise failed
        yield from blocks

    return b"".join(block for block, _ in held), chain(held, rest())


def read_blocks(path: Path) -> Iterator[Block]:
    """The contents of a file, decompressed if its suffix says so.

    Raises:
        DamagedFileError: the compressed data are cut off or wrong, or need more memory than `MAX_WINDOW`.
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    with path.open("rb", buffering=READ_BYTES) as file:
        if suffix in MAGIC:
            yield from _decompress(file, suffix)
            return
        done = 0
        while block := file.read(READ_BYTES):
            done += len(block)
            yield block, done


class _Member(Protocol):
    """One gzip member, xz or bzip2 stream, or zstd frame. `rest`: what follows its end, once `eof`."""

    @property
    def eof(self) -> bool: ...
    @property
    def rest(self) -> bytes: ...
    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` decompress to, in pieces, all of which must be consumed."""


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    eof = property(lambda self: self._stream.eof)
    rest = property(lambda self: self._stream.unused_data)

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            before = self._stream.copy()
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                yield from self._before_error(before, data)
                raise
            yield piece
            data = self._stream.unconsumed_tail
            if self.eof or (not data and len(piece) < PIECE_BYTES):
                return

    @staticmethod
    def _before_error(stream: Any, data: bytes) -> Iterator[bytes]:
        """What the library had decompressed of `data` before the error, and did not return."""
        with suppress(zlib.error):
            for index in range(len(data)):
                yield stream.decompress(data[index : index + 1])


class _Stdlib:
    """bzip2 and xz, which share an interface."""

    def __init__(self, suffix: str) -> None:
        self._stream: Any = (
            bz2.BZ2Decompressor()
            if suffix == ".bz2"
            else lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW + PIECE_BYTES)
        )

    eof = property(lambda self: self._stream.eof)
    rest = property(lambda self: self._stream.unused_data)

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._stream.decompress(data, PIECE_BYTES)
        while not (self.eof or self._stream.needs_input):
            yield self._stream.decompress(b"", PIECE_BYTES)


class _Zstd:
    def __init__(self) -> None:
        import zstandard

        self._stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        self.rest = b""

    eof = property(lambda self: self._stream.eof)

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), ZSTD_FEED_BYTES):
            end = start + ZSTD_FEED_BYTES
            yield self._stream.decompress(data[start:end])
            if self.eof:
                self.rest = self._stream.unused_data + data[end:]
                return


def _decompress(file: Any, suffix: str) -> Iterator[Block]:
    """Members one after another, each with its own decompressor; zeros between and after them are padding."""
    errors: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
    if suffix == ".zst":
        import zstandard

        errors = (zstandard.ZstdError,)

    def start() -> _Member:
        return _Gzip() if suffix == ".gz" else _Zstd() if suffix == ".zst" else _Stdlib(suffix)

    member = start()
    done = 0
    while chunk := file.read(FEED_BYTES):
        if not done and not chunk.startswith(MAGIC[suffix]):
            raise DamagedFileError(f"it holds something other than {suffix} data")
        done += len(chunk)
        while chunk:
            if member.eof:
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    break
                member = start()
            pieces = member.feed(chunk)
            while True:
                try:
                    piece = next(pieces, None)
                except errors as error:
                    raise DamagedFileError(_why(str(error))) from error
                if piece is None:
                    break
                if piece:
                    yield piece, done
            chunk = member.rest if member.eof else b""
    if not member.eof:
        raise DamagedFileError("the compressed data end early")


def _why(message: str) -> str:
    if "too much memory" in message or "limit exceeded" in message:
        return f"decompressing it needs a window above {MAX_WINDOW >> 20} MiB; compress it again with a smaller one"
    return message


def line_blocks(blocks: Iterable[Block], size: int, longest: int) -> Iterator[tuple[bytes | None, int, int]]:
    """Gather blocks into pieces of whole lines, of about `size` bytes.

    Yields:
        (lines, number of lines, bytes of the file read so far), with None for the lines if a single one
        is longer than `longest` bytes. The last line need not end with a newline.

    Raises:
        DamagedFileError, OSError: as `blocks` does, after all whole lines before that.
    """
    held: list[bytes] = []  # whole lines, except for the tail of the last block
    length = tail = done = 0  # bytes held; bytes held since the last newline
    dropping = False
    try:
        for read, done in blocks:
            block = read
            if dropping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                yield None, 1, done
                dropping = False
                block = block[end + 1 :]
            held.append(block)
            length += len(block)
            newline = block.rfind(b"\n")
            tail = tail + len(block) if newline < 0 else len(block) - newline - 1
            if tail == length:
                if length > longest:
                    held, length, tail, dropping = [], 0, 0, True
            elif length >= size:
                data = b"".join(held)
                lines, rest = data[: length - tail], data[length - tail :]
                held, length = [rest], tail
                yield lines, lines.count(b"\n"), done
    except (DamagedFileError, OSError):
        if length > tail:
            lines = b"".join(held)[: length - tail]
            yield lines, lines.count(b"\n"), done
        raise
    if dropping:
        yield None, 1, done
    elif length:
        data = b"".join(held)
        yield data, data.count(b"\n") + (tail > 0), done


_SPACE = b" \t\r\n"
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_MARK = re.compile(rb'["\[\]{},]')


class _Values:
    """Cuts JSON into values without parsing it: those of one array, after its bracket, or one after another.

    Only brackets and strings count, so a value may still be wrong. Never more than `longest` bytes are held.
    """

    def __init__(self, longest: int, *, array: bool) -> None:
        self.open = array  # whether anything is still to come: the end of the array, or of a value
        self._longest, self._array = longest, array
        self._depth = 0
        self._in_string = False
        self._carried = b""  # a backslash whose character has not come yet
        self._held: list[bytes] = []
        self._length = 0

    def feed(self, block: bytes) -> Iterator[bytes | None]:
        """The values that end in `block`; None for one that is too long."""
        block, self._carried = self._carried + block, b""
        start = at = 0
        while at < len(block):
            if self._in_string:
                end = block.find(b'"', at)
                if block.find(b"\\", at, end if end >= 0 else len(block)) < 0:
                    at = end if end >= 0 else len(block)
                else:
                    match = _REST_OF_STRING.match(block, at)
                    at = match.end() if match else at
                if block[at : at + 1] == b"\\":
                    block, self._carried = block[:at], block[at:]
                elif at < len(block):
                    self._in_string = False
                    at += 1
                continue
            match = _MARK.search(block, at)
            if match is None:
                break
            at = match.end()
            mark = match[0]
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                if self._array and not self.open:
                    raise DamagedFileError("something follows the end of the array")
                self._depth += 1
                self.open = True
                if self._depth > MAX_DEPTH:
                    raise DamagedFileError(f"nested deeper than {MAX_DEPTH} levels")
            elif mark == b",":
                if self._array and self._depth == 0:
                    yield self._take(block[start : at - 1])
                    start = at
            elif self._depth:
                self._depth -= 1
                if self._depth == 0 and not self._array:
                    yield self._take(block[start:at])
                    self.open = False
                    start = at
            elif self._array:
                yield self._take(block[start : at - 1])
                self.open = False
                start = at
        self._hold(block[start:])

    def _hold(self, part: bytes) -> None:
        self._length += len(part)
        if self._length <= self._longest:
            self._held.append(part)
        else:
            self._held.clear()

    def _take(self, part: bytes) -> bytes | None:
        self._hold(part)
        value = b"".join(self._held) if self._length <= self._longest else None
        self._held.clear()
        self._length = 0
        return value

    def end(self) -> bytes | None:
        """What follows the last value; white space if all is well."""
        if self._array and self.open:
            raise DamagedFileError("its array is not closed")
        rest = self._take(self._carried)
        if self._array and (rest is None or rest.strip(_SPACE)):
            raise DamagedFileError("something follows the end of the array")
        return rest


def _records(blocks: Iterator[Block], longest: int, *, array: bool) -> Iterator[tuple[bytes | None, int]]:
    values = _Values(longest, array=array)
    started = done = 0
    for read, done in blocks:
        block = read
        if not started:
            block = block.lstrip(codecs.BOM_UTF8 + _SPACE)
            started = len(block)
            block = block[array:]
        for value in values.feed(block):
            yield value, done
    rest = values.end()
    if rest is None or rest.strip(_SPACE):
        yield rest, done


def record_blocks(blocks: Iterator[Block], size: int, longest: int) -> Iterator[tuple[bytes | None, int, int]]:
    """`line_blocks` of a `.json` file: one array with a record per element, objects one after another, or lines.

    They are lines if the first line holds a whole value. A record of several lines is returned as one.

    Raises:
        DamagedFileError, OSError: as `blocks` does, or an array is not closed; after all whole records before that.
    """
    blank = codecs.BOM_UTF8 + _SPACE
    head, blocks = peek(blocks, longest, lambda block: bool(block.strip(blank)))
    first = head.lstrip(blank)[:1]
    lines = first not in (b"[", b"{")
    if first == b"{":
        started = False

        def ends_line(block: bytes) -> bool:
            nonlocal started
            block = block if started else block.lstrip(blank)
            started = started or bool(block)
            return b"\n" in block

        head, blocks = peek(blocks, longest, ends_line)
        line = _Values(longest, array=False)
        deque(line.feed(head.lstrip(blank).partition(b"\n")[0]), maxlen=0)
        lines = not line.open
    if lines:
        yield from line_blocks(blocks, size, longest)
        return
    held: list[bytes] = []
    length = done = 0
    try:
        for record, done in _records(blocks, longest, array=first == b"["):
            if held and (record is None or length >= size):
                yield b"\n".join(held), len(held), done
                held, length = [], 0
            if record is None:
                yield None, 1, done
            else:
                held.append(record.replace(b"\n", b"\r"))  # also white space, and just as wrong inside a string
                length += len(record)
    except (DamagedFileError, OSError):
        if held:
            yield b"\n".join(held), len(held), done
        raise
    if held:
        yield b"\n".join(held), len(held), done
