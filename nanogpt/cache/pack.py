"""A cache file: a directory of compiled code in one piece, with its key and a checksum over all of it.

Notable features:
- Written under another name, synced and renamed: a file under its final name is whole, whoever else writes.
- Its content will be executed. So a file is read only if it belongs to this user, to root or to the container's image,
  and nobody else may write it; and none of it is looked at before the checksum over header and content matches.
- Members are plain files below the directory they are unpacked into; anything else is refused.
- Triton lists a kernel's files by their whole paths, and compiles it again where they are not there. So these lists are
  written anew for the directory that they are unpacked into.

Three parts: a line that says what it is, with the sha256 of what follows; a line of JSON (`Header`); a tar archive,
compressed with zstd.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard
from pydantic import AwareDatetime, BaseModel, ValidationError

from nanogpt.files import last_line
from nanogpt.runs.record import utc_now

SUFFIX = ".compiled"
MAGIC = b"nanogpt compiled code 1 sha256 "
LEVEL = 3  # of zstd: higher ones gain a few per cent here
NOT_KEPT = ("__pycache__", "locks")  # directories that each process makes itself
TEMPORARY = (".lock", ".tmp", ".pending")
KERNEL_FILES = "__grp__"  # begins the name of Triton's list of a kernel's files


class PackError(Exception):
    """A file that is not used, and why: a reason to compile, not an error of the run."""


class Header(BaseModel):
    """What a file says about itself, before its content."""

    key: dict[str, Any]
    key_sha256: str
    recipe: str
    created: AwareDatetime
    contents: dict[str, int]
    files: int
    bytes: int  # unpacked


def kept_files(root: Path) -> dict[str, Path]:
    """The files below `root` that belong in a cache file, by their path in it."""
    return {path[len(f"{root}/") :]: Path(path) for path in _plain_files(str(root))}


def _kept(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(TEMPORARY)


def _plain_files(directory: str) -> Iterator[str]:
    """There are thousands: what the directory says of an entry is enough."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in NOT_KEPT and not entry.name.startswith("tmp."):
                    yield from _plain_files(entry.path)
            elif _kept(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.path


def count_contents(names: Collection[str]) -> dict[str, int]:
    """How many graphs, kernels and tuning results are among the files of a cache."""
    paths = [PurePosixPath(name) for name in names]

    def below(folder: str) -> list[PurePosixPath]:
        return [path for path in paths if folder in path.parts[:-1]]

    return {
        "graphs": len({path.parent for path in below("aotautograd")}) + len(below("graphs")),
        "graph parts": len({path.parent for path in below("fxgraph")}),
        "Triton kernels": sum(path.suffix == ".cubin" for path in below("triton")),
        "CuTe kernels": sum(path.suffix == ".o" for path in below("cute")),
        "C++ kernels": sum(path.suffix == ".so" for path in below("inductor")),
        "tuned kernels": len(below("tuning")),
    }


def write_pack(path: Path, root: Path, *, key: Mapping[str, Any], key_sha256: str, recipe: str) -> Header:
    """Put the files below `root` into the cache file `path`, replacing one that is there. Raises OSError."""
    files = kept_files(root)
    size, body = 0, io.BytesIO()
    with (
        zstandard.ZstdCompressor(level=LEVEL, threads=-1).stream_writer(body, closefd=False) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, file in files.items():
            content = file.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), int(file.stat().st_mtime)
            member.mode = 0o700 if file.stat().st_mode & stat.S_IXUSR else 0o600
            archive.addfile(member, io.BytesIO(content))
            size += len(content)
    header = Header(
        key=dict(key),
        key_sha256=key_sha256,
        recipe=recipe,
        created=utc_now(),
        contents=count_contents(files),
        files=len(files),
        bytes=size,
    )
    rest = header.model_dump_json().encode() + b"\n" + body.getvalue()
    first = MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n"
    _write_whole(path, first + rest)
    return header


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some network file systems cannot
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def peek(path: Path) -> Header:
    """What a file says about itself, unchecked: to be shown, not to be trusted. Raises OSError and `PackError`."""
    with path.open("rb") as file:
        if not file.readline(200).startswith(MAGIC):
            raise PackError("not a file of compiled code, or damaged")
        return _header(file.readline(1_000_000))


def _header(line: bytes) -> Header:
    try:
        return Header.model_validate_json(line)
    except ValidationError as error:
        raise PackError("made by another version of this package") from error


class Pack:
    """A cache file that has been read and found whole. Raises `PackError` where it cannot be used.

    Args:
        path: the file.
        in_image: it lies in the container's image, whose owner may appear as anybody; it must not be writable.
    """

    def __init__(self, path: Path, *, in_image: bool = False):
        self.path = path
        self.raw = _read_trusted(path, in_image)
        first, _, rest = self.raw.partition(b"\n")
        if not first.startswith(MAGIC):
            raise PackError("not a file of compiled code, or damaged")
        if hashlib.sha256(rest).hexdigest().encode() != first[len(MAGIC) :]:
            raise PackError("damaged: its checksum does not match its content")
        line, _, self._body = rest.partition(b"\n")
        self.header = _header(line)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.raw)

    def unpack(self, root: Path) -> list[str]:
        """Write what is not there yet below `root`; returns the names of all files. Raises OSError and `PackError`."""
        return _unpack(self._body, root)

    def unpack_apart(self, root: Path) -> list[str]:
        """The same by a process of its own, for a process that imports meanwhile.

        A thread would ask for Python's lock again after each of its thousands of system calls, and both would wait.
        """
        command = [sys.executable, "-m", "nanogpt.cache.pack", str(root)]
        done = subprocess.run(command, check=False, input=self._body, capture_output=True)
        if done.returncode:
            raise PackError(last_line(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}")
        names: list[str] = json.loads(done.stdout)
        return names


def _unpack(body: bytes, root: Path) -> list[str]:
    names, made = [], set[Path]()
    for name, content, mode, mtime in _members(body):
        names.append(name)
        target = root / name
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        is_list = target.name.startswith(KERNEL_FILES)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_files_of_kernel(content, target.parent) if is_list else content)
                file.flush()
                os.utime(descriptor, (mtime, mtime))
    return names


