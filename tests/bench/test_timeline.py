"""The picture of a step's communication, from made-up traces whose answers are plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt.bench.exposed import Activity, alone, exposure
from nanogpt.bench.timeline import busiest_step, plot_timeline, read_stages
from nanogpt.errors import InputError

REDUCE, GATHER = "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "ncclDevKernel_AllGather_RING_LL"


def events(*ran: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [{"ph": "X", "cat": "kernel", "name": name, "ts": a, "dur": b - a} for name, a, b in ran]


TWO_STEPS = events(
    ("gemm", 0, 20_000),
    (REDUCE, 20_000, 29_000),  # waits for the other rank
    ("adam", 29_000, 29_500),
    ("gemm", 29_500, 50_000),
    (REDUCE, 50_000, 51_000),
    ("muon", 50_600, 52_000),
    (GATHER, 51_500, 52_500),
    (GATHER, 52_500, 52_600),
    ("gemm", 55_000, 70_000),
)


def write(directory: Path, rank: int = 0) -> None:
    for stage in (1, 2):
        (directory / f"stage-{stage}.rank-{rank}.json").write_text(json.dumps({"traceEvents": TWO_STEPS}))


def test_the_step_with_most_collectives_is_shown(tmp_path: Path) -> None:
    write(tmp_path)
    stages = read_stages(tmp_path, 0)
    assert list(stages) == [1, 2]
    step = busiest_step(stages[1])
    assert [run.name for run in step] == ["gemm", REDUCE, "muon", GATHER, GATHER]
    assert alone(step) == [(50_000, 50_600), (52_000, 52_600)]


def test_alone_is_what_the_exposure_says() -> None:
    made = (("x", 0, 10), ("ncclA", 5, 30), ("y", 12, 15), ("z", 15, 20), ("w", 29, 40))
    ran = [Activity(start, end, name) for name, start, end in made]
    assert alone(ran) == [(10, 12), (20, 29)]
    found = exposure(events(*((run.name, run.start, run.end) for run in ran)))
    assert 1000 * found.exposed == pytest.approx(sum(end - start for start, end in alone(ran)))


def test_the_command_draws_it(tmp_path: Path, nanogpt: Callable[..., Any]) -> None:
    write(tmp_path)
    picture = tmp_path / "made" / "timeline.svg"
    assert nanogpt("bench", "timeline", tmp_path, "--out", picture).code == 0
    text = picture.read_text()
    for expected in ("stage 1: 1.20 ms in which NCCL runs alone", "stage 2", "reduce-scatter", "all-gather"):
        assert expected in text, expected
    assert "all-reduce" not in text  # there is none


def test_what_cannot_be_drawn_is_said(tmp_path: Path, nanogpt: Callable[..., Any]) -> None:
    write(tmp_path)
    missing = nanogpt("bench", "timeline", tmp_path, "--rank", 3)
    assert missing.code == 2 and "no stage-N.rank-3.json" in missing.err and "--traces" in missing.err
    with pytest.raises(InputError, match="of one GPU"):
        plot_timeline({1: [Activity(0, 1, "gemm")]}, tmp_path / "x.png")
    with pytest.raises(InputError, match=r"found suffix '\.pdf'"):
        plot_timeline({}, tmp_path / "x.pdf")
