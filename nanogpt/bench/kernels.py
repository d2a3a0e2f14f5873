"""Measuring kernels: each against its plain equal, and against what the machine can do.

A kernel's module may define `bench_cases(device) -> Iterator[BenchCase]`; the cases of all of them are in
`all_bench_cases`. The floor of a case is the larger of its operations over the measured rate of a large matrix product
and its bytes over the measured rate of a large copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

MODULES = (
    "attention",
    "head_mixing",
    "relu_squared_mlp",
    "fp8_mlp",
    "cross_entropy",
    "row_gradients",
    "symmetric_matmul",
    "transpose",
)


@dataclass(frozen=True)
class BenchCase:
    """One kernel at one shape. `fast` and `plain` run it once on inputs that they hold."""

    name: str
    shape: str
    fast: Callable[[], object]
    plain: Callable[[], object] | None
    flops: float
    """Multiplications and additions that the result needs (what a kernel computes beyond them counts against it)."""
    bytes: float
    """Each input read once, each output written once."""


@dataclass(frozen=True)
class MachineRates:
    """What this device reaches on large, simple work, on random data."""

    matmul_flops: float
    """bf16 product of two 8192 x 8192 matrices, operations a second."""
    copy_bytes: float
    """Copy of 4 GiB within the device, bytes read and written a second."""


@dataclass(frozen=True)
class BenchResult:
    """Median milliseconds of a case, with the 20th and 80th percentile of the fast version."""

    case: BenchCase
    fast_ms: float
    fast_low_ms: float
    fast_high_ms: float
    plain_ms: float | None
    floor_ms: float


def measure(
    function: Callable[[], object], *, capture: bool = True, warmup_ms: int = 25, repeat_ms: int = 100
) -> tuple[float, ...]:
    """Median, 20th and 80th percentile in milliseconds of device time, the L2 cache flushed before each run.

    With `capture`, times replays of a CUDA graph, so that what the host needs to launch is not counted; runs the
    function itself where it cannot be captured.
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


def document_ends(tokens: int, longest: int, entries: int) -> list[int]:
    """Ends of made-up documents with about the lengths of FineWeb's, padded with `tokens` to `entries` numbers.

    Lengths are log-normal with median 500, cut at `longest` tokens; the draw is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    ends: list[int] = []
    while not ends or ends[-1] < tokens:
        length = int(500 * torch.randn((), generator=generator).exp())
        ends.append(min((ends[-1] if ends else 0) + min(max(length, 8), longest), tokens))
    return ends + [tokens] * (entries - len(ends))


def machine_rates(device: torch.device | str = "cuda") -> MachineRates:
    """Measures the two ceilings; takes about a second and 8 GiB of device memory.

    Not captured: a copy in a graph takes another path, seen at two thirds of the rate.
    """
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul_ms = measure(lambda: torch.mm(a, b, out=out), capture=False)[0]
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    copy_ms = measure(lambda: target.copy_(source), capture=False)[0]
    return MachineRates(2 * 8192**3 / matmul_ms * 1e3, 2 * source.nbytes / copy_ms * 1e3)


def floor_ms(case: BenchCase, rates: MachineRates) -> float:
    """The larger of the time for the case's operations and for its bytes."""
    return 1e3 * max(case.flops / rates.matmul_flops, case.bytes / rates.copy_bytes)


def all_bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The cases of every kernel, one at a time: inputs live only while their case is in hand."""
    for name in MODULES:
        module = importlib.import_module(f"nanogpt.kernels.{name}")
        if hasattr(module, "bench_cases"):
            yield from module.bench_cases(device)


def run_cases(cases: Iterable[BenchCase], rates: MachineRates) -> Iterator[BenchResult]:
    """Times each case, the fast version and the plain one."""
    for case in cases:
        fast_ms, low, high = measure(case.fast)
        plain_ms = None if case.plain is None else measure(case.plain)[0]
        yield BenchResult(case, fast_ms, low, high, plain_ms, floor_ms(case, rates))


def as_row(result: BenchResult) -> str:
    """A row of a Markdown table whose columns are in TABLE_HEAD."""
    plain = "" if result.plain_ms is None else f"{1e3 * result.plain_ms:,.0f}"
    gain = "" if result.plain_ms is None else f"{result.plain_ms / result.fast_ms:.2f}"
    spread = f"{1e3 * result.fast_low_ms:,.0f}-{1e3 * result.fast_high_ms:,.0f}"
    return (
        f"| {result.case.name} | {result.case.shape} | {1e3 * result.fast_ms:,.0f} | {spread} | {plain} | {gain} "
        f"| {1e3 * result.floor_ms:,.0f} | {result.floor_ms / result.fast_ms:.0%} |"
    )


TABLE_HEAD = (
    "| kernel | shape | fast, us | 20-80 % | plain, us | gain | floor, us | of floor |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
