"""The end of a run as its recipe lists it: averages of the last weights, in checkpoint, log and record."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import (
    assert_same,
    averaged_spec,
    losses,
    make_data,
    make_text_data,
    newest_state,
    tiny_spec,
    train,
)

from nanogpt.data.canonical_mask import build
from nanogpt.data.validation_batches import ValBatches
from nanogpt.optim.communication import Communicator
from nanogpt.recipe import load_recipe
from nanogpt.recipe_yaml import RecipeError
from nanogpt.runs.record import read_record
from nanogpt.training.end_of_run import ROWS_SENT, EndOfRun
from nanogpt.training.evaluation import as_json, as_lines, evaluate_runs
from nanogpt.training.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")
AVERAGE = "training.end=[{kind: tail_averages, averages: [{blend: {mlp: 1}, window_steps: 3, every: 1, rate: 0.5}]}]"
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
    first, second, last = (weights(plain, step) for step in (10, 11, 12))
    end = weights(averaged, 12)
    expected = (first["mlp"] + second["mlp"]) / 4 + last["mlp"] / 2
    torch.testing.assert_close(end.pop("mlp"), expected, rtol=1e-6, atol=1e-7)
    assert_same(dict(end), {name: last[name] for name in end})
    assert losses(plain)[0] == losses(averaged)[0]  # the steps are the same
    validation, without = losses(averaged)[1], losses(plain)[1]
    assert validation[12] != without[12]
    assert {step: loss for step, loss in validation.items() if step < 12} == {
        step: loss for step, loss in without.items() if step < 12
    }
    assert evaluate_runs([averaged], data_directory=data).runs[0].mean.value == pytest.approx(validation[12], abs=1e-6)

    line = "mlp 1 of the way to a running average; ticks: 3, after steps 9 to 11; rate 0.5"
    assert (read_record(averaged).end_of_run, read_record(plain).end_of_run) == ([line], [])
    assert f"end of the run: {line}" in (averaged / "log.txt").read_text()


# --- tail averages and the canonical mask, in the shipped recipe made small ---

EVERY_FIFTH = "checkpoint={every: 5, at_end: true, keep: 3}"
ENDS = (
    "vo 1, mlp 1 of the way to a running average; ticks: 2, after steps 7 to 11; rate 0.955943",
    "norms as before: embed, lm_head, mlp, qk, vo",
    "the last validation rules out 70,889,701 pairs of tokens that GPT-2's tokenizer never produces",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("text") / "data")


@pytest.fixture(scope="module")
def averaged(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of `record89-averaged` made small: with all of its end, and without the mask."""
    paths, spec = {}, averaged_spec(EVERY_FIFTH)
    for name, entries in (("whole", spec.training.end), ("unmasked", spec.training.end[:1])):
        paths[name] = tmp_path_factory.mktemp(name) / "run"
        training = spec.training.model_copy(update={"end": entries})
        train(spec.model_copy(update={"training": training}), text, paths[name])
    return paths


def test_the_mask_is_the_last_validations_alone(averaged: dict[str, Path]):
    train_losses, validation = zip(*(losses(path) for path in averaged.values()), strict=True)
    assert train_losses[0] == train_losses[1]
    whole, unmasked = validation
    assert [whole[step] for step in (0, 5, 10)] == [unmasked[step] for step in (0, 5, 10)]
    assert whole[12] < unmasked[12] - 0.01  # what cannot be takes no part of the probability
    assert_same(newest_state(averaged["whole"]), newest_state(averaged["unmasked"]))


