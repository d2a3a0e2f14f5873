"""Directories on a shared node that are this user's alone: those of predictable names, and those of one process.

A directory of a predictable name, as in /tmp, may be somebody else's, a link, or writable by others, and
contain their code under our names. `open_private` opens each part of its path separately, relative to the
one before and without following links, so that nothing can be swapped between check and use.

A directory of one process has a name that nobody knows beforehand. It is removed with the process, or when the next one
starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nanogpt.errors import InputError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
UID_MAP = Path("/proc/self/uid_map")
LOCK_NAME = ".lock"
ABANDONED_S = 24 * 3600.0  # older than this without a lock: its process died before creating one


@contextmanager
def private_directory(prefix: str) -> Iterator[Path]:
    """`make_private`'s directory, removed in the end. Raises OSError."""
    root, lock = make_private(prefix)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


def make_private(prefix: str) -> tuple[Path, int]:
    """A directory that this user alone can enter, and the lock that says it is in use.

    Removes those of `prefix` whose process was killed. Raises OSError.
    """
    parent, prefix = Path(tempfile.gettempdir()), f"{prefix}{os.geteuid()}-"
    _remove_abandoned(parent, prefix)
    root = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return root, lock


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """This user's directories whose lock is free."""
    for root in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = root.lstat()
            if status.st_uid != os.geteuid() or root.is_symlink():
                continue
            try:
                lock = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # being created, unless it is old
                if time.time() - status.st_mtime > ABANDONED_S:
                    shutil.rmtree(root, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(lock)


def open_private(base: Path, names: Sequence[str], *, make: bool = True) -> int:
    """Open the directory `names` below `base`, each part of which must be this user's alone; returns a descriptor.

    Args:
        base: the shared place; may be a link, as its owner made it.
        names: one directory after the other; missing ones are created with mode 0700 if `make` is set.

    Raises:
        InputError: a part is a link, somebody else's, or open to others; or others may replace the contents of `base`.
        OSError: a part does not exist or cannot be made.
    """
    _check_place(base)
    path, descriptor = base, os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            path /= name
            inner = _open_part(path, name, descriptor, make=make)
            os.close(descriptor)
            descriptor = inner
            _check_mine(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_part(path: Path, name: str, parent: int, *, make: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    except NotADirectoryError as error:  # a link, too
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
        raise InputError(f"{path}: is {kind}, of {_who(found.st_uid)}; expected a directory of your own") from error
    with contextlib.suppress(FileExistsError):  # another job created it just now; the owner is checked next
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, flags, dir_fd=parent)


def _check_mine(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise InputError(f"{path}: belongs to {_who(found.st_uid)}; expected a directory of your own")
    if found.st_mode & OTHERS_WRITE:
        mode = stat.S_IMODE(found.st_mode)
        raise InputError(f"{path}: others may write to it (mode {mode:04o}); expected 0700: remove it, or chmod go-w")


def _check_place(base: Path) -> None:
    """Raise `InputError` if another user could replace a directory in `base`."""
    trusted = {0, os.geteuid(), *_hidden_owners()}
    real = base.resolve()
    for path in (real, *real.parents):
        found = path.stat()
        if found.st_uid not in trusted:
            raise InputError(f"{path}: belongs to {_who(found.st_uid)}, who can replace its contents")
        if found.st_mode & OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(found.st_mode)
            raise InputError(f"{path}: others can replace its contents (mode {mode:04o}, without a sticky bit)")


def _hidden_owners() -> set[int]:
    """The id under which root's files appear in a user namespace without root; else none."""
    try:
        known = {int(line.split()[1]) for line in UID_MAP.read_text().splitlines()}
        return set() if 0 in known else {int(OVERFLOW_UID.read_text())}
    except (OSError, ValueError, IndexError):
        return set()


def _who(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
