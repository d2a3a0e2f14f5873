"""What a run says of itself: the form of its lines, the records of its metrics, losses that arrive late."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_spec

from nanogpt.errors import RunError
from nanogpt.launch.world import World
from nanogpt.optim.communication import Communicator
from nanogpt.recipe import load_recipe
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import read_metrics
from nanogpt.training.loss_monitor import LossMonitor, SeenLoss
from nanogpt.training.report import Reporter
from nanogpt.training.schedule import Schedule


def a_world(rank: int = 0) -> World:
    return World(rank, 8, rank, torch.device("cpu"), Communicator())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(tmp_path, tiny_spec()) as run:
        yield run


@pytest.fixture
def reporter(run: RunDirectory) -> Reporter:
    """Of the speedrun itself."""
    spec = load_recipe("speedrun")
    return Reporter(spec, Schedule(spec), a_world(), run)


def test_lines_have_exactly_the_public_form(
    reporter: Reporter, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter.evaluation(0, 10.82581, 0.0)
    reporter.evaluation(250, 4.56773, 8345.6)
    reporter.step(reporter.schedule.at(250), torch.tensor(4.5), 8379.4)
    reporter.evaluation(1555, 3.27749, 93123.4)
    lines = [
        "step:0/1555 val_loss:10.8258 train_time:0ms step_avg:0.00ms",
        "step:250/1555 val_loss:4.5677 train_time:8346ms step_avg:33.38ms",
        "step:251/1555 train_time:8379ms step_avg:33.38ms",
        "step:1555/1555 val_loss:3.2775 train_time:93123ms step_avg:59.89ms",
    ]
    assert run.log_path.read_text().splitlines() == lines
    # Without a terminal the same lines stand in the job's output.
    assert capsys.readouterr().err.splitlines() == lines


def test_a_step_record(reporter: Reporter, run: RunDirectory) -> None:
    reporter.step(reporter.schedule.at(505), torch.tensor(4.25), 20240.0)
    (record,) = read_metrics(run.metrics_path)
    assert record == {
        "kind": "step",
        "step": 506,
        "total_steps": 1555,
        "train_loss": 4.25,
        "data_wait_ms": 0.0,
        "tokens": 505 * 131072 + 262144,
        "stage": 1,
        "train_time_ms": 20240.0,
        "step_avg_ms": 40.0,
        "lr_factor": 1.52,
    }


def test_an_evaluation_record(reporter: Reporter, run: RunDirectory) -> None:
    reporter.evaluation(500, 4.1, 16000.0)
    (record,) = read_metrics(run.metrics_path)
    assert record == {
        "kind": "evaluation",
        "step": 500,
        "total_steps": 1555,
        "val_loss": 4.1,
        "train_time_ms": 16000.0,
        "step_avg_ms": 32.0,
        "tokens": 500 * 131072,
    }


def test_the_end(reporter: Reporter, run: RunDirectory) -> None:
    reporter.end("failed", "RunError after step 7: disk full", 250.0)
    (record,) = read_metrics(run.metrics_path)
    assert record == {
        "kind": "end",
        "state": "failed",
        "reason": "RunError after step 7: disk full",
        "train_time_ms": 250.0,
    }
    assert run.log_path.read_text() == "run failed: RunError after step 7: disk full\n"


def test_only_rank_0_writes(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    spec = load_recipe("speedrun")
    reporter = Reporter(spec, Schedule(spec), a_world(rank=3), run)
    reporter.start(0, resumed=False)
    reporter.step(reporter.schedule.at(0), torch.tensor(10.8), 33.0)
    reporter.evaluation(1, 10.7, 33.0)
    reporter.note("a line")
    reporter.checkpoint(1, Path("step-000001.pt"))
    reporter.end("finished", None, 33.0)
    assert [file.name for file in run.path.iterdir()] == ["spec.yaml"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 5])
def test_every_rank_stops_where_the_loss_is_not_finite(run: RunDirectory, rank: int) -> None:
    spec = load_recipe("speedrun")
    reporter = Reporter(spec, Schedule(spec), a_world(rank), run)
    reporter.step(reporter.schedule.at(6), torch.tensor(7.25), 200.0)
    with pytest.raises(RunError, match=r"^step 8: the training loss is nan; the last finite one was 7.2500 at step 7"):
        reporter.step(reporter.schedule.at(7), torch.tensor(math.nan), 230.0)


def test_a_monitor_hands_out_losses_in_order_and_once() -> None:
    monitor = LossMonitor()
    assert monitor.take() == []
    monitor.put(1, torch.tensor(3.5))
    monitor.put(2, torch.tensor(3.25))
    assert monitor.take() == [SeenLoss(1, 3.5), SeenLoss(2, 3.25)]
    assert monitor.take(wait=True) == []


def test_a_monitor_stops_at_the_first_step() -> None:
    monitor = LossMonitor()
    monitor.put(1, torch.tensor(math.inf))
    with pytest.raises(RunError, match=r"^step 1: the training loss is inf. The run stops"):
        monitor.take()
