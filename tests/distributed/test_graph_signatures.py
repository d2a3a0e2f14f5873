"""What the ranks of a run compile, and that a warm-up on one process compiles all of it."""

from __future__ import annotations

import json
from pathlib import Path

from divided_graphs import compile_graphs
from forked import Forked, in_ranks
from graph_signatures import warm_up
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.training.parallel_compile import graph_jobs


def test_what_ranks_call_is_what_a_warm_up_on_one_process_has_called(tmp_path: Path):
    data = make_data(tmp_path / "data")
    alone, together = (
        write_recipe(tmp_path / f"{ranks}.yaml", tiny_spec(f"hardware.gpus_per_node={ranks}")) for ranks in (1, 2)
    )
    one = Forked(warm_up, alone, data, tmp_path / "alone", 2).wait(200)
    for done in (one, *in_ranks(2, warm_up, together, data, tmp_path / "rank")):
        assert done.returncode == 0, done.stderr

    def signatures(name: str) -> set[str]:
        return set(json.loads((tmp_path / name).read_text()))

    for rank in range(2):
        called = signatures(f"rank.{rank}")
        assert len(called) >= 10
        assert called <= signatures("alone.0.more")
        ranks_own = {signature.split(",")[0] for signature in called - signatures("alone.0")}
        assert ranks_own == {'["Adam"', '["banks"'}  # without a warm-up for two; the model's are the same


def test_ranks_divide_the_graphs_and_the_first_begins_with_the_optimizers(tmp_path: Path):
    spec = tiny_spec("hardware.gpus_per_node=2")
    for done in in_ranks(2, compile_graphs, write_recipe(tmp_path / "two.yaml", spec), tmp_path, tmp_path / "rank"):
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in range(2))
    names = [job.name for job in graph_jobs(spec)]
    assert first.pop(0) == "the optimizer's"
    assert [*second, *reversed(first)] == names  # the expensive ones come first
