"""Exposed communication, on made-up traces whose answers are plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanogpt.bench.exposed import as_table, exposure, read_trace


def event(name: str, start: float, end: float, cat: str = "kernel", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, **more}


def test_what_is_hidden_and_what_is_not() -> None:
    found = exposure(
        [
            event("gemm", 0, 1000),
            event("ncclDevKernel_ReduceScatter_Sum_bf16(...)", 500, 2000),  # the second half alone
            event("gemm", 1500, 1600),  # beside it, for a while
            event("Memcpy HtoD", 1900, 2100, cat="gpu_memcpy"),
            event("ncclDevKernel_AllGather_RING_LL(...)", 2600, 3000),  # after 500 in which nothing runs
            event("aten::mm", 0, 9000, cat="cpu_op"),  # of the host
            {"ph": "i", "cat": "kernel", "name": "a mark", "ts": 5},
        ]
    )
    assert found.span == pytest.approx(3.0)
    assert found.computing == pytest.approx(1.0 + 0.1 + 0.2)
    assert found.communicating == pytest.approx(1.5 + 0.4)
    assert found.exposed == pytest.approx(0.5 + 0.3 + 0.4)
    assert found.idle == pytest.approx(0.5)
    assert found.computing + found.exposed + found.idle == pytest.approx(found.span)


def test_overlapping_kernels_count_once_and_steps_share() -> None:
    events = [event("a", 0, 100), event("b", 50, 200), event("ncclX", 0, 200), event("ncclY", 100, 400)]
    found = exposure(events, steps=2)
    assert (found.span, found.computing, found.communicating, found.exposed) == pytest.approx((0.2, 0.1, 0.2, 0.1))


def test_one_gpu_has_none() -> None:
    assert exposure([event("gemm", 0, 10)]).exposed == 0
    assert exposure([event("aten::mm", 0, 10, cat="cpu_op")]).span == 0


def test_a_trace_on_disk_and_the_table(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [event("gemm", 0, 1000), event("ncclAllReduce", 1000, 1500)]}))
    late = exposure([event("gemm", 0, 1000), event("ncclAllReduce", 1000, 1100)])
    table = as_table([[late, exposure(read_trace(path))]])
    assert "| 1 | 1.50 | 1.00 | 0.50 | 0.30 | 0.50 (rank 1) | 33.3% | 0.00 |" in table
