"""Compiling the model's graphs by several processes at once, each graph by one of them, where none is in the cache yet.

All processes of a node look for compiled code in one directory (`nanogpt.cache`). So before the warm-up each takes one
graph after another that nobody has taken, calls it once on made-up tokens without any communication, and finds the
others' in the directory: a rank with helpers as each of them ends, any other rank when the warm-up comes to them. The
processes are the ranks of a node and, where these are fewer than the graphs, helpers on its first GPU, as many as
processor cores and the GPU's memory allow, which make the model, compile graphs and end. They are forked from a process
that imports for all of them, while the node's first rank imports too (`nanogpt.training.compile_helper`).

- Helpers call their graphs in turns, as the GPU's memory allows. Compiling them needs none.
- A graph launches our own kernels, which Triton and FlashAttention compile one after another at its first call. Two
  more helpers launch all of them on a few tokens, without any graph, while the others still trace: one of them without
  attention's backward pass, the other, which begins with evaluation, without its forward pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch

from nanogpt.cache.compile_cache import CompileCache, compiled_code_of
from nanogpt.cache.graphs import compile_whole, prepare
from nanogpt.console import say
from nanogpt.data.micro_batches import MicroBatch, cu_seqlens_length
from nanogpt.files import last_line
from nanogpt.garbage import collect_so_far
from nanogpt.kernels.attention_flash import skipping
from nanogpt.launch.world import World, join_world
from nanogpt.models.model_spec import Slot
from nanogpt.spec import RunSpec
from nanogpt.training.build import undrawn_model
from nanogpt.training.compilation import GraphTimes, graph_times_table, timed_graph
from nanogpt.training.compile_helper import CORES_PER_HELPER, HelperServer, Order, code_file, helper_server, output_file
from nanogpt.training.implementations import choose_implementations
from nanogpt.training.micro_step import MicroStep
from nanogpt.training.schedule import Schedule, StepSettings
from nanogpt.training.startup import process_age
from nanogpt.training.tables import rows_of, table_bytes

# Upper bounds of GPU memory: a run has 28 GB for 49,152 tokens, 6 of them the optimizer's, which helpers do not make;
# evaluation keeps nothing for a gradient.
HELPER_BYTES = 4_000_000_000  # context, libraries, parameters and their gradients
OPTIMIZER_BYTES = 6_000_000_000
TRAINED_TOKEN_BYTES, EVALUATED_TOKEN_BYTES = 450_000, 50_000
PATIENCE_S = 600.0  # to wait for a helper
MEMORY_PAUSES_S = (2, 4, 8, 16, 32)
KERNELS = ("forward", "backward")  # tasks of the helpers that launch kernels; the others' are numbers of graphs
FEW_TOKENS = 2_048  # a kernel's code does not depend on their number

T = TypeVar("T")


class GraphJob(NamedTuple):
    """A graph of the model: of training steps like `settings`, or of evaluation where there are none."""

    settings: StepSettings | None
    tokens: int  # of a micro-batch
    max_seqlen: int
    max_documents: int | None
    masked: bool = False  # evaluation with the canonical mask

    @property
    def name(self) -> str:
        """For a table."""
        kind = "training" if self.settings else "evaluation, masked" if self.masked else "evaluation"
        return f"{kind}, {self.tokens:,} tokens"

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


class MadeUpCall(NamedTuple):
    """One call of a graph on made-up tokens."""

    prepare: Callable[[], object]  # finds or compiles the graph
    call: Callable[[], object]


@contextmanager
def made_up_call(
    job: GraphJob, spec: RunSpec, micro_step: MicroStep, evaluation_loss: Callable[..., torch.Tensor]
) -> Iterator[MadeUpCall]:
    """A call of the graph, to be made while the context lasts. No gradient is left."""
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
            embedded = stack.enter_context(rows_of(micro_step.model, batch))
            arguments = (batch, Schedule(spec).final_windows.at_run_time(), embedded, mask)
            yield MadeUpCall(partial(prepare, evaluation_loss, *arguments), partial(evaluation_loss, *arguments))
        else:
            loss_inputs = micro_step.model.loss_inputs(job.settings.point, device)
            yield MadeUpCall(
                partial(micro_step.prepare, batch, loss_inputs), partial(micro_step.compute, batch, loss_inputs)
            )
    for parameter in micro_step.model.parameters():
        parameter.grad = None


def call_graph(
    job: GraphJob,
    spec: RunSpec,
    micro_step: MicroStep,
    evaluation_loss: Callable[..., torch.Tensor],
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Compile the graph, and call it once, in its `turn`, on made-up tokens. No gradient is left."""
    with made_up_call(job, spec, micro_step, evaluation_loss) as made_up:
        made_up.prepare()
        with turn():
            made_up.call()


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


