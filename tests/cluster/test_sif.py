"""The image, built and run for real as an ordinary user."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_torch_is_imported(sif: Path, as_user: Run) -> None:
    done = as_user(["apptainer", "exec", sif, "python", "-c", "import torch; print(torch.__version__)"], check=True)
    assert done.stdout.startswith("2.")
