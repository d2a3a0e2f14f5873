"""`nanogpt launch` without torchrun's options, with real ranks: as many as the hardware has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import read_record


def launch(*arguments: object) -> None:
    command = [sys.executable, "-m", "nanogpt", "launch", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_process_for_each_of_the_hardware(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())  # which says 1 x cpu
    launch(recipe, "--on", "2xcpu", "--data", data, "--out", tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    record = read_record(path)
    assert (record.state, record.hardware.world_size, record.hardware.claimed.gpus_per_node) == ("finished", 2, 2)
    hardware = RunDirectory.open(path).spec().hardware
    assert (hardware.gpu, hardware.gpus_per_node, hardware.nodes) == ("cpu", 2, 1)
