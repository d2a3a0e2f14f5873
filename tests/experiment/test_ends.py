"""Other ends of a run, on a CPU: averages of weights, weights before the end, and windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import make_data, python, tiny_spec, write_recipe

from nanogpt.experiment import ends
from nanogpt.models.language_model import Windows
from nanogpt.runs.metrics import read_run

pytestmark = pytest.mark.usefixtures("one_thread")


class Remembering(ends.TrainerWithEnds):
    """Keeps the weights of every step, and evaluates what was asked for by hand."""

    expected: tuple[tuple[str, float], ...] = ()

    def train_step(self, settings, micro_steps=None):
        told = super().train_step(settings, micro_steps)
        if micro_steps is not None:
            return told
        if settings.step == 0:
            self.weights = []
        self.weights.append([parameter.detach().clone() for parameter in self.model.parameters()])
        return told

    def run(self, *, resume=False):
        result = super().run(resume=resume)
        last = self.weights[-1]
        assert all(torch.equal(a, b) for a, b in zip(self.model.parameters(), last, strict=True))  # put back
        expected = []
        for count in (1, 3):
            means = [torch.stack(steps).mean(0) for steps in zip(*self.weights[-count:], strict=True)]
            self._put(means)
            expected.append((f"mean of the last {count}", self.evaluate(self.schedule.final_windows)))
        for count in (0, 2):
            self._put(self.weights[-1 - count])
            expected.append((f"{count} steps before", self.evaluate(self.schedule.final_windows)))
        self._put(last)
        expected.append(("windows of 2 and 5 blocks", self.evaluate(Windows(8, 20))))
        Remembering.expected = tuple(expected)
        return result


def test_ends_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nanogpt: Callable):
    monkeypatch.setattr(ends, "TrainerWithEnds", Remembering)
    data = make_data(tmp_path / "data")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec("training.warmup=true"))
    asked_for = ["--average", "1", "3", "--before", "0", "2", "--windows", "2:5"]
    done = nanogpt("experiment", "ends", recipe, "--data", data, "--out", tmp_path / "runs", *asked_for)
    assert done.code == 0, done.err
    [path] = (tmp_path / "runs").iterdir()
    found = dict(json.loads((path / "ends.json").read_text()))
    final = read_run(path).evaluations[-1]["val_loss"]
    assert found.pop("the last weights") == found["mean of the last 1"] == pytest.approx(final, abs=1e-6)
    assert found == pytest.approx(dict(Remembering.expected), abs=1e-6)
    assert found.pop("0 steps before") == found["mean of the last 1"]
    assert len(set(found.values())) == 4
    assert f"| mean of the last 1 | {final:.4f} | +0.0000 |" in done.out


@pytest.mark.slow
def test_ends_of_a_run_on_two_ranks_are_those_of_one(tmp_path: Path, nanogpt: Callable):
    data = make_data(tmp_path / "data")
    found = []
    for ranks in (1, 2):
        recipe = write_recipe(tmp_path / f"{ranks}.yaml", tiny_spec(f"hardware.gpus_per_node={ranks}"))
        places = ["--data", data, "--out", tmp_path / f"runs-{ranks}"]
        asked_for = ["--average", 3, "--before", 2, "--windows", "2:5"]
        call = ["ends", recipe, *places, *asked_for]
        if ranks == 1:
            code, out, err = nanogpt("experiment", *call)
        else:
            launch = ["-m", "nanogpt", "launch", "--nproc-per-node", 2, "--experiment"]
            done = python(*map(str, [*launch, *call]), timeout=300)
            code, out, err = done.returncode, done.stdout, done.stderr
        assert code == 0, err
        assert out.count("| mean of the last 3 |") == 1  # rank 0 tells
        [path] = (tmp_path / f"runs-{ranks}").iterdir()
        found.append(dict(json.loads((path / "ends.json").read_text())))
    assert len(set(found[0].values())) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("--average", "13"), "--average 13: expected 1 to the 12 steps"),
        (("--before", "12"), "--before 12: expected 0 to one less than the 12 steps"),
        (("--windows", "6"), "--windows 6: expected SHORT:LONG"),
        (("--windows", "6:4"), "--windows 6:4: expected SHORT:LONG"),
        ((), "no fineweb_train_*.bin there"),
    ],
)
def test_wrong_ends_are_refused_before_the_run(tmp_path: Path, nanogpt: Callable, wrong: tuple[str, ...], problem: str):
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    done = nanogpt("experiment", "ends", recipe, "--data", tmp_path, "--out", tmp_path / "runs", *wrong)
    assert done.code == 2 and problem in done.err and not (tmp_path / "runs").exists()
