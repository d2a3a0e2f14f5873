"""Runs that cannot be read do not hide the others, and a run of many steps needs little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from made_runs import made_run, made_runs
from tiny_runs import python

from nanogpt.errors import InputError
from nanogpt.runs.curves import MOST_POINTS
from nanogpt.runs.curves import points as curve_points
from nanogpt.runs.metrics import iter_metrics, read_run, run_metrics


def break_run(path: Path, how: str) -> Path:
    if how == "spec":
        (path / "spec.yaml").write_bytes(b"\xff\xfe: [")
    elif how == "metrics":
        (path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "train_time_ms": "soon"}\n')
    elif how == "depth":
        (path / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    else:
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl").mkdir()
    return path


@pytest.mark.parametrize("how", ["spec", "metrics", "depth", "directory"])
def test_an_unreadable_run_hides_no_other(tmp_path, nanogpt, how):
    good = made_runs(tmp_path / "runs", (3.2756, 3.2757, 3.2758))
    bad = break_run(made_run(tmp_path / "runs" / "bad", seed=7), how)
    (bad / "record.json").write_text("{")
    listed = {row["name"]: row for row in json.loads(nanogpt("runs", tmp_path / "runs", "--json").out)}
    assert listed.keys() == {"run-0", "run-1", "run-2", "bad"}
    assert listed["run-1"]["val_loss"] == 3.2757 and listed["bad"]["problem"]
    assert "run-2" in nanogpt("runs", tmp_path / "runs").out
    for command, shown in (
        (("compare", *good, bad), "3.2757"),
        (("plot", *good, bad, "--out", tmp_path / "loss.svg"), "loss.svg"),
        (("significance", bad, *good), "n = 3, mean 3.27570"),
    ):
        done = nanogpt(*command)
        assert done.code == 1 and shown in done.out, done
        assert f"left out: {bad}/" in done.err
        assert nanogpt(*(argument for argument in command if argument != bad)).code == 0
    assert ">run-2<" in (tmp_path / "loss.svg").read_text()


AS_NOBODY = """
import contextlib, os, sys
from nanogpt.cli.main import main
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
with contextlib.suppress(SystemExit):  # what is imported is imported: nobody may not read where Python is
    main(["runs", sys.argv[1], "--json"])
os.dup2(out, 1)
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
main(["runs", sys.argv[1], "--json"])
"""


def test_a_directory_that_may_not_be_read_hides_no_run():
    """Root may read all: it becomes nobody for this."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        directory.chmod(0o755)
        made_run(directory / "good")
        made_run(directory / "closed")
        (directory / "closed").chmod(0)
        done = python("-c", AS_NOBODY, str(directory))
        assert [row["name"] for row in json.loads(done.stdout)] == ["good"], done.stderr
        assert f"{directory}/closed: cannot be read: Permission denied" in done.stderr
    finally:
        (directory / "closed").chmod(0o700)
        shutil.rmtree(directory)


STEPS = 200_000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of 200,000 steps: 46 MB of metrics; as dicts, some 250 MB of memory."""
    path = made_run(tmp_path_factory.mktemp("large") / "run", with_record=False)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            loss = 99.0 if step == 123_456 else 4 + 6 / step
            file.write(
                f'{{"kind": "step", "step": {step}, "total_steps": {STEPS}, "train_loss": {loss:.8f},'
                f' "data_wait_ms": 0.0123, "tokens": {131072 * step}, "stage": {step % 3},'
                f' "train_time_ms": {step / 4}, "step_avg_ms": 0.25, "lr_factor": 1.0}}\n'
            )
            if step % 100 == 0:
                file.write(f'{{"kind": "evaluation", "step": {step}, "val_loss": {3 + 7 / step:.8f}}}\n')
    return path


# Of this process alone: matplotlib and SciPy are imported before it begins to count.
LIMITED = """
import resource, sys
import matplotlib.backends.backend_agg, matplotlib.figure, numpy, nanogpt.runs.plot, nanogpt.runs.check
from nanogpt.cli.main import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["check", "plot", "compare", "report"])
def test_a_large_run_needs_little_memory(large, tmp_path, command):
    arguments = {
        "check": ("check", large),
        "plot": ("plot", large, "--out", tmp_path / "loss.svg"),
        "report": ("report", large, "--out", tmp_path / "report.html"),
        "compare": ("compare", large, made_run(tmp_path / "run"), "--json"),
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == (1 if command == "check" else 0), done.stderr
    if command == "plot":
        assert (tmp_path / "loss.svg").stat().st_size < 2 << 20
    if command == "report":
        assert (tmp_path / "report.html").stat().st_size < 8 << 20


def test_a_thin_curve_keeps_its_peaks_and_its_ends(large):
    run = read_run(large)
    assert (len(run.steps), run.last["step"]) == (STEPS, STEPS)
    points = curve_points(run.steps, "step", "train_loss")
    assert len(points) <= MOST_POINTS + 2
    assert points[0] == (1.0, 10.0) and points[-1][0] == STEPS and (123_456.0, 99.0) in points
    assert points == sorted(points)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "step", "step": 1.5}', "step: expected a whole number, found '1.5'"),
        ('{"kind": "step", "step": true}', "step: expected a whole number, found 'True'"),
        ('{"kind": "evaluation", "step": 1, "val_loss": "low"}', "val_loss: expected a number, found 'low'"),
        ('{"kind": "evaluation", "step": 1, "val_loss": 1e999}', "val_loss: expected a number, found 'inf'"),
        ('{"kind": "step", "step": 1, "train_loss": NaN}', "expected a JSON object"),
        ('{"step": 1' + "0" * 400 + "}", "step: expected a whole number"),
        ("x" * (1 << 20), "expected a JSON object"),
    ],
)
def test_lines_that_mean_nothing_are_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "start"}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: ") as refused:
        list(iter_metrics(path))
    assert message in str(refused.value)


def test_records_are_as_they_were_written():
    """Keys, nulls, whole numbers and words; in the order of steps, the later of two."""
    records = [
        {"kind": "evaluation", "step": 5, "val_loss": 4.5, "reference": "record 67"},
        {"kind": "evaluation", "step": 3, "val_loss": None, "tokens": 12},
        {"kind": "evaluation", "step": 5, "val_loss": 4.25},
        {"kind": "evaluation", "step": 9, "val_loss": 4, "new": [1]},
    ]
    kept = run_metrics(records).evaluations
    assert list(kept) == [records[1], records[2], records[3]]
    assert [list(record) for record in kept] == [list(records[1]), list(records[2]), list(records[3])]
    assert (kept[-1], kept[:1], len(kept)) == (records[3], [records[1]], 3)
    assert type(kept[0]["tokens"]) is int and kept[0]["val_loss"] is None
    later = [{"kind": "start", "resumed_at": 4}, {"kind": "evaluation", "step": 6, "val_loss": 4.0}]
    assert [record["step"] for record in run_metrics([*records, *later]).evaluations] == [3, 6]
