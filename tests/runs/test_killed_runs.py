"""Runs that are killed at random moments: `nanogpt runs` says what they were, every time."""

from __future__ import annotations

import json
import os
import random
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

KILLS = 10
STEPS = 12

# A process that has imported everything by a run of its own, and forks the others: `start OUT` answers with
# a process id, `wait PID` with how it ended, as a shell counts.
NURSERY = """
    import contextlib, os, sys
    import torch
    torch.set_num_threads(1)
    from nanogpt.cli.main import main

    recipe, data, first = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    said = os.open(f"{first}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    with contextlib.suppress(SystemExit):
        main(["train", recipe, "--data", data, "--out", first])
    print("ready", file=answers)
    for line in sys.stdin:
        command, argument = line.split()
        if command == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1]), file=answers)
        elif (child := os.fork()):
            print(child, file=answers)
        else:
            main(["train", recipe, "--data", data, "--out", argument])
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

    def tell(self, command: str, argument: object) -> int:
        assert self.process.stdin
        print(command, argument, file=self.process.stdin, flush=True)
        return int(self._answer())


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    spec = tiny_spec("evaluation.every=3", "checkpoint.every=4", "training.warmup=true")
    nursery = Nursery(write_recipe(tmp_path / "tiny.yaml", spec), make_data(tmp_path / "data"), tmp_path / "first")
    yield nursery
    nursery.process.stdin.close()  # type: ignore[union-attr]
    nursery.process.wait(120)  # a busy machine takes its time


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


def test_a_run_that_is_killed_at_any_of_ten_random_moments(nursery: Nursery, tmp_path: Path) -> None:
    whole_s = float("inf")
    for name in ("whole", "again"):
        began = time.monotonic()
        assert nursery.tell("wait", nursery.tell("start", tmp_path / name)) == 0
        whole_s = min(whole_s, time.monotonic() - began)
        row = only_row(tmp_path / name)
        assert row and (row.state, row.steps, row.total_steps, row.problem) == ("finished", STEPS, STEPS, None)

    moments = random.Random(7)
    seen = []
    for kill in range(KILLS):
        out = tmp_path / f"killed-{kill}"
        pid = nursery.tell("start", out)
        time.sleep(whole_s * (kill + moments.random()) / KILLS)
        os.kill(pid, signal.SIGSTOP)  # a moment that stands still
        while (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
            time.sleep(0.001)
        before = only_row(out)
        steps, val_loss, ended = told(out)
        os.kill(pid, signal.SIGKILL)
        code = nursery.tell("wait", pid)
        row = only_row(out)

        shown = f"kill {kill}: {before} then {row}, exit code {code}; {(tmp_path / 'first.txt').read_text()[-300:]}"
        seen.append("none" if row is None else row.state)
        if row is None:  # killed before there was a run
            assert code == -signal.SIGKILL, shown
            assert before is None, shown
            assert not any(is_run(path) for path in out.glob("[!.]*")), shown
            continue
        assert before is not None
        assert row.problem is None, shown
        assert (row.steps, row.val_loss, row.total_steps, row.seed) == (steps, val_loss, STEPS, 0), shown
        assert (before.steps, before.val_loss) == (row.steps, row.val_loss), shown
        if code == 0 or ended:
            assert (row.state, row.steps) == ("finished", STEPS), shown
        else:
            assert (before.state, row.state) == ("running", "killed"), shown
    assert seen.count("killed") >= KILLS // 3, seen
