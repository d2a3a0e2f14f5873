"""A directory to try scripts of slurm/ in, with a stand-in for Apptainer and recorded answers of Slurm's commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recorded import SQUEUE, program
from scripts_place import SCRIPTS, Run, variables
from tiny_runs import make_data


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with an image, shards, Slurm's commands in bin/ and those of the image in inside/."""
    (tmp_path / "nanogpt.sif").touch()
    make_data(tmp_path / "data", val_tokens=20_000, bos=50256)
    program(tmp_path / "bin", "sbatch", {"": "12\n"})
    program(tmp_path / "bin", "squeue", {"": SQUEUE})
    inside = tmp_path / "inside"
    inside.mkdir()
    nanogpt = inside / "nanogpt"
    nanogpt.write_text(f'#!/bin/sh\nPYTHONPATH={SCRIPTS.parent} exec {sys.executable} -m nanogpt "$@"\n')
    nanogpt.chmod(0o755)
    return tmp_path


@pytest.fixture
def run(place: Path) -> Run:
    """Run a script in `place` with nothing of this process's environment."""

    def started(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            cwd=place,
            env=variables(place, environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return started
