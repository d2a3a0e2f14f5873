"""Runs on 2 and 4 GPUs over NCCL: collectives, the losses and parameters of one GPU, faults.

python -m pytest tests/gpu/test_several_gpus.py        # those for more GPUs than there are, are skipped
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from launched import Launched, endless_recipe
from tiny_runs import GPU_SIZES, losses, make_data, newest_state, python, tiny_spec, train, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.timeout(600)]

PLAIN = "attention: plain, kernels: plain, head_precision: bf16, compile: off"
STEPS = 200
LONG = (
    "training.stages=["
    "{steps: 100, batch_tokens: 4096, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1},"
    "{steps: 90, batch_tokens: 6144, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.2},"
    "{steps: 8, batch_tokens: 8192, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.4}]",
    "evaluation={every: 50, tokens: 16384, micro_batch_tokens: 2048, target_loss: null}",
)


def gpus(count: int) -> object:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = f"needs {count} GPUs, there are {there}"
    return pytest.param(count, marks=pytest.mark.skipif(there < count, reason=reason))


SEVERAL = pytest.mark.parametrize("count", [gpus(2), gpus(4)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (1_300_000,), val_tokens=20_000)


def machine(count: int) -> str:
    return f"hardware={{gpu: h100, gpus_per_node: {count}}}"


def on(count: int, data: Path, directory: Path, *overrides: str) -> Path:
    """A run on this many GPUs, by `nanogpt launch`."""
    recipe = write_recipe(directory / f"{count}.yaml", tiny_spec(*overrides, machine(count)))
    with Launched(directory / str(count), count, recipe, "--data", data) as launched:
        assert launched.end(300) == 0, launched.output
        return launched.run


@SEVERAL
def test_collectives(count: int) -> None:
    script = Path(__file__).parents[1] / "distributed" / "collectives.py"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    done = python(*launcher, str(script), "nccl")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [gpus(1), gpus(2)])
def test_no_step_of_record92_makes_the_host_wait(count: int) -> None:
    script = Path(__file__).parent / "host_waits.py"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    done = python(*launcher, str(script), "error", timeout=500)
    assert done.returncode == 0, done.stderr


@SEVERAL
@pytest.mark.parametrize("row_gradients", ["dense", "sparse"])
def test_in_fp32_parameters_are_those_of_one_gpu(count: int, row_gradients: str, data: Path, tmp_path: Path) -> None:
    runtime = f"runtime={{dtype: fp32, {PLAIN}, row_gradients: {row_gradients}}}"
    train(tiny_spec(runtime, machine(1), "checkpoint.at_end=true"), data, tmp_path / "one")
    path = on(count, data, tmp_path, runtime, "checkpoint.at_end=true")
    for found, expected in zip(losses(path), losses(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    one, several = newest_state(tmp_path / "one")["model"], newest_state(path)["model"]
    tensors = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() >= {"attn", "mlp", "lm_head", "bigram_embed"}
    for name, expected_tensor in tensors.items():
        difference = (several[name] - expected_tensor).norm()
        assert difference <= 1e-3 * expected_tensor.norm() + 1e-6 * expected_tensor.numel() ** 0.5, name
    assert len({rank.device_uuid for rank in read_record(path).hardware.ranks}) == count


@SEVERAL
def test_in_bf16_losses_over_200_steps_are_those_of_one_gpu(count: int, data: Path, tmp_path: Path) -> None:
    runtime = f"runtime={{dtype: bf16, {PLAIN}}}"
    train(tiny_spec(*LONG, runtime, machine(1)), data, tmp_path / "one")
    path = on(count, data, tmp_path, *LONG, runtime)
    (_, found), (_, expected) = losses(path), losses(tmp_path / "one")
    assert max(found) == STEPS
    assert found == pytest.approx(expected, abs=0.01)


@SEVERAL
def test_recorded_micro_steps_are_those_of_one_gpu(
    count: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, with Triton's kernels, as a real run is; graphs are recorded beside NCCL's work."""
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))  # the second start takes the model's from the first
    runtime = "runtime={dtype: bf16, compile: 'on', attention: varlen}"
    train(tiny_spec(*GPU_SIZES, runtime, machine(1)), data, tmp_path / "one")
    path = on(count, data, tmp_path, *GPU_SIZES, runtime)
    assert "CUDA graphs: 4 micro-steps captured" in (path / "log.txt").read_text().splitlines()
    for found, expected in zip(losses(path), losses(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("count", [gpus(2)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run_and_frees_the_gpus(count: int, number: int, data: Path, tmp_path: Path) -> None:
    """The other rank's main thread is stuck in NCCL, which tells nobody."""
    recipe = endless_recipe(tmp_path / "endless.yaml", count, f"runtime={{dtype: bf16, {PLAIN}}}", machine(count))
    with Launched(tmp_path / "lost", count, recipe, "--data", data) as launched:
        launched.wait_for_step(20)
        os.kill(launched.ranks()[1], number)
        assert launched.end(60.0) == 1, launched.output
        how = "has died" if number == signal.SIGKILL else "has been silent for 20 s"
        assert f"rank 1 on {os.uname().nodename} (process {launched.seen[1]}) {how} in step " in launched.log


@pytest.mark.parametrize("count", [gpus(2)])
def test_usr1_stops_all_ranks_at_one_step(count: int, data: Path, tmp_path: Path) -> None:
    recipe = endless_recipe(tmp_path / "endless.yaml", count, f"runtime={{dtype: bf16, {PLAIN}}}", machine(count))
    with Launched(tmp_path / "stopped", count, recipe, "--data", data) as launched:
        launched.wait_for_step(20)
        os.kill(launched.ranks()[1], signal.SIGUSR1)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        run = read_run(launched.run)
    assert run.state == "interrupted"
    assert run.checkpoints[-1]["step"] == run.last["step"]
