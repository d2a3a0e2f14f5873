"""The output of `prep-text`: which document goes where, and how complete sets of shards appear in a directory.

Tokens are spooled as they come, because the choice needs the lengths of all documents. The shards are then
written from the spool into a hidden folder of the target directory, hashed as they fill, and renamed together.
A killed run leaves that folder, which the next one removes, and no shard under a final name.
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
SHARDS = ("fineweb_val_*.bin", "fineweb_train_*.bin")
SPOOL_TOKENS = 1 << 26
COPY_TOKENS = 1 << 21
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

VAL = 0  # the target of validation documents; training shard k is target k
DROPPED = -1  # the target of documents that are left out

Lengths = npt.NDArray[np.int64]  # (documents,) tokens of each, BOS included
Keys = npt.NDArray[np.uint64]  # (documents,) a hash of each text
Ordinals = npt.NDArray[np.int64]  # (documents,) 0, 1, ...: which part of its text a document is
Targets = npt.NDArray[np.int64]  # (documents,) the shard of each


@dataclass(frozen=True)
class Shard:
    """One file that was written."""

    name: str
    tokens: int
    documents: int
    sha256: str


def first_copies(keys: Keys, ordinals: Ordinals) -> npt.NDArray[np.bool_]:
    """Which documents come from the first text with their key: (documents,) bool. All parts of a text go together."""
    text = np.cumsum(ordinals == 0) - 1
    _, first = np.unique(keys[ordinals == 0], return_index=True)
    kept = np.zeros(int(text[-1]) + 1, dtype=bool)
    kept[first] = True
    return kept[text]


def shuffled(keys: Keys, ordinals: Ordinals) -> npt.NDArray[np.int64]:
    """The documents' order by a hash of their text and part, (documents,): the same whatever order they came in.

    Only equal documents, copies of one text, keep the order they came in.
    """
    mixed = keys ^ (ordinals.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    # The finalizer of SplitMix64: unmixed keys would put a text's validation copies and its parts side by side.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


def choose_validation(
    lengths: Lengths, keys: Keys, val_tokens: int, *, of_sources: bool = False
) -> npt.NDArray[np.bool_]:
    """Which documents are validation: (documents,) bool.

    Documents are taken by key, smallest first, until at least `val_tokens` tokens are held. Those with one key, copies
    or with `of_sources` all of a source, go together and count together. Those above `val_tokens` come after all
    others, so that validation is less than twice as long as requested wherever that is possible.

    Raises:
        InputError: there are not `val_tokens` tokens, or no document would be left for training.
    """
    total = int(lengths.sum())
    if total < val_tokens:
        raise InputError(
            f"--val-tokens {val_tokens}: the input has only {total} tokens in {lengths.size} documents;"
            " give more text or ask for fewer"
        )
    distinct, group = np.unique(keys, return_inverse=True)  # in the order of the keys
    tokens = np.zeros(distinct.size, dtype=np.int64)
    np.add.at(tokens, group, lengths)
    order = np.argsort(tokens > val_tokens, kind="stable")
    taken = 1 + int(np.searchsorted(np.cumsum(tokens[order]), val_tokens))
    if taken == distinct.size and of_sources:
        raise InputError(
            f"--val-tokens {val_tokens}: validation takes whole sources and would take all {distinct.size} ({total}"
            " tokens), so none is left for training; ask for fewer tokens, or for a finer --split-by"
        )
    if taken == distinct.size:
        raise InputError(
            f"--val-tokens {val_tokens}: validation takes whole documents and would take all {lengths.size}"
            f" ({total} tokens), so none is left for training; give more documents (a file each, or a record each"
            " in JSON lines) or ask for fewer tokens"
        )
    chosen = np.zeros(distinct.size, dtype=bool)
    chosen[order[:taken]] = True
    return chosen[group]


def assign_shards(lengths: Lengths, train: npt.NDArray[np.int64], shard_tokens: int) -> Targets:
    """The shard of each document: 1, 2, ... for those of `train`, filled whole in that order; `VAL` for the rest."""
    targets = np.full(lengths.size, VAL, dtype=np.int64)
    ends = np.cumsum(lengths[train])
    first, shard, before = 0, 1, 0
    while first < train.size:
        last = max(first + 1, int(np.searchsorted(ends, before + shard_tokens, side="right")))
        targets[train[first:last]] = shard
        before = int(ends[last - 1])
        first, shard = last, shard + 1
    return targets


class Spool:
    """Tokens on disk, written once; then read in the same order, which deletes its files, or at any place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = -1
        self._left = 0
        self._file: BinaryIO | None = None
        self._open: dict[int, BinaryIO] = {}

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
        """Finish writing; reading starts at the first token."""
        self.close()
        self._index, self._left = -1, 0

    def read(self, count: int) -> Iterator[bytes]:
        """The next `count` tokens, as blocks of bytes of bounded length."""
        while count:
            if not (self._file and self._left):
                if self._index >= 0:
                    (self._folder / f"spool_{self._index:06d}").unlink()
                self._next("rb")
            assert self._file
            part = min(count, self._left, COPY_TOKENS)
            data = self._file.read(TOKEN_BYTES * part)
            if len(data) != TOKEN_BYTES * part:
                raise self._ends_early()
            yield data
            self._left -= part
            count -= part

    def read_at(self, start: int, count: int) -> Iterator[bytes]:
        """Tokens `start` to `start + count`, as blocks of bytes of bounded length; the files stay."""
        while count:
            index, offset = divmod(start, SPOOL_TOKENS)
            part = min(count, SPOOL_TOKENS - offset, COPY_TOKENS)
            if index not in self._open:
                self._open[index] = (self._folder / f"spool_{index:06d}").open("rb", buffering=0)
            data = os.pread(self._open[index].fileno(), TOKEN_BYTES * part, TOKEN_BYTES * offset)
            if len(data) != TOKEN_BYTES * part:
                raise self._ends_early()
            yield data
            start += part
            count -= part

    def _ends_early(self) -> RunError:
        return RunError(f"{self._folder}: the spooled tokens end early; is another program clearing the folder?")

    def close(self) -> None:
        """Close the open files."""
        if self._file:
            self._file.close()
            self._file = None
        for file in self._open.values():
            file.close()
        self._open.clear()