def _files_of_kernel(content: bytes, directory: Path) -> bytes:
    """Triton's list of a kernel's files, which are in `directory`. Raises `PackError`."""
    try:
        listed: dict[str, Any] = json.loads(content)
        listed["child_paths"] = {name: str(directory / Path(name).name) for name in listed["child_paths"]}
    except (ValueError, LookupError, TypeError) as error:
        raise PackError(f"Triton's list of a kernel's files cannot be read: {content[:100]!r}") from error
    return json.dumps(listed).encode()


def _members(body: bytes) -> Iterator[tuple[str, bytes, int, float]]:
    try:
        with (
            zstandard.ZstdDecompressor().stream_reader(body) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if not member.isreg() or ".." in parts or member.name.startswith("/"):
                    raise PackError(f"has a member that is not a plain file: {member.name}")
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read(), member.mode & 0o700, member.mtime
    except (tarfile.TarError, zstandard.ZstdError) as error:
        raise PackError(f"cannot be unpacked: {error}") from error


def _read_trusted(path: Path, in_image: bool) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
        try:
            _check_trust(os.fstat(descriptor), in_image)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise PackError(f"cannot be read: {error.strerror}") from error


def _check_trust(status: os.stat_result, in_image: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PackError("not a plain file")
    if status.st_uid not in (os.geteuid(), 0) and not in_image:
        raise PackError(f"belongs to user {status.st_uid}; only files of this user ({os.geteuid()}) or root are used")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PackError("others may write it (chmod go-w makes it usable)")


def main(root: str) -> None:
    """`Pack.unpack_apart`: the archive comes on standard input, the names go to standard output."""
    try:
        print(json.dumps(_unpack(sys.stdin.buffer.read(), Path(root))))
    except OSError as error:
        sys.exit(error.strerror)
    except PackError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
