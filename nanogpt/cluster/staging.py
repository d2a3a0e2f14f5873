"""The image and the shards on a node's own disk, copied once.

An existing copy is used if its sha256 is the original's. Copies are in directories that are this user's
alone (see nanogpt/private_directories.py), and appear under their names only when complete; jobs of one user that
start on a node at the same time wait for one another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from nanogpt.console import human_bytes, say
from nanogpt.data.manifest import file_sha256, read_manifest
from nanogpt.data.shards import missing_target
from nanogpt.errors import InputError, RunError
from nanogpt.image.labels import known_sha256, read_built, sidecar
from nanogpt.private_directories import open_private

BLOCK_BYTES = 4 << 20
HASHING_THREADS = 4
ELSEWHERE = "Name a directory of your own on the node's disk (NANOGPT_STAGE=/local/$USER), or unset NANOGPT_STAGE"


def stage_directory(stage: Path) -> Path:
    """The user's own directory in `stage`."""
    return stage / f"nanogpt-{os.geteuid()}"


def staged_image(stage: Path, image: Path) -> Path:
    """Where the image's copy goes."""
    return stage_directory(stage) / _tag(image.parent) / image.name


def staged_data(stage: Path, data: Path) -> Path:
    """Where the copies of the shards go."""
    return stage_directory(stage) / _tag(data) / "shards"


def _tag(path: Path) -> str:
    """Directories with other contents get other copies."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]


def stage_files(
    files: Sequence[Path], stage: Path, directory: Path, known: Mapping[Path, str] | None = None
) -> tuple[int, float]:
    """Make `directory`, below `stage`, hold copies of `files`; returns the bytes copied and those compared.

    Args:
        files: of different names.
        stage: the shared place.
        directory: each of its parts below `stage` is created, or must be this user's alone.
        known: sha256 of files whose content is known; others are read.

    Raises:
        InputError: the directory cannot be created, or is not this user's alone.
        RunError: too little space, a copy failed, or a file does not match `known`.
    """
    known = known or {}
    copied = compared = 0
    try:
        with _opened(stage, directory) as folder, _locked(folder), ThreadPoolExecutor(HASHING_THREADS) as threads:
            for name in os.listdir(folder):  # noqa: PTH208 -- left by a job that was killed
                if name.endswith(".partial"):
                    os.unlink(name, dir_fd=folder)
            same = list(threads.map(lambda file: _identical(file, folder, known.get(file)), files))
            todo = [file for file, is_same in zip(files, same, strict=True) if not is_same]
            compared = sum(file.stat().st_size for file in files if file not in todo)
            needed, free = sum(file.stat().st_size for file in todo), shutil.disk_usage(folder).free
            if needed > free:
                raise RunError(
                    f"NANOGPT_STAGE: {directory} has {human_bytes(free)} free, but copies need {human_bytes(needed)}."
                    " Name a larger disk, or unset NANOGPT_STAGE"
                )
            for file in todo:
                copied += _copy(file, folder, known.get(file))
    except OSError as error:
        raise RunError(f"NANOGPT_STAGE: {directory}: copying failed: {error}. Unset NANOGPT_STAGE") from error
    return copied, compared


@contextmanager
def _opened(stage: Path, directory: Path) -> Iterator[int]:
    try:
        stage.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = open_private(stage, directory.relative_to(stage).parts)
    except InputError as error:
        raise InputError(f"NANOGPT_STAGE: {error}. {ELSEWHERE}") from error
    except OSError as error:
        raise InputError(f"NANOGPT_STAGE: {directory} cannot be created: {error.strerror}. {ELSEWHERE}") from error
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def _locked(folder: int) -> Iterator[None]:
    lock = os.open(".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _identical(source: Path, folder: int, known: str | None) -> bool:
    """Whether the copy has the length and the content of its source."""
    try:
        copy = os.open(source.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    with os.fdopen(copy, "rb") as stream:
        if os.fstat(copy).st_size != source.stat().st_size:
            return False
        if hashlib.file_digest(stream, "sha256").hexdigest() != (known or file_sha256(source)):
            return False
        _keep_time(source, copy)
        return True


def _copy(source: Path, folder: int, known: str | None) -> int:
    partial = f".{source.name}.partial"
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as target, source.open("rb", buffering=0) as original:
            while block := original.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                view = memoryview(block)
                while view:
                    view = view[target.write(view) :]
            _keep_time(source, target.fileno())
        if known and digest.hexdigest() != known:
            raise RunError(
                f"{source}: has sha256 {digest.hexdigest()}, but the file beside it says {known}: it is damaged or was"
                " changed. Make it again: make sif for an image, prep-fineweb --verify for shards"
            )
        os.rename(partial, source.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
    return size


def _keep_time(source: Path, copy: int) -> None:
    """Manifests and the facts beside an image go by modification time."""
    status = source.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def stage(stage: Path, *, image: Path | None, shards: Sequence[Path], manifests: Sequence[Path] = ()) -> None:
    """Copy image and shards to this node's disk below `stage`, and say how long that took.

    Raises:
        InputError: `stage` is not writable or not safe, or a shard is a broken link.
        RunError: too little space there, or a copy failed.
    """
    parts: list[tuple[str, list[Path], Path, Callable[[], dict[Path, str]]]] = []
    if image is not None and image.is_dir():
        say(f"staged image: {image} is unpacked and stays where it is; only a .sif is copied")
    elif image is not None:
        files = [image, sidecar(image)] if read_built(image) else [image]
        digest = known_sha256(image)
        parts.append(("image", files, staged_image(stage, image).parent, lambda: {image: digest} if digest else {}))
    if shards:
        for shard in shards:
            if problem := missing_target(shard):
                raise InputError(problem)
        files = [*shards, *manifests]
        parts.append(("shards", files, staged_data(stage, shards[0].parent), lambda: _verified(shards)))
    for what, files, directory, known in parts:
        began = time.monotonic()
        copied, compared = stage_files(files, stage, directory, known())
        seconds = time.monotonic() - began
        if copied:
            rate = f", {human_bytes(copied / max(seconds, 1e-3))}/s"
            say(f"staged {what}: {human_bytes(copied)} to {directory} in {seconds:.1f} s{rate}")
        else:
            size = human_bytes(compared)
            say(f"staged {what}: there already, identical ({size} compared in {seconds:.1f} s): {directory}")


def _verified(shards: Sequence[Path]) -> dict[Path, str]:
    """sha256 of the shards that are unchanged since the manifest was written."""
    known = {}
    manifest = read_manifest(shards[0].parent)
    for shard in shards:
        entry, status = manifest.get(shard.name), shard.stat()
        if entry is not None and (entry.bytes, entry.mtime_ns) == (status.st_size, status.st_mtime_ns):
            known[shard] = entry.sha256
    return known


def check_staged(stage: Path, directory: Path) -> None:
    """Raise `InputError` unless the copies' `directory`, below `stage`, is still this user's alone."""
    try:
        os.close(open_private(stage, directory.relative_to(stage).parts, make=False))
    except InputError as error:
        raise InputError(f"NANOGPT_STAGE: {error}. {ELSEWHERE}") from error
    except OSError as error:
        raise InputError(f"NANOGPT_STAGE: {directory}: {error.strerror}: the copies are gone. {ELSEWHERE}") from error
