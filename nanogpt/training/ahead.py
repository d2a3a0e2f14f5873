"""What a start does while it imports the compiler, which takes seconds of Python.

All of this leaves Python's lock to the imports: a process reads the cache file (`nanogpt.cache`), a thread draws the
model's parameters, and where no file is found helpers import and compile too (`nanogpt.training.parallel_compile`).
While the attention library is imported, a thread hashes the compilers' files, which are part of every graph's key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nanogpt.cache.compile_cache import CompileCache, compile_cache
from nanogpt.launch.world import World
from nanogpt.models import MODELS
from nanogpt.registry import built_class
from nanogpt.spec import RunSpec
from nanogpt.training.build import draw_model
from nanogpt.training.compile_helper import end_unneeded
from nanogpt.training.implementations import choose_implementations, compiles
from nanogpt.training.parallel_compile import helpers_for, start_kernel_compilers
from nanogpt.training.startup import StartUp


@contextmanager
def compiler(
    spec: RunSpec, world: World, startup: StartUp, directory: Path | None, *, fresh: bool = False
) -> Iterator[CompileCache]:
    """`compile_cache`, as a phase of the start-up; what it begins besides, later phases find in `startup`.

    Nothing is begun for a run that is not compiled.
    """
    ahead = compiles(spec, world.device)
    when_cold = functools.partial(helpers_for, spec, world) if ahead and spec.training.warmup else None
    with ExitStack() as stack:
        with startup.phase("compiler, compile cache"):
            if ahead:
                begin_drawing(spec, world.device, startup)
            cache = stack.enter_context(compile_cache(spec, world, directory, fresh=fresh, when_cold=when_cold))
            end_unneeded()
            if ahead and world.device.type == "cuda":
                begin_hashing(startup)
                if not cache.found:
                    start_kernel_compilers()
        yield cache


def begin_drawing(spec: RunSpec, device: torch.device, startup: StartUp) -> None:
    """Have the model drawn for the implementations that will be chosen if the attention library can be imported."""
    expected, _ = choose_implementations(spec, device, import_failure=lambda _: None)
    built_class(MODELS, spec.model)  # imports it here: one thread imports torch's modules
    startup.begin(draw_model, spec, device=device, implementations=expected)


def begin_hashing(startup: StartUp) -> None:
    """Have Triton's and torch's keys of their own files computed, 400 and 60 MB, which both remember."""
    from torch._inductor.codecache import torch_key
    from torch._inductor.runtime.triton_compat import triton_key

    startup.begin(call_each, triton_key, torch_key)


def call_each(*functions: Callable[[], object]) -> None:
    """One after another."""
    for function in functions:
        function()
