"""Remove from an installed environment what no code path of this package loads, and report what that saved.

Runs during the image's build: `python3 slim.py /opt/venv`. Standard library only. What is removed, and why, is in
`REMOVED`; a pattern that matches nothing is fine (the CPU flavour has no CUDA libraries). Shared libraries are
stripped of symbols that only a linker or a debugger reads.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PT_LOAD, PAGE = 1, 4096
WORTH_STRIPPING = 1_000_000  # bytes


class Rule(NamedTuple):
    """Files or directories to remove, and why nobody will miss them."""

    why: str
    patterns: tuple[str, ...]  # of Path.glob, below site-packages
    keep: tuple[str, ...] = ()  # of Path.match: kept although a pattern matches it or a parent


REMOVED = (
    Rule("tests of packages", ("**/tests", "torch/test", "sympy/**/test"), keep=("numpy/_core/tests",)),
    Rule("static libraries and CMake files", ("**/*.a", "torch/share", "torch/lib/cmake", "**/*.cmake")),
    Rule("sources that are compiled already", ("**/*.pyx", "**/*.pxd", "pyarrow/include", "pyarrow/src", "**/*.pyi")),
    Rule("programs for tests and protocols", ("torch/bin/*",), keep=("torch_shm_manager",)),
    Rule(
        "profilers and disassemblers",
        (
            "triton/profiler",
            "triton/instrumentation",
            "triton/_C/libproton.so",
            "triton/backends/nvidia/lib/cupti",
            "triton/backends/nvidia/bin/cuobjdump",
            "triton/backends/nvidia/bin/nvdisasm",
            "nvidia/cu13/lib/libnvperf*",
            "nvidia/cu13/lib/libpcsamplingutil*",
            "nvidia/cu13/lib/libcheckpoint*",
            "nvidia_cutlass_dsl/dsl_packages/iket",
        ),
    ),
    # libtorch links to the libraries that stay; it neither links to nor opens these.
    Rule(
        "CUDA libraries that PyTorch never opens",
        (
            "nvidia/cu13/lib/libcusolverMg*",  # cuSOLVER over several GPUs in one process
            "nvidia/cu13/lib/libnvrtc.alt*",  # NVRTC again, for older glibc
            "nvidia/cu13/lib/libnvrtc-builtins.alt*",
            "nvidia/cu13/lib/libcufftw*",
            "nvidia/cu13/lib/libnvblas*",
            "nvidia/cu13/lib/libcufile_rdma*",
            "nvidia/nvshmem/lib/*.bc",
        ),
    ),
    Rule("cuDNN's recurrent networks", ("nvidia/cudnn/lib/libcudnn_adv*",)),
    Rule("CUDA headers; Triton brings its own", ("nvidia/*/include", "nvidia/cu13/bin")),
    Rule("assembler for GPUs that no recipe names", ("triton/backends/nvidia/bin/ptxas-blackwell",)),
    Rule(
        "plotly but for plotly.js, which reports have inside",
        ("plotly/*", "plotly/package_data/*"),
        keep=("plotly/package_data", "plotly.min.js"),
    ),
    Rule("Arrow's network part", ("pyarrow/libarrow_flight*", "pyarrow/_flight*")),
)


def removable(site: Path, rule: Rule) -> Iterator[Path]:
    """What the rule removes from `site`, parents before children."""
    for pattern in rule.patterns:
        for path in sorted(site.glob(pattern)):
            if not any(path.match(kept) for kept in rule.keep):
                yield path


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(below.lstat().st_size for below in path.rglob("*") if not below.is_dir())


def remove(site: Path, rule: Rule) -> int:
    """Apply the rule; returns the bytes saved."""
    saved = 0
    for path in list(removable(site, rule)):
        if not path.exists() and not path.is_symlink():
            continue  # removed with its parent
        saved += size_of(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return saved


def loadable(path: Path) -> bool:
    """Whether the file is a 64-bit ELF whose segments are placed as the loader maps them."""
    content = path.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        return False
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    for index in range(count):
        kind, _, offset, address = struct.unpack_from("<IIQQ", content, headers + index * size)
        if kind == PT_LOAD and (offset - address) % PAGE:
            return False
    return True


def strip(site: Path) -> int:
    """Strip the larger shared libraries in `site`; returns the bytes saved.

    A library that patchelf has rearranged, like those in most wheels' own `.libs`, does not survive strip: if the
    segments are off afterwards, the library stays as it was.
    """
    saved = 0
    for path in sorted(site.rglob("*.so*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size < WORTH_STRIPPING or not loadable(path):
            continue
        stripped = path.with_name(path.name + ".stripped")
        done = subprocess.run(["strip", "--strip-unneeded", "-o", stripped, path], check=False, capture_output=True)
        if done.returncode == 0 and loadable(stripped) and stripped.stat().st_size < path.stat().st_size:
            saved += path.stat().st_size - stripped.stat().st_size
            stripped.chmod(path.stat().st_mode)
            stripped.replace(path)
        stripped.unlink(missing_ok=True)
    return saved


def main() -> None:
    """Remove, strip, and print a line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environment", type=Path)
    environment = parser.parse_args().environment
    for site in sorted(environment.glob("lib/python3*/site-packages")):
        for rule in REMOVED:
            print(f"{remove(site, rule) / 1e6:8.1f} MB  {rule.why}", flush=True)
        print(f"{strip(site) / 1e6:8.1f} MB  symbols for linkers and debuggers", flush=True)
        print(f"{size_of(site) / 1e6:8.1f} MB  left", flush=True)


if __name__ == "__main__":
    main()
