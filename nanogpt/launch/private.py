"""Directories on the node that a process of this user has for itself. They go with it, or at the next one's start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"
ABANDONED_S = 24 * 3600.0  # a directory of this age without a lock: its process died before it had made one


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
    """Directories of this user's whose lock is free."""
    for root in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = root.lstat()
            if status.st_uid != os.geteuid() or root.is_symlink():
                continue
            try:
                lock = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # just being made, unless it is old
                if time.time() - status.st_mtime > ABANDONED_S:
                    shutil.rmtree(root, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(lock)
