"""The compile cache with Triton, FlashAttention and the speedrun's model: warmed up in one process, used in another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import losses, python

from nanogpt.cache.compile_cache import FEW_KERNELS
from nanogpt.cache.graphs import UNKEPT
from nanogpt.data.made_up import write_made_up_shards
from nanogpt.data.shards import train_name, val_name
from nanogpt.runs.record import Record, read_record

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.timeout(1800)]

# A short run of every stage at the sizes of the record.
SHORT = (
    "training.stages=["
    "{steps: 6, batch_tokens: 131072, window_blocks: {short: 1, long: 3}, token_weights: [1, 0.5, 0.25], lr_factor: 1},"
    "{steps: 6, batch_tokens: 262144, window_blocks: {short: 3, long: 7}, token_weights: [1, 0.5], lr_factor: 1.5},"
    "{steps: 6, batch_tokens: 393216, window_blocks: {short: 5, long: 11}, token_weights: [1], lr_factor: 1.7}]",
    "training.extension={steps: 4, batch_tokens: 393216, window_blocks: {short: 6, long: 13}, token_weights: [1],"
    " lr_factor: 1.7}",
    "evaluation.every=10",
    "evaluation.tokens=2097152",
    "evaluation.target_loss=null",
    "optimizer.normuon.momentum.warmup_steps=4",
    "optimizer.normuon.momentum.cooldown_steps=2",
    "data.epochs=null",
    "reference=null",
    "checkpoint={at_end: false}",
)


def total(record: Record, count: str) -> int:
    return sum(getattr(phase, count) for phase in record.starts[-1].start_up)


def test_a_warm_start_compiles_nothing_and_computes_the_same(tmp_path: Path):
    gpu = "a100" if torch.cuda.get_device_capability()[0] < 9 else "h200"
    sets = [part for override in SHORT for part in ("--set", override)]
    data = tmp_path / "data"
    data.mkdir()
    write_made_up_shards(data, train_tokens=12_000_000, val_tokens=2_097_153, bos=50256)
    assert (data / train_name(1)).exists() and (data / val_name()).exists()

    def command(name: str, *arguments: str) -> str:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        done = python(
            *("-m", "nanogpt", name.partition("-")[0], f"1x{gpu}", *sets, *arguments),
            timeout=900,
            TMPDIR=str(place),
            NANOGPT_CACHE=str(tmp_path / "kept"),
        )
        assert done.returncode == 0 and UNKEPT not in done.stderr, done.stderr
        print(done.stdout)
        return done.stdout

    def train(name: str, *arguments: str) -> tuple[Record, Path]:
        command(name, "--data", str(data), "--out", str(tmp_path / name / "runs"), *arguments)
        [path] = (tmp_path / name / "runs").glob("speedrun-*")
        print("\n".join(line for line in (path / "log.txt").read_text().splitlines() if line.startswith("| ")))
        return read_record(path), path

    assert "written" in command("warm", "--world-size", "1", "--world-size", "8")
    [kept] = (tmp_path / "kept").iterdir()
    warm, warm_path = train("train-warm")
    assert total(warm, "parts_compiled") == total(warm, "kernels_tuned") == 0
    assert total(warm, "kernels_compiled") <= FEW_KERNELS  # some depend on the data's sizes
    assert total(warm, "bypassed") == 0
    assert total(warm, "from_cache") == total(warm, "graphs") >= 10
    assert warm.compilation is not None and warm.compilation.late_graphs == 0
    assert [line.split(": ")[2].split(",")[0] for line in warm.compilation.cache] == ["used"], warm.compilation.cache
    kept.unlink()
    cold, cold_path = train("train-cold")
    assert total(cold, "parts_compiled") > 0 and total(cold, "kernels_tuned") > 0
    # Equal to what noise of atomic additions leaves; with deterministic algorithms, exactly.
    assert losses(warm_path)[1][0] == losses(cold_path)[1][0]
    assert losses(warm_path)[0] == pytest.approx(losses(cold_path)[0], abs=0.02)


@pytest.mark.parametrize("recipe", ["speedrun", "record89", "record92-quarter-table"])
def test_losses_of_a_warm_start_are_those_of_a_cold_one_bit_by_bit(tmp_path: Path, recipe: str):
    """With deterministic algorithms, so that nothing but the code could make a difference."""
    sizes = SHORT if recipe == "speedrun" else (*SHORT[-2:], "evaluation.tokens=2097152", "data.epochs=null")
    sets = [part for override in (*sizes, "runtime.deterministic=true") for part in ("--set", override)]
    steps = [] if recipe == "speedrun" else ["--steps", "24"]
    gpu = "a100" if torch.cuda.get_device_capability()[0] < 9 else "h200"
    data = tmp_path / "data"
    data.mkdir()
    write_made_up_shards(data, train_tokens=12_000_000, val_tokens=10_485_761, bos=50256)
    found = []
    for name in ("cold", "warm"):
        arguments = (
            "train",
            recipe,
            "--on",
            f"1x{gpu}",
            *steps,
            *sets,
            "--data",
            str(data),
            "--out",
            str(tmp_path / name),
        )
        done = python("-m", "nanogpt", *arguments, timeout=900, NANOGPT_CACHE=str(tmp_path / "kept"))
        assert done.returncode == 0 and UNKEPT not in done.stderr, done.stderr
        [path] = (path.parent for path in (tmp_path / name).glob("*/record.json"))
        found.append(losses(path))
        log = (path / "log.txt").read_text().splitlines()
        print("\n".join(line for line in log if line.startswith(("| ", "CUDA graphs"))))
    record = read_record(path)
    assert total(record, "from_cache") == total(record, "graphs") >= 10
    assert total(record, "parts_compiled") == total(record, "kernels_compiled") == 0
    assert found[0] == found[1]
