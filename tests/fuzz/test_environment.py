"""Variables of the environment with values that nobody means: refused by name, or without effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutated import WORDS, examples
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.runs.provenance import container_of, slurm_job
from nanogpt.training.recorder import create_run

DIRECTORIES = ("NANOGPT_DATA", "NANOGPT_RUNS", "NANOGPT_CACHE", "NANOGPT_STAGE", "NANOGPT_SRC", "HOME", "TMPDIR")
NAMES = (
    *DIRECTORIES, "NANOGPT_SIF", "NANOGPT_SIF_SHA256", "NANOGPT_PREFLIGHT", "NANOGPT_SCRIPTS", "NANOGPT_FLASH_ATTN",
    "NANOGPT_OWN_GPU", "GPU_TYPE", "NUM_GPUS", "FINEWEB_CHUNKS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT",
    "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME", "SLURM_JOB_START_TIME", "SLURM_NODEID",
    "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "APPTAINER_CONTAINER", "CUDA_VISIBLE_DEVICES", "COLUMNS", "LINES",
    "TERM", "TZ", "USER", "LC_ALL", "MPLBACKEND", "HF_ENDPOINT", "NO_COLOR",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_spec(model="gpt2"))


def test_any_value(
    nanogpt: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuzz: int
) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    commands: tuple[tuple[Any, ...], ...] = (
        ("validate", recipe),
        ("runs",),
        ("runs", "--json"),
        ("cache", "ls"),
        ("status",),
        ("version",),
        ("preflight", recipe, "--data", data),
        ("submit", "--dry-run", recipe),
        ("job", "plan", recipe, "--data", data),
        ("job", "requeue", recipe),
        ("job", "stage", recipe, "--data", tmp_path / "empty"),
        ("train", recipe, "--data", tmp_path / "empty"),
        ("prep", "--chunks", 1, "--retries", 0, "--dir", tmp_path / "hub"),
    )
    for number, chance in enumerate(examples(130 * fuzz, "environment")):
        with monkeypatch.context() as changed:
            changed.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
            for name in chance.sample(NAMES, chance.choice((1, 1, 2, 4, 8))):
                changed.setenv(name, chance.choice(WORDS))
            command = commands[number % len(commands)]
            if command[0] == "train":  # else it waits for ranks that do not come
                changed.delenv("WORLD_SIZE", raising=False)
                changed.delenv("RANK", raising=False)
            outcome = nanogpt(*command)
        assert outcome.code in (0, 1, 2)
        assert outcome.code == 0 or outcome.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("~", "$"))]


def test_what_a_run_says_of_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuzz: int) -> None:
    spec = tiny_spec(model="gpt2")
    for chance in examples(20 * fuzz, "run"):
        with monkeypatch.context() as changed:
            others = [name for name in NAMES if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
            for name in (*chance.sample(others, 8), "SLURM_JOB_ID", "NCCL_\udcff", "NCCL_X"):
                changed.setenv(name, chance.choice(WORDS))
            create_run(tmp_path / "runs", spec)
            slurm_job({"SLURM_JOB_ID": chance.choice(WORDS), "SLURM_RESTART_COUNT": chance.choice(WORDS)})
            container_of({"APPTAINER_CONTAINER": chance.choice(WORDS)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "1"), ("WORLD_SIZE", "-2"), ("RANK", "²")],
)
def test_a_rank_that_is_none(
    nanogpt: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    done = nanogpt("train", recipe)
    assert done.code == 2
    assert name in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_none(
    nanogpt: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}
    monkeypatch.chdir(tmp_path)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    done = nanogpt("train", recipe, "--set=hardware.gpus_per_node=2")
    assert done.code == 2
    assert "MASTER_PORT: found 'http'" in done.err and "Traceback" not in done.err
