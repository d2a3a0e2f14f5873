"""`build-flash-attn`: build FlashAttention 3 from source, only what a run needs.

The image's FlashAttention 4 needs no building. FlashAttention 3 was a little quicker on short documents; its source, in
`hopper/` of the flash-attention repository, builds hundreds of kernels unless told otherwise. Here: heads of 128, bf16,
variable length, local windows and the backward pass, for sm_90, which takes minutes and makes a library of 3 MB.

It needs a CUDA toolkit of the same major version as PyTorch's (nvcc is not in the image: a toolkit is as large as all
the rest), CUTLASS, which is a submodule of the repository, and 6 GB of memory per compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nanogpt.console import human_bytes, say
from nanogpt.errors import InputError, RunError

ARCHITECTURES = ("90",)
BYTES_PER_JOB = 6_000_000_000
MAX_JOBS = 16  # fewer files than that are worth a compiler of their own
# What FlashAttention 3's setup.py leaves out.
DISABLED = (
    "SPLIT",
    "PAGEDKV",
    "APPENDKV",
    "SOFTCAP",
    "PACKGQA",
    "FP16",
    "FP8",
    "CLUSTER",
    "HDIM64",
    "HDIM96",
    "HDIM192",
    "HDIM256",
    "HDIMDIFF64",
    "HDIMDIFF192",
    "SM80",
)
TOOLKIT_PLACES = ("/usr/local/cuda",)
TOOLKIT_ADVICE = (
    "Bind a toolkit into the container and name it: apptainer exec --bind /usr/local/cuda ... build-flash-attn --cuda"
    " /usr/local/cuda, or set CUDA_HOME."
)


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    home: Path
    version: tuple[int, ...]


def unpack_source(source: Path, scratch: Path) -> Path:
    """The root of the flash-attention checkout `source`, or of the archive, unpacked into `scratch`.

    Raises:
        InputError: it does not exist, is an archive that cannot be read, or is not flash-attention.
    """
    if not source.exists():
        raise InputError(f"{source}: no such directory or archive; expected a checkout of flash-attention")
    root = source
    if source.is_file():
        try:
            if zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive:
                    archive.extractall(scratch)
            else:
                with tarfile.open(source) as archive:
                    _extract(archive, scratch)
        except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{source}: cannot be unpacked: {error}; expected .tar.gz, .tar.xz or .zip") from error
        below = [path for path in scratch.iterdir() if path.is_dir()]
        root = below[0] if len(below) == 1 else scratch
    if not (root / "hopper" / "setup.py").is_file():
        raise InputError(
            f"{source}: has no hopper/setup.py; expected the flash-attention repository, where FlashAttention 3 is"
        )
    return root


def _extract(archive: tarfile.TarFile, to: Path) -> None:
    """Unpack into `to`. Raises `tarfile.TarError` for an archive that would write outside it."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(to, filter="data")
        return
    # Python 3.11.2, which Debian 12 has, does not have filters yet.
    top = to.resolve()
    for member in archive.getmembers():
        path = top / member.name
        places = [path, path.parent / member.linkname if member.issym() else top / member.linkname]
        if member.isdev() or not all(place.resolve().is_relative_to(top) for place in places):
            raise tarfile.TarError(f"{member.name!r} would be written outside the destination")
    archive.extractall(to)


def find_cutlass(root: Path, given: Path | None) -> Path:
    """The directory of CUTLASS.

    Raises:
        InputError: CUTLASS's headers are missing, as in an archive from GitHub or a clone without submodules.
    """
    place = given or root / "csrc" / "cutlass"
    if not (place / "include" / "cutlass" / "cutlass.h").is_file():
        raise InputError(
            f"{place}: has no include/cutlass/cutlass.h; CUTLASS is a submodule, which archives and plain clones lack."
            " In the checkout: git submodule update --init csrc/cutlass. Or name another copy: --cutlass DIR"
        )
    return place


