"""Python processes that begin with PyTorch and the trainer imported: forks of a server that has them, one a session.

A new interpreter takes seconds to import those. Tests of how a process is started start one themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

_server = multiprocessing.get_context("forkserver")
# The last is loaded by the first call of a custom operation, compiled or not.
_server.set_forkserver_preload(["nanogpt.cli.main", "nanogpt.training.trainer", "torch._dynamo"])


class Forked:
    """A process that calls `function(*arguments)`, on one thread; it ends as Python would.

    `environment` is all of its environment; None: this process's. It does not outlive the session.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ):
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._output = Path(name), Path(f"{name}.err")
        self._process = _server.Process(
            target=_call,
            args=(function, arguments, self._output, dict(os.environ if environment is None else environment)),
            daemon=True,
        )
        self._process.start()

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Its end and what it has written. Raises AssertionError when it does not come to an end."""
        self._process.join(timeout)
        alive = self._process.is_alive()
        if alive:
            self._process.kill()
            self._process.join()
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in self._output]
        for path in self._output:
            path.unlink(missing_ok=True)
        assert not alive, f"still there after {timeout} s: {texts}"
        code = self._process.exitcode
        assert code is not None
        return subprocess.CompletedProcess([], code, *texts)


def _call(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    output: tuple[Path, Path],
    environment: dict[str, str],
) -> None:
    import torch

    for number, path in enumerate(output, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def run_code(code: str, *arguments: str) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_nanogpt(*arguments: str) -> None:
    sys.argv = ["nanogpt", *arguments]
    runpy.run_module("nanogpt", run_name="__main__", alter_sys=True)


def forked_code(code: str, *arguments: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """As `python -c CODE ARGUMENT...`."""
    return Forked(run_code, textwrap.dedent(code), *map(str, arguments)).wait(timeout)


def forked_nanogpt(*arguments: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """As `python -m nanogpt ARGUMENT...`."""
    return Forked(run_nanogpt, *map(str, arguments)).wait(timeout)


def in_ranks(
    processes: int, function: Callable[..., object], *arguments: object, timeout: float = 200
) -> list[subprocess.CompletedProcess[str]]:
    """What became of `function(*arguments)` in each of so many ranks, started as torchrun does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Forked(
            function,
            *arguments,
            environment={
                **os.environ,
                **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
                **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
        )
        for rank in range(processes)
    ]
    return [rank.wait(timeout) for rank in ranks]
