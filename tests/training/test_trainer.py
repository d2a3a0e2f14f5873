"""The trainer on runs of a few milliseconds a step: what it does at which step, what it writes, and that it learns."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import (
    SPEEDRUN_STEPS,
    assert_same,
    losses,
    make_data,
    newest_state,
    tiny_spec,
    train,
)

from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.errors import InputError, RunError
from nanogpt.launch.world import join_world
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam
from nanogpt.runs.metrics import read_metrics, read_run
from nanogpt.runs.unigram import unigram_cross_entropy
from nanogpt.spec import RunSpec
from nanogpt.training import clock
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@contextmanager
def a_trainer(spec: RunSpec, data: Path) -> Iterator[Trainer]:
    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=data) as trainer:
        yield trainer


# -- what a run writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint at its end."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_spec("checkpoint.at_end=true", "evaluation.every=4"), data, path)
    return path


def test_the_log_has_the_public_lines(finished: Path) -> None:
    lines = [line for line in (finished / "log.txt").read_text().splitlines() if line.startswith("step:")]
    time = r"train_time:\d+ms step_avg:\d+\.\d\dms"
    evaluated, stepped = [], []
    for line in lines:
        if match := re.fullmatch(rf"step:(\d+)/12 val_loss:\d+\.\d{{4}} {time}", line):
            evaluated.append(int(match[1]))
        elif match := re.fullmatch(rf"step:(\d+)/12 {time}", line):
            stepped.append(int(match[1]))
        else:
            assert line == "step:12/12 checkpoint:step-000012.pt"
    assert evaluated == [0, 4, 8, 12]
    assert stepped == list(range(1, 13))


def test_log_every_thins_the_steps_and_no_validation(data: Path, tmp_path: Path) -> None:
    train(tiny_spec("output.log_every=5", "evaluation.every=4"), data, tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.findall(r"step:(\d+)/12 train_time", log) == ["5", "10"]
    assert re.findall(r"step:(\d+)/12 val_loss", log) == ["0", "4", "8", "12"]
    assert len(losses(tmp_path / "run")[0]) == SPEEDRUN_STEPS


def test_metrics_are_those_documented(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    by_kind = {kind: [record for record in records if record["kind"] == kind] for kind in kinds}

    (start,), (end,), (checkpoint,) = by_kind["start"], by_kind["end"], by_kind["checkpoint"]
    assert start.keys() == {"kind", "time", "name", "total_steps", "world_size", "device", "resumed_at"}
    assert (start["name"], start["total_steps"], start["world_size"]) == ("tiny", 12, 1)
    assert (start["device"], start["resumed_at"]) == ("cpu", None)
    assert checkpoint == {"kind": "checkpoint", "step": 12, "path": str(finished / "checkpoints" / "step-000012.pt")}
    assert (end["state"], end["reason"]) == ("finished", None)

    steps = by_kind["step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["stage"] for record in steps] == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2
    assert [record["tokens"] for record in steps] == list(
        itertools.accumulate([256] * 4 + [320] * 3 + [512] * 3 + [512] * 2)
    )
    times = [record["train_time_ms"] for record in steps]
    assert times == sorted(times)
    assert all(r["step_avg_ms"] == pytest.approx(r["train_time_ms"] / r["step"], rel=1e-6) for r in steps)
    assert all(r["lr_factor"] > 0 and math.isfinite(r["train_loss"]) for r in steps)

    validations = by_kind["evaluation"]
    assert [(r["step"], r["tokens"]) for r in validations] == [(0, 0), (4, 1024), (8, 2496), (12, 4544)]
    assert validations[0]["val_loss"] == pytest.approx(math.log(64), rel=0.05)
    log = (finished / "log.txt").read_text()
    for record in validations:
        assert f"step:{record['step']}/12 val_loss:{record['val_loss']:.4f} " in log
    assert end["train_time_ms"] == validations[-1]["train_time_ms"]


def test_the_training_loss_is_a_mean_per_token(data: Path, tmp_path: Path) -> None:
    """At the start every token costs about ln(64), and the next token's weights add up."""
    train(tiny_spec(), data, tmp_path / "run")
    first = losses(tmp_path / "run")[0][1]
    assert first == pytest.approx(1.75 * math.log(64), rel=0.05)