def launch_kernels(spec: RunSpec, micro_step: MicroStep, task: str) -> None:
    """Launch what the run's graphs launch of our own kernels, and what its model launches between steps.

    `micro_step` is without any graph. task: of KERNELS, attention's pass that is launched. No gradient is left.
    """
    jobs = graph_jobs(spec)
    with skipping("backward" if task == "forward" else "forward"):
        micro_step.model.weights_changed(0)
        for job in jobs if task == "forward" else reversed(jobs):
            few = min(job.tokens, FEW_TOKENS)
            small = job._replace(tokens=few, max_seqlen=min(job.max_seqlen, few))
            call_graph(small, spec, micro_step, micro_step.model.evaluation_loss)


def helpers_that_fit(jobs: Sequence[GraphJob], cores: int, memory: int | None, other_ranks: int = 0) -> tuple[int, int]:
    """How many helpers to start, one for each of `jobs` from the first on, and how many may call graphs at a time.

    Args:
        jobs: the graphs. Those that a process takes later are smaller than its first.
        cores: that all ranks of the node have together.
        memory: bytes of the GPU that are free before the run has made its model and optimizer; None without a GPU.
        other_ranks: of the node, each on a GPU of its own: they compile as helpers do.
    """
    wanted = max(0, min(len(jobs), (cores - 1) // CORES_PER_HELPER) - other_ranks)  # one core for this rank
    if memory is None:
        return wanted, wanted
    for count in range(wanted, 0, -1):
        # The run's own call, and the helpers that launch kernels.
        room = memory - OPTIMIZER_BYTES - jobs[-1].memory - (count + 1 + len(KERNELS)) * HELPER_BYTES
        turns = sum(needed <= room for needed in itertools.accumulate(job.memory for job in jobs[:count]))
        if turns:
            return count, turns
    return 0, 0


def compile_in_parallel(
    spec: RunSpec,
    world: World,
    cache: CompileCache,
    *,
    micro_step: MicroStep,
    evaluation_loss: Callable[..., torch.Tensor],
    warm_up_optimizer: Callable[[], None],
    given_up: Callable[[], bool],
) -> list[str]:
    """Compile each graph once on this node, where no file of compiled code was found and several processes can.

    Every rank calls it; they wait for one another. Parameters, gradients and data stay as they were. A node's first
    rank compiles the optimizer's graphs while the others and helpers compile the model's. given_up: whether nobody
    waits for the helpers any more. Returns a table for the log: what this process and its helpers did.
    """
    helpers: Sequence[Helper] = cache.helpers
    if cache.root is None or cache.found or (world.size == 1 and not helpers):
        return []
    jobs, rows, leads = list(enumerate(graph_jobs(spec))), list[GraphTimes](), world.local_rank == 0
    if leads:  # first, so that its kernels are tuned before the graphs' turns: one process tunes at a time
        with timed_graph("the optimizer's", rows):
            warm_up_optimizer()
    for job in not_taken(reversed(jobs) if leads else jobs, cache.root):  # the others have the first
        with timed_graph(job.name, rows):
            call_graph(job, spec, micro_step, evaluation_loss)
    collect_so_far()  # the processes wait for one another now
    for helper in reversed(helpers):  # the cheapest graphs are there first, and are loaded while others still compile
        helper.wait(given_up)
        if helper.task not in KERNELS and not given_up():
            job = jobs[int(helper.task)][1]
            with (
                timed_graph(f"{job.name}, loading", rows),
                made_up_call(job, spec, micro_step, evaluation_loss) as made_up,
            ):
                made_up.prepare()
    world.synchronize()
    world.communicator.barrier()
    return graph_times_table({"the run": rows, **{helper.name: helper.times() for helper in helpers}})


@contextmanager
def helpers_for(spec: RunSpec, world: World, root: Path) -> Iterator[list[Helper]]:
    """As many helpers of a node's first rank as fit, compiling into `root` while the context lasts."""
    jobs, cores, others = graph_jobs(spec), len(os.sched_getaffinity(0)), spec.hardware.gpus_per_node - 1
    gpu = world.device.type == "cuda"
    count, turns = helpers_that_fit(jobs, cores, None, others)
    if not count and not (gpu and others):
        yield []
        return
    server = helper_server()
    try:
        kernels_fit = False
        if gpu:
            memory = torch.cuda.mem_get_info(world.device)[0] - int(table_bytes(spec))  # makes a context, meanwhile
            count, turns = helpers_that_fit(jobs, cores, memory, others)
            kernels_fit = memory >= OPTIMIZER_BYTES + jobs[0].memory + (1 + len(KERNELS)) * HELPER_BYTES
        tasks = [*KERNELS * kernels_fit, *map(str, range(count))]
        yield begin_helpers(server, on_one_gpu(spec), root, tasks, turns)
    finally:
        server.end()


def begin_helpers(server: HelperServer, spec: RunSpec, root: Path, tasks: Sequence[str], turns: int) -> list[Helper]:
    """Have helpers compile graphs of `spec`, a world of its own, into `root`.

    turns: how many of them may call graphs at a time.
    """
    for task in tasks:
        if task not in KERNELS:
            take(root, int(task))
    server.fork(Order(str(root), tasks, turns, spec.model_dump_json(), without_rank(os.environ)))
    return [Helper(server, root, task) for task in tasks]


def on_one_gpu(spec: RunSpec) -> RunSpec:
    """The spec for a process that is a world of its own. Its graphs are the same."""
    return spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"nodes": 1, "gpus_per_node": 1})})


