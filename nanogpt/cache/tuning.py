"""What inductor has tuned, kept so that later processes choose the same without tuning again.

inductor times the variants of a reduction kernel at its first launch, some 20 ms each, and notes the fastest in a file
beside the kernel's source. A graph that comes out of torch's cache brings its kernels ready for launch, with the path
that their source had in the process that compiled them. That directory is gone when another job has unpacked the cache
into one of its own, so the note is not found, and all is timed again: seconds per graph at every start, and sums in
another order where the clock decides otherwise. Variants that inductor derives from others at load (smaller blocks of a
reduction) are not found again even with the same path (torch 2.11).

So choices are files of our own, named by the hash of the kernel's source. The first process of a node that has timed a
kernel decides for all of them, and for every later run that unpacks the directory.

inductor also derives variants of a reduction at its first load, with half of the block where a thread needs many
registers, and compiles them itself, one after another. Here the processes that compile all others compile these too.
"""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanogpt.files import read_json

FOLDER = "tuning"
COUNTER = ("nanogpt", "kernels_tuned")  # in torch._dynamo.utils.counters
KERNELS_COMPILED = ("nanogpt", "kernels_compiled")  # likewise
SMALLEST_BLOCK = 64  # of a reduction, which inductor does not halve
TUNING_MS, WAITING_MS = ("nanogpt", "tuning_ms"), ("nanogpt", "waiting_to_tune_ms")


@contextmanager
def kept_tuning(directory: Path) -> Iterator[None]:
    """Choices among variants of inductor's kernels are taken from `directory` and left there, while the context lasts.

    All variants are compiled before the choice, by inductor's processes. Loads inductor. Where torch's classes are not
    what this module knows, nothing is changed: inductor tunes as usual.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import async_compile
    from torch._inductor.runtime import triton_heuristics

    compiling: Any = async_compile
    compile_given = getattr(compiling, "_worker_compile_triton", None)
    kernels: Any = triton_heuristics.CachingAutotuner
    tune = getattr(kernels, "autotune_to_one_config", None)
    precompile = getattr(kernels, "precompile", None)
    if tune is None or precompile is None or compile_given is None:
        yield
        return

    def autotune_to_one_config(self: Any, *args: Any, **kwargs: Any) -> None:
        path = _file_of(self, directory)
        if path is not None and (known := _matching(self.launchers, _read(path))):
            self.launchers = known
            return
        variants = list(self.launchers)
        began = time.perf_counter()
        with _alone(directory):  # on the GPU as well
            since = time.perf_counter()
            counters[WAITING_MS[0]][WAITING_MS[1]] += round(1000 * (since - began))
            if path is not None and (known := _matching(variants, _read(path))):
                self.launchers = known
                return
            with _few_launches():
                _tune_on_the_gpu(tune, self, *args, **kwargs)
            counters[COUNTER[0]][COUNTER[1]] += 1
            counters[TUNING_MS[0]][TUNING_MS[1]] += round(1000 * (time.perf_counter() - since))
            if path is not None and (
                chosen := _matching(variants, _keep(path, _description(self.launchers[0].config)))
            ):
                self.launchers = chosen

    def precompile_chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the chosen variant alone, and derive no others, where it is among those that came from the cache."""
        path = _file_of(self, directory)
        if path is not None and self.compile_results and (known := _matching(self.compile_results, _read(path))):
            self.compile_results = known
            self.inductor_meta["dynamic_scale_rblock"] = False
        return precompile(self, *args, **kwargs)

    kernels.autotune_to_one_config = autotune_to_one_config
    kernels.precompile = precompile_chosen
    compiling._worker_compile_triton = compile_variants
    try:
        yield
    finally:
        kernels.autotune_to_one_config = tune
        kernels.precompile = precompile
        compiling._worker_compile_triton = compile_given


def compile_variants(load_kernel: Callable[[], Any], *args: Any) -> Any:
    """What inductor has another process do for a kernel, and the variants that it would derive at its first load."""
    from torch._inductor.runtime.compile_tasks import _worker_compile_triton

    return _worker_compile_triton(functools.partial(_with_derived, load_kernel), *args)


