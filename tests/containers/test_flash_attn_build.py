"""build-flash-attn without a GPU's compiler: what it refuses, what it would run, and that it uses what comes out."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from nanogpt.errors import InputError, RunError
from nanogpt.image import flash_attn_build
from nanogpt.image.flash_attn_build import (
    Toolkit,
    available_memory,
    build,
    build_environment,
    choose_jobs,
    find_cutlass,
    find_toolkit,
    unpack_source,
)

# A setup.py that writes a wheel by hand, with the variables that it was given inside.
SETUP = """
import json, os, sys, zipfile
from pathlib import Path
assert sys.argv[1:] == ["bdist_wheel"]
assert Path("../csrc/cutlass/include/cutlass/cutlass.h").is_file()
if os.environ.get("BREAK"):
    print("fatal error: cute/tensor.hpp: No such file or directory"); sys.exit(1)
Path("dist").mkdir()
with zipfile.ZipFile("dist/flash_attn_3-3.0.0-cp311-abi3-linux_x86_64.whl", "w") as wheel:
    chosen = {name: value for name, value in os.environ.items() if name.startswith(("FLASH_", "TORCH_", "MAX_JOBS"))}
    wheel.writestr("flash_attn_interface.py", f"BUILT_WITH = {chosen!r}\\n")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "flash-attention"
    (root / "hopper").mkdir(parents=True)
    (root / "hopper" / "setup.py").write_text(SETUP)
    headers = root / "csrc" / "cutlass" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (headers / "cutlass.h").write_text("// CUTLASS\n")
    return root


def make_toolkit(place: Path, release: str = "13.0") -> Path:
    """A directory that looks like a CUDA toolkit."""
    (place / "bin").mkdir(parents=True)
    (place / "include").mkdir()
    (place / "include" / "cuda_runtime.h").write_text("")
    nvcc = place / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    nvcc.chmod(0o755)
    return place


def test_sources_are_checkouts_and_archives(source: Path, tmp_path: Path) -> None:
    assert unpack_source(source, tmp_path) == source
    packed = tmp_path / "v3.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(source, "flash-attention-3")
    root = unpack_source(packed, tmp_path / "a")
    assert (root / "hopper" / "setup.py").read_text() == SETUP
    zipped = tmp_path / "v3.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("flash-attention-3/hopper/setup.py", SETUP)
    assert unpack_source(zipped, tmp_path / "b").name == "flash-attention-3"
    with pytest.raises(InputError, match="no such directory or archive"):
        unpack_source(tmp_path / "none", tmp_path)
    with pytest.raises(InputError, match=r"has no hopper/setup\.py"):
        unpack_source(tmp_path, tmp_path)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack_source(broken, tmp_path / "c")


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("kind", ["name", "symlink", "hardlink"])
def test_an_archive_cannot_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, filters: bool
) -> None:
    if not filters:  # as Python was before 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python has no filters")
    packed = tmp_path / "evil.tar"
    with tarfile.open(packed, "w") as archive:
        info = tarfile.TarInfo("../outside" if kind == "name" else "link")
        if kind == "name":
            info.size = 1
        else:
            info.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
            info.linkname = "../outside"
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack_source(packed, tmp_path / "inside")
    assert not (tmp_path / "outside").exists()


def test_missing_cutlass_says_how_to_get_it(source: Path, tmp_path: Path) -> None:
    assert find_cutlass(source, None) == source / "csrc" / "cutlass"
    (source / "csrc" / "cutlass" / "include" / "cutlass" / "cutlass.h").unlink()
    with pytest.raises(InputError, match="git submodule update --init csrc/cutlass"):
        find_cutlass(source, None)


