"""The output of `prep-text`: which document goes where, and how whole sets of shards appear in a directory.

Tokens are spooled as they come, because the choice needs the lengths of all documents. The shards are then
written from the spool into a hidden folder of the target directory, hashed as they fill, and renamed together.
A run that is killed leaves that folder, which the next one clears away, and no shard under a final name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nanogpt.data.shards import HEADER_BYTES, TOKEN_BYTES, Tokens, header_bytes, train_name, val_name
from nanogpt.errors import InputError, RunError

MANIFEST = "text.json"
STAGING = ".prep-text.partial"
SHARDS = ("fineweb_train_*.bin", "fineweb_val_*.bin")
SPOOL_TOKENS = 1 << 26
COPY_TOKENS = 1 << 21
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32

VAL = 0  # the target of validation documents; training shard k is target k

Lengths = npt.NDArray[np.int64]  # (documents,) tokens of each, BOS included
Keys = npt.NDArray[np.uint64]  # (documents,) a hash of each text
Targets = npt.NDArray[np.int64]  # (documents,) the shard of each


@dataclass(frozen=True)
class Shard:
    """One file that was written."""

    name: str
    tokens: int
    documents: int
    sha256: str


def choose_validation(lengths: Lengths, keys: Keys, val_tokens: int) -> npt.NDArray[np.bool_]:
    """Which documents are validation: (documents,) bool.

    Documents are taken by key, smallest first, until at least `val_tokens` tokens are held. Copies, which share a
    key, go together and count together. Those above `val_tokens` come after all others, so that validation
    is less than twice as long as asked wherever that is possible.

    Raises:
        InputError: there are not `val_tokens` tokens, or no document would be left for training.
    """
    total = int(lengths.sum())
    if total < val_tokens:
        raise InputError(
            f"--val-tokens {val_tokens}: the input has {total} tokens in {lengths.size} documents in all;"
            " give more text or ask for fewer"
        )
    distinct, group = np.unique(keys, return_inverse=True)  # in the order of the keys
    tokens = np.zeros(distinct.size, dtype=np.int64)
    np.add.at(tokens, group, lengths)
    order = np.argsort(tokens > val_tokens, kind="stable")
    taken = 1 + int(np.searchsorted(np.cumsum(tokens[order]), val_tokens))
    if taken == distinct.size:
        raise InputError(
            f"--val-tokens {val_tokens}: validation takes whole documents and would take all {lengths.size}"
            f" ({total} tokens), so none is left for training; give more documents (a file each, or a record each"
            " in JSON lines) or ask for fewer tokens"
        )
    chosen = np.zeros(distinct.size, dtype=bool)
    chosen[order[:taken]] = True
    return chosen[group]


def assign_shards(lengths: Lengths, is_val: npt.NDArray[np.bool_], shard_tokens: int) -> Targets:
    """The shard of each document: `VAL`, or 1, 2, ... for training, in order and filled with whole documents."""
    targets = np.zeros(lengths.size, dtype=np.int64)
    train = np.flatnonzero(~is_val)
    ends = np.cumsum(lengths[train])
    first, shard, before = 0, 1, 0
    while first < train.size:
        last = max(first + 1, int(np.searchsorted(ends, before + shard_tokens, side="right")))
        targets[train[first:last]] = shard
        before = int(ends[last - 1])
        first, shard = last, shard + 1
    return targets


class Spool:
    """Tokens on disk, written once and read once in the same order, in files that go as they have been read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = -1
        self._left = 0
        self._file: BinaryIO | None = None

    def _next(self, mode: str) -> BinaryIO:
        self.close()
        self._index += 1
        self._left = SPOOL_TOKENS
        self._file = (self._folder / f"spool_{self._index:06d}").open(mode)  # type: ignore[assignment]
        return self._file  # type: ignore[return-value]

    def write(self, tokens: Tokens) -> None:
        """Append `tokens`."""
        while tokens.size:
            file = self._file if self._file and self._left else self._next("wb")
            part = tokens[: self._left]
            file.write(part.astype("<u2", copy=False).tobytes())
            self._left -= part.size
            tokens = tokens[part.size :]

    def rewind(self) -> None:
        """End writing; reading starts at the first token."""
        self.close()
        self._index, self._left = -1, 0

    def read(self, count: int) -> Iterator[bytes]:
        """The next `count` tokens, as bytes of bounded length."""
        while count:
            if not (self._file and self._left):
                if self._index >= 0:
                    (self._folder / f"spool_{self._index:06d}").unlink()
                self._next("rb")
            assert self._file
            part = min(count, self._left, COPY_TOKENS)
            data = self._file.read(TOKEN_BYTES * part)
            if len(data) != TOKEN_BYTES * part:
                raise RunError(f"{self._folder}: the spooled tokens end early; is another program clearing the folder?")
            yield data
            self._left -= part
            count -= part

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._file:
            self._file.close()
            self._file = None


