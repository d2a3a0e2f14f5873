"""Another user of the node, for real: root starts processes under other numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ME, OTHER = 61_001, 61_002

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be two users; needs setpriv"
)


def as_other(script: str, *arguments: object, uid: int = OTHER) -> None:
    """Run a shell script as the other user."""
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "sh", "-eu", "-c", script, "sh"]
    subprocess.run([*command, *map(str, arguments)], check=True, timeout=30)


def as_me(work: Callable[[], object]) -> str:
    """Do `work` in a process of an ordinary user; returns "done", or the exception's type and text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(ME, ME, ME)
            os.setresuid(ME, ME, ME)
            work()
            said = "done"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


@contextmanager
def shared_place() -> Iterator[Path]:
    """A directory that everybody can write to, as /tmp is."""
    place = Path(tempfile.mkdtemp(prefix="nanogpt-test-", dir="/tmp"))
    place.chmod(0o1777)
    try:
        yield place
    finally:
        shutil.rmtree(place)
