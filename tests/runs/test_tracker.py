"""Trackers: off by default, refused before the run starts where their package is missing, and what they are given."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

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


@pytest.mark.parametrize("name", ["tensorboardX", "wandb", "trackio"])
def test_a_missing_package_is_said_before_anything_is_made(tmp_path, data, nanogpt, monkeypatch, name):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    tracker = "tensorboard" if name == "tensorboardX" else name
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec(f"output.tracker={tracker}"))
    refused = nanogpt("train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert refused.code == 2 and f"pip install {name}" in refused.err
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(module, "inside_labels", lambda: {"nanogpt.flavour": "cpu"})  # in an image pip changes nothing
    refused = nanogpt("train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert refused.code == 2 and f":all: {name}`; NANOGPT_EXTRA=DIR" in refused.err


class Stub(ModuleType):
    """wandb or trackio: keeps what it is called with."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.logged, self.ended = {}, [], 0

    def init(self, **options):
        print("where to look: https://example.org")
        self.started = options
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1

    Settings = dict


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_online_is_said_and_nothing_else_sends(tmp_path, monkeypatch, capsys, name, online):
    stub = Stub(name)
    monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(module, "check_tracker", lambda spec: None)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "lab/space")
    monkeypatch.setenv("TRACKIO_DIR", "x")
    monkeypatch.delenv("TRACKIO_DIR")
    spec = tiny_spec(f"output={{tracker: {name}, online: {str(online).lower()}}}")
    tracker = Tracker(spec, tmp_path / "run")
    tracker.metric({"kind": "evaluation", "step": 3, "val_loss": 3.25})
    tracker.close()
    assert (stub.logged, stub.ended) == ([(3, {"val_loss": 3.25})], 1)
    assert (stub.started["project"], stub.started["name"]) == ("nanogpt-speedrun", "run")
    assert stub.started["config"]["training"]["seed"] == 0
    if name == "wandb":
        assert stub.started["mode"] == ("online" if online else "offline")
    else:
        assert ("TRACKIO_SPACE_ID" in os.environ) == online
        assert os.environ["TRACKIO_DIR"] == str(tmp_path / "run" / "trackio")
        assert capsys.readouterr().out == ""  # results alone are written there


def test_online_is_for_trackers_that_can(nanogpt):
    refused = nanogpt("validate", "speedrun", "--set", "output.online=true")
    assert refused.code == 2 and "output.online: is true, which needs output.tracker wandb" in refused.err + refused.out


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
    monkeypatch.setitem(module._SINKS, "wandb", Kept)
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
        "output.tracker: wandb failed: disk full. The run continues without it; metrics.jsonl has all\n"
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