def test_two_runs_of_one_spec_are_equal_and_the_seed_matters(data: Path, finished: Path, tmp_path: Path) -> None:
    for name, override in (("again", "training.seed=0"), ("other", "training.seed=1")):
        train(tiny_spec("checkpoint.at_end=true", "evaluation.every=4", override), data, tmp_path / name)
    assert losses(tmp_path / "again") == losses(finished)
    assert_same(newest_state(tmp_path / "again"), newest_state(finished))
    assert losses(tmp_path / "other") != losses(finished)


# -- the clock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's time, which only the test moves."""
    now = [5000.0]
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, now: list[float], seconds: float) -> list[float]:
    """`owner.name` takes `seconds` more of the fake time; returns a list that gets the time of each call."""
    original, calls = getattr(owner, name), []

    def slow(*args: Any, **kwargs: Any) -> Any:
        now[0] += seconds
        calls.append(now[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    return calls


def test_the_clock_runs_for_steps_only(
    data: Path, tmp_path: Path, fake_seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, NorMuonAdam, "step", fake_seconds, 1.0)
    slow_down(monkeypatch, TrainBatches, "next_step", fake_seconds, 0.25)
    slow_down(monkeypatch, Speedrun, "change_windows", fake_seconds, 0.5)
    validations = slow_down(monkeypatch, Trainer, "evaluate", fake_seconds, 100.0)
    checkpoints = slow_down(monkeypatch, NorMuonAdam, "state_dict", fake_seconds, 1000.0)
    spec = tiny_spec("checkpoint={every: 3, at_end: true}", "training.warmup=true")
    result = train(spec, data, tmp_path / "run")

    assert len(validations) == len([0, 5, 10, 12]) + len(spec.training.all_stages) + 1  # the warm-up's: by stage, final
    assert len(checkpoints) == len([3, 6, 9, 12]) + 1
    # Steps, their data and YaRN's three table rebuilds; no validation, no checkpoint, no warm-up.
    assert result.train_seconds == pytest.approx(12 * 1.25 + 3 * 0.5)
    run = read_run(tmp_path / "run")
    expected = {0: 0.0, 5: 6.75, 10: 14.0, 12: 16.5}
    # What a stage changes is inside the clock and before its first validation, as at step 10, the extension's first.
    assert {r["step"]: r["train_time_ms"] / 1000 for r in run.evaluations} == pytest.approx(expected)
    assert run.steps[-1]["train_time_ms"] == pytest.approx(16500)
    assert run.end is not None
    assert run.end["train_time_ms"] == pytest.approx(16500)


def test_a_slow_validation_takes_no_training_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the real clock."""
    import time

    original, slept = Trainer.evaluate, 0.4

    def slow(self: Trainer, *args: Any) -> float:
        time.sleep(slept)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "evaluate", slow)
    began = time.perf_counter()
    result = train(tiny_spec("evaluation.every=4"), data)
    wall = time.perf_counter() - began
    assert 0 < result.train_seconds < wall - 4 * slept


# -- warm-up ---------------------------------------------------------------------------------------------------------

GPT2_STAGES = (
    "training.stages=["
    "{steps: 5, batch_tokens: 256, window_blocks: {short: 1, long: 1}, token_weights: [1], lr_factor: 1},"
    "{steps: 4, batch_tokens: 320, window_blocks: {short: 2, long: 2}, token_weights: [1], lr_factor: 1}]"
)


@pytest.mark.parametrize(("model", "overrides"), [("speedrun", ()), ("gpt2", (GPT2_STAGES,))])
def test_warm_up_leaves_no_trace(data: Path, tmp_path: Path, model: str, overrides: tuple[str, ...]) -> None:
    for name in ("with", "without"):
        warmup = f"training.warmup={'true' if name == 'with' else 'false'}"
        train(tiny_spec("checkpoint.at_end=true", warmup, *overrides, model=model), data, tmp_path / name)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))


def counted(function: Any) -> Mock:
    """`function`, which counts its calls, and has its attributes."""
    return Mock(wraps=function, grad_scale=getattr(function, "grad_scale", None))


@pytest.mark.parametrize(
    ("model", "overrides", "steps"),
    [("speedrun", (), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), ("gpt2", (GPT2_STAGES,), [0, 1, 2, 4, 5, 6])],
)
def test_warm_up_runs_the_steps_around_stage_changes_and_restores_all(
    data: Path, monkeypatch: pytest.MonkeyPatch, model: str, overrides: tuple[str, ...], steps: list[int]
) -> None:
    spec = tiny_spec(*overrides, model=model)

    def everything(trainer: Trainer) -> dict[str, Any]:
        return {
            "model": {**trainer.model.state_dict(), **dict(trainer.model.named_buffers())},
            "gradients": {name: p.grad for name, p in trainer.model.named_parameters()},
            "optimizer": trainer.optimizer.state_dict(),
            "batches": trainer.train_batches.state_dict(),
            "wait": trainer.train_batches.wait_seconds,
            "step": trainer.next_step,
        }

    seen: list[int] = []
    changed: list[bool] = []
    original = Trainer.train_step

    def spy(self: Trainer, settings: Any, micro_steps: int | None = None) -> Any:
        loss = original(self, settings, micro_steps)
        seen.append(settings.step)
        changed.append(any(not torch.equal(a, b) for a, b in zip(self.model.parameters(), start, strict=True)))
        return loss

    monkeypatch.setattr(Trainer, "train_step", spy)
    with a_trainer(spec, data) as trainer, a_trainer(spec, data) as fresh:
        start = [p.detach().clone() for p in trainer.model.parameters()]
        micro_steps, evaluations = counted(trainer.micro_step), counted(trainer.evaluation_loss)
        trainer.micro_step, trainer.evaluation_loss = micro_steps, evaluations
        trainer.warm_up()
        assert seen == steps
        stages = len({trainer.schedule.at(step).stage for step in steps})
        assert micro_steps.call_count == len(steps) + (min(2, spec.accumulation_steps) - 1) * stages
        assert evaluations.call_count == stages + 1  # at the end
        assert all(changed)
        assert_same(everything(trainer), everything(fresh))
        assert trainer.clock.elapsed_ms == 0


# -- stages ----------------------------------------------------------------------------------------------------------


def test_each_stage_brings_its_batch_windows_weights_and_yarn(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int, int, tuple[float, ...], float]] = []
    training, evaluation = Speedrun.training_loss, Speedrun.evaluation_loss

    def note(kind: str, self: Speedrun, batch: Any, windows: Any, weights: tuple[float, ...] = ()) -> None:
        scale = self.rotary.attention_scale
        assert float(self.rotary.run_time_scale) == scale
        calls.append((kind, batch.inputs.numel(), windows.short, windows.long, weights, scale))

    def spy_training(self: Speedrun, batch: Any, inputs: Any, embedded: Any) -> torch.Tensor:
        note("train", self, batch, inputs.windows, tuple(round(w, 6) for w in inputs.token_weights.tolist()))
        return training(self, batch, inputs, embedded=embedded)

    def spy_evaluation(self: Speedrun, batch: Any, windows: Any, *more: Any) -> torch.Tensor:
        note("eval", self, batch, windows)
        return evaluation(self, batch, windows, *more)

    monkeypatch.setattr(Speedrun, "training_loss", spy_training)
    monkeypatch.setattr(Speedrun, "evaluation_loss", spy_evaluation)
    train(tiny_spec("evaluation.every=4"), data, tmp_path / "run")

    scale = [0.1]
    for old, new in ((16, 24), (24, 36), (36, 40)):
        scale.append(scale[-1] * (1 + 0.2 * math.log(new / old)))

    def step(tokens: int, short: int, long: int, weights: tuple[float, ...], stage: int) -> list[Any]:
        return [("train", tokens, short, long, weights, scale[stage])] * 4

    def validation(short: int, long: int, stage: int) -> list[Any]:
        return [("eval", 64, short, long, (), scale[stage])] * 4

    expected = [
        validation(8, 16, 0),
        *(step(64, 8, 16, (1.0, 0.5, round(0.25 * (1 - i / 4), 6)), 0) for i in range(4)),
        validation(12, 24, 1),  # step 4 has the second stage's windows
        *(step(80, 12, 24, (1.0, round(0.5 * (1 - i / 3), 6)), 1) for i in range(3)),
        step(128, 16, 36, (1.0,), 2),
        validation(16, 36, 2),
        *(step(128, 16, 36, (1.0,), 2) for _ in range(2)),
        *(step(128, 16, 40, (1.0,), 3) for _ in range(2)),
        validation(16, 64, 3),  # the last one has a longer window without a YaRN step
    ]
    assert calls == [call for part in expected for call in part]


def test_each_step_is_built_once_and_ahead(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage waits for its first batch: it was known before that the next step would be another."""
    spec = tiny_spec()
    built: list[StepRequest] = []
    build = TrainBatches._build

    def spy(self: TrainBatches, before: Any, request: StepRequest, host: Any) -> Any:
        built.append(request)
        return build(self, before, request, host)

    monkeypatch.setattr(TrainBatches, "_build", spy)
    with a_trainer(spec, data) as trainer:
        steps = [trainer.schedule.at(step) for step in range(spec.training.total_steps)]
        for settings in steps:
            trainer.train_step(settings, micro_steps=1)
    assert built[: len(steps)] == [settings.request for settings in steps]
    assert len(built) <= len(steps) + 1  # and a guess after the last


# -- losses that are not finite --------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, value: float, call: int) -> None:
    """The training loss's call number `call` (from 0) gives `value`."""
    original, calls = Speedrun.training_loss, itertools.count()

    def poisoned(*args: Any, **embedded: Any) -> torch.Tensor:
        return original(*args, **embedded) * (value if next(calls) == call else 1.0)

    monkeypatch.setattr(Speedrun, "training_loss", poisoned)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, shown: str
) -> None:
    path = tmp_path / "run"
    poison(monkeypatch, value, 4 * 4 + 2)  # in the fifth step's third micro-batch
    with pytest.raises(RunError) as error:
        train(tiny_spec("checkpoint={every: 1, keep: 1, at_end: true}"), data, path)
    assert error.value.exit_code == 1
    run = read_run(path)
    before = losses(path)[0][4]
    assert re.match(
        rf"step 5: the training loss is {shown}; the last finite one was {before:.4f} at step 4", str(error.value)
    )
    assert run.state == "failed"
    assert run.end is not None
    assert f"step 5: the training loss is {shown}" in run.end["reason"]
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4]
    # The step is not saved, so the checkpoint before it is not deleted.
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step-000004.pt"]
    assert "run failed: RunError" in (path / "log.txt").read_text()


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Speedrun.evaluation_loss, itertools.count()
    monkeypatch.setattr(
        Speedrun, "evaluation_loss", lambda *args: original(*args) + (math.nan if next(calls) == 10 else 0.0)
    )
    with pytest.raises(RunError, match="step 10: the validation loss is nan"):
        train(tiny_spec(), data, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.state == "failed"
    assert [(r["step"], r["val_loss"] is None) for r in run.evaluations] == [(0, False), (5, False), (10, True)]


def test_parameters_that_are_not_finite_are_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = NorMuonAdam.step, itertools.count(1)

    def poisoned(self: NorMuonAdam, rates: Any) -> None:
        original(self, rates)
        if next(calls) == 6:
            self.parameters["mlp"].data[0, 0, 0, 0] = math.inf

    monkeypatch.setattr(NorMuonAdam, "step", poisoned)
    with pytest.raises(RunError, match="step 6: mlp no longer finite"):
        train(tiny_spec("checkpoint={every: 2, keep: 1}"), data, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004.pt"]


def test_an_interrupted_run_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NorMuonAdam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_spec(), data, tmp_path / "run")
    assert read_run(tmp_path / "run").state == "interrupted"


# -- data and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("fineweb_train_*.bin", r"no fineweb_train_\*\.bin there"),
        ("fineweb_val_*.bin", r"no fineweb_val_\*\.bin there"),
    ],
)
def test_missing_shards(tmp_path: Path, remove: str, message: str) -> None:
    directory = make_data(tmp_path / "data")
    for file in directory.glob(remove):
        file.unlink()
    with pytest.raises(InputError, match=message) as error:
        train(tiny_spec(), directory)
    assert str(directory) in str(error.value)
    assert "prep-fineweb or prep-text" in str(error.value)