def test_the_masked_loss_is_the_definitions(averaged: dict[str, Path], text: Path):
    trained = load_trained_model(averaged["whole"])
    mask = np.zeros((50304, 50304 // 8), dtype=np.uint8)
    build(mask)
    batches = ValBatches(
        sorted(text.glob("*_val_*")),
        tokens=256,
        micro_batch_tokens=64,
        slots=1,
        bos=50256,
        device=torch.device("cpu"),
        extras=trained.spec.model.batch_extras,
    )
    nats, without = [], []
    for batch in batches:
        with torch.no_grad():
            logits = (trained.model(batch, trained.windows).double() @ trained.model.lm_head.double()).numpy()
        z = 23 / (1 + np.exp(-(logits + 5) / 7.5))
        for row, token, target in zip(z, batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            without.append(math.log(np.exp(row).sum()) - row[target])
            never = np.flatnonzero(np.unpackbits(mask[token], bitorder="little"))
            assert target not in never
            row[never] = -60
            nats.append(math.log(np.exp(row).sum()) - row[target])
    found = losses(averaged["whole"])[1][12]
    assert found == pytest.approx(np.mean(nats), abs=1e-5)
    assert losses(averaged["unmasked"])[1][12] == pytest.approx(np.mean(without), abs=1e-5)


def test_an_evaluation_anew_has_the_mask_where_the_run_had_it(averaged: dict[str, Path], text: Path, tmp_path: Path):
    evaluation = evaluate_runs([averaged["whole"], averaged["unmasked"]], data_directory=text, device="cpu")
    for one in evaluation.runs:
        assert one.mean.value == pytest.approx(one.recorded, abs=1e-5)
    assert [one["canonical_mask"] for one in as_json(evaluation)["runs"]] == [True, False]
    lines = [line for line in as_lines(evaluation, 0) if "canonical mask" in line]
    assert lines == [f"{evaluation.runs[0].label}: with the canonical mask, as its last validation"]
    earlier = tmp_path / "earlier"
    shutil.copytree(averaged["whole"], earlier)
    (earlier / "checkpoints" / "step-000012.pt").unlink()
    (one,) = evaluate_runs([earlier], data_directory=text, device="cpu").runs
    assert (one.step, one.masked) == (10, False)


def test_log_and_record_say_it(averaged: dict[str, Path]):
    record = read_record(averaged["whole"])
    assert record.end_of_run == averaged_spec().training.end_lines
    assert len(record.end_of_run) == 6 and set(ENDS) < set(record.end_of_run)
    log = (averaged["whole"] / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("end of the run: ")] == [
        f"end of the run: {line}" for line in record.end_of_run
    ]


@pytest.mark.parametrize("step", [10, 12])
def test_resuming_in_the_averages_or_at_the_end(averaged: dict[str, Path], text: Path, tmp_path: Path, step: int):
    path = tmp_path / "run"
    shutil.copytree(averaged["whole"], path)
    if step < 12:
        (path / "checkpoints" / "step-000012.pt").unlink()
    state = newest_state(path)["end_of_run"]
    assert len(state) == 1
    assert (len(state[0]) > 0) == (step < 12)  # written back, nothing is kept
    train(averaged_spec(EVERY_FIFTH), text, path, resume=True)
    assert losses(path) == losses(averaged["whole"])
    assert_same(newest_state(path), newest_state(averaged["whole"]))
    assert read_record(path).end_of_run == read_record(averaged["whole"]).end_of_run


def test_warm_up_leaves_no_trace(averaged: dict[str, Path], text: Path, tmp_path: Path):
    train(averaged_spec(EVERY_FIFTH, "training.warmup=true"), text, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(averaged["whole"])


@pytest.mark.parametrize("done_after", [1, 2, 9])
def test_the_mask_is_sent_in_parts_once_it_is_built(done_after: int, monkeypatch: pytest.MonkeyPatch):
    rows = 2 * ROWS_SENT + 8
    built = np.random.default_rng(0).integers(1, 255, (rows, rows // 8), dtype=np.uint8)
    builder = SimpleNamespace(is_done=False, wait=lambda: built)
    monkeypatch.setattr("nanogpt.training.end_of_run.MaskBuilder", lambda _: builder)
    training = SimpleNamespace(total_steps=3, end=(), masked=True)
    spec: Any = SimpleNamespace(training=training, model=SimpleNamespace(padded_vocab_size=rows))
    end = EndOfRun(spec, torch.nn.Linear(1, 1), Communicator(), torch.device("cpu"))
    end.clock_starts()
    for step in range(3):
        builder.is_done = step >= done_after
        end.after_step(step)
        assert end.mask is not None
        sent = max(0, step + 1 - done_after) * ROWS_SENT
        assert np.array_equal(end.mask[:sent], built[:sent]) and not end.mask[sent:].any()
    mask = end.take_mask()
    assert mask is end.mask is not None and np.array_equal(mask, built)


def test_no_process_is_left_where_a_run_ends_early(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        "nanogpt.training.mask_builder.subprocess.Popen", lambda *a, **b: started.append(popen(*a, **b)) or started[-1]
    )

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("nanogpt.training.trainer.Trainer.train_step", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(averaged_spec(), text, tmp_path / "run")
    (builder,) = [process for process in started if "nanogpt.data.canonical_mask" in process.args]
    assert builder.poll() is not None


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("record89", (), r"training\.end\.0: canonical_mask is for GPT-2's tokens: .* found 50000 with 49999"),
        ("gpt2", (), r"training\.end\.0: canonical_mask: a gpt2 model does not support it"),
        ("record89", ("model.padded_vocab_size=50260",), r"model\.padded_vocab_size is 50260, must be a multiple of 8"),
    ],
)
def test_other_vocabularies_and_models_are_refused(recipe: str, overrides: tuple[str, ...], message: str):
    if "50000" in message:
        overrides = ("model.vocab_size=50000", "data.bos=49999")
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, ["training.end=[{kind: canonical_mask}]", *overrides])


def test_the_shipped_recipe_trains_as_record_89(tmp_path: Path):
    averaged, plain = load_recipe("record89-averaged"), load_recipe("record89")
    for part in ("model", "optimizer", "data", "evaluation", "runtime"):
        assert getattr(averaged, part) == getattr(plain, part)
    assert averaged.training.model_copy(update={"end": []}) == plain.training
    first, banks, values, blend = averaged.training.end[0].averages
    adam_steps = {step for step in range(1285) if step % 2}
    assert set(list(first.ticks(1285))[1:]) <= adam_steps and max(first.ticks(1285)) == max(adam_steps)
    assert set(values.ticks(1285)) <= adam_steps
    assert {max(each.ticks(1285)) for each in (banks, blend)} == {1284}
    for average, (rate, window) in zip(
        (first, banks, values, blend),
        ((1 - (1 - 2 / 299) ** 2, 298), (4 / 53, 250), (4 / 53, 250), (2 / 75, 298)),
        strict=True,
    ):
        assert average.rate == pytest.approx(1 - (1 - rate) ** (1194 / 1285), rel=1e-3)
        assert average.window_steps == round(window * 1285 / 1194)
