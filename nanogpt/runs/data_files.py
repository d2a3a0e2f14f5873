"""The token shards of a run for its record: sizes, sha256, and the hash of the validation stream.

Hashes that prep-fineweb and prep-text have left are taken over where the files are as they left them. The rest is
hashed in a thread of its own, which stands still while the run's clock runs: before training (a compiling run has
minutes) and after it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

from nanogpt.data.manifest import read_manifest
from nanogpt.data.shards import HEADER_BYTES, TOKEN_BYTES
from nanogpt.data.text_shards import MANIFEST as TEXT_MANIFEST
from nanogpt.files import open_regular, read_regular
from nanogpt.runs.record import DataFile

BLOCK_BYTES = 1 << 20


def describe_shards(paths: Sequence[Path]) -> list[DataFile]:
    """Names, sizes, and the sha256 that a manifest beside the shards knows, where the file is the one it speaks of.

    The shards are in one directory. prep-fineweb's manifest has size and time of change of each file; prep-text's has
    the count of tokens, and takes its name after the shards have taken theirs: a file that changed later is another
    one. Raises OSError.
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
        entry = fineweb.get(path.name)
        if entry is not None and (entry.bytes, entry.mtime_ns) == (status.st_size, status.st_mtime_ns):
            shard.sha256, shard.sha256_from = entry.sha256, "manifest.json"
        elif (path.name, status.st_size) in text and status.st_mtime_ns <= written_ns:
            shard.sha256, shard.sha256_from = text[path.name, status.st_size], "text.json"
        shards.append(shard)
    return shards


def _text_manifest(path: Path) -> tuple[dict[tuple[str, int], str], int]:
    """sha256 by name and size of the shards that prep-text wrote, and when, in ns; empty where there is no file."""
    try:
        shards = json.loads(read_regular(path))["shards"]
        known = {
            (str(one["name"]), HEADER_BYTES + TOKEN_BYTES * int(one["tokens"])): str(one["sha256"]) for one in shards
        }
        return known, path.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0


class OffClockHashes:
    """Hashes files in a thread that `pause` holds up, to the end of the block it has in hand.

    Args:
        wanted: whole files, in the order in which they are to be hashed.
        val_files: the validation shards, sorted; the first `val_tokens` + 1 tokens of their stream are hashed first.
        val_tokens: targets of an evaluation.
    """

    def __init__(self, wanted: Sequence[Path], val_files: Sequence[Path], val_tokens: int):
        self.sha256: dict[Path, str] = {}
        self.val_stream_sha256: str | None = None
        self._wanted = list(wanted)
        self._val_files, self._val_tokens = list(val_files), val_tokens
        self._go = threading.Event()
        self._go.set()
        self._turn = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="shard hashes", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self) -> None:
        """Return once the thread stands still."""
        self._go.clear()
        with self._turn:
            pass

    def finish(self, timeout_s: float) -> None:
        """Go on, and wait for the rest or until the time is up."""
        self._go.set()
        self._thread.join(timeout_s)

    @property
    def busy(self) -> bool:
        """Whether something is left to hash."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End where it stands."""
        self._stopped = True
        self._go.set()

    def _work(self) -> None:
        try:
            self.val_stream_sha256 = self._hash_stream()
            for path in self._wanted:
                digest = self._hash([(path, 0, path.stat().st_size)])
                if digest is not None:
                    self.sha256[path] = digest
        except OSError:
            pass  # what is not known is not in the record; training reads the same files and says what is wrong

    def _hash_stream(self) -> str | None:
        left = TOKEN_BYTES * (self._val_tokens + 1)
        parts = []
        for path in self._val_files:
            part = min(left, path.stat().st_size - HEADER_BYTES)
            parts.append((path, HEADER_BYTES, part))
            left -= part
        return self._hash(parts) if not left else None

    def _hash(self, parts: Sequence[tuple[Path, int, int]]) -> str | None:
        """sha256 of (file, first byte, bytes), one after the other; None where it was stopped or a file is short."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for path, first, size in parts:
            with open_regular(path) as file:
                file.seek(first)
                left = size
                while left:
                    self._go.wait()
                    if self._stopped:
                        return None
                    with self._turn:
                        count = file.readinto(buffer[: min(left, BLOCK_BYTES)])
                        digest.update(buffer[:count])
                    if not count:
                        return None
                    left -= count
        return digest.hexdigest()