def test_too_few_tokens_are_refused_before_the_first_step(tmp_path: Path) -> None:
    directory = make_data(tmp_path / "data", (4000,))
    with pytest.raises(InputError, match=r"4,000 tokens; the run takes 4,544"):
        train(tiny_spec("data.epochs=1"), directory)


def test_gpt2_learns_through_the_same_trainer(data: Path, tmp_path: Path) -> None:
    train(tiny_spec(model="gpt2"), data, tmp_path / "run")
    training, validation = losses(tmp_path / "run")
    assert list(training) == list(range(1, 10))
    assert training[1] == pytest.approx(math.log(64), rel=0.05)
    assert training[9] < training[1] - 0.6
    assert list(validation) == [0, 4, 8, 9]
    assert validation[9] < validation[0] - 0.6


def test_the_model_learns_a_small_language(tmp_path: Path) -> None:
    """What follows a token is nearly fixed; a model that ignores context stays at the unigram cross-entropy, 4.15."""
    directory = make_data(tmp_path / "data", (60_000,), 2049)
    spec = tiny_spec(
        "training.slots=1",
        "training.stages=["
        "{steps: 20, batch_tokens: 512, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5], lr_factor: 1},"
        "{steps: 20, batch_tokens: 1024, window_blocks: {short: 3, long: 6}, token_weights: [1], lr_factor: 1.52}]",
        "training.extension=null",
        "optimizer.tied_head.split_stage=1",
        "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 10, cooldown_steps: 5}",
        "evaluation={every: 20, tokens: 2048, micro_batch_tokens: 512, target_loss: null}",
    )
    result = train(spec, directory)
    unigram = unigram_cross_entropy(
        list(directory.glob("*train*")), list(directory.glob("*val*")), 2048, spec.model.vocab_size
    )
    assert unigram > 4.0
    assert result.final_val_loss < unigram - 1.3


def test_the_deterministic_setting_reaches_torch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored in the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        with a_trainer(tiny_spec("runtime.deterministic=true"), data):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # cuBLAS refuses to be deterministic without
        with a_trainer(tiny_spec(), data):
            assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("model", "size"), [("speedrun", "0"), ("gpt2", None)])
def test_eight_bit_products_get_no_workspace(
    data: Path, monkeypatch: pytest.MonkeyPatch, model: str, size: str | None
) -> None:
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "")  # restored in the end
    monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE")
    with join_world(tiny_spec(model=model)):
        assert os.environ.get("CUBLASLT_WORKSPACE_SIZE") == size
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "1024")
    with join_world(tiny_spec(model=model)):
        assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "1024"  # the user's


def test_every_metric_is_valid_json(finished: Path) -> None:
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
