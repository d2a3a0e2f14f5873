"""`nanogpt doctor` and the image's %test: everything a run needs, checked one by one, in seconds.

Each check says what it found and, unless it passed, what to do. A machine without a GPU is fine unless one is
required: checks that need a GPU then say that they were not tried.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanogpt.gpus import GPU_TYPES, OTHER_DRIVER, driver_cuda_version, nearest_type, newer_driver, runs_on
from nanogpt.image.build_checks import Check, Status

SHARED_MEMORY_NEEDED = 1 << 30  # NCCL and the batches' workers
# Heads of 128, which the kernels expect, and almost nothing else.
TINY = (
    "model.vocab_size=512",
    "model.padded_vocab_size=512",
    "model.width=256",
    "model.heads=2",
    "model.head_dim=128",
    "model.rotary.frequencies=32",
    "model.bigram_rows=512",
    "training.stages=["
    "{steps: 1, batch_tokens: 1024, window_blocks: {short: 2, long: 6}, token_weights: [1, 0.5], lr_factor: 1}]",
    "training.extension={steps: 1, batch_tokens: 1024, window_blocks: {short: 2, long: 6}, token_weights: [1],"
    " lr_factor: 1}",
    "optimizer.tied_head.split_stage=1",
    "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 1, cooldown_steps: 1}",
    "evaluation={every: 2, tokens: 4096, micro_batch_tokens: 1024, target_loss: null}",
    "data={bos: 511, epochs: null}",
    "checkpoint={at_end: false}",
)


def checkup(*, require_gpu: bool = False, environ: Mapping[str, str] | None = None) -> Iterator[Check]:
    """All checks, each as soon as it is done."""
    environ = os.environ if environ is None else environ
    yield check_code()
    torch_check = check_torch()
    yield torch_check
    if torch_check.status == "failed":
        return
    gpu = check_gpu(require_gpu=require_gpu)
    yield gpu
    yield check_compiler()
    yield check_attention(environ)
    triton = check_triton()
    yield triton
    if triton.status != "failed":
        yield check_kernels()
    yield check_shared_memory()
    yield check_cache(environ)
    yield check_training()


def first_line(error: Exception) -> str:
    """The first line of the error's message."""
    return str(error).strip().partition("\n")[0] or "no message"


def check_code() -> Check:
    """Which code is running."""
    from nanogpt import __version__
    from nanogpt.runs.provenance import code_state, container_of, package_directory

    container = container_of(os.environ)
    code = code_state(container)
    commit = code.commit[:12] if code.commit else "of no known commit"
    clean = {True: "", False: " with changes", None: ""}[code.clean]
    where = f"{package_directory()}, in {container.image}" if container else str(package_directory())
    return Check(
        "code",
        "passed",
        f"nanogpt-speedrun {__version__}, {commit}{clean}, {where}; Python {platform.python_version()}",
    )


def check_torch() -> Check:
    """PyTorch can be imported, and its Triton fits."""
    start = time.perf_counter()
    try:
        import torch
    except Exception as error:
        return Check(
            "PyTorch",
            "failed",
            f"{type(error).__name__}: {error}",
            "The installation is broken, or another one comes first: check PYTHONPATH and LD_LIBRARY_PATH.",
        )
    seconds = time.perf_counter() - start
    built_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    return Check("PyTorch", "passed", f"{torch.__version__} {built_for}, imported in {seconds:.1f} s")


def judge_driver(built_for: str, driver_cuda: tuple[int, int], driver: str | None) -> Check:
    """Whether the driver is new enough for the CUDA libraries of this PyTorch."""
    shown = f"driver {driver or 'of unknown version'} for CUDA {driver_cuda[0]}.{driver_cuda[1]}"
    if (needed := newer_driver(built_for, driver_cuda)) is not None:
        return Check("driver", "failed", f"{shown}; this PyTorch has CUDA {built_for}", f"{needed}. {OTHER_DRIVER}.")
    return Check("driver", "passed", f"{shown}, PyTorch has CUDA {built_for}")


