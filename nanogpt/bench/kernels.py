"""Timing kernels: each against its plain equivalent, and against what the machine can do.

The cases come from the modules of `nanogpt.kernels.bench`. The floor of a case is the larger of two times: its
operations at the measured rate of a large matrix product, and its bytes at the measured rate of a large copy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanogpt.bench.conditions import device_conditions
from nanogpt.console import markdown_table
from nanogpt.kernels import bench
from nanogpt.kernels.bench import BenchCase


@dataclass(frozen=True)
class MachineRates:
    """What this device reaches on large, simple work, on random data."""

    matmul_flops: float
    """bf16 product of two 8192 x 8192 matrices, operations per second."""
    copy_bytes: float
    """Copy of 4 GiB within the device, bytes read and written per second."""


@dataclass(frozen=True)
class BenchResult:
    """Median milliseconds of a case, with the 20th and 80th percentile of the fast version; not the case's inputs."""

    kernel: str
    shape: str
    fast_ms: float
    fast_low_ms: float
    fast_high_ms: float
    plain_ms: float | None
    floor_ms: float
    error: float | None  # relative, against fp64


def measure(
    function: Callable[[], object], *, capture: bool = True, warmup_ms: int = 25, repeat_ms: int = 100
) -> tuple[float, ...]:
    """Median, 20th and 80th percentile in milliseconds of device time, the L2 cache flushed before each run.

    With `capture`, times replays of a CUDA graph, so that the host's launches do not count; a function that cannot be
    captured runs itself.
    """
    from triton.testing import do_bench

    timed = _captured(function) if capture else function
    return tuple(do_bench(timed, warmup=warmup_ms, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8]))


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # it synchronizes, or calls a library that does
        return function
    return graph.replay


def machine_rates(device: torch.device | str = "cuda") -> MachineRates:
    """Measure the two ceilings; takes about a second and 8 GiB of device memory.

    Not captured: a graph copies by another route, which reached only two thirds of the rate.
    """
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul_ms = measure(lambda: torch.mm(a, b, out=out), capture=False)[0]
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    copy_ms = measure(lambda: target.copy_(source), capture=False)[0]
    return MachineRates(2 * 8192**3 / matmul_ms * 1e3, 2 * source.nbytes / copy_ms * 1e3)


def floor_ms(case: BenchCase, rates: MachineRates) -> float:
    """The larger of the times for the case's operations and for its bytes."""
    return 1e3 * max(case.flops / rates.matmul_flops, case.bytes / rates.copy_bytes)


def all_bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The cases of every kernel, one at a time: a case's inputs live only as long as the case."""
    for module in pkgutil.iter_modules(bench.__path__, f"{bench.__name__}."):
        yield from importlib.import_module(module.name).bench_cases(device)


def run_cases(cases: Iterable[BenchCase], rates: MachineRates) -> Iterator[BenchResult]:
    """Time each case, the fast version and the plain one, and compare with fp64."""
    for case in cases:
        fast_ms, low, high = measure(case.fast)
        plain_ms = None if case.plain is None else measure(case.plain)[0]
        error = None if case.error is None else case.error()
        yield BenchResult(case.name, case.shape, fast_ms, low, high, plain_ms, floor_ms(case, rates), error)


def as_table(results: Iterable[BenchResult], rates: MachineRates) -> list[str]:
    """The results as a Markdown table, below what the device reaches."""
    head = ("kernel", "shape", "fast, us", "20-80 %", "plain, us", "gain", "floor, us", "of floor", "error")
    rows = [
        (
            one.kernel,
            one.shape,
            f"{1e3 * one.fast_ms:,.0f}",
            f"{1e3 * one.fast_low_ms:,.0f}-{1e3 * one.fast_high_ms:,.0f}",
            "" if one.plain_ms is None else f"{1e3 * one.plain_ms:,.0f}",
            "" if one.plain_ms is None else f"{one.plain_ms / one.fast_ms:.2f}",
            f"{1e3 * one.floor_ms:,.0f}",
            f"{one.floor_ms / one.fast_ms:.0%}",
            "" if one.error is None else f"{one.error:.1e}",
        )
        for one in results
    ]
    device = device_conditions(torch.device("cuda"))
    reached = f"bf16 product {rates.matmul_flops / 1e12:.0f} TFLOP/s, copy {rates.copy_bytes / 1e12:.2f} TB/s"
    return [f"{device['device']}, torch {device['torch']}: {reached}", "", *markdown_table(head, rows)]


def as_json(results: Iterable[BenchResult], rates: MachineRates) -> dict[str, Any]:
    """The results with what they depend on."""
    return {
        **device_conditions(torch.device("cuda")),
        **asdict(rates),
        "kernels": [asdict(one) for one in results],
    }
