"""`make sif-diff A=old.sif B=new.sif`: what differs between two images, file by file.

Names, types, modes, owners, times and contents are compared; two builds of one commit differ in none of them. A
and B may be directories too (owners are then not compared). Standard library only; exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanogpt.console import human_bytes, say
from nanogpt.errors import InputError, NanogptError, RunError

SHOWN = 50
KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}


class Entry(NamedTuple):
    """One file, directory or link of a tree."""

    kind: str
    mode: int  # permission bits
    owner: str | None  # "uid/gid" inside the image; None: in a directory, where it means nothing
    modified: int  # seconds since 1970
    size: int  # of a file, else 0
    content: str  # sha256 of a file, target of a link, else empty


class Difference(NamedTuple):
    """A path that differs between the two trees."""

    path: str
    what: str

    def line(self) -> str:
        """As the user sees it."""
        return f"{self.path}: {self.what}"


def tree_entries(root: Path, owners: Mapping[str, str] | None = None) -> dict[str, Entry]:
    """Path relative to `root` -> entry, for everything below it."""
    found = {}
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        status = path.lstat()
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        content = ""
        if kind == "file":
            content = file_sha256(path)
        elif kind == "link":
            content = str(path.readlink())
        size = status.st_size if kind == "file" else 0
        owner = owners.get(name) if owners is not None else None
        found[name] = Entry(kind, stat.S_IMODE(status.st_mode), owner, int(status.st_mtime), size, content)
    return found


def _walk(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differences(a: Mapping[str, Entry], b: Mapping[str, Entry]) -> list[Difference]:
    """What differs, in the order of the paths."""
    found = []
    for path in sorted({*a, *b}):
        if path not in a or path not in b:
            found.append(Difference(path, "only in B" if path not in a else "only in A"))
            continue
        left, right = a[path], b[path]
        if left == right:
            continue
        parts = []
        if left.kind != right.kind:
            parts.append(f"{left.kind}, {right.kind}")
        if left.mode != right.mode:
            parts.append(f"mode {left.mode:o}, {right.mode:o}")
        if left.owner != right.owner:
            parts.append(f"owner {left.owner}, {right.owner}")
        if left.modified != right.modified:
            parts.append(f"time {left.modified}, {right.modified}")
        if left.size != right.size:
            parts.append(f"size {left.size}, {right.size}")
        elif left.content != right.content:
            parts.append("content" if left.kind == "file" else f"target {left.content}, {right.content}")
        found.append(Difference(path, "; ".join(parts)))
    return found


def partition(image: Path) -> tuple[int, int]:
    """Where the squashfs lies in the SIF: first byte, and the one after the last.

    Raises:
        InputError: no such file, or not a SIF with a squashfs.
        RunError: there is no apptainer.
    """
    if not image.is_file():
        raise InputError(f"{image}: no such file; expected an image (make sif) or a directory")
    try:
        done = subprocess.run(["apptainer", "sif", "list", image], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(f"apptainer cannot be started: {error.strerror}; load its module or install it") from error
    for row in done.stdout.splitlines():
        match = re.search(r"\|(\d+)-(\d+)\s*\|FS \(Squashfs", row)
        if match:
            return int(match.group(1)), int(match.group(2))
    raise InputError(f"{image}: holds no squashfs: {(done.stderr or done.stdout).strip()[:200]}; is it damaged?")


def content_sha256(image: Path) -> str:
    """sha256 of the image's file system alone: without the SIF's header, which has times and ids of its own."""
    start, end = partition(image)
    digest = hashlib.sha256()
    with image.open("rb") as stream:
        stream.seek(start)
        left = end - start
        while left > 0 and (block := stream.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def image_entries(image: Path, scratch: Path) -> dict[str, Entry]:
    """The image's files, unpacked into `scratch`.

    Raises:
        RunError: unsquashfs failed.
    """
    offset = str(partition(image)[0])
    listing = _output("unsquashfs", "-lln", "-o", offset, image)
    owners = {}
    for line in listing.splitlines():
        match = re.match(r"\S{10}\s+(\d+/\d+)\s+\d+\s+\S+ \S+ squashfs-root/(.*?)( -> .*)?$", line)
        if match:
            owners[match.group(2)] = match.group(1)
    target = scratch / "tree"
    _output("unsquashfs", "-no-progress", "-quiet", "-o", offset, "-d", target, image)
    return tree_entries(target, owners)


def _output(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}; install squashfs-tools") from error
    if done.returncode != 0:
        raise RunError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def entries_of(place: Path, scratch: Path) -> dict[str, Entry]:
    """Entries of a directory or an image."""
    if place.is_dir():
        return tree_entries(place)
    scratch.mkdir()
    return image_entries(place, scratch)


def large_parts(entries: Mapping[str, Entry], depth: int, at_least: int) -> list[tuple[str, int]]:
    """Directories at most `depth` deep with at least `at_least` bytes of files, largest first."""
    sizes: Counter[str] = Counter()
    for path, entry in entries.items():
        parts = path.split("/")
        sizes["/".join(parts[: min(depth, len(parts) - 1)])] += entry.size
    return [(path, size) for path, size in sizes.most_common() if size >= at_least]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its exit code: 0 alike, 1 different, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="sif-diff", description=__doc__.partition("\n")[0])
    parser.add_argument("a", type=Path, metavar="A", help="image or directory")
    parser.add_argument("b", type=Path, metavar="B", help="image or directory")
    arguments = parser.parse_args(argv)
    a, b = arguments.a, arguments.b
    try:
        if str(a) in ("", ".") or str(b) in ("", "."):
            raise InputError("make sif-diff needs two images or directories: make sif-diff A=old.sif B=new.sif")
        if a.is_file() and b.is_file() and content_sha256(a) == content_sha256(b):
            print(f"The file systems of {a} and {b} are identical, bit for bit.")
            return 0
        with tempfile.TemporaryDirectory(prefix="sif-diff-", dir=os.environ.get("APPTAINER_TMPDIR")) as scratch:
            left, right = entries_of(a, Path(scratch, "a")), entries_of(b, Path(scratch, "b"))
            if a.is_dir() or b.is_dir():
                left, right = (
                    {path: entry._replace(owner=None) for path, entry in side.items()} for side in (left, right)
                )
    except NanogptError as error:
        say(f"sif-diff: {error}")
        return error.exit_code
    found = differences(left, right)
    for difference in found[:SHOWN]:
        print(difference.line())
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more")
    sizes = " and ".join(human_bytes(sum(entry.size for entry in side.values())) for side in (left, right))
    print(f"{len(left)} and {len(right)} files, {sizes}: {f'{len(found)} differ' if found else 'no difference'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
