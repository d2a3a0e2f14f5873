"""Graphs: how many there are, and that none is compiled once the clock runs."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from tiny_runs import FIRST_WITH_PREFIX, make_data, tiny_spec, train

from nanogpt.cache import graphs
from nanogpt.launch.world import World, join_world
from nanogpt.models.record89.spec import Record89ModelSpec
from nanogpt.recipe import load_recipe
from nanogpt.runs.record import read_record
from nanogpt.training.compilation import (
    CompileCounts,
    GraphTimes,
    compile_counts,
    compiled_functions,
    functions_table,
    graph_times_table,
    timed_graph,
)
from nanogpt.training.micro_step import MicroStep
from nanogpt.training.parallel_compile import (
    KERNELS,
    GraphJob,
    call_graph,
    graph_jobs,
    helpers_for,
    helpers_that_fit,
    launch_kernels,
    not_taken,
    once_there_is_memory,
    start_kernel_compilers,
    take,
    turn_of,
)
from nanogpt.training.schedule import Schedule
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "traced_only")
SPEC = tiny_spec("runtime.compile=on", "training.warmup=true")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and guards as ever, and computes with the operations as they are: no compiler of code."""
    import torch._dynamo
    from torch._dynamo.utils import clear_compilation_metrics, counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "kept_graphs", lambda _: nullcontext())
    torch._dynamo.reset()
    clear_compilation_metrics()
    counters[graphs.SPENT].clear()
    counters[graphs.SPENT].clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # which the trainer raises
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


def test_the_warm_up_compiles_everything_once(data: Path, tmp_path: Path):
    """One graph for each size of micro-batch: windows, YaRN's scale and learning rates take none of their own."""
    before = compile_counts()
    result = train(SPEC, data, tmp_path / "run")
    assert result.late_graphs == 0
    functions = {entry.name: entry.graphs for entry in compiled_functions()}
    assert functions.pop("adam_updates") <= 8  # sharded parameters, and a group of the others
    sizes = {stage.batch_tokens for stage in SPEC.training.all_stages}
    assert functions == {"training_loss": len(sizes), "evaluation_loss": 1, "normuon_update": 2}

    record = read_record(tmp_path / "run")
    phases = {phase.name: phase for phase in record.starts[-1].start_up}
    assert sum(phase.graphs for phase in phases.values()) == (compile_counts() - before).graphs
    assert phases["warm-up, stage 1"].graphs > phases["warm-up, stage 2"].graphs > 0
    assert phases["warm-up, stage 4"].graphs == 0  # the extension has another window and scale only
    assert {"Python and imports", "data", "model", "everything else"} <= phases.keys()
    assert all(phase.seconds >= 0 for phase in phases.values())
    log = (tmp_path / "run/log.txt").read_text()
    assert "| warm-up, stage 1 |" in log and "| start to first timed step |" in log
    assert not re.search("^recompiled", log, re.MULTILINE)


def test_a_graph_compiled_inside_the_clock_is_counted_and_explained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Schedule, "warmup_steps", lambda self: [0, 1, 2])  # no stage but the first
    assert train(SPEC, data, tmp_path / "run").late_graphs == 3  # two sizes, and Adam on the embedding once it is split
    log = (tmp_path / "run/log.txt").read_text()
    lines = [line for line in log.splitlines() if line.startswith("recompiled after the clock started: training_loss")]
    assert len(lines) == 2 and all("size mismatch" in line for line in lines)
    record = read_record(tmp_path / "run")
    assert record.compilation is not None and record.compilation.late_graphs == 3


def test_the_table_of_functions_sums_up(data: Path):
    torch.compile(lambda x: x + 1)(torch.ones(3))
    lines = functions_table(compiled_functions())
    assert lines[-1].split("|")[1:4] == [" all ", " 1 ", " 1 "]


def test_a_graphs_times_leave_out_what_was_compiled_before(data: Path):
    rows: list[GraphTimes] = []
    torch.compile(lambda x: x + 1)(torch.ones(3))
    with timed_graph("one", rows):
        torch.compile(lambda x: x + 2)(torch.ones(3))
    with timed_graph("none", rows):
        pass
    [one, none] = rows
    assert one.seconds >= one.tracing_s + one.forward_s > 0 == none.tracing_s
    assert [line.split("|")[1:3] for line in graph_times_table({"run": rows})[2:]] == [
        [" run ", " one "],
        [" run ", " none "],
    ]


