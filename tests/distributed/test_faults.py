"""What clusters do to a run of several processes; more of it, which takes longer, in tests/cluster/test_faults.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launched import Launched, endless_recipe
from tiny_runs import losses, make_data, tiny_spec, train, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ALL_S = 60.0  # every process of a run with a fault ends within
SILENCE = "watchdog={silence_seconds: 10}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,))


def test_a_killed_rank_ends_the_run(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 2, SILENCE)
    with Launched(tmp_path / "killed", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        os.kill(launched.ranks()[1], signal.SIGKILL)
        assert launched.end(ALL_S) == 1, launched.output
        host = os.uname().nodename
        assert f"rank 1 on {host} (process {launched.seen[1]}) has died in step " in launched.log
        assert f"rank 1 on {host} was killed by SIGKILL" in launched.output
        assert (read_run(launched.run).state, read_record(launched.run).state) == ("failed", "failed")


def test_a_refusal_is_told_once(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 4)  # for four, on two
    with Launched(tmp_path / "refused", 2, recipe, "--data", data) as launched:
        assert launched.end() == 2, launched.output
        assert launched.output.count("the recipe wants 4 processes, found 2") == 1
        assert "Traceback" not in launched.output
        assert not launched.runs.exists()


def test_a_stopped_rank_zero_ends_the_run(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 2, SILENCE)
    with Launched(tmp_path / "stopped", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        os.kill(launched.ranks()[0], signal.SIGSTOP)
        assert launched.end(ALL_S) == 1, launched.output
        silent = f"rank 0 on {os.uname().nodename} (process {launched.seen[0]}) has been silent for 10 s in step "
        assert silent in launched.output
        assert f"run failed: {silent}" in launched.log  # by rank 1, as rank 0 cannot


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.at_end=true", "training.stages.0.steps=40")
    train(tiny_spec(*settings), data, tmp_path / "whole")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec(*settings, "hardware.gpus_per_node=2"))
    with Launched(tmp_path / "first", 2, recipe, "--data", data) as launched:
        launched.wait_for("the start", lambda: "Run directory: " in launched.output)
        os.kill(launched.ranks()[1], signal.SIGUSR1)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        run = launched.run
        stopped = read_run(run)
        assert launched.output.count("SIGUSR1 to rank 1 on ") == 1
        assert (stopped.state, read_record(run).state) == ("interrupted", "interrupted")
        assert stopped.checkpoints[-1]["step"] == stopped.last["step"]
    train(tiny_spec(*settings), data, run, resume=True)  # on one process
    assert [start.state for start in read_record(run).starts] == ["interrupted", "finished"]
    for found, expected in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
