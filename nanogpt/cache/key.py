"""What decides compiled code: versions, machine, the package's source, and the part of the spec that reaches a graph.

A cache file belongs to one key and is used for no other. Inside it each graph belongs to one kind of call
(`nanogpt.cache.graphs`), and Triton and FlashAttention have keys of their own for each kernel, so a run whose graphs
differ anyway, as with another world size, compiles what is missing and adds it to the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.runs.provenance import driver_version, package_directory, source_sha256
from nanogpt.spec import RunSpec
from nanogpt.spec_fields import compiled_values

if TYPE_CHECKING:
    import torch

FORMAT = 1

# What a graph is traced from and what it calls. Formulas of backward passes, which are in no graph that torch makes its
# keys from, are in kernels/.
SOURCES = (
    "cache/graphs.py",
    "gpus.py",
    "kernels",
    "layers",
    "models",
    "optim",
    "training/build.py",
    "training/implementations.py",
    "training/micro_step.py",
)

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "quack-kernels",
)

# The compilers' variables, except those that only say where and how things are kept, or how much is printed.
VARIABLES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TRITON_", "CUTE_DSL_", "FLASH_ATTENTION_")
PLACES = re.compile(
    r"TORCHINDUCTOR_(CACHE_DIR|COMPILE_THREADS|WORKER_START)|TORCH_COMPILE_(CACHE_DIR|DEBUG_DIR)"
    r"|TRITON_(CACHE_DIR|CACHE_MANAGER|HOME|DUMP_DIR|STORE_BINARY_ONLY)|(CUTE_DSL|FLASH_ATTENTION_CUTE_DSL)_CACHE_(DIR|ENABLED)"
)


def graph_settings(spec: RunSpec) -> dict[str, Any]:
    """What in the spec reaches compiled code, by path, as its fields are marked; and what is updated together."""
    rows = spec.model.parameters()
    return {**dict(compiled_values(spec)), "updated together": spec.optimizer.updated_together(rows)}


def cache_key(spec: RunSpec, device: torch.device) -> dict[str, Any]:
    """Everything that decides the code of `spec` on `device`, as JSON values. Asks CUDA about the device."""
    import torch

    key = {
        **installation_key(),
        "cpu": [platform.machine(), _cpu_flags_sha256(), torch.get_num_threads() if device.type == "cpu" else None],
        "device": _device(device),
        # The packages' own compilers make the kernels; the driver loads them. A new major version may differ.
        "driver": (driver_version() or "").partition(".")[0] if device.type == "cuda" else "",
        "environment": _compiler_variables(os.environ),
        "spec": graph_settings(spec),
    }
    return _plain(key)


def key_of_spec(spec: RunSpec) -> dict[str, Any]:
    """The part of the key that is the same for all machines and versions: this package's source, and the spec's."""
    return _plain({"source": graph_source_sha256(), "spec": graph_settings(spec)})


def installation_key() -> dict[str, Any]:
    """The part of the key that is the same for all machines and recipes: this installation's."""
    import torch

    return _plain(
        {
            "format": FORMAT,
            "python": f"{platform.python_version()} {sys.implementation.cache_tag}",
            "prefix": sys.prefix,
            "packages": _package_versions(),
            "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
            "libc": " ".join(platform.libc_ver()),
            "source": graph_source_sha256(),
        }
    )


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: lists, not tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def key_sha256(key: Mapping[str, Any]) -> str:
    """One hash of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def graph_source_sha256(package: Path | None = None) -> str:
    """One hash of the modules that graphs and kernels come from, of the installed package or the one in `package`."""
    package = package or package_directory()
    digest = hashlib.sha256()
    for name in SOURCES:
        path = package / name
        digest.update(
            (source_sha256(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()).encode()
        )
    return digest.hexdigest()


def _package_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _compiler_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A hash of each value, by name: it shows a difference, and keeps what a variable may hold out of the file."""
    return {
        name: hashlib.sha256(os.fsencode(f"{name}={value}")).hexdigest()[:16]
        for name, value in sorted(environ.items())
        if name.startswith(VARIABLES) and not PLACES.fullmatch(name)
    }


def _device(device: torch.device) -> list[Any]:
    import torch

    if device.type != "cuda":
        return [device.type]
    properties = torch.cuda.get_device_properties(device)
    return [properties.name, f"{properties.major}.{properties.minor}", properties.multi_processor_count]


def _cpu_flags_sha256() -> str | None:
    """A hash of the processor's instruction sets: host code is compiled for exactly this processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join(sorted(flags.partition(":")[2].split())).encode()).hexdigest()[:16]
