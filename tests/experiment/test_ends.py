"""Other ends of a run, on a CPU: averages of weights, weights before the end, and windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    FIRST_WITH_PREFIX,
    averaged_spec,
    make_data,
    make_text_data,
    python,
    tiny_spec,
    write_recipe,
)

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
    asked_for = ["--before", "0", "2", "--windows", "2:5"]
    done = nanogpt("experiment", "ends", recipe, "--data", data, "--out", tmp_path / "runs", *asked_for)
    assert done.code == 0, done.err
    [path] = (tmp_path / "runs").iterdir()
    found = {name: losses.pop("validation") for name, losses in json.loads((path / "ends.json").read_text())}
    final = read_run(path).evaluations[-1]["val_loss"]
    assert found.pop("the last weights") == found["0 steps before"] == pytest.approx(final, abs=1e-6)
    assert found == pytest.approx(dict(Remembering.expected), abs=1e-6)
    assert len(set(found.values())) == 3
    assert f"0 steps before {final:.4f} +0.0000" in " ".join(done.out.split())


class AllWeights(ends.TrainerWithEnds):
    """Keeps the weights that every step has left, before anything at the end changes them; and stays in reach."""

    last: AllWeights

    def train_step(self, settings, micro_steps=None):
        told = super().train_step(settings, micro_steps)
        self.left = [*(self.left if settings.step else []), self._weights()]
        AllWeights.last = self
        return told

    def loss_of(self, weights: list[torch.Tensor], name: str) -> float:
        kept = self._weights()
        self._put(weights)
        self.val_batches = self.sets[name]
        loss = self.evaluate(self.schedule.final_windows, self.end_of_run.mask)
        self._put(kept)
        return loss


def by_hand(left: list[list[torch.Tensor]], horizon: int, blend: float, places: list[int]) -> list[torch.Tensor]:
    """`(1 - g) w + g EMA` with the norms of w, in fp64."""
    found = list(left[-1])
    for place in places:
        values = [weights[place].double() for weights in left[-horizon:]]
        average = values[0]
        for value in values[1:]:
            average = average + 2 / (horizon + 1) * (value - average)
        mixed = (1 - blend) * values[-1] + blend * average
        if mixed.ndim > 1:
            mixed *= values[-1].norm() / mixed.norm().clamp(min=1e-30)
        found[place] = mixed
    return found


@pytest.mark.parametrize("model", ["record89", "record92"])
def test_a_grid_of_blends_and_horizons_on_two_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nanogpt: Callable, model: str
):
    monkeypatch.setattr(ends, "TrainerWithEnds", AllWeights)
    tokens = {"first_token": FIRST_WITH_PREFIX}
    data = make_data(tmp_path / "data", val_tokens=1200, **tokens)
    other = make_data(tmp_path / "other", train_tokens=(300,), val_tokens=521, **tokens)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec("evaluation.tokens=1024", model=model))
    only = ["mlp", "lm_head"] if model == "record92" else []
    grid = ["--horizon", "3", "7", "--blend", "0.25", "0.65", *(["--blended", *only] if only else [])]
    places = ["--data", data, "--out", tmp_path / "runs", "--validate", f"prose={other}"]
    done = nanogpt("experiment", "ends", recipe, *places, *grid)
    assert done.code == 0, done.err
    trainer = AllWeights.last
    read = {name: sum(batch.inputs.numel() for batch in batches) for name, batches in trainer.sets.items()}
    assert read == {"validation": 1024, "prose": 512}
    blended = [i for i, (name, _) in enumerate(trainer.model.named_parameters()) if not only or name in only]
    expected = {
        f"{blend:g} of the average over {horizon}": by_hand(trainer.left, horizon, blend, blended)
        for horizon in (3, 7)
        for blend in (0.25, 0.65)
    }
    if model == "record92":  # whose recipe averages: the grid begins without that
        expected["what the last step has left"] = trainer.left[-1]
    expected["the last weights"] = trainer._weights()
    [path] = (tmp_path / "runs").iterdir()
    found = dict(json.loads((path / "ends.json").read_text()))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        by_set = {of_set: trainer.loss_of(weights, of_set) for of_set in ("validation", "prose")}
        assert found[name] == pytest.approx(by_set, abs=2e-6), name
    assert len({losses["validation"] for losses in found.values()}) == len(found)
    assert done.out.count("prose loss") == 1


@pytest.mark.parametrize("averages", [False, True])
def test_the_mask_is_on_all_ends_and_off_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nanogpt: Callable, averages: bool
):
    monkeypatch.setattr(ends, "TrainerWithEnds", AllWeights)
    end = () if averages else ("training.end=[{kind: canonical_mask}]",)
    recipe = write_recipe(tmp_path / "tiny.yaml", averaged_spec("evaluation.every=null", *end))
    data = make_text_data(tmp_path / "data")
    done = nanogpt("experiment", "ends", recipe, "--data", data, "--out", tmp_path / "runs", "--horizon", 2)
    assert done.code == 0, done.err
    [path] = (tmp_path / "runs").iterdir()
    found = {name: losses["validation"] for name, losses in json.loads((path / "ends.json").read_text())}
    trainer = AllWeights.last
    weights = {"the last weights": trainer._weights()}
    if averages:
        weights["what the last step has left"] = trainer.left[-1]
    assert len(found) == 2 * len(weights) + 5
    mask = trainer.end_of_run.mask
    assert mask is not None
    for name, of_end in weights.items():
        trainer.end_of_run.mask = mask
        assert found[name] == pytest.approx(trainer.loss_of(of_end, "validation"), abs=1e-6)
        trainer.end_of_run.mask = None
        unmasked = trainer.loss_of(of_end, "validation")
        assert found[f"{name}, without the mask"] == pytest.approx(unmasked, abs=1e-6)
        assert unmasked > found[name]


@pytest.mark.slow
def test_ends_of_a_run_on_two_ranks_are_those_of_one(tmp_path: Path, nanogpt: Callable):
    data = make_data(tmp_path / "data")
    found = []
    for ranks in (1, 2):
        recipe = write_recipe(tmp_path / f"{ranks}.yaml", tiny_spec(f"hardware.gpus_per_node={ranks}"))
        places = ["--data", data, "--out", tmp_path / f"runs-{ranks}"]
        asked_for = ["--before", 2, "--windows", "2:5", "--horizon", 4, "--blend", 0.5]
        call = ["ends", recipe, *places, *asked_for]
        if ranks == 1:
            code, out, err = nanogpt("experiment", *call)
        else:
            launch = ["-m", "nanogpt", "launch", "--nproc-per-node", 2, "--experiment"]
            done = python(*map(str, [*launch, *call]), timeout=300)
            code, out, err = done.returncode, done.stdout, done.stderr
        assert code == 0, err
        assert out.count("2 steps before") == 1  # rank 0 tells
        [path] = (tmp_path / f"runs-{ranks}").iterdir()
        found.append({name: losses["validation"] for name, losses in json.loads((path / "ends.json").read_text())})
    assert len(set(found[0].values())) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("--before", "12"), "--before 12: expected 0 to one less than the 12 steps"),
        (("--windows", "6"), "--windows 6: expected SHORT:LONG"),
        (("--windows", "6:4"), "--windows 6:4: expected SHORT:LONG"),
        (("--horizon", "13"), "--horizon 13: expected 1 to the 12 steps"),
        (("--horizon", "3", "--blend", "1.5"), "--blend 1.5: expected a number above 0, at most 1"),
        (("--blend", "0.5"), "--horizon, --blend: give both or neither"),
        (("--horizon", "3", "--blended", "mpl"), "--blended mpl: the model has no such parameter; it has"),
        (("--validate", "prose"), "--validate prose: expected NAME=DIR"),
        (("--validate", "validation=x"), "the run's own set has this name"),
        (("--validate", "prose=/nowhere"), "no fineweb_val_*.bin there"),
        ((), "no fineweb_train_*.bin there"),
    ],
)
def test_wrong_ends_are_refused_before_the_run(tmp_path: Path, nanogpt: Callable, wrong: tuple[str, ...], problem: str):
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    done = nanogpt("experiment", "ends", recipe, "--data", tmp_path, "--out", tmp_path / "runs", *wrong)
    assert done.code == 2 and problem in done.err and not (tmp_path / "runs").exists()