def check_gpu(*, require_gpu: bool, devices: Path = Path("/dev"), environ: Mapping[str, str] | None = None) -> Check:
    """The GPUs that PyTorch can use, or why it cannot."""
    import torch

    from nanogpt.runs.provenance import driver_version

    environ = os.environ if environ is None else environ
    missing: Status = "failed" if require_gpu else "passed"
    if torch.version.cuda is None:
        advice = "Use the CUDA flavour: make sif." if require_gpu else ""
        return Check("GPU", missing, "this PyTorch is for CPUs; GPUs are not looked for", advice)
    driver_cuda = driver_cuda_version()
    nodes = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    if driver_cuda is None:
        if not nodes:
            advice = "Ask Slurm for one: --gpus-per-node." if require_gpu else ""
            return Check("GPU", missing, "none on this machine", advice)
        inside = environ.get("APPTAINER_CONTAINER")
        advice = "Start the container with --nv: apptainer run --nv ..." if inside else "Install the NVIDIA driver."
        return Check("GPU", "failed", f"{', '.join(nodes)}, and no libcuda.so.1 to use them", advice)
    judged = judge_driver(torch.version.cuda, driver_cuda, driver_version())
    if judged.status == "failed":
        return judged
    if not torch.cuda.is_available():
        hidden = environ.get("CUDA_VISIBLE_DEVICES")
        advice = (
            "CUDA_VISIBLE_DEVICES hides them." if hidden in ("", "-1") else "Does `nvidia-smi` work on this machine?"
        )
        return Check("GPU", missing, f"PyTorch finds none; {judged.found}", advice)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    capability = torch.cuda.get_device_capability()
    found = f"{len(names)} x {names[0]} (sm_{capability[0]}{capability[1]}), {judged.found}"
    known = ", ".join(name.upper() for name in GPU_TYPES)
    if not runs_on("triton", capability):
        return Check("GPU", "failed", found, f"The kernels need sm_80 or newer: {known}.")
    if capability not in {gpu.capability for gpu in GPU_TYPES.values()}:
        return Check("GPU", "warning", found, f"Runs have been tried on {known}; speed on others is unknown.")
    return Check("GPU", "passed", found)


def check_compiler() -> Check:
    """A C compiler, which Triton needs for its launchers, and a C++ compiler for torch.compile on CPUs."""
    found = [path for name in ("gcc", "g++") if (path := shutil.which(name))]
    if len(found) < 2:
        return Check("compiler", "warning", "no gcc or no g++", "Triton and torch.compile need them: apt install g++.")
    return Check("compiler", "passed", ", ".join(found))


def check_attention(environ: Mapping[str, str]) -> Check:
    """The attention backend of this machine can be imported."""
    import torch

    from nanogpt.kernels.attention import import_failure, select_attention_backend

    name = "attention"
    if torch.version.cuda is None:
        return Check(name, "passed", "plain, the only one for CPUs")
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        choice = select_attention_backend("auto", capability, head_dim=128, dtype=torch.bfloat16)
        status: Status = "warning" if choice.backend == "plain" else "passed"
        return Check(name, status, choice.reason, "Without a fast backend a run takes many times longer.")
    backend = "fa3" if environ.get("NANOGPT_FLASH_ATTN") else "fa4"
    failure = import_failure(backend)
    if failure is not None:
        return Check(
            name, "warning", f"{backend} cannot be imported: {failure}", "Another backend, or the plain one, runs."
        )
    return Check(name, "passed", f"{backend} can be imported; not run, as there is no GPU")


def check_triton() -> Check:
    """Triton compiles a kernel and runs it."""
    import torch

    if not torch.cuda.is_available():
        return Check("Triton", "passed", "not tried, as there is no GPU")
    start = time.perf_counter()
    try:
        from nanogpt.kernels.transpose import transpose_copy

        source = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(128, 64, device="cuda", dtype=torch.bfloat16)
        transpose_copy(source, target)
        if not torch.equal(target, source.mT):
            return Check(
                "Triton", "failed", "a kernel gave a wrong result", "Empty its cache (NANOGPT_CACHE), try again."
            )
    except Exception as error:
        advice = "Needs gcc, libcuda (--nv) and a cache that can be written (NANOGPT_CACHE)."
        return Check("Triton", "failed", f"{type(error).__name__}: {first_line(error)}", advice)
    return Check("Triton", "passed", f"compiled and ran a kernel in {time.perf_counter() - start:.1f} s")


