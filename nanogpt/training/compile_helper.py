"""The process that helpers are forked from, which imports for all of them what compiles graphs: seconds of Python.

`nanogpt.training.parallel_compile` has what helpers do. The process starts before the run itself imports torch, where
no file of compiled code can have what the run needs, and otherwise once no file is found. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from nanogpt.cache.compile_cache import may_have
from nanogpt.frames import with_room
from nanogpt.garbage import collect_later
from nanogpt.launch.tied import die_with_parent, tied_command
from nanogpt.spec import RunSpec

CORES_PER_HELPER = 2  # a helper computes in one thread, until its graph's kernels go to many processes at once
# Once a process has asked CUDA for anything, no fork of it can use a GPU. Inductor asks for one when it is imported:
# with this it asks NVML. The processes that compile a helper's kernels are forks of it, and import nothing either.
SETTINGS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TORCHINDUCTOR_WORKER_START": "fork"}
IMPORTED = (
    "nanogpt.training.parallel_compile",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.async_compile",
)


@dataclass(frozen=True)
class Order:
    """What the helpers are to do: see `nanogpt.training.parallel_compile`."""

    root: str
    tasks: Sequence[str]
    turns: int
    spec: str  # JSON
    environment: Mapping[str, str]


class HelperServer:
    """The process, which waits for an order when it has imported. Start it from a thread that lasts."""

    def __init__(self) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // 2)  # helpers seldom compile kernels at the same time
        self._output = os.memfd_create("helpers")
        self._process = subprocess.Popen(
            tied_command("nanogpt.training.compile_helper"),
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SETTINGS, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
            text=True,
        )

    def fork(self, order: Order) -> None:
        """Have it forked into a helper for each task. Once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(f"{json.dumps(asdict(order))}\n")

    def exit_code(self) -> int | None:
        """Of the process; None while it lives, as it does until its last helper has ended."""
        return self._process.poll()

    def output(self) -> str:
        """What it has said so far; helpers speak into files of their own."""
        return os.pread(self._output, os.fstat(self._output).st_size, 0).decode(errors="replace")

    def end(self) -> None:
        """End it and its helpers, whatever they do."""
        self._process.kill()
        self._process.communicate()
        os.close(self._output)


_begun: list[HelperServer] = []


def import_ahead(spec: RunSpec, directory: Path | None, *, fresh: bool = False) -> None:
    """Start the process if this one, a node's first rank, will most likely need helpers.

    directory, fresh: as for `nanogpt.cache.compile_cache.compile_cache`.
    """
    if (
        os.environ.get("LOCAL_RANK", "0") == "0"
        and len(os.sched_getaffinity(0)) > CORES_PER_HELPER
        and spec.runtime.compiles(gpu=spec.hardware.gpu != "cpu")
        and spec.training.warmup
        and directory is not None
        and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        and (fresh or not may_have(spec, directory))
    ):
        with contextlib.suppress(OSError):  # then it starts later
            _begun.append(HelperServer())


def helper_server() -> HelperServer:
    """The process that was started ahead, or else a new one."""
    return _begun.pop() if _begun else HelperServer()


def end_unneeded() -> None:
    """End what was started ahead and not used."""
    while _begun:
        _begun.pop().end()


def code_file(root: Path, task: str) -> Path:
    """Where a helper's exit code is."""
    return root / f".helper-{task}.code"


def output_file(root: Path, task: str) -> Path:
    """Where a helper's output is."""
    return root / f".helper-{task}.txt"


def import_and_hash() -> None:
    """Import what helpers need, and compute the keys of the compilers' own files, 400 MB of Triton's in a thread."""
    triton = importlib.import_module("torch._inductor.runtime.triton_compat")
    with ThreadPoolExecutor(1) as hashing:
        if triton.HAS_TRITON:
            hashing.submit(triton.triton_key)
        for module in IMPORTED:
            importlib.import_module(module)
        importlib.import_module("torch._inductor.codecache").torch_key()


@with_room
def main() -> None:
    """Import; fork; wait for the helpers, and leave their exit codes in files."""
    collect_later()
    import_and_hash()
    text = sys.stdin.readline()
    if not text:
        return
    order = Order(**json.loads(text))
    os.environ.clear()
    os.environ.update(order.environment)
    server, tasks = os.getpid(), {}
    for task in order.tasks:
        pid = os.fork()
        if pid == 0:
            _help(server, order, task)
        tasks[pid] = task
    while tasks:
        pid, status = os.wait()
        if pid in tasks:
            code_file(Path(order.root), tasks.pop(pid)).write_text(str(os.waitstatus_to_exitcode(status)))


def _help(server: int, order: Order, task: str) -> NoReturn:
    """Be a helper."""
    code = 1
    try:
        die_with_parent(server)
        os.register_at_fork(after_in_child=functools.partial(die_with_parent, os.getpid()))
        output = os.open(output_file(Path(order.root), task), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from nanogpt.training.parallel_compile import help_compiling

        help_compiling(Path(order.root), task, order.turns, RunSpec.model_validate_json(order.spec))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the run waits for it, and taking apart what was imported takes a second


if __name__ == "__main__":
    main()
