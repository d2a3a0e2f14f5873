"""`nanogpt bench communication`, on two ranks of a CPU, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import in_ranks, run_nanogpt
from tiny_runs import tiny_spec, write_recipe

from nanogpt.bench.communication import TableTiming, as_table


def test_ranks_agree_on_the_sum_and_rank_0_prints_json(tmp_path: Path) -> None:
    spec = tiny_spec("hardware.gpus_per_node=2")
    recipe = write_recipe(tmp_path / "tiny.yaml", spec)
    first, second = in_ranks(2, run_nanogpt, "bench", "communication", str(recipe), "--repeats", "1", "--json")
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    found = json.loads(first.stdout)
    assert (found["world_size"], found["device"]) == (2, "cpu")
    timings = found["tables"]["bigram_embed"]
    assert [timing["stage"] for timing in timings] == list(range(len(spec.training.stages)))
    assert all(timing["error"] < 1e-2 and 0 < timing["touched"] < 1 for timing in timings)


def test_the_table() -> None:
    row = as_table([TableTiming(1, 0.25, 2.0, 1.0, 0.5, 4_000_000, 1_000_000, 1e-3)]).splitlines()[-1]
    assert row == "| 2 | 25.0% | 2.00 | 1.00 | 0.50 | 4.0 | 1.0 | 1.0e-03 |"


@pytest.mark.parametrize(
    ("recipe", "message"), [("gpt2", "has no embedding table"), ("record89", "nanogpt launch --bench communication")]
)
def test_what_cannot_be_timed_is_refused(nanogpt: Callable[..., Any], recipe: str, message: str) -> None:
    outcome = nanogpt("bench", "communication", recipe, "--on", "1xh100")
    assert (outcome.code, outcome.out) == (2, "") and message in outcome.err