def test_missing_or_unfit_toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_build, "TOOLKIT_PLACES", ())
    with pytest.raises(InputError, match="for CPUs"):
        find_toolkit(None, {}, None)
    with pytest.raises(InputError, match=r"no nvcc.*--bind /usr/local/cuda"):
        find_toolkit(tmp_path / "none", {"PATH": ""}, "13.0")
    old = make_toolkit(tmp_path / "cuda-12", "12.8")
    with pytest.raises(InputError, match=r"is CUDA 12\.8, but PyTorch is built for CUDA 13\.0"):
        find_toolkit(old, {}, "13.0")
    new = make_toolkit(tmp_path / "cuda-13")
    assert find_toolkit(None, {"CUDA_HOME": str(new)}, "13.0") == Toolkit(new, (13, 0))
    assert find_toolkit(None, {"PATH": f"{new / 'bin'}:/usr/bin"}, "13.1") == Toolkit(new, (13, 0))
    (new / "include" / "cuda_runtime.h").unlink()
    with pytest.raises(InputError, match="a whole toolkit"):
        find_toolkit(new, {}, "13.0")


def test_memory_decides_how_many_compilers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"5\.0 GB of memory are free, one compiler needs 6\.0 GB"):
        choose_jobs(5_000_000_000, 64)
    assert choose_jobs(25_000_000_000, 64) == 4
    assert choose_jobs(500_000_000_000, 64) == 16
    assert choose_jobs(500_000_000_000, 64, wanted=2) == 2
    assert choose_jobs(500_000_000_000, 3) == 3

    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   20000000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/slurm/job_1\n")
    job = cgroup / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    assert available_memory(proc, cgroup) == 20_480_000_000
    (job.parent / "memory.max").write_text("8000000000\n")
    (job.parent / "memory.current").write_text("1000000000\n")
    assert available_memory(proc, cgroup) == 7_000_000_000


def test_only_what_a_run_needs_is_built(tmp_path: Path) -> None:
    found = build_environment(
        {"PATH": "/usr/bin", "FLASH_ATTENTION_DISABLE_BACKWARD": "TRUE"}, Toolkit(tmp_path, (13, 0)), 4
    )
    for name in ("BACKWARD", "LOCAL", "VARLEN", "HDIM128"):
        assert found[f"FLASH_ATTENTION_DISABLE_{name}"] == "FALSE"
    for name in ("HDIM64", "HDIM256", "FP16", "FP8", "PAGEDKV", "SPLIT", "SM80"):
        assert found[f"FLASH_ATTENTION_DISABLE_{name}"] == "TRUE"
    assert found["PATH"] == f"{tmp_path}/bin:/usr/bin"
    assert (found["CUDA_HOME"], found["TORCH_CUDA_ARCH_LIST"], found["MAX_JOBS"]) == (str(tmp_path), "9.0a", "4")


def test_a_wheel_is_built_and_can_be_imported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(flash_attn_build, "BYTES_PER_JOB", 1_000_000)
    toolkit = make_toolkit(tmp_path / "cuda")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(path.relative_to(source) for path in source.rglob("*"))
    wheel = build(source, tmp_path / "out", cuda=toolkit, jobs=1, scratch=scratch)
    assert wheel.parent == tmp_path / "out"
    assert sorted(path.relative_to(source) for path in source.rglob("*")) == before  # the source stays as it was
    code = "import flash_attn_interface; print(flash_attn_interface.BUILT_WITH['TORCH_CUDA_ARCH_LIST'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "out")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "9.0a\n"

    monkeypatch.setenv("BREAK", "1")
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(RunError, match=r"header cute/tensor\.hpp is missing"):
        build(source, tmp_path / "out2", cuda=toolkit, jobs=1, scratch=again)
    with pytest.raises(InputError, match="--arch 80"):
        build(source, tmp_path / "out2", architecture="80", cuda=toolkit, scratch=tmp_path)


def test_the_command_ends_with_the_code_of_wrong_input(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from nanogpt.cli.build_flash_attn import main; main()"]
    done = subprocess.run(
        [*command, tmp_path / "none", "--out", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no such directory or archive" in done.stderr
    assert "Traceback" not in done.stderr
