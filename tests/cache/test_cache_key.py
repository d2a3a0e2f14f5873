"""What decides the key of a cache file, and what does not."""

from __future__ import annotations

import json
import shutil
import types
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from tiny_runs import tiny_spec

from nanogpt.cache.compile_cache import differences, file_name
from nanogpt.cache.key import (
    SOURCES,
    cache_key,
    graph_settings,
    graph_source_sha256,
    key_sha256,
)
from nanogpt.runs.provenance import package_directory
from nanogpt.spec import RunSpec
from nanogpt.spec_fields import NOT_COMPILED, Compiled, Strict, compiled_values

CPU = torch.device("cpu")


def test_a_field_that_nobody_has_marked_reaches_compiled_code():
    class Part(Strict):
        plain: int
        told: Annotated[int, NOT_COMPILED]
        counted: Annotated[list[int], Compiled(len)]

    class Absent(Strict):
        nothing: Annotated[int, NOT_COMPILED]

    class Whole(Strict):
        part: Part
        parts: list[Part]
        named: dict[str, Part]
        there: Absent | None
        left: Annotated[Part, NOT_COMPILED]

    part = Part(plain=1, told=2, counted=[3, 4])
    whole = Whole(part=part, parts=[part], named={"a": part}, there=Absent(nothing=1), left=part)
    places = ("part", "parts[0]", "named.a")
    expected = {f"{place}.{name}": value for place in places for name, value in (("plain", 1), ("counted", 2))}
    assert dict(compiled_values(whole)) == {**expected, "there": "Absent"}


def digest(*overrides: str, model: str = "speedrun") -> str:
    return key_sha256(graph_settings(tiny_spec(*overrides, model=model)))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.adam.lr=0.5",
        "optimizer.normuon.weight_decay=0.5",
        "training.seed=7",
        "training.warmup=false",
        "model.attention_scale=0.2",
        "evaluation.every=3",
        "hardware.gpus_per_node=2",
        "output.directory=elsewhere",
        "name=other",
    ],
)
def test_numbers_that_reach_no_graph_leave_the_key(override: str):
    assert digest(override) == digest()


@pytest.mark.parametrize(
    "override", ["steps=5", "window_blocks.long=5", "token_weights=[1, 0.4, 0.3]", "lr_factor=2.0"]
)
def test_numbers_of_a_stage_that_reach_no_graph_leave_the_key(override: str):
    assert key_sha256(graph_settings(with_stage(override))) == digest()


def with_stage(override: str) -> RunSpec:
    """The tiny spec with one key of its first stage changed."""
    spec = tiny_spec()
    path, _, text = override.partition("=")
    data = spec.model_dump()
    place = data["training"]["stages"][0]
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = yaml.safe_load(text)
    return RunSpec.model_validate(data)


@pytest.mark.parametrize(
    "override",
    [
        "model.padded_vocab_size=128",
        "model.softcap.cap=20",
        "optimizer.adam.eps=1e-8",
        "optimizer.normuon.beta2=0.9",
        "evaluation.micro_batch_tokens=32",
        "training.max_document_tokens=40",
        "runtime.dtype=bf16",
        "runtime.deterministic=true",
    ],
)
def test_numbers_that_reach_a_graph_change_the_key(override: str):
    assert digest(override) != digest()


def test_the_order_of_updates_leaves_the_key_but_for_what_is_updated_together():
    order = tiny_spec().optimizer.update_order
    assert order[:2] == ["scalars", "smear_gate"] and order[-2:] == ["attn", "mlp"]
    banks_first = f"optimizer.update_order=[{', '.join([*order[-2:], *order[:-2]])}]"
    one_alone = f"optimizer.update_order=[{', '.join([*order[1:], order[0]])}]"
    assert digest(banks_first) == digest() != digest(one_alone)


@pytest.mark.parametrize("override", ["batch_tokens=512", "token_weights=[1, 0.5]", "max_segment_tokens=8"])
def test_a_stages_sizes_change_the_key(override: str):
    assert key_sha256(graph_settings(with_stage(override))) != digest()


def test_a_change_of_any_source_of_graphs_changes_the_key(tmp_path: Path):
    package = tmp_path / "nanogpt"
    for name in SOURCES:
        source = package_directory() / name
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    start = graph_source_sha256(package)
    assert start == graph_source_sha256()
    files = sorted(package.rglob("*.py"))
    assert {"relu_squared_mlp_triton.py", "attention_plain.py", "record_model.py", "rotary.py", "adam.py"} <= {
        file.name for file in files
    }
    for file in files:
        text = file.read_text()
        file.write_text(text + "\n# changed\n")
        assert graph_source_sha256(package) != start, file
        file.write_text(text)
    assert graph_source_sha256(package) == start


def test_versions_and_compiler_variables_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    spec = tiny_spec()
    start = cache_key(spec, CPU)
    assert cache_key(spec, CPU) == start
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert cache_key(spec, CPU) == start
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    tuned = cache_key(spec, CPU)
    assert differences(start, tuned) == "environment TORCHINDUCTOR_MAX_AUTOTUNE"
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "0")
    assert differences(tuned, cache_key(spec, CPU)) == "environment TORCHINDUCTOR_MAX_AUTOTUNE"
    monkeypatch.delenv("TORCHINDUCTOR_MAX_AUTOTUNE")
    monkeypatch.setenv("TRITON_PASSPHRASE", "hunter2\udcff")
    assert "TRITON_PASSPHRASE" in cache_key(spec, CPU)["environment"]
    assert "hunter2" not in json.dumps(cache_key(spec, CPU))
    monkeypatch.delenv("TRITON_PASSPHRASE")

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99" if name == "triton" else version(name))
    other = cache_key(spec, CPU)
    assert differences(start, other) == "packages triton"
    assert file_name(other) != file_name(start)


def test_the_gpu_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    def gpu(name: str, major: int) -> dict[str, Any]:
        properties = types.SimpleNamespace(name=name, major=major, minor=0, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return cache_key(tiny_spec(), torch.device("cuda", 0))

    h100, h200, a100 = gpu("NVIDIA H100", 9), gpu("NVIDIA H200", 9), gpu("NVIDIA A100", 8)
    assert len({key_sha256(key) for key in (h100, h200, a100)}) == 3
    assert file_name(h100).startswith("h100-torch")
    # The first of a node's GPUs or the last: the same code.
    assert cache_key(tiny_spec(), torch.device("cuda", 3)) == a100


@pytest.mark.parametrize(
    "name",
    [
        "training/report.py",
        "training/trainer.py",
        "training/checkpoint.py",
        "training/recorder.py",
        "runs/display.py",
        "runs/record.py",
        "cli/train.py",
        "data/training_batches.py",
        "launch/watchdog.py",
    ],
)
def test_reports_checkpoints_and_the_command_line_leave_the_key(tmp_path: Path, name: str):
    package = tmp_path / "nanogpt"
    shutil.copytree(package_directory(), package, ignore=shutil.ignore_patterns("__pycache__", "embedded", "gpt2"))
    shutil.copytree(package_directory() / "models" / "gpt2", package / "models" / "gpt2", dirs_exist_ok=True)
    file = package / name
    file.write_text(file.read_text() + "\nprint('another line of the log')\n")
    assert graph_source_sha256(package) == graph_source_sha256()
