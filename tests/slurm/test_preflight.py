"""Preflight's checks, with a made-up driver and real files."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest
from made_nvml import MadeNvml
from tiny_runs import make_data, tiny_spec

from nanogpt.cluster import preflight as module
from nanogpt.cluster.gpus import oldest_driver, visible_gpus
from nanogpt.cluster.preflight import check_files, check_gpus, check_links, checkpoint_bytes, preflight
from nanogpt.data.manifest import file_sha256
from nanogpt.data.shards import read_tokens, train_name, val_name, write_tokens
from nanogpt.errors import RunError
from nanogpt.image.build_checks import Check
from nanogpt.recipe import load_recipe

H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_version", lambda: "13.0")


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_eight_good_gpus_pass(nvml: MadeNvml) -> None:
    nvml.show(*[H200] * 8)
    checks = check_gpus(load_recipe("8xh200"), {})
    assert states(checks) == {"GPUs": "passed", "driver": "passed", "GPU memory": "passed"}
    assert checks[0].found == "8 x NVIDIA H200"


def test_number_and_type_are_compared_with_the_recipe(nvml: MadeNvml) -> None:
    nvml.show(*[H200] * 4)
    checks = check_gpus(load_recipe("8xh200"), {})
    assert states(checks)["GPUs"] == "failed"
    assert "needs 8 x h200, found 4 x NVIDIA H200" in checks[0].found and "gpu:h200:8" in checks[0].advice
    assert checks[0].advice.endswith("run on fewer: --on 4xh200")
    checks = check_gpus(load_recipe("2xh200"), {})
    assert states(checks)["GPUs"] == "warning" and "--on 4xh200 uses more" in checks[0].advice
    checks = check_gpus(load_recipe("4xh100"), {})
    assert states(checks)["GPUs"] == "failed" and checks[0].advice.endswith("run on what there is: --on 4xh200")
    nvml.show("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")
    (check,) = [check for check in check_gpus(load_recipe("2xh100"), {}) if check.name == "GPUs"]
    assert check.status == "warning" and "several kinds" in check.found
    nvml.show("NVIDIA RTX PRO 6000 Blackwell Server Edition")
    check, *_ = check_gpus(load_recipe("1xh100"), {})
    assert check.status == "warning" and "an unknown type" in check.found and "doctor" in check.advice


def test_the_job_s_gpus_are_those_that_slurm_shows(nvml: MadeNvml) -> None:
    nvml.show(*["NVIDIA A100-SXM4-80GB"] * 4, *[H200] * 4)
    assert [gpu.index for gpu in visible_gpus({"CUDA_VISIBLE_DEVICES": "4,5"})] == [4, 5]
    assert [gpu.index for gpu in visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-00000002"})] == [2]
    assert states(check_gpus(load_recipe("2xh200"), {"CUDA_VISIBLE_DEVICES": "4,5"}))["GPUs"] == "passed"
    nvml.show(H200, H200)  # confined devices count from 0, whatever their number on the node
    assert len(visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"})) == 2


def test_an_old_driver_fails_with_the_one_that_is_needed(nvml: MadeNvml) -> None:
    nvml.show(H200, driver="535.104.12")
    (check,) = [check for check in check_gpus(load_recipe("1xh200"), {}) if check.name == "driver"]
    assert check.status == "failed"
    assert "535.104.12 is too old for CUDA 13.0, which needs 580.65" in check.found
    assert oldest_driver("12.8") == (525, 60) and oldest_driver("14.1") == oldest_driver("13.0")


def test_memory_in_use_and_foreign_processes_are_named(nvml: MadeNvml) -> None:
    processes = [(1, 4711, "python3", 60000), (7, 5, "other", 10)]
    nvml.show(H200, H200, used={1: 60500}, processes=processes)
    checks = check_gpus(load_recipe("2xh200"), {})
    assert states(checks)["GPU memory"] == "failed"
    (foreign,) = [check for check in checks if check.name == "foreign process"]
    assert foreign.status == "warning" and "python3 (pid 4711) with 60000 MiB" in foreign.found
    nvml.show(H200, used={0: 2000})
    assert states(check_gpus(load_recipe("1xh200"), {}))["GPU memory"] == "warning"
    nvml.show(H200, used={0: None})
    assert "GPU memory" not in states(check_gpus(load_recipe("1xh200"), {}))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), "--nv"),
        (pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), "mismatch"),
        (ImportError("pynvml"), "pip install nvidia-ml-py"),
    ],
)
def test_no_driver_or_one_that_fails(nvml: MadeNvml, error: Exception, words: str) -> None:
    nvml.error = error
    (check,) = check_gpus(load_recipe("1xh200"), {})
    assert check.status == "failed" and words in check.found


def test_a_driver_that_hangs(nvml: MadeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", answered.wait)
    monkeypatch.setattr("nanogpt.cluster.gpus.TIMEOUT_S", 0.1)
    (check,) = check_gpus(load_recipe("1xh200"), {})
    answered.set()
    assert check.status == "failed" and "no answer" in check.found


def test_links_are_held_against_the_kind_of_gpu(nvml: MadeNvml) -> None:
    spec = load_recipe("4xh100")
    nvml.show(*["NVIDIA H100 80GB HBM3"] * 4)
    assert check_links(spec, {}, lambda: [390.0, 385.0, 391.0, 388.0]).status == "passed"
    slow = check_links(spec, {}, lambda: [390.0, 41.0, 391.0, 388.0])
    assert slow.status == "warning" and "41 GB/s from GPU 1" in slow.found and "nvlink" in slow.advice
    nvml.show(*["NVIDIA H100 PCIe"] * 4)
    assert check_links(spec, {}, lambda: [41.0] * 4).status == "passed"
    nvml.show(*["NVIDIA L40S"] * 4)  # without NVLink, whatever its name
    check = check_links(load_recipe("4xl40s"), {}, lambda: [20.0] * 4)
    assert check.status == "passed" and check.found.startswith("PCIe")

    def fails() -> list[float]:
        raise RunError("CUDA error: peer access is not supported")

    assert check_links(spec, {}, fails).status == "failed"


# --- files ------------------------------------------------------------------------------------------------------


def test_whole_shards_and_room_pass(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (1700, 1300))
    checks = check_files(tiny_spec(), data, tmp_path / "new" / "runs")
    assert set(states(checks).values()) == {"passed"}
    assert "2 with 3,000 tokens" in checks[0].found
    assert (tmp_path / "new" / "runs").is_dir()


def failures(data: Path, tmp_path: Path, *overrides: str) -> str:
    checks = check_files(tiny_spec(*overrides), data, tmp_path / "runs")
    return "\n".join(str(check) for check in checks if check.status == "failed")


def test_what_is_wrong_with_shards_is_named(tmp_path: Path) -> None:
    assert "nowhere: no such directory" in failures(tmp_path / "nowhere", tmp_path)
    data = make_data(tmp_path / "data", (1700, 1300, 1200))
    assert "the run needs" in failures(data, tmp_path, "data={epochs: 1, bos: 63}")
    assert "validation shards: " in failures(data, tmp_path, "evaluation.tokens=2560")
    second = data / "fineweb_train_000002.bin"
    second.write_bytes(second.read_bytes()[:-2])
    assert "fineweb_train_000002.bin: corrupt: the header promises 1300 tokens" in failures(data, tmp_path)
    second.unlink()
    assert "fineweb_train_000002.bin: missing, though later ones exist" in failures(data, tmp_path)
    (data / "fineweb_val_000000.bin").unlink()
    assert "no fineweb_val_*.bin there" in failures(data, tmp_path)


def test_tokens_that_the_model_does_not_know_and_shards_without_documents(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (1700, 1300))
    tokens = read_tokens(data / train_name(2))
    tokens[-1] = 64
    write_tokens(data / train_name(2), tokens)
    assert f"{data / train_name(2)}: token 1,299 (from 0) is 64, the vocabulary is 0..63" in failures(data, tmp_path)
    write_tokens(data / train_name(2), [1] * 1300)
    assert f"{data / train_name(2)}: has no token 63, which begins each document" in failures(data, tmp_path)
    write_tokens(data / val_name(), [1] * 600)
    assert f"{data / val_name()}: has no token 63" in failures(data, tmp_path)
    padded = ("model.padded_vocab_size=128", "model.vocab_size=64")
    write_tokens(data / val_name(), [63, 100] * 300)
    assert f"{data / val_name()}: token 1 (from 0) is 100, the vocabulary is 0..63" in failures(data, tmp_path, *padded)


def test_output_that_cannot_be_written_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    (tmp_path / "file").touch()
    checks = check_files(tiny_spec(), data, tmp_path / "file" / "runs")
    assert states(checks)["output"] == "failed" and "NANOGPT_RUNS" in checks[-1].advice
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    checks = check_files(tiny_spec(), data, tmp_path / "runs")
    assert states(checks)["space"] == "failed" and "1.0 kB free" in checks[-1].found


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_is_no_larger_than_reckoned(tmp_path: Path) -> None:
    from tiny_runs import train

    spec = tiny_spec("checkpoint={at_end: true}")
    train(spec, make_data(tmp_path / "data"), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    weights = checkpoint.stat().st_size
    assert weights < 1.5 * checkpoint_bytes(spec) + 200_000  # what is not weights counts in a run this small


# --- all of it --------------------------------------------------------------------------------------------------


def test_the_whole_of_it_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    image = tmp_path / "nanogpt.sif"
    image.write_bytes(b"image" * 1000)
    environ = {"APPTAINER_CONTAINER": str(image), "NANOGPT_SIF_SHA256": file_sha256(image)}
    checks = preflight(tiny_spec(), data, tmp_path / "runs", environ)
    assert states(checks)["image"] == "passed" and file_sha256(image) in checks[-1].found
    assert "5 passed, 0 warnings, 0 failed" in capsys.readouterr().err
    image.write_bytes(b"other" * 1000)
    checks = preflight(tiny_spec(), data, tmp_path / "runs", environ)
    assert states(checks)["image"] == "failed"
    assert states(preflight(tiny_spec(), data, tmp_path / "runs", {}))["image"] == "warning"


def test_the_command_exits_with_2_for_a_failure(nanogpt: Callable, tmp_path: Path) -> None:
    outcome = nanogpt("preflight", "demo", "--data", tmp_path / "nowhere", "--out", tmp_path / "runs")
    assert outcome.code == 2
    assert ": failed  shards" in outcome.err and "nowhere: no such directory" in outcome.err


def test_averages_count_in_a_checkpoint():
    plain, averaged = (checkpoint_bytes(load_recipe(recipe)) for recipe in ("record89", "record89-averaged"))
    sizes = {row.name: row.size for row in load_recipe("record89").model.parameters()}
    twice = ("vo", "mlp")
    once = ("lm_head", "embed", "value_embed", "qk")
    assert averaged - plain == 4 * sum(sizes[name] for name in (*twice, *twice, *once))
