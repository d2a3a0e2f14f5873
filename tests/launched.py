"""Runs of several real processes: `nanogpt launch` or plain torchrun, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tiny_runs import tiny_spec, write_recipe

PATIENCE_S = 150.0  # for anything to happen on a busy machine
NAMES = {"launch": ("-m", "nanogpt", "launch"), "torchrun": ("-m", "torch.distributed.run")}

# So many short steps that no test sees the end, after a few stages as in a real run.
LONG = (
    "training.stages=["
    "{steps: 100, batch_tokens: 256, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1},"
    "{steps: 100, batch_tokens: 320, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.52},"
    "{steps: 100000, batch_tokens: 512, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.73}]"
)


def wait_until(
    condition: Callable[[], object], output: Callable[[], str] = lambda: "", within_s: float = PATIENCE_S
) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, output()
        time.sleep(0.02)


def endless_recipe(path: Path, processes: int, *overrides: str) -> Path:
    """A recipe of the tiny run that continues until it is stopped."""
    settings = (LONG, f"hardware.gpus_per_node={processes}", "evaluation.every=1000000", "training.warmup=false")
    return write_recipe(path, tiny_spec(*settings, *overrides))


class Launched:
    """A launcher and its ranks; a context manager that leaves no process behind.

    Args:
        directory: for the output and the runs; made.
        processes: ranks.
        arguments: of `nanogpt train`, beginning with the recipe or an option.
        launcher: launch or torchrun.
        options: of torchrun; None: one node, alone.
        prefix: of the command: `ip netns exec NAME`.
    """

    def __init__(
        self,
        directory: Path,
        processes: int,
        *arguments: object,
        launcher: str = "launch",
        options: tuple[str, ...] | None = None,
        prefix: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.runs = directory / "runs"
        self.output_path = directory / "output.txt"
        given = list(map(str, arguments))
        if "--resume" not in given and "--out" not in given:
            given += ["--out", str(self.runs)]
        own = {"TMPDIR": str(directory)} if launcher == "torchrun" else {}  # where it leaves a directory of its own
        middle = ["--"] if launcher == "launch" else ["-m", "nanogpt", "train"]
        command = [*prefix, sys.executable, *NAMES[launcher], *(("--standalone",) if options is None else options)]
        with self.output_path.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--nproc-per-node", str(processes), *middle, *given],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **own, **(environment or {})},
            )
        self.processes = processes
        self.seen: dict[int, int] = {}  # pids of ranks by rank

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks()
        for pid in (self.process.pid, *self.seen.values()):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have been started, by rank."""
        for pid in descendants(self.process.pid):
            environment = read(f"/proc/{pid}/environ").split("\0")
            rank = next((int(entry[5:]) for entry in environment if entry.startswith("RANK=")), None)
            if rank is not None:
                self.seen.setdefault(rank, pid)  # not what the rank itself starts
        return self.seen

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}: {self.output}"
            assert time.monotonic() < until, f"no {what}: {self.output}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until `step` steps are done."""
        self.wait_for(f"step {step}", lambda: f"\nstep:{step}/" in self.log)
        self.wait_for("all ranks", lambda: len(self.ranks()) == self.processes)

    @property
    def log(self) -> str:
        return "".join(read(str(path)) for path in self.runs.glob("*/log.txt"))

    @property
    def run(self) -> Path:
        (path,) = (path for path in self.runs.iterdir() if not path.name.startswith("."))
        return path

    def end(self, within_s: float = PATIENCE_S) -> int:
        """Wait for the launcher, and check that no rank outlives it; returns the exit code."""
        began = time.monotonic()
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {within_s} s: {self.output}") from None
        self.wait_for_all_gone(within_s - (time.monotonic() - began))
        return code

    def wait_for_all_gone(self, within_s: float) -> None:
        until = time.monotonic() + within_s
        while left := [rank for rank, pid in self.seen.items() if lives(pid)]:
            assert time.monotonic() < until, f"ranks {left} still live: {self.output}"
            time.sleep(0.05)


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*") for child in read(f"{task}/children").split()]


def descendants(pid: int) -> list[int]:
    return [below for child in children(pid) for below in (child, *descendants(child))]


def lives(pid: int) -> bool:
    state = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"