class _ShardWriter:
    def __init__(self, path: Path, lengths: Lengths) -> None:
        self.path = path
        self.documents = lengths.size
        self.tokens = int(lengths.sum())
        if self.tokens > MAX_SHARD_TOKENS:
            raise InputError(
                f"{path.name} would hold {self.tokens} tokens, but a shard holds at most {MAX_SHARD_TOKENS}"
            )
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


def write_shards(
    folder: Path, spool: Spool, lengths: Lengths, targets: Targets, order: npt.NDArray[np.int64] | None = None
) -> tuple[Shard, ...]:
    """Write the spooled documents into their shards in `folder`, in the order that they were spooled, or in `order`.

    Targets must not decrease along that order, except for validation and what is left out.
    """
    shards = {}
    with ExitStack() as stack:

        def start(target: int) -> _ShardWriter:
            name = train_name(target) if target else val_name()
            writer = _ShardWriter(folder / name, lengths[targets == target])
            stack.callback(writer.close)
            return writer

        val = start(VAL)
        train: _ShardWriter | None = None
        current = VAL
        for target, blocks in _in_order(spool, lengths, targets, order):
            if target not in (VAL, DROPPED, current):
                if train:
                    shards[current] = train.finish()
                    train.close()
                train, current = start(target), target
            writer = train if target and train else val
            for data in blocks:
                if target != DROPPED:
                    writer.write(data)
        if train:
            shards[current] = train.finish()
        shards[VAL] = val.finish()
    return tuple(shards[target] for target in sorted(shards))


def _in_order(
    spool: Spool, lengths: Lengths, targets: Targets, order: npt.NDArray[np.int64] | None
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Neighbours with one target, as (target, blocks of their tokens); all blocks must be consumed."""
    starts = np.cumsum(lengths) - lengths
    if order is None:
        edges = np.flatnonzero(np.diff(targets, prepend=DROPPED - 1, append=DROPPED - 1))
        ends = np.concatenate([starts, lengths.sum(keepdims=True)])[edges]
        for target, count in zip(targets[edges[:-1]].tolist(), np.diff(ends).tolist(), strict=True):
            yield target, spool.read(count)
        return
    for index in order[targets[order] != DROPPED].tolist():
        yield int(targets[index]), spool.read_at(int(starts[index]), int(lengths[index]))


def check_free(directory: Path, force: bool) -> None:
    """Raise `InputError` if `directory` holds a set of shards that must not be replaced, or is a file."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--dir {directory}: is a file, expected a folder")
    present = _present(directory)
    # A staged manifest, and none beside the shards, means that a run was killed while its shards were being renamed:
    # whatever part is here of that set, or of the one it replaced, is of no use.
    cut_off = (directory / STAGING / MANIFEST).exists() and not (directory / MANIFEST).exists()
    if present and not force and not cut_off:
        raise InputError(
            f"{directory} already holds {len(present)} file(s) of a data set ({present[0].name}, ...); sets are not"
            " mixed: choose another --dir, or add --force to replace them all"
        )


@contextmanager
def writing_to(directory: Path, force: bool) -> Iterator[Path]:
    """Hold `directory` for one run and give it a folder to stage in, which is removed afterwards.

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
            locked = _lock(lock, directory)
            check_free(directory, force)
            if locked:
                shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir()
            except FileExistsError as error:
                raise RunError(
                    f"{staging} exists: another prep-text is writing to {directory}, or was killed. The file system"
                    " has no locks to tell which; if none is running, remove that folder"
                ) from error
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            yield staging
        except OSError as error:
            full = "; free some room or choose another --dir" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise RunError(f"{directory}: writing failed: {error}{full}") from error


def _lock(descriptor: int, directory: Path) -> bool:
    """Whether the lock is held; never on a file system that cannot lock folders, such as NFS."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"{directory}: another prep-text is writing to it; wait for it or choose another --dir"
        ) from error
    except OSError:
        return False
    return True


def _present(directory: Path) -> list[Path]:
    """The files of a set in `directory`, the manifest and then validation first, so that they are the first to go."""
    shards = [path for pattern in SHARDS for path in sorted(directory.glob(pattern))]
    return [path for path in [directory / MANIFEST] if path.exists()] + shards


def publish(staging: Path, directory: Path, shards: tuple[Shard, ...], manifest: dict[str, Any]) -> None:
    """Replace whatever set `directory` holds with the staged one, or leave it as it was.

    The manifest is renamed last.
    """
    with (staging / "manifest").open("w", encoding="ascii") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    (staging / "manifest").replace(staging / MANIFEST)
    old = staging / "old"
    old.mkdir()
    moves = [(path, old / path.name) for path in _present(directory)]
    # Validation comes last, so that a set cut off in the middle, with no time to undo it, cannot be trained on.
    moves += [(staging / name, directory / name) for name in [*(shard.name for shard in reversed(shards)), MANIFEST]]
    moved = 0
    try:
        for source, target in moves:
            source.replace(target)
            moved += 1
    except BaseException:
        for source, target in reversed(moves[: moved + 1]):
            with suppress(OSError):  # the last move may or may not have been done
                target.replace(source)
        raise
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
