"""Triton, which PyTorch for CPUs does not bring: in a process of its own, also since it reads its settings once."""

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
    run_with_triton(file, TRITON_INTERPRET="1")


def run_with_triton(file: str, *arguments: str, **variables: str) -> str:
    """Run a file as a script that can import Triton, and return what it printed. Fails likewise."""
    environment = os.environ | variables
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TRITON, *Path(__file__).parents[:2])))
    command = [sys.executable, file, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
