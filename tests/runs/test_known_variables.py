"""What of the environment gets into a record, which is published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_spec

from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.known_variables import HIDDEN, KNOWN, compiler_variables, known_variables
from nanogpt.runs.record import read_record
from nanogpt.training.trainer import train_run

SECRET = "hunter2-of-ada"
SECRETS = [
    f"{prefix}{word}"
    for prefix in (
        "NANOGPT_",
        "TORCH_",
        "NCCL_",
        "CUDA_",
        "TRITON_",
        "TORCHINDUCTOR_",
        "OMP_",
        "UCX_",
        "MKL_",
        "PYTORCH_",
    )
    for word in ("PASSWD", "AUTH", "apikey", "PWD", "CREDENTIALS", "COOKIE", "REDIS_URL", "WEBHOOK", "TOKEN", "X")
] + ["HF_TOKEN", "WANDB_API_KEY", "TORCH_COMPILE_PIN", "TORCHDYNAMO_BEARER", "NCCL_IB_SESSION"]


def test_a_record_has_what_matters_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NANOGPT_DATA", "/scratch/shards")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    run = RunDirectory.create(tmp_path / "runs", tiny_spec())
    train_run(tiny_spec(), run=run, data_directory=make_data(tmp_path / "data"))
    for file in (path for path in run.path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file
    record = read_record(run.path)
    assert record.environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert record.environment["NANOGPT_DATA"] == "/scratch/shards"
    assert record.compilation is not None
    assert record.compilation.environment["TORCHINDUCTOR_MAX_AUTOTUNE"] == "1"
    assert record.compilation.environment["TRITON_AUTH"] == HIDDEN


def test_values_of_compilers_variables() -> None:
    plain = {"TRITON_A": "1", "TORCHINDUCTOR_B": "True", "TORCHDYNAMO_C": "", "TORCH_COMPILE_D": "-0.5"}
    assert compiler_variables(plain) == plain
    assert compiler_variables({"TRITON_CACHE_DIR": "/x", "TRITON_A": "s3cret", "TORCH_LOGS": "x"}) == {
        "TRITON_A": HIDDEN,
        "TRITON_CACHE_DIR": "/x",
    }


def test_names_are_whole_and_in_capitals() -> None:
    assert known_variables({"NCCL_DEBUG": "INFO", "nccl_debug": "x", "NCCL_DEBUG_2": "x", "XNCCL_DEBUG": "x"}) == {
        "NCCL_DEBUG": "INFO"
    }
    assert not KNOWN & {*SECRETS}
    assert {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"} <= KNOWN
    assert known_variables(dict.fromkeys(KNOWN, "1") | {"PATH": os.environ["PATH"]}).keys() == KNOWN
