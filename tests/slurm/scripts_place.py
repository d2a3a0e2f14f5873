"""Where the scripts in slurm/ are tried: their environment, in a job and outside, and programs that stand in."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from recorded import ONE_NODE, program

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "slurm"
Run = Callable[..., subprocess.CompletedProcess[str]]


def variables(place: Path, more: dict[str, str]) -> dict[str, str]:
    """The environment of a script."""
    all_of_them = {
        "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        "HOME": str(place),
        "USER": "ada",
        "APPTAINER": str(HERE / "fake_apptainer.sh"),
        "FAKE_IMAGE_PATH": f"{place / 'inside'}:/usr/bin:/bin",
        **more,
    }
    return {name: value for name, value in all_of_them.items() if value}


def job_environment(place: Path) -> dict[str, str]:
    """More of it, in a job of one node."""
    program(place / "bin", "scontrol", {"show hostnames": "n1\n", "show job": ONE_NODE})
    program(place / "bin", "srun", {"": "the step runs\n"}, code=0)
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def bound(run: Run, place: Path, *arguments: str, **environment: str) -> set[str]:
    """What the script has Apptainer show."""
    log = place / "arguments"
    executable(place / "bin" / "apptainer", f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\n')
    done = run("in_image.sh", *arguments, APPTAINER="", **environment)
    assert done.returncode == 0, done.stderr
    words = log.read_text().splitlines()
    return {words[index + 1] for index, word in enumerate(words) if word == "--bind"}
