"""Compiling the model's graphs by several processes at once, each graph by one of them, where none is in the cache yet.

All processes of a node look for compiled code in one directory (`nanogpt.cache`). So before the warm-up each takes one
graph after another that nobody has taken, calls it once on made-up tokens without any communication, and finds the
others' in the directory when the warm-up comes to them. The processes are the ranks of a node; a run on one GPU starts
helpers, as many as processor cores and the GPU's memory allow, which make the model, compile graphs and end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanogpt.cache.compile_cache import CompileCache, compiled_code_of
from nanogpt.cache.graphs import compile_whole
from nanogpt.console import say
from nanogpt.data.batches import MicroBatch, cu_seqlens_length
from nanogpt.launch.tied import tied_command
from nanogpt.launch.world import World, join_world
from nanogpt.models.model_spec import Slot
from nanogpt.spec import RunSpec
from nanogpt.training.build import build_model
from nanogpt.training.implementations import choose_implementations
from nanogpt.training.micro_step import MicroStep
from nanogpt.training.schedule import Schedule, StepSettings
from nanogpt.training.tables import rows_of

CORES_PER_HELPER = 4
# Upper bounds of GPU memory: a run has 28 GB for 49,152 tokens, 6 of them the optimizer's, which helpers do not make;
# evaluation keeps nothing for a gradient.
HELPER_BYTES = 4_000_000_000  # context, libraries, parameters and their gradients
TRAINED_TOKEN_BYTES, EVALUATED_TOKEN_BYTES = 450_000, 50_000
PATIENCE_S = 600.0  # to wait for a helper


class GraphJob(NamedTuple):
    """A graph of the model: of training steps like `settings`, or of evaluation where there are none."""

    settings: StepSettings | None
    tokens: int  # of a micro-batch
    max_seqlen: int
    max_documents: int | None
    masked: bool = False  # evaluation with the canonical mask

    @property
    def memory(self) -> int:
        """Bytes of GPU memory that a process with a model needs to call it."""
        return self.tokens * (TRAINED_TOKEN_BYTES if self.settings else EVALUATED_TOKEN_BYTES)


def graph_jobs(spec: RunSpec) -> list[GraphJob]:
    """The graphs of a run, most expensive first."""
    schedule, by_graph = Schedule(spec), {}
    for first in schedule.first_steps:
        settings = schedule.at(first)
        tokens = settings.batch_tokens // spec.training.slots
        request = settings.request
        job = GraphJob(settings, tokens, request.max_seqlen, request.max_documents)
        by_graph[job[1:], settings.point.loss.terms] = job
    evaluated = spec.evaluation.micro_batch_tokens
    largest_first = sorted(by_graph.values(), key=lambda job: -job.tokens)
    masked = [GraphJob(None, evaluated, evaluated, None, masked=True)] if spec.training.masked else []
    return [*largest_first, *masked, GraphJob(None, evaluated, evaluated, None)]


def call_graph(
    job: GraphJob, spec: RunSpec, micro_step: MicroStep, evaluation_loss: Callable[..., torch.Tensor]
) -> None:
    """Call the graph once, on made-up tokens. No gradient is left."""
    device = next(micro_step.model.parameters()).device
    inputs = torch.zeros(job.tokens, dtype=torch.int64, device=device)
    ends = torch.arange(cu_seqlens_length(job.tokens, job.max_documents), device=device) * job.max_seqlen
    tokens = np.zeros(job.tokens, dtype=np.uint16)
    loss = None if job.settings is None else job.settings.point.loss
    arrays = spec.model.batch_extras(Slot(tokens, tokens, loss, slots=spec.training.slots)).arrays
    extras = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    batch = MicroBatch(inputs.int(), inputs, ends.clamp(max=job.tokens).int(), job.max_seqlen, extras)
    with ExitStack() as stack:
        for table in micro_step.model.tables.values():
            stack.enter_context(table.idle())
        if job.settings is None:
            rows = spec.model.padded_vocab_size
            mask = torch.zeros((rows, rows // 8), dtype=torch.uint8, device=device) if job.masked else None
            with rows_of(micro_step.model, batch) as embedded:
                evaluation_loss(batch, Schedule(spec).final_windows.at_run_time(), embedded, mask)
        else:
            micro_step.compute(batch, micro_step.model.loss_inputs(job.settings.point, device))
    for parameter in micro_step.model.parameters():
        parameter.grad = None


def take(root: Path, number: int) -> bool:
    """Whether this process is the first of the node to take job `number`."""
    try:
        os.close(os.open(root / f".graph-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def not_taken(jobs: Iterable[tuple[int, GraphJob]], root: Path) -> Iterator[GraphJob]:
    """The numbered jobs that no process of this node has taken yet; each is taken as it comes up."""
    return (job for number, job in jobs if take(root, number))


def helpers_that_fit(jobs: Sequence[GraphJob], cores: int, memory: int | None) -> int:
    """How many helpers to start, one for each of `jobs` from the first on; the last at least is left to the run itself.

    memory: bytes of the GPU that the run's model and optimizer leave free; None without a GPU. Jobs that a
    process takes later are smaller than its first.
    """
    count, needed = 0, jobs[-1].memory
    for job in jobs[: min(len(jobs) - 1, cores // CORES_PER_HELPER)]:
        needed += HELPER_BYTES + job.memory
        if memory is not None and needed > memory:
            break
        count += 1
    return count


def compile_in_parallel(
    spec: RunSpec,
    world: World,
    cache: CompileCache,
    *,
    micro_step: MicroStep,
    evaluation_loss: Callable[..., torch.Tensor],
    warm_up_optimizer: Callable[[], None],
    given_up: Callable[[], bool],
) -> None:
    """Compile each graph once on this node, where no file of compiled code was found and several processes can.

    Every rank calls it; they wait for one another. Parameters, gradients and data stay as they were. The optimizer's
    graphs are compiled while helpers compile the model's. given_up: whether nobody waits for the helpers any more.
    """
    if cache.root is None or cache.found:
        return
    jobs = graph_jobs(spec)
    with ExitStack() as stack:
        helpers = []
        if world.size == 1:
            memory = torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else None
            count = helpers_that_fit(jobs, len(os.sched_getaffinity(0)), memory)
            if count == 0:
                return
            helpers = [stack.enter_context(Helper(spec, cache.root, index, count)) for index in range(count)]
        numbered = list(enumerate(jobs))
        for job in not_taken(reversed(numbered) if helpers else numbered, cache.root):  # helpers have the first
            call_graph(job, spec, micro_step, evaluation_loss)
        if helpers:
            warm_up_optimizer()
        for helper in helpers:
            helper.wait(given_up)
    world.synchronize()
    world.communicator.barrier()


class Helper:
    """A process that compiles graph number `index` into `root`, and then others that nobody has taken.

    A context manager: leaving it ends the process.
    """

    def __init__(self, spec: RunSpec, root: Path, index: int, count: int):
        take(root, index)
        self.name = f"helper {index + 1} of {count}, compiling ahead"
        self._output = root / f".helper-{index}.txt"
        threads = max(1, len(os.sched_getaffinity(0)) // (count + 1))
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                tied_command("nanogpt.training.parallel_compile", str(root), str(index)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
                text=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(spec.model_dump_json())

    def wait(self, given_up: Callable[[], bool]) -> None:
        """Wait until it is done or `given_up`. If it fails, the run compiles by itself, and a line says so."""
        deadline = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and time.monotonic() < deadline and not given_up():
            time.sleep(0.1)
        code = self._process.poll()
        if code is None and not given_up():
            say(f"{self.name}: not done after {PATIENCE_S:.0f} s; the run continues without it")
        elif code:
            last = self._output.read_text(errors="replace").strip().splitlines()[-1:]
            say(f"{self.name}: ended with exit code {code}{f': {last[0]}' if last else ''}; the run compiles by itself")

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main(root: str, index: str) -> None:
    """A helper: the spec, as JSON, comes on standard input."""
    spec = RunSpec.model_validate_json(sys.stdin.read())
    with join_world(spec) as world, compiled_code_of(Path(root), world):
        implementations, _ = choose_implementations(spec, world.device)
        model = build_model(spec, device=world.device, implementations=implementations)
        micro_step = MicroStep(
            model, compile_whole(model.training_loss), grad_scale=1.0, plain_kernels=implementations.plain_kernels
        )
        evaluation_loss = compile_whole(model.evaluation_loss)
        jobs = graph_jobs(spec)
        for job in itertools.chain([jobs[int(index)]], not_taken(enumerate(jobs), Path(root))):
            call_graph(job, spec, micro_step, evaluation_loss)
        world.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
