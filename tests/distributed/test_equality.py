"""Runs of several processes over gloo: the losses and parameters of one process, and checkpoints for any number."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import in_ranks, run_nanogpt
from tiny_runs import (
    ANVIL,
    FIRST_WITH_PREFIX,
    assert_same,
    averaged_spec,
    losses,
    make_data,
    make_text_data,
    newest_state,
    python,
    tiny_spec,
    train,
    write_recipe,
)
from untrained_runs import gpt2_tokens_spec

from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record
from nanogpt.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5  # relative, in fp32: sums in another order
CALM = "optimizer.adam.eps=1e-6"  # or Adam brings gradients that are rounding errors to full size
CHECKPOINTS = "checkpoint={every: 5, keep: 3, at_end: true}"  # after 5 steps Adam's gradients are pending


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (1700, 1300))


def torchrun(processes: int, *arguments: object) -> str:
    """`torchrun -m nanogpt train` on this machine; returns standard output and error together."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    with tempfile.TemporaryDirectory() as place:  # torchrun leaves a directory of its own
        done = python(*launcher, "-m", "nanogpt", "train", *map(str, arguments), TMPDIR=place)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def forked(processes: int, *arguments: object) -> str:
    """The same without torchrun, whose processes take seconds to import PyTorch."""
    done = in_ranks(processes, run_nanogpt, "train", *map(str, arguments))
    output = "".join(rank.stdout + rank.stderr for rank in done)
    assert {rank.returncode for rank in done} == {0}, output
    return output


def assert_close(one: Any, other: Any, where: str = "state") -> None:
    """Tensors equal to TOLERANCE by norm, or to 1e-7 where they are small; everything else equal."""
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        difference = (one.double() - other.double()).norm()
        allowed = TOLERANCE * one.double().norm() + 1e-7 * one.numel() ** 0.5
        assert difference <= allowed, f"{where}: off by {difference:.1e}, {allowed:.1e} is allowed"
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, where


def assert_same_run(path: Path, whole: Path) -> None:
    for found, expected in zip(losses(path), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    assert_close(*(comparable(newest_state(run)) for run in (path, whole)))


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Without GPT-2's key biases: their gradient is rounding error, which Adam brings to full size."""
    del state["extra_state_by_rank"]
    for name, value in state["model"].items():
        if name.endswith("qkv.bias"):
            value.view(3, -1)[1] = 0
    return state


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_spec(CHECKPOINTS), data, path)
    return path


def distributed_run(
    processes: int,
    data: Path,
    parent: Path,
    *overrides: str,
    model: str = "speedrun",
    launch: Callable[..., str] = forked,
) -> Path:
    spec = tiny_spec(CHECKPOINTS, f"hardware.gpus_per_node={processes}", *overrides, model=model)
    parent.mkdir()
    output = launch(processes, write_recipe(parent / "tiny.yaml", spec), "--data", data, "--out", parent / "runs")
    (path,) = (parent / "runs").iterdir()
    # One process of them speaks.
    assert len(re.findall(r"^step:12/12 val_loss:", output, re.MULTILINE)) == (0 if model == "gpt2" else 1)
    assert output.count("finished, ") == 1
    assert "Warning" not in output.replace("OMP_NUM_THREADS", "")
    assert read_run(path).start["world_size"] == processes
    record = read_record(path)
    assert (record.state, record.hardware.world_size) == ("finished", processes)
    assert [(rank.rank, rank.local_rank) for rank in record.hardware.ranks] == [(i, i) for i in range(processes)]
    return path


@pytest.fixture(scope="module")
def on_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of torchrun, with the warm-up, whose restore must give every rank its shards back."""
    parent = tmp_path_factory.mktemp("two") / "of"
    return distributed_run(2, data, parent, "training.warmup=true", launch=torchrun)


def test_two_processes_train_as_one(on_two: Path, whole: Path) -> None:
    assert_same_run(on_two, whole)


def test_four_processes_train_as_one(data: Path, whole: Path, tmp_path: Path) -> None:
    """With the bigram table's gradient communicated by rows, where two and one process send all of it or nothing."""
    assert_same_run(distributed_run(4, data, tmp_path / "four", "runtime.row_gradients=sparse"), whole)


def test_record89_on_two_processes_trains_as_on_one(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (1700, 1300), first_token=FIRST_WITH_PREFIX)
    train(tiny_spec(CHECKPOINTS, model="record89"), data, tmp_path / "whole")
    sparse = "runtime.row_gradients=sparse"
    path = distributed_run(2, data, tmp_path / "two", "training.warmup=true", sparse, model="record89")
    assert_same_run(path, tmp_path / "whole")
    whole, two = (read_run(tmp_path / "whole"), read_run(path))
    assert len(whole.steps) == len(two.steps) == 12


