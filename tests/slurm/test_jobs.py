"""Jobs as squeue and sacct list them, their runs, and what a requeued job continues with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import SACCT, SACCT_OFF, SQUEUE, program
from tiny_runs import make_data, tiny_spec, train

from nanogpt.cli.watch import one_line, view
from nanogpt.cluster.job_runs import continuation, job_name_for_slurm, newest_run, requeue_refusal
from nanogpt.cluster.jobs import duration, find_job, my_jobs, parse_sacct, parse_squeue
from nanogpt.errors import InputError, RunError
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import Slurm, read_record, write_record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints."""
    place = tmp_path_factory.mktemp("trained")
    train(tiny_spec("checkpoint={every: 5, keep: 3, at_end: true}"), make_data(place / "data"), place / "run")
    return place / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, of job 77 on cluster c, that was interrupted after step 10 of 12."""
    import shutil

    path = shutil.copytree(trained, tmp_path / "runs" / "tiny-1")
    (path / "checkpoints" / "step-000012.pt").unlink()
    change(path, "interrupted", steps=10)
    return path


def change(path: Path, state: str, *, steps: int, job: str = "77", resumed_at: int | None = None) -> None:
    record = read_record(path)
    record.state, record.steps = state, steps  # type: ignore[assignment]
    record.starts[-1].slurm = Slurm(job_id=job, cluster="c")
    record.starts[-1].resumed_at = resumed_at
    write_record(path, record)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, printing what was recorded; without accounting."""
    bin_directory = tmp_path / "bin"
    program(bin_directory, "squeue", {"--user": SQUEUE})
    program(bin_directory, "sacct", {"--user": SACCT_OFF}, code=1)
    monkeypatch.setenv("PATH", f"{bin_directory}:/usr/bin:/bin")
    return bin_directory


def test_squeue_and_sacct_are_read() -> None:
    waiting, task, two_nodes, failed = parse_squeue(SQUEUE)
    assert (waiting.id, waiting.state, waiting.reason, waiting.live) == ("120_[4-9]", "PENDING", "Priority", True)
    assert (task.id, task.raw_id, task.elapsed, task.left, task.reason) == ("120_3", "124", "1:05", "38:55", "")
    assert (two_nodes.nodes, two_nodes.node_list, two_nodes.name) == (2, "n[1-2]", "a|strange name")
    assert (failed.state, failed.live, failed.directory) == ("FAILED", False, Path("/home/ada/speedrun"))
    done, cancelled, refused, running = parse_sacct(SACCT)
    assert (done.state, done.reason) == ("COMPLETED", "")
    assert (cancelled.state, refused.reason) == ("CANCELLED", "exit code 2")
    assert (running.raw_id, running.name) == ("77", "a|strange name")


def test_jobs_come_with_their_runs_without_accounting(slurm: Path, run: Path) -> None:
    found = my_jobs([run.parent])
    assert not found.history
    by_id = {job.id: job for job in found.jobs}
    assert list(by_id) == ["76", "77", "120_3", "120_[4-9]"]  # newest last, whatever Slurm's order
    job = by_id["77"]
    assert job.run is not None and (job.run.steps, job.run.total_steps) == (10, 12)
    assert job.train_loss is not None and job.seconds_of_run_left is not None
    assert by_id["76"].run is None
    assert one_line(job).startswith("77 running: step 10/12, val loss ")
    change(run, "finished", steps=12, job="50")  # a job that the queue has forgotten
    old = my_jobs([run.parent]).jobs[0]
    assert (old.id, old.state, old.live) == ("50", "", False)
    assert one_line(old).startswith("50 run finished: step 12/12")


def test_accounting_tells_of_jobs_that_ended(slurm: Path, run: Path) -> None:
    program(slurm, "sacct", {"--user": SACCT})
    found = my_jobs([run.parent])
    assert found.history
    assert [job.id for job in found.jobs] == ["70", "71", "72_0", "76", "77", "120_3", "120_[4-9]"]
    assert [job.id for job in my_jobs([], only="124").jobs] == ["120_3"]


def test_no_squeue_says_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match=r"slurm/nanogpt\.sh"):
        my_jobs([])


def test_unknown_jobs_are_refused_with_those_there_are(slurm: Path) -> None:
    assert find_job("124", []).id == "120_3"
    with pytest.raises(InputError, match=r"your jobs: .*77"):
        find_job("99", [])
    with pytest.raises(InputError, match="not a job id"):
        find_job("all", [])


def test_status_prints_a_table_and_json(slurm: Path, run: Path, nanogpt: Callable) -> None:
    outcome = nanogpt("status", "--runs", run.parent)
    assert outcome.code == 0, outcome.err
    assert "10/12" in outcome.out and "pending (Priority)" in outcome.out
    assert "sacct is not configured" in outcome.err
    rows = json.loads(nanogpt("status", "--runs", run.parent, "--json").out)
    assert [row["run"] and row["run"]["steps"] for row in rows if row["id"] == "77"] == [10]


@pytest.mark.usefixtures("terminal_of_80")
def test_status_fits_a_terminal_of_80_columns(slurm: Path, run: Path, nanogpt: Callable) -> None:
    run.rename(run.parent / "speedrun-8xh200-20261122-182056")
    lines = nanogpt("status", "--runs", run.parent).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(word in lines[0] for word in ("job", "state", "step", "val loss", "run left", "limit left", "run"))
    assert "where" not in lines[0]  # a wider terminal has it
    (line,) = [line for line in lines if line.startswith("77 ")]
    assert "running" in line and "10/12" in line and "20:00" in line