def _with_derived(load_kernel: Callable[[], Any]) -> Any:
    """A kernel with a variant of half the block beside each that inductor may halve, which it then does not."""
    from torch._inductor.runtime.hints import HeuristicType

    kernel = load_kernel()
    settings = kernel.inductor_meta
    if (
        kernel.heuristic_type != HeuristicType.REDUCTION
        or settings.get("persistent_reduction")
        or settings.get("deterministic")
        or not settings.get("dynamic_scale_rblock", True)
    ):
        return kernel
    for given in list(kernel.configs):
        blocks = {name: size for name, size in given.kwargs.items() if name.startswith("R")}
        programs = -(-kernel.size_hints["x"] // given.kwargs.get("XBLOCK", 1))
        # inductor's conditions, except for the registers
        if math.prod(blocks.values()) <= SMALLEST_BLOCK or programs <= kernel.device_props.multi_processor_count:
            continue
        halved = copy.deepcopy(given)
        longest = max(blocks, key=blocks.__getitem__)
        halved.kwargs[longest] //= 2
        is_new = _description(halved) not in map(_description, kernel.configs)
        if is_new and halved.kwargs[longest] >= (settings.get("min_rblock") or 1):
            kernel.configs.append(halved)
    settings["dynamic_scale_rblock"] = False
    return kernel


def _tune_on_the_gpu(tune: Callable[..., None], kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Tune a kernel that overwrites what it reads on copies beside it.

    Where a copy would raise the peak of the memory in use, as in a process that has just begun, inductor brings the
    contents back from the host after each launch, within what it times: milliseconds, in which the microseconds of the
    variants are lost. Here it does so only where the GPU has no room.
    """
    import torch

    before = getattr(kernel, "optimize_mem", None)
    kernel.optimize_mem = False
    try:
        tune(kernel, *args, **kwargs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        kernel.optimize_mem = before
        tune(kernel, *args, **kwargs)
    finally:
        kernel.optimize_mem = before


@contextmanager
def _few_launches() -> Iterator[None]:
    """A variant's time is the shortest of 10 launches instead of 100: the other processes wait for their turn."""
    from torch._inductor.runtime import benchmarking

    clock: Any = benchmarking.benchmarker
    if type(clock) is not getattr(benchmarking, "InductorBenchmarker", None):
        yield
        return
    before = clock.benchmark_gpu
    clock.benchmark_gpu = functools.partial(before, memory_warmup_iters=10, benchmark_iters=10)
    try:
        yield
    finally:
        clock.benchmark_gpu = before


@contextmanager
def kernels_counted() -> Iterator[None]:
    """Count the kernels that Triton compiles in this process because its cache does not have them. Loads Triton."""
    from torch._dynamo.utils import counters
    from triton import knobs

    def count(*, cache_hit: bool, **_: Any) -> None:
        counters[KERNELS_COMPILED[0]][KERNELS_COMPILED[1]] += not cache_hit

    before, knobs.compilation.listener = knobs.compilation.listener, count
    try:
        yield
    finally:
        knobs.compilation.listener = before


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process of the node at a time: two that time kernels on one GPU would see each other's."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _file_of(kernel: Any, directory: Path) -> Path | None:
    """inductor names the source of a kernel by its hash; None for a kernel that has none."""
    source = getattr(kernel, "filename", None)
    return directory / f"{Path(source).stem}.json" if source else None


def _description(config: Any) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(
        json.dumps({**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}, default=str)
    )
    return described


def _matching(variants: Sequence[Any], wanted: dict[str, Any] | None) -> list[Any]:
    """The wanted one among the variants, which have a `config`; empty if it is not there."""
    if wanted is None:
        return []
    return [variant for variant in variants if _description(variant.config) == wanted][:1]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _keep(path: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """Write the choice, unless another process was first; returns the one that is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as file:
            json.dump(choice, file)
        try:
            os.link(name, path)  # fails if one is there, whichever process is faster
        except FileExistsError:
            return _read(path) or choice
        finally:
            Path(name).unlink()
    except OSError:  # full or without links: this process uses its own
        pass
    return choice
