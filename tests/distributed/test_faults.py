"""What clusters do to a run of several processes; more of it, which takes longer, in tests/cluster/test_faults.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launched import PATIENCE_S, Launched, endless_recipe
from tiny_runs import losses, make_data, tiny_spec, train, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SILENCE_S = 20  # the default


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,))


def test_a_killed_rank_ends_the_run(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 2)
    with Launched(tmp_path / "killed", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        os.kill(launched.ranks()[1], signal.SIGKILL)
        assert launched.end() == 1, launched.output
        host = os.uname().nodename
        assert f"rank 1 on {host} (process {launched.seen[1]}) has died in step " in launched.log
        assert f"rank 1 on {host} was killed by SIGKILL" in launched.output
        assert (read_run(launched.run).state, read_record(launched.run).state) == ("failed", "failed")


def test_a_refusal_is_told_once(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 4)  # for four, on two
    with Launched(tmp_path / "refused", 2, recipe, "--data", data) as launched:
        assert launched.end() == 2, launched.output
        assert launched.output.count("the recipe needs 4 processes, found 2") == 1
        assert "Traceback" not in launched.output
        assert not launched.runs.exists()


def test_a_stopped_rank_zero_ends_the_run(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 2)
    with Launched(tmp_path / "stopped", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        os.kill(launched.ranks()[0], signal.SIGSTOP)
        assert launched.end() == 1, launched.output
        who = f"rank 0 on {os.uname().nodename} (process {launched.seen[0]})"
        silent = f"{who} has been silent for {SILENCE_S} s in step "
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
        asked = f"SIGUSR1 to rank 1 on {os.uname().nodename}: "
        for what in ("finishing the step, then writing a checkpoint", "the run stopped after step "):
            assert launched.output.count(asked + what) == 1, launched.output
        assert (stopped.state, read_record(run).state) == ("interrupted", "interrupted")
        assert stopped.checkpoints[-1]["step"] == stopped.last["step"]
    train(tiny_spec(*settings), data, run, resume=True)  # on one process
    assert [start.state for start in read_record(run).starts] == ["interrupted", "finished"]
    for found, expected in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_of_two_that_resume_a_run_at_once_one_goes_on(data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", 1)
    with Launched(tmp_path / "run", 1, recipe, "--data", data) as first:
        first.wait_for_step(5)
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.end() == REQUEUE_EXIT_CODE, first.output
    run = first.run
    resume = ("--resume", run, "--data", data)
    with Launched(tmp_path / "a", 1, *resume) as one, Launched(tmp_path / "b", 1, *resume) as other:
        pair = (one, other)
        until = time.monotonic() + PATIENCE_S
        while all(launched.process.poll() is None for launched in pair):  # the winner's steps have no end
            assert time.monotonic() < until, one.output + other.output
            time.sleep(0.05)
        loser, winner = sorted(pair, key=lambda launched: launched.process.poll() is None)
        assert loser.end() == 2, loser.output
        assert f"{run}: process {winner.ranks()[0]} on {os.uname().nodename} is still writing it" in loser.output
        winner.wait_for("its start", lambda: read_run(run).starts == 2)
        os.kill(winner.process.pid, signal.SIGTERM)
        assert winner.end() == REQUEUE_EXIT_CODE, winner.output
    assert read_run(run).starts == 2
    assert [start.state for start in read_record(run).starts] == ["interrupted", "interrupted"]
