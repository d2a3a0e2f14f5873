"""Trackers: off by default, refused before the run starts where their package is missing, and what they are given."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from tiny_runs import make_data, tiny_spec, train, write_recipe

from nanogpt.runs import tracker as module
from nanogpt.runs.metrics import read_run
from nanogpt.runs.tracker import Tracker, tracker_for


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("tracked") / "data")


def test_none_imports_nothing(tmp_path):
    assert tracker_for(tiny_spec(), tmp_path) is None
    program = (
        "import sys, nanogpt.runs.tracker; print([m for m in ('torch', 'wandb', 'tensorboard') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_made(tmp_path, data, nanogpt, monkeypatch, name):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec(f"output.tracker={name}"))
    refused = nanogpt("train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert refused.code == 2 and f"pip install {name}" in refused.err
    assert not (tmp_path / "runs").exists()


class Kept:
    """A sink that keeps what it is given, and fails on request."""

    def __init__(self, directory, spec):
        self.written, self.closed, self.broken = [], False, False

    def write(self, step, values):
        if self.broken:
            raise OSError("disk full")
        self.written.append((step, dict(values)))

    def close(self):
        self.closed = True


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "check_tracker", lambda spec: None)
    monkeypatch.setattr(module, "_Wandb", Kept)
    return Tracker(tiny_spec("output.tracker=wandb"), tmp_path)


def test_steps_wait_for_the_evaluation(kept):
    kept.metric({"kind": "start", "name": "x"})
    kept.metric({"kind": "step", "step": 1, "train_loss": 3.5, "stage": 0})
    kept.metric({"kind": "step", "step": 2, "train_loss": None, "train_time_ms": 8.0})
    assert kept._sink.written == []
    kept.metric({"kind": "evaluation", "step": 2, "val_loss": 3.25})
    assert kept._sink.written == [(1, {"train_loss": 3.5}), (2, {"train_time_ms": 8.0, "val_loss": 3.25})]
    kept.metric({"kind": "step", "step": 3, "train_loss": 3.0})
    sink = kept._sink
    kept.close()
    assert sink.written[-1] == (3, {"train_loss": 3.0}) and sink.closed


def test_a_tracker_that_fails_does_not_end_the_run(kept, capsys):
    kept._sink.broken = True
    for step in (1, 2):
        kept.metric({"kind": "evaluation", "step": step, "val_loss": 3.25})
    kept.close()
    assert capsys.readouterr().err == (
        "output.tracker: wandb failed: disk full. The run goes on without it; metrics.jsonl has it all\n"
    )


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("tensorboard")
def test_tensorboard(tmp_path, data, one_thread):
    train(tiny_spec("output.tracker=tensorboard"), data, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    run = read_run(tmp_path / "run")
    for name, records in (("val_loss", run.evaluations), ("train_loss", run.steps)):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]


@installed("wandb")
def test_wandb_offline(tmp_path, data, one_thread):
    train(tiny_spec("output.tracker=wandb"), data, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(iter(folder.glob("*.wandb"))).stat().st_size > 1000
