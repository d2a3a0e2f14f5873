"""nanogpt doctor on this machine and on made-up ones; which code a run in an image says it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt.cluster import checkup
from nanogpt.cluster.checkup import (
    check_cache,
    check_gpu,
    check_kernels,
    check_shared_memory,
    check_training,
    judge_driver,
)
from nanogpt.kernels.bench import BenchCase
from nanogpt.runs import provenance
from nanogpt.runs.provenance import code_state
from nanogpt.runs.record import Container


def test_an_old_driver_is_told_with_the_version_that_is_needed() -> None:
    assert judge_driver("13.0", (13, 0), "580.65").status == "passed"
    assert judge_driver("13.2", (13, 0), "580.65").status == "passed"  # minor versions are compatible
    assert judge_driver("12.8", (13, 0), None).status == "passed"
    old = judge_driver("13.0", (12, 4), "550.54.15")
    assert old.status == "failed"
    for word in ("550.54.15", "CUDA 12.4", "CUDA 13.0", "580 or newer"):
        assert word in old.line()


def test_a_gpu_that_cannot_be_used_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(checkup, "driver_cuda_version", lambda: None)
    none = check_gpu(require_gpu=False, devices=tmp_path)
    assert (none.status, none.found) == ("passed", "none on this machine")
    wanted = check_gpu(require_gpu=True, devices=tmp_path)
    assert wanted.status == "failed"
    assert "--gpus-per-node" in wanted.line()
    (tmp_path / "nvidia0").touch()
    hidden = check_gpu(require_gpu=False, devices=tmp_path, environ={"APPTAINER_CONTAINER": "/n.sif"})
    assert hidden.status == "failed"
    assert "--nv" in hidden.line()
    monkeypatch.setattr(checkup, "driver_cuda_version", lambda: (12, 2))
    assert "580" in check_gpu(require_gpu=False, devices=tmp_path).line()


def test_cache_and_shared_memory(tmp_path: Path) -> None:
    assert check_cache({}).status == "passed"
    assert check_cache({"NANOGPT_CACHE": "off"}).found == "none (NANOGPT_CACHE=off)"
    assert check_cache({"NANOGPT_CACHE": str(tmp_path / "new")}).status == "passed"
    (tmp_path / "file").touch()
    bad = check_cache({"NANOGPT_CACHE": str(tmp_path / "file")})
    assert bad.status == "failed"
    assert "--bind" in bad.line()
    assert check_shared_memory(tmp_path, needed=1).status == "passed"
    assert check_shared_memory(tmp_path, needed=10**18).status == "warning"
    assert check_shared_memory(tmp_path / "none").status == "warning"


def test_a_kernel_that_cannot_be_launched_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_kernels().found == "not tried, as there is no GPU"
    launched: list[str] = []

    def case(name: str, error: Exception | None = None) -> BenchCase:
        def launch() -> None:
            launched.append(name)
            if error is not None:
                raise error

        return BenchCase(name, "", launch, None, flops=0, bytes=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cases = [case("x x^T"), case("head"), case("head")]
    monkeypatch.setattr("nanogpt.bench.kernels.all_bench_cases", lambda: iter(cases))
    assert (check_kernels().status, launched) == ("passed", ["x x^T", "head"])
    cases.append(case("MLP", RuntimeError("out of resource: shared memory, Required: 180248, Hardware limit: 101376")))
    broken = check_kernels()
    assert broken.status == "failed" and broken.found.startswith("MLP: RuntimeError: out of resource: shared memory")
    assert "runtime.kernels=plain" in broken.advice
    cases[-1] = case("MLP", torch.OutOfMemoryError("CUDA out of memory."))
    assert check_kernels().status == "warning"


@pytest.mark.usefixtures("one_thread")
def test_two_steps_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_training()
    assert check.status == "passed", check.line()
    monkeypatch.setattr(checkup, "TINY", (*checkup.TINY, "model.heads=3"))
    broken = check_training()
    assert broken.status == "failed"
    assert "model.width" in broken.found


def test_the_command_prints_each_check_and_its_exit_code(nanogpt, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    made = [
        checkup.Check("a", "passed", "fine"),
        checkup.Check("b", "warning", "odd", "look"),
        checkup.Check("c", "passed", ""),
    ]
    monkeypatch.setattr(checkup, "checkup", lambda require_gpu: iter(made))
    found = nanogpt("doctor")
    assert found.code == 0
    assert found.out.splitlines()[1:3] == ["warning  b: odd", "         look"]
    made.append(checkup.Check("d", "failed", "broken", "mend it"))
    assert nanogpt("doctor").code == 1


def test_code_of_an_image_is_what_its_labels_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"org.opencontainers.image.revision": "c" * 40, "nanogpt.clean": "true"}
    container = Container(image="n.sif", labels=labels)
    package = tmp_path / "venv" / "lib" / "nanogpt"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "package_directory", lambda: package)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    code = code_state(container)
    assert (code.commit, code.clean) == ("c" * 40, True)
    labels["nanogpt.clean"] = "false"
    assert code_state(Container(image="n.sif", labels=labels)).clean is False
    labels["org.opencontainers.image.revision"] = "unknown"
    assert code_state(Container(image="n.sif", labels=labels)).commit is None
    # Another checkout, by NANOGPT_SRC: the labels say nothing of it.
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "other"))
    assert code_state(container).commit is None


def test_a_checkout_tells_its_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "nanogpt").mkdir(parents=True)
    (root / "nanogpt" / "a.py").write_text("")
    commit = ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first"]
    for arguments in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", "-C", root, *arguments], check=True)
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.setattr(provenance, "package_directory", lambda: root / "nanogpt")
    assert (code_state().commit, code_state().clean) == (head, True)
    subprocess.run(["git", "-C", root, "pack-refs", "--all"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (code_state().commit, code_state().clean) == (head, None)
    subprocess.run(["/usr/bin/git", "-C", root, "checkout", "-q", "--detach"], check=True)
    assert code_state().commit == head
