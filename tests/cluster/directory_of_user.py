"""A directory that an ordinary user of the tests owns."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def directory_of_user(as_user: Callable[..., subprocess.CompletedProcess[str]]) -> Iterator[Path]:
    """A directory of the user's own, outside home, for as long as it lasts."""
    made = Path(as_user(["mktemp", "-d", "/var/tmp/sif-test-XXXXXX"], check=True).stdout.strip())
    yield made
    shutil.rmtree(made)