def find_toolkit(given: Path | None, environ: Mapping[str, str], cuda_of_torch: str | None) -> Toolkit:
    """A CUDA toolkit with nvcc that fits PyTorch.

    Raises:
        InputError: there is none, its major version differs, or PyTorch is for CPUs.
    """
    if cuda_of_torch is None:
        raise InputError("This PyTorch is for CPUs, but FlashAttention is for GPUs; use the CUDA flavour of the image")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    named = [given] if given else [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    places = named or [*([Path(on_path).resolve().parents[1]] if on_path else []), *map(Path, TOOLKIT_PLACES)]
    home = next((place for place in places if os.access(place / "bin" / "nvcc", os.X_OK)), None)
    if home is None:
        looked = ", ".join(str(place / "bin" / "nvcc") for place in places)
        raise InputError(f"There is no nvcc, the compiler for GPUs (looked for {looked}). {TOOLKIT_ADVICE}")
    try:
        done = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{home / 'bin' / 'nvcc'} cannot be started: {error}. {TOOLKIT_ADVICE}") from error
    match = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if match is None:
        said = (done.stdout + done.stderr).strip()[:200]
        raise InputError(f"{home / 'bin' / 'nvcc'} --version does not give its release: {said!r}. {TOOLKIT_ADVICE}")
    version = (int(match.group(1)), int(match.group(2)))
    if version[0] != int(cuda_of_torch.partition(".")[0]):
        raise InputError(
            f"{home}: is CUDA {version[0]}.{version[1]}, but PyTorch is built for CUDA {cuda_of_torch}; both must"
            f" have the same major version. {TOOLKIT_ADVICE}"
        )
    if not (home / "include" / "cuda_runtime.h").is_file():
        raise InputError(f"{home}: has nvcc but no include/cuda_runtime.h; a whole toolkit is needed. {TOOLKIT_ADVICE}")
    return Toolkit(home, version)


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that compilers may use: the machine's, or less if this process's cgroup has a limit."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    found = int(match.group(1)) * 1024 if match else 0
    try:
        own = (proc / "self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        place = cgroup / own
        while True:
            limit = place / "memory.max"
            if limit.is_file() and (value := limit.read_text().strip()) != "max":
                used = int((place / "memory.current").read_text())
                found = min(found, max(0, int(value) - used))
            if place == cgroup:
                return found
            place = place.parent
    except (OSError, ValueError):
        return found


def choose_jobs(memory: int, processors: int, wanted: int | None = None) -> int:
    """How many compilers to run at once.

    Raises:
        InputError: too little memory for one.
    """
    if memory < BYTES_PER_JOB:
        raise InputError(
            f"{human_bytes(memory)} of memory are free, one compiler needs {human_bytes(BYTES_PER_JOB)}; ask for a node"
            " with more (srun --mem=16G), or close other programs"
        )
    return max(1, min(wanted or MAX_JOBS, processors, memory // BYTES_PER_JOB))


def build_environment(environ: Mapping[str, str], toolkit: Toolkit, jobs: int) -> dict[str, str]:
    """What FlashAttention 3's setup.py reads."""
    kept = {name: value for name, value in environ.items() if not name.startswith("FLASH_ATTENTION_")}
    return {
        **kept,
        **{f"FLASH_ATTENTION_DISABLE_{name}": "TRUE" for name in DISABLED},
        **{f"FLASH_ATTENTION_DISABLE_{name}": "FALSE" for name in ("BACKWARD", "LOCAL", "VARLEN", "HDIM128")},
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
        "CUDA_HOME": str(toolkit.home),
        "PATH": f"{toolkit.home / 'bin'}:{environ.get('PATH', '')}",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "MAX_JOBS": str(jobs),
        "NVCC_THREADS": "1",
    }


def build(
    source: Path,
    out: Path,
    *,
    architecture: str = "90",
    cuda: Path | None = None,
    cutlass: Path | None = None,
    jobs: int | None = None,
    scratch: Path,
) -> Path:
    """Build the wheel into the directory `out`, and unpack it there, so that `NANOGPT_FLASH_ATTN=out` uses it.

    Returns the wheel. `scratch` is an empty directory with 2 GB of space.

    Raises:
        InputError: something that it needs is missing; the message says what.
        RunError: the compiler failed.
    """
    import torch

    if architecture not in ARCHITECTURES:
        raise InputError(
            f"--arch {architecture}: FlashAttention 3 is for 90 (H100, H200). On sm_80 PyTorch's own varlen attention"
            " runs, newer GPUs use FlashAttention 4: both are in the image"
        )
    root = unpack_source(source, scratch / "source")
    headers = find_cutlass(root, cutlass)
    toolkit = find_toolkit(cuda, os.environ, torch.version.cuda)
    count = choose_jobs(available_memory(), len(os.sched_getaffinity(0)), jobs)
    work = scratch / "work"
    shutil.copytree(root / "hopper", work / "hopper")  # the source may be read-only, and stays as it is
    (work / "csrc").mkdir()
    (work / "csrc" / "cutlass").symlink_to(headers.resolve())
    for name in ("README.md", "LICENSE"):
        if (root / name).is_file():
            shutil.copyfile(root / name, work / name)

    version = ".".join(map(str, toolkit.version))
    say(f"Building with {count} compilers, CUDA {version} of {toolkit.home}; minutes, not hours")
    started, log = time.monotonic(), out / "build.log"
    out.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "setup.py", "bdist_wheel"],
            cwd=work / "hopper",
            env=build_environment(os.environ, toolkit, count),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    say(f"{time.monotonic() - started:5.0f} s  {_last_line(log)}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = sorted((work / "hopper" / "dist").glob("*.whl"))
    if code != 0 or not wheels:
        raise RunError(f"FlashAttention did not build (exit code {code}). {_meaning(log)}\nThe whole log: {log}")
    wheel = out / wheels[-1].name
    shutil.copyfile(wheels[-1], wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    say(f"{wheel}: {human_bytes(wheel.stat().st_size)}, built in {time.monotonic() - started:.0f} s")
    say(f"Use it with NANOGPT_FLASH_ATTN={out.resolve()} and runtime.attention: fa3")
    return wheel


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:150] if lines else "starting"


def _meaning(log: Path) -> str:
    text = log.read_text(errors="replace")
    if re.search(r"Killed|signal 9|out of memory|Cannot allocate memory", text):
        return "A compiler ran out of memory: run fewer at once with --jobs 1, or ask for more memory."
    if "Unsupported gpu architecture" in text:
        return "This nvcc does not know sm_90a: use CUDA 12.3 or newer."
    missing = re.search(r"fatal error: (\S+): No such file", text)
    if missing:
        return f"The header {missing.group(1)} is missing: is the toolkit complete, and CUTLASS this checkout's own?"
    lines = [line for line in text.splitlines() if line.strip()][-10:]
    return "Its last lines:\n" + "\n".join(f"    {line[:200]}" for line in lines)
