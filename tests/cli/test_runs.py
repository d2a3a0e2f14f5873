"""`nanogpt runs`: the table, its order and filters, and runs that are not whole."""

from __future__ import annotations

import datetime
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_data, tiny_spec, train

from nanogpt.runs.listing import list_runs, runs_table
from nanogpt.runs.record import Process, Slurm, read_record, write_record
from nanogpt.terminal import rich_console

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(source: Path, to: Path, created: str, **fields: Any) -> None:
    """A copy of the run `source` whose record says something else."""
    shutil.copytree(source, to)
    record = read_record(to)
    record.created = datetime.datetime.fromisoformat(created)
    for key, value in fields.items():
        if key == "slurm":
            record.starts[-1].slurm = value
        elif key == "process":
            record.starts[-1].process = value
        elif key == "commit":
            record.code.commit, record.code.clean = value, True
        else:
            setattr(record, key, value)
    write_record(to, record)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs that ended, were killed, are old, or are damaged; one is deeper down."""
    parent = tmp_path_factory.mktemp("several")
    directory = parent / "runs"
    source = parent / "source"
    train(tiny_spec(), make_data(parent / "data"), source)
    gone = read_record(source).starts[-1].process.model_copy(update={"started_ticks": 1})
    elsewhere = Process(pid=1, host="node7", boot_id="another")
    job = Slurm(job_id="120", array_job_id="118", array_task_id="2")

    changed(source, directory / "good", "2026-01-05T10:00Z", val_loss=3.2779, commit="abcdef0123", seed=7, slurm=job)
    changed(source, directory / "sweep" / "bad", "2026-01-04T10:00Z", val_loss=3.2991, commit="abcdef0123")
    changed(source, directory / "broken", "2026-01-03T10:00Z", state="failed", reason="RunError: no luck", steps=7)
    changed(source, directory / "killed", "2026-01-02T10:00Z", state="running", process=gone)
    changed(source, directory / "quiet", "2026-01-01T10:00Z", state="running", process=elsewhere)
    for name in ("killed", "quiet"):  # the last words of its metrics are of step 11
        metrics = directory / name / "metrics.jsonl"
        kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"step": 12' not in line]
        metrics.write_text("".join(kept[:-1]))

    shutil.copytree(source, directory / "old")
    (directory / "old" / "record.json").unlink()
    shutil.copytree(source, directory / "damaged")
    (directory / "damaged" / "record.json").write_text('{"schema_version": 1, "name"')
    shutil.copytree(source, directory / "ruins")
    for name in ("record.json", "spec.yaml"):
        (directory / "ruins" / name).write_text("}{")
    (directory / "ruins" / "metrics.jsonl").write_text("what?\nindeed\n")
    (directory / "no-run").mkdir()
    (directory / ".hidden").mkdir()
    (directory / "notes.txt").write_text("not a run")
    return directory


def listed(nanogpt: Any, *arguments: object) -> list[dict[str, Any]]:
    outcome = nanogpt("runs", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    rows: list[dict[str, Any]] = json.loads(outcome.out)
    return rows


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def test_every_run_is_listed_for_what_it_is(nanogpt: Any, runs: Path) -> None:
    rows = {row["name"]: row for row in listed(nanogpt, runs)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "good": "finished",
        "bad": "finished",
        "broken": "failed",
        "killed": "killed",
        "quiet": "running",  # written a moment ago, on a host that cannot be asked
        "old": "finished",
        "damaged": "finished",
        "ruins": "unfinished",
    }
    good = rows["good"]
    assert (good["steps"], good["total_steps"], good["val_loss"], good["seed"]) == (12, 12, 3.2779, 7)
    assert (good["job"], good["commit"], good["gpus"], good["problem"]) == ("118_2", "abcdef0123", "1 x cpu", None)
    assert good["created"] == "2026-01-05T10:00:00+00:00"
    assert good["ms_per_step"] == pytest.approx(1000 * good["train_seconds"] / 12)
    assert good["path"] == str(runs / "good")
    assert (rows["killed"]["steps"], rows["quiet"]["steps"]) == (11, 11)
    assert rows["broken"]["reason"] == "RunError: no luck"


def test_runs_without_a_readable_record_are_read_from_spec_and_metrics(nanogpt: Any, runs: Path) -> None:
    rows = {row["name"]: row for row in listed(nanogpt, runs)}
    record = read_record(runs / "broken")
    for name, problem in (("old", "record.json: no such record"), ("damaged", "record.json: not a record of a run")):
        row = rows[name]
        assert problem in row["problem"]
        assert (row["steps"], row["total_steps"], row["world_size"], row["seed"]) == (12, 12, 1, 0)
        assert (row["val_loss"], row["tokens"]) == (record.val_loss, record.tokens)
        assert row["train_seconds"] == pytest.approx(record.train_seconds, abs=1e-6)  # which the record rounds to
    ruins = rows["ruins"]
    assert (ruins["steps"], ruins["total_steps"], ruins["val_loss"]) == (0, None, None)
    assert all(file in ruins["problem"] for file in ("record.json", "spec.yaml", "metrics.jsonl"))


def test_the_table(nanogpt: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TZ", "UTC")
    outcome = nanogpt("runs", runs)
    assert outcome.code == 0
    lines = [line.split() for line in outcome.out.splitlines() if line.strip()]
    assert lines[0] == ["run", "state", "steps", "val", "loss", "time", "GPUs", "ms/step", "commit", "date"]
    assert [line[0] for line in lines[1:6]] == ["quiet", "killed", "broken", "bad", "good"]  # by date
    (good,) = (line for line in lines if line[0] == "good")
    assert good[1:4] == ["finished", "12/12", "3.2779"]
    assert good[6] == "cpu" and good[8:10] == ["abcdef0", "2026-01-05"]
    assert "broken: RunError: no luck" in outcome.err
    assert "old: record.json: no such record" in outcome.err


def test_a_terminal_of_80_columns_has_a_line_for_each_run(runs: Path) -> None:
    rows = list_runs(runs)
    for row in rows:
        row.name, row.gpus = "speedrun-8xh200-20261122-182056", "8 x NVIDIA H200"
        row.steps, row.total_steps, row.train_seconds = 1234, 1555, 154.7
    screen = io.StringIO()
    rich_console(screen, force_terminal=True, width=80, color_system=None).print(runs_table(rows))
    head, rule, *lines = screen.getvalue().splitlines()
    assert "time" in head and "commit" not in head and set(rule.strip()) == {"\u2500"}
    assert len(lines) == len(rows) and max(map(len, screen.getvalue().splitlines())) <= 80
    assert all("speedrun-8xh200-20261122-182056" in line and "1,234/1,555" in line for line in lines)


def test_sorting(nanogpt: Any, runs: Path) -> None:
    assert names(listed(nanogpt, runs, "--sort", "val_loss", "--filter", "val_loss<3.3")) == ["good", "bad"]
    assert names(listed(nanogpt, runs, "--sort", "-val_loss", "--filter", "val_loss<3.3")) == ["bad", "good"]
    assert names(listed(nanogpt, runs, "--sort", "val_loss"))[-1] == "ruins"  # what is not known comes last
    assert names(listed(nanogpt, runs, "--sort", "-val_loss"))[-1] == "ruins"
    assert names(listed(nanogpt, runs, "--sort", "name")) == sorted(names(listed(nanogpt, runs)))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["state=killed"], {"killed"}),
        (["state=finished", "val_loss<=3.28"], {"good"}),
        (["state!=finished"], {"broken", "killed", "quiet", "ruins"}),
        (["commit=ABCDEF"], {"good", "bad"}),
        (["created>=2026-01-04", "created<2026-01-05T00:00:00+00:00"], {"bad"}),
        (["seed = 7"], {"good"}),
        (["job="], {"bad", "broken", "killed", "quiet", "old", "damaged", "ruins"}),
        (["job!="], {"good"}),
        (["steps>100"], set()),
    ],
)
def test_filters(nanogpt: Any, runs: Path, filters: list[str], expected: set[str]) -> None:
    flags = [part for text in filters for part in ("--filter", text)]
    assert set(names(listed(nanogpt, runs, *flags))) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--filter", "loss<3"), "--filter loss: no such column; the columns are name, "),
        (("--filter", "val_loss"), "--filter val_loss: expected KEY=VALUE"),
        (("--filter", "val_loss<low"), "--filter val_loss<low: 'low' is not a number"),
        (("--filter", "created>soon"), "'soon' is not a date such as 2026-01-31"),
        (("--sort", "loss"), "--sort loss: no such column"),
    ],
)
def test_wrong_keys_and_values(nanogpt: Any, runs: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = nanogpt("runs", runs, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_where_runs_are_looked_for(nanogpt: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = nanogpt("runs")
    assert outcome.code == 2
    assert outcome.err.startswith("runs: no such directory; expected a directory of runs")
    (tmp_path / "runs").mkdir()
    outcome = nanogpt("runs")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "runs: no runs\n")
    assert listed(nanogpt) == []
    monkeypatch.setenv("NANOGPT_RUNS", str(runs / "sweep"))
    assert names(listed(nanogpt)) == ["bad"]
    assert names(listed(nanogpt, runs / "good")) == ["good"]  # a run itself
    assert "is a file" in nanogpt("runs", runs / "notes.txt").err
    assert [row.name for row in list_runs(runs / "sweep")] == ["bad"]
