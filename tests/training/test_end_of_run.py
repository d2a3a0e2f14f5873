"""The end of a run as its recipe lists it: averages of the last weights, in checkpoint, log and record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same, losses, make_data, newest_state, tiny_spec, train

from nanogpt.recipe import RecipeError, load_recipe
from nanogpt.runs.record import read_record
from nanogpt.training.evaluation import evaluate_runs

pytestmark = pytest.mark.usefixtures("one_thread")
AVERAGE = "training.end=[{kind: average, last_steps: 3}]"
KEPT = "checkpoint={every: 1, at_end: true, keep: 20}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def weights(path: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(path / "checkpoints" / f"step-{step:06d}.pt", weights_only=True)["model"]


def test_the_last_weights_are_averaged(data: Path, tmp_path: Path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    train(tiny_spec(KEPT), data, plain)
    train(tiny_spec(KEPT, AVERAGE), data, averaged)
    own = [weights(plain, step) for step in (10, 11, 12)]
    end = weights(averaged, 12)
    for name, value in end.items():
        if "rotary" not in name:
            expected = torch.stack([each[name].float() for each in own]).sum(0) / 3
            torch.testing.assert_close(value.float(), expected, rtol=1e-6, atol=1e-7, msg=name)
    assert losses(plain)[0] == losses(averaged)[0]  # the steps are the same
    validation, without = losses(averaged)[1], losses(plain)[1]
    assert validation[12] != without[12]
    assert {step: loss for step, loss in validation.items() if step < 12} == {
        step: loss for step, loss in without.items() if step < 12
    }
    assert evaluate_runs([averaged], data_directory=data).runs[0].mean.value == pytest.approx(validation[12], abs=1e-6)

    line = "the mean of the weights after each of the last 3 steps"
    assert (read_record(averaged).end_of_run, read_record(plain).end_of_run) == ([line], [])
    assert f"end of the run: {line}" in (averaged / "log.txt").read_text()


def test_resuming_within_the_last_steps_changes_nothing(data: Path, tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    spec = tiny_spec(AVERAGE, "checkpoint={every: 11, at_end: true, keep: 20}")
    train(spec, data, whole)
    train(spec, data, resumed)
    (resumed / "checkpoints" / "step-000012.pt").unlink()
    train(spec, data, resumed, resume=True)
    assert losses(whole)[1] == losses(resumed)[1]
    assert_same(newest_state(whole), newest_state(resumed))


def test_more_steps_than_the_run_has_are_refused():
    with pytest.raises(RecipeError, match=r"training\.end\.0\.last_steps: is 13, the run has 12"):
        tiny_spec("training.end=[{kind: average, last_steps: 13}]")


def test_a_shortened_run_averages_its_share():
    spec = load_recipe("speedrun", ["training.end=[{kind: average, last_steps: 300}]"], steps=311)
    assert [entry.last_steps for entry in spec.training.end] == [60]
