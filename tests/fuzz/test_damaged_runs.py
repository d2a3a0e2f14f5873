"""Mutated runs: spec, record, metrics and checkpoints, read by every command that reads runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run
from mutated import VALUES, examples, mutated_bytes, mutated_data, mutated_text, refused_or_done
from tiny_runs import make_data, tiny_spec, train

from nanogpt.training.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")
Nanogpt = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two runs of published figures."""
    parent = tmp_path_factory.mktemp("runs")
    for number in range(2):
        made_run(parent / f"run{number}", seed=number)
    return parent


def read(nanogpt: Nanogpt, runs: list[Path], out: Path, which: int) -> None:
    commands: tuple[tuple[Any, ...], ...] = (
        ("runs", runs[0].parent),
        ("runs", runs[0].parent, "--json"),
        ("compare", *runs),
        ("compare", *runs, "--json"),
        ("check", runs[0]),
        ("check", runs[0], "--json"),
        ("significance", *runs),
        ("significance", *runs, "--unofficial"),
        ("plot", runs[0], "--out", out / "loss.svg"),
        ("report", *runs, "--out", out / "report.html"),
        ("submission", runs[0], "--unofficial", "--description", "x", "--out", out / "submission"),
    )
    outcome = nanogpt(*commands[which % len(commands)])
    assert outcome.code in (0, 1, 2)
    assert outcome.code == 0 or outcome.err or outcome.out
    shutil.rmtree(out / "submission", ignore_errors=True)


@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl", "spec.yaml", "log.txt"])
def test_files_of_a_run(nanogpt: Nanogpt, finished: Path, tmp_path: Path, fuzz: int, name: str) -> None:
    runs = [tmp_path / "runs" / path.name for path in sorted(finished.iterdir())]
    shutil.copytree(finished, tmp_path / "runs")
    text = (runs[0] / name).read_text()
    for number, chance in enumerate(examples((10 if name == "log.txt" else 40) * fuzz, name)):
        if chance.random() < 0.2 or name == "log.txt":
            changed = mutated_bytes(text.encode(), chance)
        elif name == "record.json":
            changed = json.dumps(mutated_data(json.loads(text), chance)).encode()
        elif name == "metrics.jsonl":
            records = [json.loads(line) for line in text.splitlines()]
            chosen = [*records[:2], *records[-9:]]
            changed = "".join(json.dumps(record) + "\n" for record in mutated_lines(chosen, chance)).encode()
        else:
            changed = mutated_text(text, chance)
        (runs[0] / name).write_bytes(changed)
        read(nanogpt, runs, tmp_path, number)


def mutated_lines(records: list[Any], chance: Any) -> list[Any]:
    changed = mutated_data(records, chance)
    return changed if isinstance(changed, list) else records


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of gpt2 with checkpoints; its shards are beside it in `data`."""
    parent = tmp_path_factory.mktemp("tiny")
    spec = tiny_spec("checkpoint={every: 3, keep: 2, at_end: true}", model="gpt2")
    train(spec, make_data(parent / "data"), parent / "run")
    return parent / "run"


def test_bytes_of_a_checkpoint(tiny: Path, tmp_path: Path, fuzz: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    files = sorted((run / "checkpoints").iterdir())
    whole = files[-1].read_bytes()
    for file in files[:-1]:
        file.unlink()
    for chance in examples(40 * fuzz, "checkpoint bytes"):
        files[-1].write_bytes(mutated_bytes(whole, chance))
        refused_or_done(lambda: load_trained_model(run, device="cpu"))


def test_values_of_a_checkpoint(nanogpt: Nanogpt, tiny: Path, tmp_path: Path, fuzz: int) -> None:
    """One that is whole, and of another run or another program: read for a sample, and gone on with."""
    run, data = tmp_path / "run", tiny.parent / "data"
    shutil.copytree(tiny, run)
    first, last = sorted((run / "checkpoints").iterdir())
    state = torch.load(first, weights_only=True)
    last.unlink()
    other = torch.zeros(3)
    for number, chance in enumerate(examples(40 * fuzz, "checkpoint values")):
        changed = state if number == 0 else mutated_data(state, chance)
        if isinstance(changed, dict) and chance.random() < 0.3:
            part = changed.get(chance.choice(("model", "optimizer")))
            if isinstance(part, dict) and part:
                part[chance.choice(sorted(part, key=str))] = chance.choice((other, other.int(), *VALUES))
        torch.save(changed, first)
        if number % 2:
            outcome = nanogpt("evaluate", run, "--data", data, "--device", "cpu", "--tokens", 64)
        else:
            outcome = nanogpt("train", "--resume", run, "--data", data)
        assert outcome.code in (0, 1, 2)
        assert outcome.code == 0 or outcome.err
        for file in (run / "checkpoints").iterdir():
            file.unlink()
        for name in ("record.json", "metrics.jsonl", "log.txt"):
            if (tiny / name).exists():
                shutil.copy(tiny / name, run / name)