class Helper:
    """A process that compiles into `root`: graph number `task`, and then others that nobody has taken; or kernels."""

    def __init__(self, server: HelperServer, root: Path, task: str):
        self.name = f"helper for {task} kernels" if task in KERNELS else f"helper {int(task) + 1}"
        self.task = task
        self._server, self._root = server, root

    def exit_code(self) -> int | None:
        """Its own, or that of the process it was to be forked from; None while it works."""
        with contextlib.suppress(OSError, ValueError):
            return int(code_file(self._root, self.task).read_text())
        return self._server.exit_code()

    def wait(self, given_up: Callable[[], bool]) -> None:
        """Wait until its graphs are done or `given_up`. If it fails, the run compiles by itself, and a line says so."""
        deadline = time.monotonic() + (0 if self.task in KERNELS else PATIENCE_S)
        while (code := self.exit_code()) is None and time.monotonic() < deadline and not given_up():
            time.sleep(0.1)
        who = f"{self.name}, compiling ahead"
        if code is None and self.task not in KERNELS and not given_up():
            say(f"{who}: not done after {PATIENCE_S:.0f} s; the run continues without it")
        elif code:
            last = last_line(self._output())
            say(f"{who}: ended with exit code {code}{f': {last}' if last else ''}; the run compiles by itself")

    def _output(self) -> str:
        with contextlib.suppress(OSError):
            return output_file(self._root, self.task).read_text(errors="replace")
        return self._server.output()

    def times(self) -> list[GraphTimes]:
        """What it has done so far."""
        try:
            return [GraphTimes(**row) for row in json.loads(times_file(self._root, self.task).read_text())]
        except (OSError, ValueError):
            return []


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what makes a process a rank of a run. It still sees that rank's GPU alone."""
    return {name: value for name, value in environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def once_there_is_memory(call: Callable[..., T], *arguments: Any) -> T:
    """The call's result; while the GPU's memory is full of others' work it is tried again, for a minute."""
    for pause in MEMORY_PAUSES_S:
        with contextlib.suppress(torch.OutOfMemoryError):
            return call(*arguments)
        torch.cuda.empty_cache()
        time.sleep(pause)
    return call(*arguments)


@contextmanager
def turn_of(root: Path, turns: int) -> Iterator[None]:
    """Wait for one of `turns` turns; leaving it gives back the GPU's memory that nothing uses."""
    with ExitStack() as stack:
        files = [stack.enter_context((root / f".turn-{number}").open("w")) for number in range(turns)]
        while not any(map(_locked, files)):
            time.sleep(0.1)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _locked(file: IO[str]) -> bool:
    """Whether it could be locked, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def times_file(root: Path, task: str) -> Path:
    """Where a helper says what it has done."""
    return root / f".helper-{task}.json"


def help_compiling(root: Path, task: str, turns: int, spec: RunSpec) -> None:
    """What a helper does."""
    with join_world(spec) as world, compiled_code_of(root, world):
        if world.device.type == "cuda":
            torch.set_num_threads(1)  # the others have the cores
            if task not in KERNELS:
                start_kernel_compilers()  # forks of this process, while it has no threads
            threading.Thread(target=torch.cuda.synchronize, args=(world.device,), daemon=True).start()  # for a context
        compile_graphs(spec, world, root, task, turns)


def compile_graphs(spec: RunSpec, world: World, root: Path, task: str, turns: int) -> None:
    """`help_compiling`, once it knows its GPU."""
    implementations, _ = choose_implementations(spec, world.device)
    model = once_there_is_memory(lambda: undrawn_model(spec, device=world.device, implementations=implementations))
    training_loss = model.training_loss if task in KERNELS else compile_whole(model.training_loss)
    micro_step = MicroStep(model, training_loss, grad_scale=1.0, plain_kernels=implementations.plain_kernels)
    rows = [GraphTimes("start", process_age())]

    def timed(name: str, call: Callable[..., None], *arguments: Any) -> None:
        with timed_graph(name, rows):
            once_there_is_memory(call, *arguments)
            world.synchronize()
        times_file(root, task).write_text(json.dumps([asdict(row) for row in rows]))

    if task in KERNELS:
        timed("launching kernels", launch_kernels, spec, micro_step, task)
        return
    evaluation_loss = compile_whole(model.evaluation_loss)
    jobs, turn = list(enumerate(graph_jobs(spec))), partial(turn_of, root, turns)
    for job in itertools.chain([jobs[int(task)][1]], not_taken(jobs, root)):
        timed(job.name, call_graph, job, spec, micro_step, evaluation_loss, turn)


def start_kernel_compilers() -> None:
    """Start the processes that compile Triton kernels: until they have imported, this process compiles by itself."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    AsyncCompile.use_process_pool()
