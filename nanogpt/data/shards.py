"""The shard format: `fineweb_train_%06d.bin`, `fineweb_val_%06d.bin`.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by the tokens as
little-endian uint16. The format is that of the hub data set kjj0/fineweb10B-gpt2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogpt.environment import seen_inside
from nanogpt.errors import InputError
from nanogpt.files import open_regular

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAXSYMLINKS = 40  # Linux's own bound
CHECKED_TOKENS = 1 << 18  # at once: what is read stays in the processor's cache until it is checked

Tokens = npt.NDArray[np.uint16]


class ShardError(InputError):
    """A file is not a complete shard: the message names the file and what is wrong with it."""


def train_name(index: int, stem: str = "fineweb") -> str:
    """File name of training shard `index`; training shards count from 1."""
    return f"{stem}_train_{index:06d}.bin"


def val_name(index: int = 0, stem: str = "fineweb") -> str:
    """File name of validation shard `index`; validation shards count from 0."""
    return f"{stem}_val_{index:06d}.bin"


def number_of_shards(count: int) -> str:
    """`count` in words: 1 shard, 2 shards."""
    return "1 shard" if count == 1 else f"{count} shards"


def sorted_shards(files: Sequence[Path], kind: str) -> list[Path]:
    """In the order in which runs read them. Raises InputError if there are none of this `kind`."""
    if not files:
        raise InputError(f"{kind} data: no shards found; run prep-fineweb or prep-text first, and check the directory")
    return sorted(Path(file) for file in files)


def missing_target(path: Path) -> str | None:
    """What is wrong with a link that leads nowhere, and what to do; None: it is not such a link."""
    if not path.is_symlink():
        return None
    link = path
    for _ in range(MAXSYMLINKS):
        target = link.parent / link.readlink()
        try:
            target.lstat()
        except OSError as error:
            what = f"{path}: is a link to {target}: {error.strerror}"
            way_out = ". Fix the link, or make the shards again: prep-fineweb, prep-text"
            return what + (seen_inside(target.parent) or way_out)
        if not target.is_symlink():
            return None
        link = target
    return f"{path}: is a link that leads back to itself. Fix it, or make the shards again: prep-fineweb, prep-text"


def read_count(path: Path) -> int:
    """Check a shard's header against the file's length and return its token count, reading 1 KiB.

    Raises:
        ShardError: missing or unreadable file, wrong magic or version, or a length that does not fit the count.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEADER_BYTES)
            length = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(missing_target(path) or f"{path}: cannot be read: {error.strerror}") from error
    if len(head) != HEADER_BYTES:
        raise ShardError(f"{path}: {length} bytes long, shorter than a shard's {HEADER_BYTES}-byte header")
    header = np.frombuffer(head, dtype="<i4")
    if header[0] != MAGIC:
        raise ShardError(f"{path}: magic number {header[0]}, but a token shard has {MAGIC}")
    if header[1] != VERSION:
        raise ShardError(f"{path}: shard version {header[1]}, only version {VERSION} is known")
    count = int(header[2])
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if count < 0 or length != expected:
        raise ShardError(
            f"{path}: the header promises {count} tokens ({expected} bytes), but the file has {length} bytes"
        )
    return count


def check_tokens(path: Path, tokens: Tokens, vocab_size: int, first: int = 0) -> None:
    """Refuse tokens that a model of `vocab_size` does not know; `tokens` are those of the shard from `first` on.

    Raises:
        ShardError: naming the first such token and its place.
    """
    if tokens.size and tokens.max() >= vocab_size:
        place = int(np.argmax(tokens >= vocab_size))
        raise ShardError(
            f"{path}: token {first + place:,} (from 0) is {tokens[place]}, the vocabulary is 0..{vocab_size - 1}"
            " (model.vocab_size): the shard is damaged, or another tokenizer's. Get it again (prep-fineweb --verify,"
            " prep-text), or leave it out"
        )


def check_shard_tokens(path: Path, vocab_size: int, bos: int) -> int:
    """Read a whole shard, some MiB at a time, and return its count of tokens.

    Raises:
        ShardError: as `read_count` does, or for a token outside the vocabulary, or if there is no `bos`.
    """
    count = read_count(path)
    buffer = np.empty(CHECKED_TOKENS, dtype="<u2")
    found = done = 0
    try:
        with open_regular(path) as file:
            file.seek(HEADER_BYTES)
            while done < count:
                piece = buffer[: count - done]
                got = file.readinto(piece.view(np.uint8).data) // TOKEN_BYTES
                if not got:
                    raise ShardError(f"{path}: {done:,} of {count:,} tokens could be read: the file changed while read")
                check_tokens(path, piece[:got], vocab_size, done)
                found = found or bool((piece[:got] == bos).any())
                done += got
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
    if not found:
        raise no_document(path, bos)
    return count


def no_document(path: Path, bos: int) -> ShardError:
    """The error for a shard in which no document begins."""
    return ShardError(
        f"{path}: has no token {bos}, which begins each document (data.bos): it is another tokenizer's, or not"
        " text. Make it with prep-text, or leave it out"
    )


def read_tokens(path: Path) -> Tokens:
    """Read a whole shard into memory: (count,) uint16. Raises `ShardError` as `read_count` does."""
    count = read_count(path)
    with open_regular(path) as file:
        file.seek(HEADER_BYTES)
        tokens = np.fromfile(file, dtype="<u2", count=count)
    if tokens.size != count:
        raise ShardError(f"{path}: {tokens.size} of {count} tokens could be read: the file changed while it was read")
    return tokens.astype(np.uint16, copy=False)


def header_bytes(count: int) -> bytes:
    """The 1 KiB header of a shard of `count` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


def write_tokens(path: Path, tokens: npt.ArrayLike) -> None:
    """Write `tokens` (values below 65,536) as a shard that appears under its name only when whole."""
    array = np.asarray(tokens)
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"{path}: tokens must lie in 0..65535, found {array.min()}..{array.max()}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header_bytes(array.size))
            file.write(array.astype("<u2").tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
