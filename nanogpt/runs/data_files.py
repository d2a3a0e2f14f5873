"""A run's token shards, for its record: what they should be, and what was read.

The manifests of prep-fineweb and prep-text say what they should be, and the package does for FineWeb's first shards.
None of these is trusted: training shards are hashed as they are read (`TrainBatches.sha256`), validation shards before
training, the rest in a separate thread that pauses while the run's clock runs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nanogpt.data import fineweb
from nanogpt.data.manifest import known_sha256, pinned_sha256, read_manifest
from nanogpt.data.shards import HEADER_BYTES, TOKEN_BYTES
from nanogpt.data.text_shards import MANIFEST as TEXT_MANIFEST
from nanogpt.files import open_regular, read_json
from nanogpt.runs.record import Data, DataFile
from nanogpt.spec import RunSpec

BLOCK_BYTES = 1 << 20
STAGED_FROM = "NANOGPT_STAGED_FROM"  # where the shards are if the run reads a node's own copies of them


def shards_directory(spec: RunSpec, read: Data | None = None) -> Path:
    """Where the shards of `spec` are: where a run `read` them if it exists, else data.directory or NANOGPT_DATA."""
    if read is not None and Path(read.directory).is_dir():
        return Path(read.directory)
    return Path(spec.data.directory) if spec.data.directory else fineweb.default_directory()


def describe_shards(paths: Sequence[Path]) -> list[DataFile]:
    """Names, sizes, and the expected sha256 of the shards, if any source has it.

    The shards are in one directory. prep-fineweb's manifest goes by names. prep-text's has the number of tokens, and
    is renamed after the shards: a file that changed later is a different one. Raises OSError.
    """
    if not paths:
        return []
    directory = paths[0].parent
    fineweb = read_manifest(directory)
    text, written_ns = _text_manifest(directory / TEXT_MANIFEST)
    shards = []
    for path in paths:
        status = path.stat()
        shard = DataFile(name=path.name, bytes=status.st_size)
        known = known_sha256(path.name, fineweb.get(path.name))
        if known is not None:
            shard.expected_sha256 = known
            entry = fineweb[path.name]
            shard.expected_from = "pinned" if pinned_sha256(path.name, entry.repository) else "manifest.json"
            if shard.expected_from == "manifest.json":
                shard.announced_by = entry.endpoint
        elif (path.name, status.st_size) in text and status.st_mtime_ns <= written_ns:
            shard.expected_sha256, shard.expected_from = text[path.name, status.st_size], "text.json"
        shards.append(shard)
    return shards


def refusal(directory: Path, shards: Sequence[DataFile], stream_sha256: str | None, read: Sequence[str]) -> str | None:
    """Why no run may be validated on these shards, once they are hashed; None: it may.

    Args:
        directory: of the shards.
        shards: the validation shards.
        stream_sha256: of the validation stream in those files.
        read: of the stream as each rank has read it.
    """
    for shard in shards:
        if (problem := shard.contradiction) is not None:
            way_out = (
                f"make it again with prep-text, or remove {TEXT_MANIFEST}"
                if shard.expected_from == "text.json"
                else f"run prep-fineweb --dir {directory}, or remove manifest.json if it is not meant to be FineWeb"
            )
            return f"{directory / problem}. Losses on it cannot be compared: {way_out}"
    others = {digest for digest in read if digest != (stream_sha256 or read[0])}
    if others:
        ranks = ", ".join(str(rank) for rank, digest in enumerate(read) if digest in others)
        return (
            f"{directory}: the validation tokens that rank {ranks} read are not those in rank 0's files:"
            f" sha256 {min(others)[:12]}, not {str(stream_sha256 or read[0])[:12]}. The nodes' shards differ, or"
            " have just changed: copy them again"
        )
    return None


def _text_manifest(path: Path) -> tuple[dict[tuple[str, int], str], int]:
    """sha256 by name and size of the shards that prep-text wrote, and when, in ns; empty without a manifest."""
    try:
        shards = read_json(path)["shards"]
        known = {
            (str(one["name"]), HEADER_BYTES + TOKEN_BYTES * int(one["tokens"])): str(one["sha256"]) for one in shards
        }
        return known, path.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0


class OffClockHashes:
    """Hashes files in a thread; `pause` holds it once it finishes its current block.

    Args:
        wanted: whole files, in the order to hash them; `add` takes more.
        val_files: the validation shards, sorted. Those that hold the first `val_tokens` + 1 tokens are hashed first,
            and in the same pass these tokens.
        val_tokens: targets of an evaluation.
    """

    def __init__(self, wanted: Sequence[Path], val_files: Sequence[Path], val_tokens: int):
        self.sha256: dict[Path, str] = {}
        self.val_stream_sha256: str | None = None
        self._validation = threading.Event()
        self._wanted: SimpleQueue[Path | None] = SimpleQueue()  # None: no more will come
        self.add(wanted)
        self._val_files, self._val_tokens = list(val_files), val_tokens
        self._go = threading.Event()
        self._go.set()
        self._turn = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="shard hashes", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, files: Iterable[Path]) -> None:
        """Also hash these; call it before `finish`."""
        for file in files:
            self._wanted.put(file)

    def wait_for_validation(self) -> None:
        """Return once the validation stream and its shards are hashed, or cannot be."""
        self._validation.wait()

    def pause(self) -> None:
        """Return once the thread has paused."""
        self._go.clear()
        with self._turn:
            pass

    def finish(self, timeout_s: float) -> None:
        """Continue, and wait for the rest or until time is up."""
        self._wanted.put(None)
        self._go.set()
        self._thread.join(timeout_s)

    @property
    def busy(self) -> bool:
        """Whether something is left to hash."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop at once."""
        self._stopped = True
        self._wanted.put(None)
        self._go.set()

    def _work(self) -> None:
        try:
            self._hash_validation()
            self._validation.set()
            while (path := self._wanted.get()) is not None:
                if path not in self.sha256 and (digest := self._hash(path)) is not None:
                    self.sha256[path] = digest
        except OSError:
            pass  # unknown values stay out of the record; training reads the same files and says what is wrong
        finally:
            self._validation.set()

    def _hash_validation(self) -> None:
        left, stream = TOKEN_BYTES * (self._val_tokens + 1), hashlib.sha256()
        for path in self._val_files:
            if not left:
                break
            part = min(left, path.stat().st_size - HEADER_BYTES)
            digest = self._hash(path, stream, HEADER_BYTES, HEADER_BYTES + part)
            if digest is None:
                return
            self.sha256[path] = digest
            left -= part
        if not left:
            self.val_stream_sha256 = stream.hexdigest()

    def _hash(self, path: Path, part: Any = None, first: int = 0, last: int = 0) -> str | None:
        """sha256 of a file; its bytes from `first` up to `last` go into `part` too. None if it was stopped."""
        digest, position = hashlib.sha256(), 0
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with open_regular(path) as file:
            while True:
                self._go.wait()
                if self._stopped:
                    return None
                with self._turn:
                    count = file.readinto(buffer)
                    digest.update(buffer[:count])
                    if part is not None:
                        part.update(buffer[max(first - position, 0) : max(min(last - position, count), 0)])
                if not count:
                    return digest.hexdigest()
                position += count