@pytest.fixture(scope="module")
def data92(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny92") / "data", (1700, 1300), first_token=FIRST_WITH_PREFIX)


@pytest.fixture(scope="module")
def whole92(data92: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record 92 on one process."""
    path = tmp_path_factory.mktemp("whole92") / "run"
    train(tiny_spec(CHECKPOINTS, model="record92"), data92, path)
    return path


@pytest.fixture(scope="module")
def two92(data92: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record 92 on two, with the warm-up, and validations in the middle of the table's cycles."""
    parent = tmp_path_factory.mktemp("two92") / "of"
    return distributed_run(2, data92, parent, "training.warmup=true", model="record92")


def test_record92_on_two_processes_trains_as_on_one(two92: Path, whole92: Path) -> None:
    """The same candidates and table, rows pulled and gradients pushed instead of read and added where they are."""
    assert_same_run(two92, whole92)


def test_record92_on_eight_processes_trains_as_on_one(data92: Path, whole92: Path, tmp_path: Path) -> None:
    assert_same_run(distributed_run(8, data92, tmp_path / "eight", model="record92"), whole92)


def test_normalized_ngrams_on_two_processes_train_as_on_one(tmp_path: Path) -> None:
    """On prose in GPT-2's tokens; one goes on from the two's checkpoint."""
    data, settings = make_text_data(tmp_path / "data"), (CHECKPOINTS, CALM, "model.normalized_ngrams=true")
    spec = gpt2_tokens_spec("record92", *settings)
    train(spec, data, tmp_path / "whole")
    recipe = write_recipe(tmp_path / "tiny.yaml", gpt2_tokens_spec("record92", *settings, "hardware.gpus_per_node=2"))
    forked(2, recipe, "--data", data, "--out", tmp_path / "runs")
    (two,) = (tmp_path / "runs").iterdir()
    assert_same_run(two, tmp_path / "whole")
    path = stopped(two, 5, tmp_path / "run")
    train(spec, data, path, resume=True)
    assert read_run(path).start["resumed_at"] == 5
    assert_same_run(path, tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 4])
def test_a_cycle_of_two_processes_goes_on_with_others(
    processes: int, two92: Path, whole92: Path, data92: Path, tmp_path: Path
) -> None:
    path = stopped(two92, 5, tmp_path / "run")
    saved = newest_state(path)["optimizer"]["tables"]["ngrams"]
    assert len(saved["decays"]) == 2 and [len(cycle["rows"]) > 0 for cycle in saved["cycles"]] == [True, True]
    forked(processes, "--resume", path, "--data", data92, "--set", f"hardware.gpus_per_node={processes}")
    assert read_run(path).start["resumed_at"] == 5
    assert_same_run(path, whole92)


def test_a_cycle_goes_on_bit_for_bit(two92: Path, data92: Path, tmp_path: Path) -> None:
    path = stopped(two92, 10, tmp_path / "run")
    forked(2, "--resume", path, "--data", data92)
    assert read_run(path).start["resumed_at"] == 10
    assert losses(path) == losses(two92)
    assert_same(newest_state(path), newest_state(two92))


def test_anvil_on_two_processes_trains_as_on_one(tmp_path: Path) -> None:
    """With gradients by rows, and from a checkpoint in the middle of a cycle on another number of ranks."""
    data = make_data(tmp_path / "data", (1700, 1300), first_token=FIRST_WITH_PREFIX)
    train(tiny_spec(CHECKPOINTS, *ANVIL, model="record89"), data, tmp_path / "whole")
    settings = (*ANVIL, "training.warmup=true", "runtime.row_gradients=sparse")
    two = distributed_run(2, data, tmp_path / "two", *settings, model="record89")
    assert_same_run(two, tmp_path / "whole")
    path = stopped(two, 10, tmp_path / "run")
    assert set(newest_state(path)["optimizer"]["pending_gradients"][0]) == {"value_embed", "bigram_embed"}
    train(tiny_spec(CHECKPOINTS, *ANVIL, "training.warmup=true", model="record89"), data, path, resume=True)
    assert_same_run(path, tmp_path / "whole")


def test_gpt2_on_two_processes_trains_as_on_one(data: Path, tmp_path: Path) -> None:
    train(tiny_spec(CHECKPOINTS, model="gpt2"), data, tmp_path / "whole")
    assert_same_run(distributed_run(2, data, tmp_path / "two", model="gpt2"), tmp_path / "whole")


def test_averages_and_mask_at_the_end(tmp_path: Path) -> None:
    """Two processes as one, whose averages one takes over in the middle; their last validation has one mask."""
    data = make_text_data(tmp_path / "data")
    train(averaged_spec(CHECKPOINTS, CALM), data, tmp_path / "whole")
    recipe = write_recipe(tmp_path / "tiny.yaml", averaged_spec(CHECKPOINTS, CALM, "hardware.gpus_per_node=2"))
    forked(2, recipe, "--data", data, "--out", tmp_path / "runs")
    (two,) = (tmp_path / "runs").iterdir()
    assert_same_run(two, tmp_path / "whole")
    assert read_record(two).end_of_run == read_record(tmp_path / "whole").end_of_run
    path = stopped(two, 10, tmp_path / "run")
    (averages,) = newest_state(path)["end_of_run"]
    assert set(averages) == {
        *("0/lm_head", "0/embed", "1/vo", "1/mlp", "2/value_embed", "3/qk", "3/vo", "3/mlp"),
    }
    train(averaged_spec(CHECKPOINTS, CALM), data, path, resume=True)
    assert_same_run(path, tmp_path / "whole")


def stopped(run: Path, step: int, path: Path) -> Path:
    """The run as it was after the checkpoint of `step`."""
    shutil.copytree(run, path)
    for file in list_checkpoints(path / "checkpoints"):
        if file.name != f"step-{step:06d}.pt":
            file.unlink()
    return path


@pytest.mark.parametrize("step", [5, 10])
def test_a_checkpoint_of_two_processes_goes_on_with_one(
    on_two: Path, whole: Path, data: Path, tmp_path: Path, step: int
) -> None:
    path = stopped(on_two, step, tmp_path / "run")
    train(tiny_spec(CHECKPOINTS, "training.warmup=true"), data, path, resume=True)
    assert read_run(path).start["resumed_at"] == step
    assert_same_run(path, whole)


def test_a_checkpoint_of_two_processes_goes_on_with_four(on_two: Path, whole: Path, data: Path, tmp_path: Path) -> None:
    path = stopped(on_two, 5, tmp_path / "run")
    forked(4, "--resume", path, "--data", data, "--set", "hardware.gpus_per_node=4")
    run = read_run(path)
    assert (run.start["resumed_at"], run.start["world_size"], run.state) == (5, 4, "finished")
    assert_same_run(path, whole)
    assert RunDirectory.open(path).spec().world_size == 2  # the run's spec stays that of its start


def test_two_processes_go_on_in_the_middle_of_a_cycle_bit_for_bit(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (1700, 1300), first_token=FIRST_WITH_PREFIX)
    settings = ("hardware.gpus_per_node=2", "runtime.row_gradients=sparse", *ANVIL)
    spec = tiny_spec("checkpoint={every: 2, keep: 9, at_end: true}", *settings, model="record89")
    forked(2, write_recipe(tmp_path / "tiny.yaml", spec), "--data", data, "--out", tmp_path / "runs")
    (whole,) = (tmp_path / "runs").iterdir()
    path = stopped(whole, 6, tmp_path / "run")  # Adam has stepped in step 5, tables do in step 7
    one, other = newest_state(path)["optimizer"]["pending_gradients"]
    assert set(one) == set(other) == {"value_embed", "bigram_embed"}
    forked(2, "--resume", path, "--data", data)
    assert read_run(path).start["resumed_at"] == 6
    assert losses(path) == losses(whole)
    assert_same(newest_state(path), newest_state(whole))


@pytest.mark.parametrize("settings", [(), ("runtime.bigram_gradient=sparse",)])
def test_two_processes_go_on_bit_for_bit(data: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """After an odd step each rank's own gradients are pending: added up in another order, the last bit would differ."""
    spec = tiny_spec("checkpoint={every: 5, keep: 9, at_end: true}", "hardware.gpus_per_node=2", *settings)
    forked(2, write_recipe(tmp_path / "tiny.yaml", spec), "--data", data, "--out", tmp_path / "runs")
    (whole,) = (tmp_path / "runs").iterdir()
    path = stopped(whole, 5, tmp_path / "run")
    optimizer = newest_state(path)["optimizer"]
    one, other = optimizer["pending_gradients"]
    assert_same(sorted(one), sorted(other))
    assert not torch.equal(one["lm_head"]["values"], other["lm_head"]["values"])
    assert len(one["bigram_embed"]["rows"]) < one["bigram_embed"]["shape"][0]
    forked(2, "--resume", path, "--data", data)
    assert read_run(path).start["resumed_at"] == 5
    assert losses(path) == losses(whole)
    assert_same(newest_state(path), newest_state(whole))
