"""Counts what torch.compile compiled and what it took from the cache, so that none of it goes unnoticed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

from nanogpt.cache.graphs import LOADED, NEW_KINDS, PARTS_COMPILED, SPENT
from nanogpt.cache.tuning import COUNTER, KERNELS_COMPILED, TUNING_MS, WAITING_MS
from nanogpt.console import markdown_table


@dataclass(frozen=True)
class CompileCounts:
    """What this process has done so far. A graph has one part in evaluation, two in training (forward, backward)."""

    graphs: int = 0  # traced, or loaded without: once per process, whatever the cache has
    from_cache: int = 0  # whole graphs taken from the cache
    bypassed: int = 0  # graphs that torch's cache cannot keep
    parts_compiled: int = 0  # parts that were compiled again
    parts_from_cache: int = 0  # parts taken from the cache although their whole graph was not
    kernels_compiled: int = 0  # Triton kernels, by this process itself; counted where a cache file is in use
    kernels_tuned: int = 0  # kernels whose variants were timed; counted where a cache file is in use

    def __sub__(self, other: CompileCounts) -> CompileCounts:
        return CompileCounts(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def __add__(self, other: CompileCounts) -> CompileCounts:
        return CompileCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def compile_counts() -> CompileCounts:
    """The counts of this process. Loads no compiler."""
    if "torch._dynamo.utils" not in sys.modules:
        return CompileCounts()
    from torch._dynamo.utils import counters

    inductor, loaded = counters["inductor"], counters[LOADED[0]][LOADED[1]]
    ahead = counters[PARTS_COMPILED[0]][PARTS_COMPILED[1]]
    return CompileCounts(
        graphs=int(counters["stats"]["unique_graphs"] + loaded),
        from_cache=int(counters["aot_autograd"]["autograd_cache_hit"] + loaded),
        bypassed=int(counters["aot_autograd"]["autograd_cache_bypass"]),
        parts_compiled=int(inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"] + ahead),
        parts_from_cache=int(inductor["fxgraph_cache_hit"]),
        kernels_compiled=int(counters[KERNELS_COMPILED[0]][KERNELS_COMPILED[1]]),
        kernels_tuned=int(counters[COUNTER[0]][COUNTER[1]]),
    )


def compiled_graphs() -> int:
    """Graphs that this process has traced and compiled, or taken from the cache, so far."""
    return compile_counts().graphs


def recompilation_reasons() -> list[str]:
    """Why functions were compiled again, or another graph of theirs loaded, a line each: the guard that failed."""
    if "torch._dynamo.utils" not in sys.modules:
        return []
    from torch._dynamo.utils import counters, get_compilation_metrics

    by_torch = (
        f"{metric.co_name}: {' '.join(metric.recompile_reason.split())}"
        for metric in get_compilation_metrics()
        if metric.recompile_reason
    )
    return [*by_torch, *counters[NEW_KINDS]]


@dataclass
class CompiledFunction:
    """A compiled function: its graphs, and seconds of this process over all of them."""

    name: str
    graphs: int = 0
    operations: int = 0  # in the traced graphs
    tracing_s: float = 0.0  # Dynamo, guards; of a graph compiled ahead also AOTAutograd
    forward_s: float = 0.0  # AOTAutograd and inductor, or the cache; of a graph compiled ahead both passes
    backward_s: float = 0.0  # inductor at the first backward pass
    kernels_s: float = 0.0  # of these, spent waiting for Triton and tuning

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.tracing_s + self.forward_s + self.backward_s


def compiled_functions() -> list[CompiledFunction]:
    """What each compiled function of this process cost, most expensive first."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    found: dict[str, CompiledFunction] = {}
    names: dict[str, str] = {}
    for metric in get_compilation_metrics():
        compile_id = str(metric.compile_id)
        if metric.co_name is not None:
            names[compile_id] = metric.co_name
        if compile_id not in names:  # one compiled ahead, which has its own figures below
            continue
        entry = found.setdefault(names[compile_id], CompiledFunction(names[compile_id]))
        entry.kernels_s += _seconds(metric.triton_compile_time_us) + _seconds(metric.runtime_triton_autotune_time_us)
        if metric.is_forward is False:
            entry.backward_s += _seconds(metric.duration_us)
            continue
        backend = metric.backend_compile_time_s or 0.0
        entry.graphs += 1
        entry.operations += metric.graph_op_count or 0
        entry.tracing_s += (metric.entire_frame_compile_time_s or 0.0) - backend
        entry.forward_s += backend
    ahead: Any = counters[SPENT]
    for (name, field), value in ahead.items():
        entry = found.setdefault(name, CompiledFunction(name))
        setattr(entry, field, getattr(entry, field) + value)
    return sorted(found.values(), key=lambda entry: -entry.seconds)


def functions_table(functions: Sequence[CompiledFunction]) -> list[str]:
    """The functions as lines of a Markdown table."""
    total = CompiledFunction("all")
    for entry in functions:
        for field in fields(entry):
            if field.name != "name":
                setattr(total, field.name, getattr(total, field.name) + getattr(entry, field.name))
    rows = []
    for entry in (*functions, total):
        times = (entry.tracing_s, entry.forward_s, entry.backward_s, entry.kernels_s)
        rows.append((entry.name, entry.graphs, entry.operations, *(f"{value:.1f}" for value in times)))
    return markdown_table(
        ("function", "graphs", "operations", "tracing, s", "forward, s", "backward, s", "of it Triton, s"), rows
    )


@dataclass(frozen=True)
class GraphTimes:
    """What a process did for one graph, in seconds; of a helper it also says what came before the first."""

    name: str
    seconds: float  # all, with the graph's execution
    tracing_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    kernels_s: float = 0.0  # of these, spent waiting for Triton and tuning
    tuning_s: float = 0.0
    waiting_s: float = 0.0  # for other processes that tune


@contextmanager
def timed_graph(name: str, rows: list[GraphTimes]) -> Iterator[None]:
    """Add a row for what is compiled inside."""
    before, began = _spent(), time.perf_counter()
    yield
    rows.append(GraphTimes(name, time.perf_counter() - began, *(b - a for a, b in zip(before, _spent(), strict=True))))


def _spent() -> list[float]:
    """Of this process, in the order of `GraphTimes`."""
    from torch._dynamo.utils import counters

    names = ("tracing_s", "forward_s", "backward_s", "kernels_s")
    parts = [sum(getattr(entry, name) for entry in compiled_functions()) for name in names]
    return [*parts, *(counters[group][key] / 1000 for group, key in (TUNING_MS, WAITING_MS))]


def graph_times_table(processes: Mapping[str, Sequence[GraphTimes]]) -> list[str]:
    """Each process's graphs as lines of a Markdown table."""
    rows = [
        (process, row.name, *(f"{value:.1f}" if value else "" for value in astuple(row)[1:]))
        for process, graphs in processes.items()
        for row in graphs
    ]
    heads = ("tracing", "forward", "backward", "of it Triton", "tuning", "waiting to tune")
    return markdown_table(("process", "graph", "s", *heads), rows)


def _seconds(microseconds: int | None) -> float:
    return (microseconds or 0) / 1e6