def test_a_helper_waits_for_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanogpt.training.parallel_compile.MEMORY_PAUSES_S", (0, 0))
    refusals = [torch.OutOfMemoryError(), torch.OutOfMemoryError()]

    def call(number: int) -> int:
        if refusals:
            raise refusals.pop()
        return number

    assert once_there_is_memory(call, 3) == 3
    refusals = [torch.OutOfMemoryError() for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError):
        once_there_is_memory(call, 3)


def test_kernel_compilers_are_asked_before_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch):
    """Until the first answer torch compiles kernels in the process itself, one after another."""
    from torch._inductor.async_compile import AsyncCompile

    asked: list[object] = []

    def submit(job: object) -> Future[Any]:
        asked.append(job)
        return Future()

    pool = SimpleNamespace(submit=submit)
    monkeypatch.setattr(AsyncCompile, "process_pool", lambda: pool)
    monkeypatch.setattr(AsyncCompile, "_ready_future", None)
    monkeypatch.setattr("torch._inductor.async_compile.get_compile_threads", lambda: 8)
    start_kernel_compilers()
    assert len(asked) == 1
    assert AsyncCompile.use_process_pool() is False and len(asked) == 1


def test_counts_add_and_subtract():
    one, other = CompileCounts(5, 4, 3, 2, 1), CompileCounts(1, 1, 1, 1, 1)
    assert one - other == CompileCounts(4, 3, 2, 1, 0)
    assert one - other + other == one


def test_the_graphs_are_divided_among_processes(data: Path):
    with join_world(SPEC) as world, Trainer(SPEC, world, run=None, data_directory=data) as trainer:
        parameters = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        position = trainer.train_batches.state_dict()
        jobs = graph_jobs(SPEC)
        assert [job.tokens for job in jobs] == [128, 80, 64, 64] and jobs[-1].settings is None
        for process, expected in ((0, {"training_loss": 2}), (1, {"training_loss": 3, "evaluation_loss": 1})):
            for job in jobs[process::2]:
                call_graph(job, SPEC, trainer.micro_step, trainer.evaluation_loss)
            assert {entry.name: entry.graphs for entry in compiled_functions()} == expected
        for parameter, before in zip(trainer.model.parameters(), parameters, strict=True):
            assert torch.equal(parameter, before) and parameter.grad is None
        assert trainer.train_batches.state_dict() == position
        trainer.warm_up()
        found = {entry.name: entry.graphs for entry in compiled_functions()}
        assert (found["training_loss"], found["evaluation_loss"]) == (3, 1)  # nothing was left to the warm-up


@pytest.mark.parametrize("model", ["speedrun", "record89", "record92"])
def test_the_optimizers_warm_up_leaves_no_graph_of_its_own_to_the_steps(model: str, tmp_path: Path):
    spec = tiny_spec("runtime.compile=on", "training.warmup=true", model=model)
    data = make_data(tmp_path / "data", first_token=0 if model == "speedrun" else FIRST_WITH_PREFIX)

    def updates() -> dict[str, int]:
        return {entry.name: entry.graphs for entry in compiled_functions() if "update" in entry.name}

    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=data) as trainer:
        trainer.optimizer.warm_up(1)
        ahead = updates()
        assert len(ahead) == 2 and min(ahead.values()) >= 2
        trainer.warm_up()
        assert updates() == ahead


def test_segments_and_candidates_make_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch):
    spec = load_recipe("record89", ["training.stages.2.max_segment_tokens=1920"])
    assert [job.max_seqlen for job in graph_jobs(spec)] == [1920, 2048, 2048, 896, 262_144]
    monkeypatch.setattr(Record89ModelSpec, "sampled_softmax", True)
    spec = load_recipe("record89", ["training.stages.2.candidates=14336"])
    assert [job.settings and job.settings.point.loss.candidates for job in graph_jobs(spec)] == [
        14_336, None, None, None, None
    ]  # fmt: skip


def test_each_job_is_taken_by_one_process(tmp_path: Path):
    """Whoever is free takes the next: helpers the most expensive that is left, the run the cheapest."""
    jobs = graph_jobs(load_recipe("1xh100"))
    helper, other = not_taken(enumerate(jobs), tmp_path), not_taken(enumerate(jobs), tmp_path)
    run = not_taken(reversed(list(enumerate(jobs))), tmp_path)
    assert [next(helper), next(run), next(other), next(helper)] == [jobs[0], jobs[3], jobs[1], jobs[2]]
    assert [*helper, *other, *run] == []


