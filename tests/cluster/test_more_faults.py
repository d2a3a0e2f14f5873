"""Faults of runs of several processes on one machine, beyond those of tests/distributed/test_faults.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launched import Launched, endless_recipe, read
from tiny_runs import make_data

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record

pytestmark = pytest.mark.timeout(900)

ALL_S = 150.0  # a busy machine is slow
SILENCE = "watchdog={silence_seconds: 10}"  # the default's 20 s: test_two_nodes.py
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,), val_tokens=2_000_000)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return endless_recipe(tmp_path / "endless.yaml", 2, SILENCE)


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_before_the_first_step(data: Path, recipe: Path, tmp_path: Path, rank: int) -> None:
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for("the ranks' agreement", lambda: "Run directory: " in launched.output)
        launched.wait_for("all ranks", lambda: len(launched.ranks()) == 2)
        os.kill(launched.seen[rank], signal.SIGSTOP)
        assert launched.end(ALL_S) == 1, launched.output
        assert f"rank {rank} on {HOST} (process {launched.seen[rank]})" in launched.output


def test_stopped_in_a_validation(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 2, SILENCE, "evaluation.tokens=1920000")
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        metrics = lambda: "".join(read(str(path)) for path in launched.runs.glob("*/metrics.jsonl"))  # noqa: E731
        launched.wait_for("the validation before the first step", lambda: '"start"' in metrics())
        launched.wait_for("all ranks", lambda: len(launched.ranks()) == 2)
        os.kill(launched.seen[1], signal.SIGSTOP)
        assert launched.end(ALL_S) == 1, launched.output
        assert '"evaluation"' not in metrics(), "the validation was over before the signal"
        assert " has been silent for 10 s while validating, 0 steps done" in launched.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher(data: Path, recipe: Path, tmp_path: Path, number: int) -> None:
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        launched.process.send_signal(number)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        assert launched.output.count(f"{signal.Signals(number).name} to the launcher on {HOST}: the run stopped") == 1
        assert read_record(launched.run).state == read_run(launched.run).state == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_everybody_at_once(data: Path, recipe: Path, tmp_path: Path, number: int) -> None:
    """As a batch system sends it; and once more, as it may."""
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        for _ in range(2):
            for pid in (launched.process.pid, *launched.seen.values()):
                os.kill(pid, number)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        run = read_run(launched.run)
        assert run.state == "interrupted"
        assert run.checkpoints[-1]["step"] == run.last["step"]


def test_a_signal_before_the_ranks_are_ready(data: Path, recipe: Path, tmp_path: Path) -> None:
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for("the ranks", lambda: len(launched.ranks()) == 2)
        for pid in (launched.process.pid, *launched.seen.values()):  # they are importing
            os.kill(pid, signal.SIGUSR1)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        assert "\nstep:9/" not in launched.log


def test_a_killed_launcher_takes_its_ranks_along(data: Path, recipe: Path, tmp_path: Path) -> None:
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        os.kill(launched.seen[0], signal.SIGSTOP)  # even a stopped one
        launched.process.kill()
        assert launched.end(ALL_S) == -signal.SIGKILL


def test_plain_torchrun(data: Path, recipe: Path, tmp_path: Path) -> None:
    with Launched(tmp_path / "signal", 2, recipe, "--data", data, launcher="torchrun") as launched:
        launched.wait_for_step(5)
        os.kill(launched.seen[0], signal.SIGTERM)
        assert launched.end() == 1, launched.output  # torchrun's own
        assert read_run(launched.run).state == "interrupted"
    with Launched(tmp_path / "stop", 2, recipe, "--data", data, launcher="torchrun") as launched:
        launched.wait_for_step(5)
        os.kill(launched.seen[1], signal.SIGSTOP)
        assert launched.end(ALL_S) == 1, launched.output
        assert f"rank 1 on {HOST} (process {launched.seen[1]}) has been silent for 10 s in step " in launched.log


def test_torchrun_on_one_process_joins_no_group(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 1)
    with Launched(tmp_path / "run", 1, recipe, "--data", data) as launched:
        launched.wait_for_step(3)
        launched.process.send_signal(signal.SIGUSR1)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        assert "SIGUSR1 to the launcher: the run stopped after step " in launched.output
