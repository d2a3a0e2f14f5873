"""Runs that are killed at any moment: `nanogpt runs` says what they were, every time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.runs.directory import is_run
from nanogpt.runs.listing import RunRow, list_runs

STEPS = 12
PATIENCE_S = 150.0

# A process that has imported everything by a run of its own, and forks the others: `start OUT WHERE NUMBER` answers
# with a process id, `wait PID` with how it ended, as a shell counts. A run stops itself at its NUMBER-th WHERE: before
# its directory has its name, in the middle of a line of metrics or after it, between writing a record and moving it
# into its place, and the same of a checkpoint.
NURSERY = """
    import contextlib, os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from nanogpt.cli.main import main
    from nanogpt.runs import directory

    def stop_at(where, number):
        left = [number]

        def reached():
            left[0] -= 1
            return left[0] == 0

        def stop():
            os.kill(os.getpid(), signal.SIGSTOP)

        rename, replace, append = Path.rename, Path.replace, directory._Lines.append

        def stopping_rename(path, target):
            if where == "directory" and path.name.startswith(".new-") and reached():
                stop()
            return rename(path, target)

        def stopping_replace(path, target):
            if where in ("record", "checkpoint") and Path(target).name.startswith(("record", "step-")):
                if Path(target).name.startswith({"record": "record", "checkpoint": "step-"}[where]) and reached():
                    stop()
            return replace(path, target)

        def stopping_append(lines, line):
            if where in ("half a line", "line") and lines._path.name == "metrics.jsonl" and reached():
                if where == "half a line":
                    with lines._path.open("a") as file:
                        file.write(line[: len(line) // 2])
                else:
                    append(lines, line)
                stop()
            append(lines, line)

        Path.rename, Path.replace, directory._Lines.append = stopping_rename, stopping_replace, stopping_append

    recipe, data, first = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    said = os.open(f"{first}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    with contextlib.suppress(SystemExit):
        main(["train", recipe, "--data", data, "--out", first])
    print("ready", file=answers)
    for line in sys.stdin:
        command, *arguments = line.rstrip("\\n").split("\\t")
        if command == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(arguments[0]), 0)[1]), file=answers)
        elif (child := os.fork()):
            print(child, file=answers)
        else:
            stop_at(arguments[1], int(arguments[2]))
            main(["train", recipe, "--data", data, "--out", arguments[0]])
"""


class Nursery:
    def __init__(self, recipe: Path, data: Path, first: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(NURSERY), str(recipe), str(data), str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, command: str, *arguments: object) -> int:
        assert self.process.stdin
        print(command, *arguments, sep="\t", file=self.process.stdin, flush=True)
        return int(self._answer())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    tmp_path = tmp_path_factory.mktemp("nursery")
    spec = tiny_spec("evaluation.every=3", "checkpoint.every=4", "training.warmup=true")
    nursery = Nursery(write_recipe(tmp_path / "tiny.yaml", spec), make_data(tmp_path / "data"), tmp_path / "first")
    yield nursery
    nursery.process.stdin.close()  # type: ignore[union-attr]
    nursery.process.wait(PATIENCE_S)


def only_row(directory: Path) -> RunRow | None:
    rows = list_runs(directory) if directory.exists() else []
    assert len(rows) <= 1
    return rows[0] if rows else None


def told(directory: Path) -> tuple[int, float | None, bool]:
    """Steps done and last validation loss by the whole lines of the only run's metrics; whether they have an end."""
    step, val_loss, ended = 0, None, False
    for file in directory.glob("*/metrics.jsonl"):
        for line in file.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            step, ended = max(step, record.get("step", 0)), record["kind"] == "end"
            val_loss = record.get("val_loss", val_loss)
    return step, val_loss, ended


def state_of(pid: int) -> str:
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


def test_a_run_that_is_left_alone(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.tell("wait", nursery.tell("start", tmp_path / "whole", "nowhere", 1)) == 0
    row = only_row(tmp_path / "whole")
    assert row and (row.state, row.steps, row.total_steps, row.problem) == ("finished", STEPS, STEPS, None)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("directory", 1),
        ("record", 1),
        ("record", 2),
        ("record", 3),
        ("half a line", 1),
        ("line", 1),
        ("line", 2),
        ("half a line", 4),
        ("checkpoint", 1),
        ("line", 9),
        ("record", 6),
        ("checkpoint", 2),
        ("half a line", 17),
    ],
)
def test_a_run_that_is_killed(nursery: Nursery, tmp_path: Path, where: str, number: int) -> None:
    out = tmp_path / "out"
    pid = nursery.tell("start", out, where, number)
    until = time.monotonic() + PATIENCE_S
    while state_of(pid) != "T":  # a moment that stands still
        assert state_of(pid) != "Z", "the run has no such moment"
        assert time.monotonic() < until
        time.sleep(0.01)
    before = only_row(out)
    steps, val_loss, ended = told(out)
    assert not ended
    os.kill(pid, signal.SIGKILL)
    assert nursery.tell("wait", pid) == -signal.SIGKILL
    row = only_row(out)
    if (where, number) in (("directory", 1), ("record", 1)):  # killed before there was a run
        assert before is None and row is None
        assert not any(is_run(path) for path in out.glob("[!.]*"))
        return
    assert before is not None and row is not None
    assert row.problem is None
    assert (row.steps, row.val_loss, row.total_steps, row.seed) == (steps, val_loss, STEPS, 0)
    assert (before.steps, before.val_loss) == (row.steps, row.val_loss)
    assert (before.state, row.state) == ("running", "killed")