class _ShardWriter:
    def __init__(self, path: Path, lengths: Lengths) -> None:
        self.path = path
        self.documents = lengths.size
        self.tokens = int(lengths.sum())
        if self.tokens > MAX_SHARD_TOKENS:
            raise InputError(f"{path.name} would hold {self.tokens} tokens, a shard holds at most {MAX_SHARD_TOKENS}")
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.write(header_bytes(self.tokens))

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def finish(self) -> Shard:
        self._file.flush()
        os.fsync(self._file.fileno())
        assert self._file.tell() == HEADER_BYTES + TOKEN_BYTES * self.tokens
        return Shard(self.path.name, self.tokens, self.documents, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()


def write_shards(folder: Path, spool: Spool, lengths: Lengths, targets: Targets) -> tuple[Shard, ...]:
    """Write the spooled documents into their shards in `folder`: validation first, then training in order."""
    shards = {}
    edges = np.flatnonzero(np.diff(targets, prepend=-1, append=-1))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    run_tokens = np.diff(ends[edges])
    with ExitStack() as stack:

        def start(target: int) -> _ShardWriter:
            name = train_name(target) if target else val_name()
            writer = _ShardWriter(folder / name, lengths[targets == target])
            stack.callback(writer.close)
            return writer

        val = start(VAL)
        train: _ShardWriter | None = None
        current = VAL
        for target, count in zip(targets[edges[:-1]].tolist(), run_tokens.tolist(), strict=True):
            if target not in (VAL, current):
                if train:
                    shards[current] = train.finish()
                    train.close()
                train, current = start(target), target
            writer = train if target and train else val
            for data in spool.read(count):
                writer.write(data)
        if train:
            shards[current] = train.finish()
        shards[VAL] = val.finish()
    return tuple(shards[target] for target in sorted(shards))


def check_free(directory: Path, force: bool) -> None:
    """Raise `InputError` if `directory` holds a set of shards that is not to be replaced, or is a file."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--dir {directory}: is a file, expected a folder")
    present = _present(directory)
    # A staged manifest means that a run was killed while its shards took their names: whatever part of the set is
    # here, and of the one that it replaced, is nobody's.
    if present and not force and not (directory / STAGING / MANIFEST).exists():
        raise InputError(
            f"{directory} holds {len(present)} file(s) of a data set already ({present[0].name}, ...); sets are not"
            " mixed: choose another --dir, or add --force to replace them all"
        )


@contextmanager
def writing_to(directory: Path, force: bool) -> Iterator[Path]:
    """Hold `directory` for one run and give it a folder to stage in, which is gone afterwards.

    Raises:
        InputError: `directory` holds shards and `force` is not set, or is not a folder.
        RunError: another run is writing to it, or it cannot be written.
    """
    staging = directory / STAGING
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, lock)
            _lock(lock, directory)
            check_free(directory, force)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            yield staging
        except OSError as error:
            full = "; free some room or choose another --dir" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise RunError(f"{directory}: writing failed: {error}{full}") from error


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"{directory}: another prep-text is writing to it; wait for it or choose another --dir"
        ) from error
    except OSError:
        pass  # a file system without locks: nothing but the user's care keeps two runs apart


def _present(directory: Path) -> list[Path]:
    """The files of a set in `directory`, the manifest first so that it is the first to go."""
    shards = sorted(path for pattern in SHARDS for path in directory.glob(pattern))
    return [path for path in [directory / MANIFEST] if path.exists()] + shards


def publish(staging: Path, directory: Path, shards: tuple[Shard, ...], manifest: dict[str, Any]) -> None:
    """Put the staged set in the place of whatever set `directory` holds; the manifest takes its name last."""
    with (staging / "manifest").open("w", encoding="ascii") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    (staging / "manifest").replace(staging / MANIFEST)
    for path in _present(directory):
        path.unlink()
    for shard in shards:
        (staging / shard.name).replace(directory / shard.name)
    (staging / MANIFEST).replace(directory / MANIFEST)
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
