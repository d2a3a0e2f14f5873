"""A run's directory: made once, written line by line, found again."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt.errors import InputError, RunError
from nanogpt.recipe import load_recipe
from nanogpt.runs.directory import RunDirectory, is_run
from nanogpt.runs.listing import list_runs
from nanogpt.runs.metrics import read_metrics

SPEC = load_recipe("speedrun")


def test_create_writes_the_resolved_spec_at_once(tmp_path):
    run = RunDirectory.create(tmp_path / "deep" / "runs", SPEC)
    assert re.fullmatch(r"speedrun-\d{8}-\d{6}", run.path.name)
    assert [child.name for child in run.path.iterdir()] == ["spec.yaml"]
    assert run.spec() == SPEC
    assert RunDirectory.open(run.path).spec() == SPEC
    assert (run.log_path.name, run.metrics_path.name) == ("log.txt", "metrics.jsonl")
    assert run.checkpoint_directory == run.path / "checkpoints"


def test_spec_is_read_from_a_relative_path(tmp_path, monkeypatch):
    run = RunDirectory.create(tmp_path, SPEC)
    monkeypatch.chdir(run.path)
    assert RunDirectory.open(".").spec() == SPEC


def test_runs_of_the_same_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(RunDirectory.create(tmp_path, SPEC).path.name)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stem = "speedrun-20260102-030405"
    assert sorted(made) == sorted([stem, *(f"{stem}-{n}" for n in range(2, 7))])


@pytest.mark.parametrize("below", ["", "deeper"])
def test_create_below_a_file_names_the_way_out(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*a file is in the way.*NANOGPT_RUNS"):
        RunDirectory.create(tmp_path / "file" / below, SPEC)


def test_create_where_nobody_may_write():
    with pytest.raises(InputError, match=r"/proc/runs: no run directory can be created here.*--out DIR"):
        RunDirectory.create(Path("/proc/runs"), SPEC)


def test_create_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*Free space"):
        RunDirectory.create(tmp_path, SPEC)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["mkdir", "replace", "rename"])
def test_a_process_that_dies_as_it_creates_leaves_no_run(tmp_path, monkeypatch, moment):
    def die(*_, **__):
        os._exit(9)

    child = os.fork()
    if child == 0:
        (tmp_path / "runs").mkdir()
        monkeypatch.setattr(Path, moment, die)
        RunDirectory.create(tmp_path / "runs", SPEC, record="{}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list_runs(tmp_path / "runs") == []
    with pytest.raises(InputError, match=r"not a run directory: no spec\.yaml"):
        RunDirectory.open(tmp_path / "runs")


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such run directory"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a run directory: no spec\.yaml"):
        RunDirectory.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, expected a run directory"):
        RunDirectory.open(tmp_path / "file")


def test_open_of_the_parent_names_the_newest_run(tmp_path):
    old, new = RunDirectory.create(tmp_path, SPEC), RunDirectory.create(tmp_path, SPEC)
    os.utime(old.spec_path, (1, 1))
    with pytest.raises(InputError, match=f"holds 2 runs, the newest is {re.escape(str(new.path))}$"):
        RunDirectory.open(tmp_path)
    assert not is_run(tmp_path)
    assert is_run(new.path)


def test_lines_are_on_disk_when_the_call_returns(tmp_path):
    run = RunDirectory.create(tmp_path, SPEC)
    run.log("step:1/2 train_time:3ms")
    run.log("with a newline already\n")
    run.metric({"kind": "step", "step": 1})
    assert run.log_path.read_text() == "step:1/2 train_time:3ms\nwith a newline already\n"
    assert read_metrics(run.metrics_path) == [{"kind": "step", "step": 1}]
    run.close()
    run.close()
    run.log("again")
    assert run.log_path.read_text().splitlines()[-1] == "again"


def test_metric_is_valid_json_whatever_the_floats(tmp_path):
    with RunDirectory.create(tmp_path, SPEC) as run:
        run.metric(
            {
                "float": 8346.000000000001,
                "tiny": 1.23456789012e-7,
                "float32": np.float32(10.8123455),
                "tensor": torch.tensor(3.25),
                "bad": [float("nan"), -math.inf, torch.tensor(float("inf"))],
                "count": np.int64(7),
                "path": tmp_path,
                "text": "Zeit: 3 µs",
            }
        )

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads(run.metrics_path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["float"] == 8346.0
    assert record["tiny"] == 1.23456789e-7
    assert np.float32(record["float32"]) == np.float32(10.8123455)
    assert record["tensor"] == 3.25
    assert record["bad"] == [None, None, None]
    assert record["count"] == 7
    assert record["path"] == str(tmp_path)
    assert record["text"] == "Zeit: 3 µs"
    with pytest.raises(TypeError, match="is a set"):
        run.metric({"kind": {1}})


def test_a_full_disk_while_logging_is_an_error_that_names_the_file(tmp_path):
    run = RunDirectory.create(tmp_path, SPEC)
    run.log_path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"log\.txt: cannot be written: No space left"):
        run.log("line")


@pytest.mark.parametrize("tail", [b'{"kind": "st', b"x" * 10_000, b"\0" * 4096])
def test_a_half_line_is_dropped_when_the_run_goes_on(tmp_path, tail):
    run = RunDirectory.create(tmp_path, SPEC)
    run.metric({"step": 1})
    run.close()
    with run.metrics_path.open("ab") as file:
        file.write(tail)
    run.log_path.write_bytes(tail)  # no whole line at all

    again = RunDirectory.open(run.path)
    again.metric({"step": 2})
    again.log("resumed")
    assert read_metrics(run.metrics_path) == [{"step": 1}, {"step": 2}]
    assert run.log_path.read_text() == "resumed\n"


def test_a_killed_run_has_told_all_it_knew(tmp_path):
    run = RunDirectory.create(tmp_path, SPEC)
    program = f"""
from nanogpt.runs.directory import RunDirectory
run = RunDirectory.open({str(run.path)!r})
for step in range(1_000_000):
    run.metric({{"kind": "step", "step": step, "train_loss": 1 / 3}})
    if step == 500:
        print("go", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    records = read_metrics(run.metrics_path)
    assert len(records) > 500
    assert [record["step"] for record in records] == list(range(len(records)))


def test_neither_torch_nor_rich_is_needed():
    program = "import sys, nanogpt.runs.directory, nanogpt.runs.display; print(*{'torch', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