def test_watch_follows_until_the_job_ends(slurm: Path, run: Path, nanogpt: Callable, tmp_path: Path) -> None:
    program(slurm, "scontrol", {"show job": f"   StdOut={tmp_path / 'log.out'}\n"})
    outcome = nanogpt("watch", "76", "--runs", run.parent)
    assert (outcome.code, outcome.out) == (0, "76 failed (NonZeroExitCode)\n")
    from rich.console import Console

    (tmp_path / "log.out").write_text("".join(f"line {number}\n" for number in range(30)))
    console = Console(width=150, record=True)
    console.print(view(find_job("77", [run.parent]), tmp_path / "log.out"))
    shown = console.export_text()
    assert "10/12" in shown and "line 29" in shown and "line 9\n" not in shown


def test_cancel_waits_for_the_end(slurm: Path, run: Path, nanogpt: Callable) -> None:
    program(slurm, "scancel", {})
    # The job is gone from the queue once scancel has been asked for.
    (slurm / "squeue").write_text(f"#!/bin/sh\ngrep -q scancel {slurm}/calls || cat <<'E'\n{SQUEUE}E\n")
    outcome = nanogpt("cancel", "77", "--runs", run.parent)
    assert outcome.code == 0, outcome.err
    assert "77: cancelled" in outcome.out and "--resume" in outcome.err
    assert "scancel 77" in (slurm / "calls").read_text()
    assert nanogpt("cancel", "77", "--runs", run.parent).code == 2


def test_durations() -> None:
    assert [duration(seconds) for seconds in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


# --- a requeued job ---------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "77", "SLURM_CLUSTER_NAME": "c"}
AGAIN = {**JOB, "SLURM_RESTART_COUNT": "1"}


def test_only_a_requeued_job_goes_on(run: Path) -> None:
    assert continuation(run.parent, JOB).action == "start"
    going_on = continuation(run.parent, AGAIN)
    assert going_on.action == "resume" and going_on.run is not None and going_on.run.path == run
    assert continuation(run.parent, {**AGAIN, "SLURM_JOB_ID": "78"}).action == "start"
    assert continuation(run.parent, {**AGAIN, "SLURM_CLUSTER_NAME": "other"}).action == "start"
    assert continuation(run.parent / "none", AGAIN).action == "start"


def test_a_killed_run_goes_on_from_its_checkpoint_and_without_one_starts_over(run: Path) -> None:
    change(run, "running", steps=11)  # as a node that failed leaves it
    assert continuation(run.parent, AGAIN).action == "resume"
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    assert continuation(run.parent, AGAIN).action == "start"
    assert "has no checkpoint" in continuation(run.parent, AGAIN).reason


def test_a_finished_run_is_not_done_again(run: Path) -> None:
    change(run, "finished", steps=12)
    assert continuation(run.parent, AGAIN).action == "nothing"


def test_the_newest_run_counts(run: Path) -> None:
    RunDirectory.create(run.parent, tiny_spec())  # without a record: nobody knows whose
    assert continuation(run.parent, AGAIN).action == "resume"


def refusal(run: Path, environ: dict[str, str] = JOB, *, lost: bool = False) -> str | None:
    newest = newest_run(run.parent, environ)
    assert newest is not None
    return requeue_refusal(newest, environ, lost=lost)


def test_a_job_that_gets_no_further_is_not_requeued(run: Path) -> None:
    assert refusal(run) is None
    change(run, "interrupted", steps=10, resumed_at=10)
    assert "made no step" in (refusal(run) or "")
    assert newest_run(run.parent / "none", JOB) is None


def test_a_lost_node_is_no_reason_to_give_up_at_once(run: Path) -> None:
    change(run, "failed", steps=11, resumed_at=5)
    assert refusal(run, {**JOB, "SLURM_RESTART_COUNT": "9"}, lost=True) is None  # step 10 is new
    change(run, "failed", steps=11, resumed_at=10)
    assert refusal(run, {**JOB, "SLURM_RESTART_COUNT": "2"}, lost=True) is None
    assert "no newer checkpoint" in (refusal(run, {**JOB, "SLURM_RESTART_COUNT": "3"}, lost=True) or "")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    assert refusal(run, lost=True) is None and "has no checkpoint" in (refusal(run) or "")


LOST = ("--lost=n2", "demo", "--out")


def test_a_job_goes_back_without_its_lost_node(
    slurm: Path, run: Path, nanogpt: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    program(slurm, "squeue", {"": "RUNNING\n"})
    program(slurm, "scontrol", {"show job": "   ReqNodeList=(null) ExcNodeList=n[7-9]\n"})
    outcome = nanogpt("job", "requeue", *LOST, run.parent)
    assert outcome.code == 0, outcome.err
    assert "node n2 does not answer" in outcome.err and "continues from its checkpoint" in outcome.err
    by_hand = f"slurm/run.sh --resume {run} -- --exclude=n2"
    assert outcome.out.splitlines() == ["77", "n[7-9],n2", by_hand]
    change(run, "failed", steps=10, resumed_at=10)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    outcome = nanogpt("job", "requeue", *LOST, run.parent)
    assert outcome.code == 1 and f"restarts of the job. By hand: {by_hand}" in outcome.err


def test_a_task_of_an_array_is_named_as_one() -> None:
    task = {**JOB, "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}
    assert (job_name_for_slurm(JOB), job_name_for_slurm(task)) == ("77", "77_2")