def check_kernels() -> Check:
    """Each kernel chosen on this GPU can be launched at the sizes of a run."""
    import torch

    from nanogpt.bench.kernels import all_bench_cases

    name, tried = "kernels", dict[str, None]()
    if not torch.cuda.is_available():
        return Check(name, "passed", "not tried, as there is no GPU")
    start = time.perf_counter()
    try:
        for case in all_bench_cases():
            if case.name not in tried:
                tried[case.name] = None
                case.fast()
                torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        advice = "Is the GPU in use? A run needs some 30 GB; --set training.slots=16 halves its micro-batches."
        return Check(name, "warning", f"{next(reversed(tried), 'the first')}: {first_line(error)}", advice)
    except Exception as error:
        found = f"{next(reversed(tried), 'the first')}: {type(error).__name__}: {first_line(error)}"
        return Check(
            name, "failed", found, "Runs continue without: --set runtime.kernels=plain --set runtime.attention=plain."
        )
    return Check(name, "passed", f"launched {len(tried)} in {time.perf_counter() - start:.1f} s")


def check_shared_memory(place: Path = Path("/dev/shm"), needed: int = SHARED_MEMORY_NEEDED) -> Check:
    """/dev/shm exists and is large enough."""
    from nanogpt.console import human_bytes

    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("shared memory", "warning", f"{place}: {error.strerror}", "NCCL then goes through the network.")
    found = f"{place}: {human_bytes(free)} free"
    advice = f"NCCL needs {human_bytes(needed)}: bind the host's /dev/shm, or ask for a larger one."
    return Check("shared memory", "passed" if free >= needed else "warning", found, advice)


def check_cache(environ: Mapping[str, str]) -> Check:
    """Compiled kernels can be written to NANOGPT_CACHE."""
    value = environ.get("NANOGPT_CACHE")
    if not value or value == "off":
        return Check(
            "cache", "passed", "none (NANOGPT_CACHE=off)" if value else "beside the runs (NANOGPT_CACHE is not set)"
        )
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=value):
            pass
    except OSError as error:
        advice = "Point NANOGPT_CACHE at a writable directory, and --bind it into the container."
        return Check("cache", "failed", f"NANOGPT_CACHE={value}: {error.strerror}", advice)
    return Check("cache", "passed", f"NANOGPT_CACHE={value}")


def check_training() -> Check:
    """Two steps of a tiny run, on a GPU if there is one."""
    start = time.perf_counter()
    said = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="nanogpt-doctor-") as directory,
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
        ):
            device, loss = _train_two_steps(Path(directory))
    except Exception as error:
        return Check(
            "training",
            "failed",
            f"{type(error).__name__}: {first_line(error)}",
            "Run `nanogpt demo --steps 2` for the details.",
        )
    return Check("training", "passed", f"two steps on {device} in {time.perf_counter() - start:.1f} s, loss {loss:.2f}")


def _train_two_steps(directory: Path) -> tuple[str, float]:
    import numpy as np
    import torch

    from nanogpt.data.shards import train_name, val_name, write_tokens
    from nanogpt.recipe import load_recipe
    from nanogpt.training.recorder import create_run
    from nanogpt.training.trainer import train_run

    overrides = list(TINY)
    device = "the CPU"
    if torch.cuda.is_available():
        gpu = nearest_type(torch.cuda.get_device_capability())
        overrides += [f"hardware.gpu={gpu}", "runtime.dtype=bf16", "runtime.compile=off"]
        device = torch.cuda.get_device_name()
    spec = load_recipe("demo", overrides)
    rng = np.random.default_rng(0)
    for name, seed_tokens in ((train_name(1), 40_000), (val_name(), 5_000)):
        tokens = rng.integers(spec.model.vocab_size - 1, size=seed_tokens).astype(np.uint16)
        tokens[::97] = spec.data.bos
        write_tokens(directory / name, tokens)
    run = create_run(directory / "runs", spec)
    result = train_run(spec, run=run, data_directory=directory, resume=False)
    return device, result.final_val_loss
