"""Triton's interpreter runs kernels on a CPU, in a process of its own, since Triton reads that setting once."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRITON = Path(sys.prefix) / ".ready" / "triton"  # see the Makefile
needs_triton = pytest.mark.skipif(
    not (TRITON / "triton").is_dir() and find_spec("triton") is None, reason="there is no Triton"
)


def run_interpreted(file: str) -> None:
    """Run a file as a script. Fails with what it said if it fails."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TRITON, *Path(__file__).parents[:2])))
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
