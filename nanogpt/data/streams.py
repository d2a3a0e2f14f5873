"""Reading lines of any number from a file, plain or compressed, in blocks of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

READ_BYTES = 64 * 1024  # of compressed bytes: one read of gzip gives at most 1,032 times as much


class DamagedFileError(Exception):
    """A compressed file ends early or is not what its name says."""


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The contents of a file, `.gz` and `.zst` decompressed, as (block, bytes of the file read so far).

    Raises:
        DamagedFileError: the compressed data are cut off or wrong. What came before it has been given out.
        OSError: the file cannot be read.
    """
    name = path.name.lower()
    with path.open("rb", buffering=0) as file:
        if name.endswith(".gz"):
            yield from _decompress(file, lambda: zlib.decompressobj(wbits=31), zlib.error)
        elif name.endswith(".zst"):
            import zstandard

            decompressor = zstandard.ZstdDecompressor()
            yield from _decompress(file, decompressor.decompressobj, zstandard.ZstdError)
        else:
            done = 0
            while block := file.read(8 * READ_BYTES):
                done += len(block)
                yield block, done


def _decompress(file: Any, start: Any, error: type[Exception]) -> Iterator[tuple[bytes, int]]:
    """Members (gzip) or frames (zstd) one after another, each with its own decompressor."""
    stream = start()
    done = 0
    try:
        while chunk := file.read(READ_BYTES):
            done += len(chunk)
            while chunk:
                if stream.eof:
                    chunk = chunk.lstrip(b"\0")  # padding, which gzip allows
                    if not chunk:
                        break
                    stream = start()
                block = stream.decompress(chunk)
                if block:
                    yield block, done
                chunk = stream.unused_data if stream.eof else b""
    except error as cause:
        raise DamagedFileError(str(cause)) from cause
    if not stream.eof:
        raise DamagedFileError("the compressed data end early")


def line_blocks(
    blocks: Iterable[tuple[bytes, int]], size: int, longest: int
) -> Iterator[tuple[bytes | None, int, int]]:
    """Gather blocks into pieces of whole lines, of about `size` bytes.

    Yields:
        (lines, number of lines, bytes of the file read so far), with None for the lines where a single one
        is longer than `longest` bytes. The last line need not end with a newline.
    """
    held: list[bytes] = []  # whole lines, but for the tail of the last block
    length = tail = done = 0  # bytes held; bytes held since the last newline
    dropping = False
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
    if dropping:
        yield None, 1, done
    elif length:
        data = b"".join(held)
        yield data, data.count(b"\n") + (tail > 0), done