def test_helpers_leave_cores_and_memory():
    jobs = graph_jobs(load_recipe("1xh100"))
    assert [job.tokens for job in jobs] == [49_152, 32_768, 16_384, 262_144]
    assert isinstance(jobs[0], GraphJob) and jobs[0].memory == 22_118_400_000
    assert helpers_that_fit(jobs, cores=2, memory=None) == (0, 0)
    assert helpers_that_fit(jobs, cores=8, memory=None) == (3, 3)
    assert helpers_that_fit(jobs, cores=64, memory=None) == (4, 4)  # a graph for each
    assert helpers_that_fit(jobs, cores=64, memory=108_000_000_000) == (4, 4)
    assert helpers_that_fit(jobs, cores=8, memory=88_000_000_000) == (3, 3)
    assert helpers_that_fit(jobs, cores=64, memory=74_000_000_000) == (4, 1)
    assert helpers_that_fit(jobs, cores=64, memory=58_000_000_000) == (1, 1)
    assert helpers_that_fit(jobs, cores=64, memory=54_000_000_000) == (0, 0)
    assert helpers_that_fit(jobs, cores=16, memory=130_000_000_000, other_ranks=1) == (3, 3)
    assert helpers_that_fit(jobs, cores=8, memory=130_000_000_000, other_ranks=1) == (2, 2)
    assert helpers_that_fit(jobs, cores=64, memory=130_000_000_000, other_ranks=7) == (0, 0)


@pytest.mark.parametrize(
    ("free", "tasks", "turns"),
    [
        (130e9, [*KERNELS, "0", "1", "2", "3"], 4),
        (74e9, [*KERNELS, "0", "1", "2", "3"], 1),
        (58e9, [*KERNELS, "0"], 1),
        (44e9, [*KERNELS], 0),
        (35e9, [], 0),
    ],
)
def test_as_many_helpers_are_forked_as_the_gpu_has_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, tasks: list[str], turns: int
):
    """The process that they are forked from starts before the GPU is asked, which takes a while."""
    events: list[Any] = []

    class Recorded:
        fork, end = events.append, lambda self: events.append("ended")

        def __init__(self) -> None:
            events.append("started")

    def memory(device: torch.device) -> tuple[int, int]:
        events.append("asked")
        return int(free), 141_000_000_000

    monkeypatch.setattr("nanogpt.training.compile_helper.HelperServer", Recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    world = cast(World, SimpleNamespace(device=torch.device("cuda")))
    with helpers_for(load_recipe("1xh100"), world, tmp_path) as helpers:
        assert [helper.task for helper in helpers] == tasks
        *before, order = events
        assert before == ["started", "asked"]
        assert (order.root, order.tasks, order.turns) == (str(tmp_path), tasks, turns)
        taken = [number for number in range(4) if not take(tmp_path, number)]
        assert taken == [int(task) for task in tasks if task not in KERNELS]
    assert events[3:] == ["ended"]


def test_helpers_call_their_graphs_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Waits(Exception):
        pass

    def waits(seconds: float) -> None:
        raise Waits

    monkeypatch.setattr("nanogpt.training.parallel_compile.time.sleep", waits)
    with turn_of(tmp_path, 2):
        with turn_of(tmp_path, 2), pytest.raises(Waits), turn_of(tmp_path, 2):
            pass
        with turn_of(tmp_path, 2):  # the second one's again
            pass


@pytest.mark.parametrize("task", KERNELS)
def test_kernels_are_launched_without_a_graph_or_a_trace(data: Path, monkeypatch: pytest.MonkeyPatch, task: str):
    """Of every stage and of evaluation, on few tokens."""
    monkeypatch.setattr("nanogpt.training.parallel_compile.FEW_TOKENS", 32)
    graphs_before = compile_counts().graphs
    with join_world(SPEC) as world, Trainer(SPEC, world, run=None, data_directory=data) as trainer:
        model = trainer.model
        parameters = [parameter.detach().clone() for parameter in model.parameters()]
        with (
            mock.patch.object(model, "training_loss", wraps=model.training_loss) as trained,
            mock.patch.object(model, "evaluation_loss", wraps=model.evaluation_loss) as evaluated,
        ):
            launch_kernels(SPEC, MicroStep(model, trained, grad_scale=1.0), task)
        assert (trained.call_count, evaluated.call_count) == (3, 1)
        batches = [call.args[0] for call in (*trained.call_args_list, *evaluated.call_args_list)]
        assert {len(batch.inputs) for batch in batches} == {32}
        for parameter, before in zip(model.parameters(), parameters, strict=True):
            assert torch.equal(parameter, before) and parameter.grad is None
    assert compile_counts().graphs == graphs_before
