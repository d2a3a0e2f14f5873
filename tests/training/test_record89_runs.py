"""Tiny runs of record 89's model: what its stages bring, warm-up, checkpoints, samples, in either precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from called_again import instead_of_graphs
from tiny_runs import (
    FIRST_WITH_PREFIX,
    VOCABULARY,
    assert_same,
    losses,
    make_data,
    newest_state,
    tiny_spec,
    train,
)

from nanogpt.data.prefixes import gpt2_tokens, prefix_table
from nanogpt.models.record89.model import Record89
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record
from nanogpt.training import trainer as trainer_module
from nanogpt.training.checkpoint import list_checkpoints
from nanogpt.training.sampling import sample_text

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_FIFTH = "checkpoint={every: 5, keep: 9, at_end: true}"
FP8 = "runtime.mlp_precision=fp8"
PRECISIONS = pytest.mark.parametrize("precision", [(), (FP8,)], ids=["fp32", "8-bit MLPs"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (1700, 1300), first_token=FIRST_WITH_PREFIX)


def spec_of(*overrides: str) -> Any:
    return tiny_spec(EVERY_FIFTH, *overrides, model="record89")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Runs that were never stopped, without warm-up."""
    paths = {}
    for precision in ((), (FP8,)):
        paths[precision] = tmp_path_factory.mktemp("whole") / "run"
        train(spec_of(*precision), data, paths[precision])
    return paths


def test_it_learns_and_the_precision_hardly_shows(whole: dict[tuple[str, ...], Path]) -> None:
    wide, narrow = (losses(path)[1] for path in whole.values())
    assert list(wide) == [0, 5, 10, 12]
    assert wide[0] > wide[5] > wide[10] > wide[12]
    assert 0 < abs(narrow[12] - wide[12]) < 0.01
    assert [read_record(path).computation.mlp_precision for path in whole.values()] == ["bf16", "fp8"]


@PRECISIONS
def test_warm_up_leaves_no_trace(
    whole: dict[tuple[str, ...], Path], data: Path, tmp_path: Path, precision: tuple[str, ...]
) -> None:
    train(spec_of("training.warmup=true", *precision), data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[precision])
    assert_same(newest_state(tmp_path / "run"), newest_state(whole[precision]))


def test_updates_and_roundings_of_weights_that_are_replayed_change_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("training.warmup=true", "model.mlp_fp8.bootstrap_steps=3", FP8)
    train(spec, data, tmp_path / "eager")
    instead_of_graphs(monkeypatch)
    monkeypatch.setattr(trainer_module, "captures_graphs", lambda *_: True)
    train(spec, data, tmp_path / "captured")
    assert losses(tmp_path / "captured") == losses(tmp_path / "eager")
    assert_same(newest_state(tmp_path / "captured"), newest_state(tmp_path / "eager"))
    log = (tmp_path / "captured" / "log.txt").read_text()
    assert "CUDA graphs: updates of banks, 3 captured" in log
    assert "CUDA graphs: rounding of weights, 1 captured" in log


@PRECISIONS
@pytest.mark.parametrize("step", [5, 10])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    whole: dict[tuple[str, ...], Path], data: Path, tmp_path: Path, precision: tuple[str, ...], step: int
) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole[precision], path)
    for file in list_checkpoints(path / "checkpoints"):
        if file.name != f"step-{step:06d}.pt":
            file.unlink()
    train(spec_of(*precision), data, path, resume=True)
    assert read_run(path).start["resumed_at"] == step
    assert losses(path) == losses(whole[precision])
    assert_same(newest_state(path), newest_state(whole[precision]))


@pytest.mark.parametrize(
    "settings",
    [("gradients=all",), ("gradients=all", "square=e4m3"), ("input_scale=bound",)],
)
def test_it_learns_with_more_in_8_bits_too(
    whole: dict[tuple[str, ...], Path], data: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    train(spec_of(FP8, *(f"model.mlp_fp8.{setting}" for setting in settings)), data, tmp_path / "run")
    (_, narrow), (_, narrower) = losses(whole[FP8,]), losses(tmp_path / "run")
    assert narrower[0] == narrow[0] and 0 < abs(narrower[12] - narrow[12]) < 0.01


def test_samples_are_drawn_from_either_precision(whole: dict[tuple[str, ...], Path]) -> None:
    for path in whole.values():
        assert sample_text(path, "A1B2", tokens=5, temperature=0).startswith("A1B2")


def test_each_stage_brings_its_prefixes_and_its_limits(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    original = Record89.training_loss

    def spy(self: Record89, batch: Any, inputs: Any, **embedded: Any) -> torch.Tensor:
        lengths = batch.cu_seqlens.diff()
        assert lengths.max() <= batch.max_seqlen
        weight = None if inputs.prefix_weight is None else round(float(inputs.prefix_weight), 6)
        calls.append((batch.inputs.numel(), len(batch.cu_seqlens), batch.max_seqlen, weight))
        table = prefix_table(gpt2_tokens()[: FIRST_WITH_PREFIX + VOCABULARY], FIRST_WITH_PREFIX + VOCABULARY)
        assert self.prefixes.tolist() == table.tolist()
        assert (self.prefixes[batch.targets] >= 0).float().mean() > 0.8
        return original(self, batch, inputs, **embedded)

    monkeypatch.setattr(Record89, "training_loss", spy)
    train(tiny_spec(model="record89"), data)
    expected = [(64, 64, 20, 0.25)] * 4
    expected += [(80, 96, 48, round(0.25 * (1 - i / 3), 6)) for i in range(3)]
    expected += [(128, 128, 48, None)] * 5
    assert calls == [call for call in expected for _ in range(4)]


def test_the_prefixes_are_made_inside_the_clock_and_off_in_the_warm_up(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    table, start, loss = trainer_module.prefix_table, trainer_module.Clock.start, Record89.training_loss
    monkeypatch.setattr(trainer_module, "prefix_table", lambda *args: order.append("table") or table(*args))

    def spy_start(self: Any) -> None:
        if "clock" not in order:  # it starts again after each validation
            order.append("clock")
        start(self)

    monkeypatch.setattr(trainer_module.Clock, "start", spy_start)

    def spy(self: Record89, *args: Any, **embedded: Any) -> torch.Tensor:
        state = "on" if bool((self.prefixes >= 0).any()) else "off"
        if order[-1:] != [state]:
            order.append(state)
        return loss(self, *args, **embedded)

    monkeypatch.setattr(Record89, "training_loss", spy)
    train(tiny_spec("training.warmup=true", model="record89"), data)
    assert order[:4] == ["off", "clock", "table", "on"]
    assert "off" not in order[1:]


def test_the_optimizers_steps_reach_the_8_bit_weights(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = Record89.weights_changed

    def spy(self: Record89, step: int) -> None:
        original(self, step)
        steps.append(step)
        for layer in range(5):
            scale = self.fp8_mlp.scales("up_scale")[layer]
            restored = self.fp8_mlp.up8[layer].float() * scale
            assert (restored - self.mlp[layer, 0]).norm() < 0.05 * self.mlp[layer, 0].norm()

    monkeypatch.setattr(Record89, "weights_changed", spy)
    train(tiny_spec(FP8, model="record89"), data)
    assert steps == list(range(12))
