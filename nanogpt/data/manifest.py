"""What is known about the shards in a directory: the manifest of verified files, the checks, and the locks.

`manifest.json` beside the shards keeps, for each, its sha256, length, token count, revision, origin, and two
times: of the last change of its content, which can be set back, and of any change, which the kernel keeps. A file whose
length and times are as recorded counts as verified; any other is hashed. If the package itself knows a shard's
sha256 (nanogpt/data/official.py), no manifest can overrule it; the others are trusted on first use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanogpt.console import say
from nanogpt.data import official
from nanogpt.data.shards import ShardError, missing_target, read_count
from nanogpt.data.workers import FatalError, Stop
from nanogpt.errors import RunError
from nanogpt.files import open_regular, read_json

REPOSITORY = "kjj0/fineweb10B-gpt2"


class DataSet(NamedTuple):
    """Shards of GPT-2's tokens on the hub."""

    repository: str
    stem: str  # of its file names
    train_shards: int


# Those that the public repository serves. The first is the leaderboard's, whose sha256s the package knows.
DATA_SETS = {
    "fineweb10B": DataSet(REPOSITORY, "fineweb", 103),
    "fineweb100B": DataSet("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": DataSet("kjj0/finewebedu10B-gpt2", "finewebedu", 103),
}
UNPINNED = frozenset(one.repository for one in DATA_SETS.values()) - {REPOSITORY}
MANIFEST = "manifest.json"
WORK_DIRECTORY = ".prep-fineweb"  # partial files and locks, on the shards' own file system
SHA256 = re.compile(r"[0-9a-f]{64}")
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Entry:
    """What the manifest records of a verified shard: it was checked against the package's sha256, else the hub's."""

    sha256: str
    bytes: int
    tokens: int
    mtime_ns: int
    revision: str
    ctime_ns: int | None = None  # None: written by a version that did not keep it; then the file is hashed
    endpoint: str | None = None  # the hub, or the mirror, that announced the sha256
    repository: str = REPOSITORY  # one of the whole manifest, where it stands


@dataclass(frozen=True)
class ShardCheck:
    """The result of checking one shard file.

    `state` is "valid" (header, length and the known sha256 fit), "unverified" (a whole shard that the manifest does
    not know, for example one of your own text), "corrupt" or "missing"; `detail` says why for the last two. `sha256` is
    the known one.
    """

    name: str
    state: Literal["valid", "unverified", "corrupt", "missing"]
    tokens: int | None = None
    sha256: str | None = None
    detail: str = ""
    entry: Entry | None = None  # what the manifest should say about a valid file, with its present time of change


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The manifest's shards by name; empty if there is no manifest or it cannot be understood."""
    try:
        content = read_json(directory / MANIFEST)
        repository = str(content.get("repository", REPOSITORY))
        return {str(name): _entry(fields, repository) for name, fields in content["shards"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"{directory / MANIFEST}: not readable as a manifest ({error}); shards are checked against the hub")
        return {}


def verify_directory(directory: Path, *, rehash: bool = False) -> list[ShardCheck]:
    """Check every shard in a directory, and every one that its manifest names; sorted by name.

    Reads headers and the manifest only, unless one of a file's times of change differs from the manifest's: then it is
    hashed. Writes nothing and needs no network.

    Args:
        directory: where the shards are.
        rehash: hash every file that the manifest knows (0.1 to 0.2 s a shard).

    Raises:
        RunError: a file exists but cannot be read.
    """
    manifest = read_manifest(directory)
    stems = {one.stem for one in DATA_SETS.values()}
    patterns = (f"{stem}_{kind}_*.bin" for stem in stems for kind in ("train", "val"))
    found = {path.name for pattern in patterns for path in directory.glob(pattern)}
    return [
        check_shard(directory / name, manifest.get(name), rehash=rehash) for name in sorted(found | manifest.keys())
    ]


def check_shard(path: Path, entry: Entry | None, *, rehash: bool = False, stop: Stop | None = None) -> ShardCheck:
    """Check one shard's header, its length, and its sha256 if the manifest's `entry` leaves it open.

    Raises:
        RunError: the file exists but cannot be read.
        Stopped: `stop` was set during hashing.
    """
    remembered = known_sha256(path.name, entry)
    try:
        tokens = read_count(path)
        status = path.stat()
        if entry is None or remembered is None:
            return ShardCheck(path.name, "unverified", tokens)
        if status.st_size != entry.bytes:
            detail = f"{status.st_size} bytes long, but the hub's file has {entry.bytes}"
            return ShardCheck(path.name, "corrupt", tokens, remembered, detail)
        now = replace(entry, sha256=remembered, tokens=tokens, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
        if rehash or (now.sha256, now.mtime_ns, now.ctime_ns) != (entry.sha256, entry.mtime_ns, entry.ctime_ns):
            digest = file_sha256(path, stop)
            if digest != remembered:
                detail = f"sha256 is {digest}, but the hub's is {remembered}"
                return ShardCheck(path.name, "corrupt", tokens, remembered, detail)
        return ShardCheck(path.name, "valid", tokens, remembered, entry=now)
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            detail = (missing_target(path) or "no such file").removeprefix(f"{path}: ")
            return ShardCheck(path.name, "missing", None, remembered, detail)
        if isinstance(error.__cause__, OSError):
            raise RunError(f"{error}. Check its permissions and the disk") from error
        return ShardCheck(path.name, "corrupt", None, remembered, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}. Check its permissions and the disk") from error


def known_sha256(name: str, entry: Entry | None) -> str | None:
    """The sha256 that FineWeb's shard `name` must have: the package's own, else the one in its manifest entry.

    Without an entry None: nobody has said that a file of this name is FineWeb's.
    """
    if entry is None:
        return None
    return pinned_sha256(name, entry.repository) or entry.sha256


def pinned_sha256(name: str, repository: str) -> str | None:
    """The package's own hash of a shard. Only the other known data sets have different files with these names."""
    return None if repository in UNPINNED else official.SHA256.get(name)


def file_sha256(path: Path, stop: Stop | None = None) -> str:
    """A file's sha256 in hexadecimal, from reading it again."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(4 << 20))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            if stop is not None:
                stop.check()
            digest.update(buffer[:count])
    return digest.hexdigest()


def update_manifest(directory: Path, entries: dict[str, Entry]) -> None:
    """Add or replace shards in the manifest; several processes may do so at once.

    Raises:
        FatalError: it cannot be written.
    """
    path = directory / MANIFEST
    temporary = directory / WORK_DIRECTORY / f"{MANIFEST}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        temporary.parent.mkdir(exist_ok=True)
        with shard_lock(directory / WORK_DIRECTORY / f"{MANIFEST}.lock", MANIFEST, wait=True, stop=None):
            shards = read_manifest(directory) | entries
            repository = next(iter(entries.values())).repository
            text = json.dumps(
                {
                    "format": 1,
                    "repository": repository,
                    "shards": {name: _fields(name, shards[name]) for name in sorted(shards)},
                },
                indent=2,
            )
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(text + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FatalError(
            f"{path}: cannot be written: {error.strerror}. Free some space or quota and run the same command again"
        ) from error


@contextmanager
def shard_lock(path: Path, name: str, *, wait: bool, stop: Stop | None) -> Iterator[bool]:
    """Hold a lock file; yields whether it is held (always, if `wait` is on).

    flock, which the kernel releases however a process dies; on file systems without it (some NFS and Lustre mounts) a
    file that is created exclusively; a process killed on another node leaves it behind, so the message names it.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path, mode=0o664)
    told = time.monotonic()
    while True:
        if stop is not None:
            stop.check()
        try:
            lock.acquire(timeout=0.5 if wait else 0, poll_interval=0.05)
            break
        except Timeout:
            if not wait:
                yield False
                return
            if time.monotonic() - told > 5:
                told = time.monotonic() + 55
                say(f"{name}: waiting for another process (if there is none, remove {lock.lock_file})")
        except (OSError, NotImplementedError) as error:
            missing = isinstance(error, NotImplementedError) or error.errno in NO_LOCKS
            if not missing or isinstance(lock, SoftFileLock):
                raise FatalError(f"{path}: cannot be locked: {error}. Choose another directory with --dir") from error
            lock = SoftFileLock(path.with_suffix(".softlock"), mode=0o664)
    try:
        yield True
    finally:
        lock.release()


def _fields(name: str, entry: Entry) -> dict[str, Any]:
    fields = asdict(entry) | {"trust": "pinned" if pinned_sha256(name, entry.repository) else "first use"}
    del fields["repository"]
    return fields


def _entry(fields: dict[str, Any], repository: str) -> Entry:
    known = {key: value for key, value in fields.items() if key != "trust"}  # for people; the package knows
    entry = Entry(**known, repository=repository)
    numbers = (entry.bytes, entry.tokens, entry.mtime_ns, entry.ctime_ns or 0)
    if not all(isinstance(number, int) for number in numbers) or not SHA256.fullmatch(entry.sha256):
        raise ValueError(f"found {fields}")
    return entry
