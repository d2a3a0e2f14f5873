"""Where the time goes between the job's start and the first timed step, phase by phase."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nanogpt.background import Worker
from nanogpt.console import markdown_table
from nanogpt.runs.record import StartUpPhase
from nanogpt.training.compilation import CompileCounts, compile_counts

T = TypeVar("T")
JOB_START = "SLURM_JOB_START_TIME"  # seconds since the epoch
COLUMNS = {  # what is counted in a phase, with its column's title
    "graphs": "graphs",
    "from_cache": "from the cache",
    "bypassed": "not cacheable",
    "parts_compiled": "parts compiled",
    "kernels_compiled": "kernels compiled",
    "kernels_tuned": "kernels tuned",
}


class StartUp:
    """Phases in the order in which they were first entered. Times are those of this process's clock."""

    def __init__(self) -> None:
        self._started = time.perf_counter() - process_age()
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, CompileCounts] = {}
        waited = _queued_for(os.environ.get(JOB_START), process_age())
        if waited is not None:
            self._seconds["job's start to this process"] = waited
        self._seconds["Python and imports"] = time.perf_counter() - self._started
        self._ahead: dict[Callable[..., Any], Future[Any]] = {}

    def begin(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Have a thread do what a later phase needs, while this one imports; the phase calls `begun`.

        It should spend its time outside Python, and import nothing that others import meanwhile.
        """
        worker = Worker(function.__name__)
        self._ahead[function] = worker.submit(functools.partial(function, *arguments, **named))
        worker.close(0)

    def begun(self, function: Callable[..., T]) -> T | None:
        """What `begin` had the function make, once; None if it was not begun. Raises what the function raised."""
        future: Future[T] | None = self._ahead.pop(function, None)
        return None if future is None else future.result()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is part of the phase `name`, which may be entered several times. Phases do not nest."""
        counts, start = compile_counts(), time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._counts[name] = self._counts.get(name, CompileCounts()) + (compile_counts() - counts)

    def phases(self) -> list[StartUpPhase]:
        """The phases so far, and how much of the time since this process's start lies between them."""
        outside = sum(seconds for name, seconds in self._seconds.items() if not name.startswith("job"))
        rest = time.perf_counter() - self._started - outside
        found = []
        for name, seconds in (*self._seconds.items(), ("everything else", rest)):
            counts = self._counts.get(name, CompileCounts())
            compiled = {key: getattr(counts, key) for key in COLUMNS}
            found.append(StartUpPhase(name=name, seconds=round(seconds, 3), **compiled))
        return found


def phases_table(phases: Sequence[StartUpPhase]) -> list[str]:
    """The phases as lines of a Markdown table, their sum last."""
    total = StartUpPhase(name="start to first timed step", seconds=0.0)
    for phase in phases:
        for key in ("seconds", *COLUMNS):
            setattr(total, key, getattr(total, key) + getattr(phase, key))
    rows = []
    for phase in (*phases, total):
        numbers = (getattr(phase, key) for key in COLUMNS)
        rows.append((phase.name, f"{phase.seconds:.1f}", *(number or "" for number in numbers)))
    return markdown_table(("phase", "s", *COLUMNS.values()), rows)


def process_age() -> float:
    """Seconds since this process was started (Linux), to the hundredth."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
    return max(0.0, age) if ticks else time.process_time()  # gVisor may give 0


def _queued_for(job_start: str | None, age: float) -> float | None:
    """Seconds from the job's start to this process's; None if no scheduler says, or if it is impossible."""
    try:
        waited = time.time() - age - float(job_start or "")
    except ValueError:
        return None
    return waited if 0 <= waited < 24 * 3600 else None
