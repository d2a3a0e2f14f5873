"""A record made ready to publish: the leaderboard's fields, the evidence and local notes in one directory.

submission.md (the row and the notes), submission.json (the same as data), leaderboard.json (the four fields of a lab's
leaderboard), loss.png and loss.svg, and in runs/ each run's log, record, metrics and spec, unchanged.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt.console import markdown_table
from nanogpt.errors import InputError
from nanogpt.runs.check import TARGET_LOSS, TARGET_RULE, Check, check_run, recipe_changes
from nanogpt.runs.consistency import contradictions_between
from nanogpt.runs.directory import LOG_NAME, METRICS_NAME, RECORD_NAME, SPEC_NAME, refuse_existing, whole_directory
from nanogpt.runs.loaded import LoadedRun, plot_runs, show
from nanogpt.runs.record import Record
from nanogpt.runs.significance import Significance, repeated_seeds, runs_significance, significance_data

UNOFFICIAL = "UNOFFICIAL"
# Rules for which a run of this package has evidence: without it there is no record.
NEEDED = (
    "validation tokens",
    "validation shards",
    "training shards",
    "compiler flags",
    "hardware",
    "no interruption",
    "files agree",
)
COPIED = (LOG_NAME, RECORD_NAME, METRICS_NAME, SPEC_NAME)


@dataclass(frozen=True)
class Fields:
    """What the leaderboard needs besides the time."""

    description: str
    contributors: tuple[str, ...] = ()
    log_url: str | None = None

    def __post_init__(self) -> None:
        if not self.description.strip():
            raise InputError(
                "--description: is empty; say in a few words what is new, as the leaderboard's column does"
            )
        if self.log_url is not None and not self.log_url.startswith(("https://", "http://")):
            raise InputError(f"--log-url: found {self.log_url!r}, expected the address of the published log")


@dataclass(frozen=True)
class Submission:
    """One record: runs of one kind, what was tested, and objections."""

    fields: Fields
    runs: tuple[LoadedRun, ...]
    checks: dict[str, list[Check]]  # by the run's label
    significance: Significance
    objections: tuple[str, ...]  # why it is not a record
    unofficial: bool

    @property
    def record_seconds(self) -> float:
        """The record's time: the mean of the runs' clocks, to milliseconds."""
        return round(statistics.fmean(run.train_seconds or 0.0 for run in self.runs), 3)


def prepare(runs: Sequence[LoadedRun], fields: Fields, *, unofficial: bool = False) -> Submission:
    """Check and test the runs.

    Raises:
        InputError: runs are unfinished or differ in spec, code or hardware; or, unless `unofficial`, fail a rule or
            the test.
    """
    result = runs_significance(runs, target=TARGET_LOSS)
    checks = {run.label: check_run(run) for run in runs}
    objections = [
        f"{label}: {check.rule}: {check.evidence}"
        for label, found in checks.items()
        for check in found
        # The rule is about the mean: one of several runs may be above.
        if check.state == "failed" and (check.rule != TARGET_RULE or len(runs) == 1)
    ]
    objections += [
        f"{label}: {check.rule} is unknown: {check.evidence}"
        for label, found in checks.items()
        for check in found
        if check.state == "unknown" and check.rule in NEEDED
    ]
    objections += contradictions_between(runs)
    if not result.significant:
        objections.append(f"significance: {result.verdict()}")
    if objections and not unofficial:
        lines = [f"  {objection}" for objection in objections]
        raise InputError(
            "\n".join(["submission: this is not a record by the public rules (--unofficial marks it as such):", *lines])
        )
    return Submission(fields, tuple(runs), checks, result, tuple(objections), unofficial)


def write_submission(
    submission: Submission, out: Path, layout: Callable[[Submission, Path], None] | None = None
) -> None:
    """Create the directory `out`, completely or not at all. layout: also writes another layout into it.

    Raises:
        InputError: `out` already exists.
        RunError: it cannot be written.
    """
    refuse_existing(out)
    with whole_directory(out, "submission") as partial:
        for run in submission.runs:
            directory = partial / "runs" / run.path.resolve().name
            for count in range(2, len(submission.runs) + 2):
                if not directory.exists():
                    break
                directory = directory.with_name(f"{run.path.resolve().name}-{count}")
            directory.mkdir(parents=True)
            for name in COPIED:
                shutil.copyfile(run.path / name, directory / name)
        mark = f"{UNOFFICIAL} " if submission.unofficial else ""
        drawn = [replace(run, label=mark + run.label) for run in submission.runs]
        for name in ("loss.png", "loss.svg"):
            plot_runs(drawn, partial / name)
        four = json.dumps(leaderboard_fields(submission), indent=2) + "\n"
        (partial / "leaderboard.json").write_text(four, "utf-8")
        if layout is not None:
            layout(submission, partial)
        (partial / "submission.json").write_text(json.dumps(submission_data(submission), indent=2) + "\n", "utf-8")
        (partial / "submission.md").write_text(submission_text(submission), "utf-8")


def leaderboard_fields(submission: Submission) -> dict[str, Any]:
    """The four fields that a lab's leaderboard needs."""
    return {
        "seconds": submission.record_seconds,
        "description": described(submission),
        "log_url": submission.fields.log_url,
        "contributors": list(submission.fields.contributors),
    }


def submission_data(submission: Submission) -> dict[str, Any]:
    """The submission as JSON data: the leaderboard's fields first, then evidence and local notes."""
    first = submission.runs[0]
    return {
        "official": not submission.unofficial,
        "record_time_seconds": submission.record_seconds,
        "description": described(submission),
        "log_url": submission.fields.log_url,
        "contributors": list(submission.fields.contributors),
        "objections": list(submission.objections),
        "significance": significance_data(submission.significance, submission.runs),
        "checks": {label: [asdict(check) for check in checks] for label, checks in submission.checks.items()},
        "notes": {
            "date": submission_date(submission),
            "hardware": hardware(first),
            "config_difference": [
                {"key": key, "record": there, "run": here} for key, there, here in recipe_changes(first.spec)
            ],
            "caveats": caveats(submission),
            "runs": [_run_notes(run) for run in submission.runs],
        },
    }


def _run_notes(run: LoadedRun) -> dict[str, Any]:
    record = one_record(run)
    slurm = record.slurm
    return {
        "run": run.label,
        "seed": run.spec.training.seed,
        "train_seconds": run.train_seconds,
        "val_loss": run.final_loss,
        "job": _job(record),
        "cluster": slurm and slurm.cluster,
        "created": record.created.isoformat(),
        "ended": record.ended and record.ended.isoformat(),
        "commit": record.code.commit,
        "clean": record.code.clean,
        "source_sha256": record.code.source_sha256,
        "hosts": record.hardware.hosts,
        "image_sha256": record.container and record.container.sha256,
        "versions": record.versions,
    }


def caveats(submission: Submission) -> list[str]:
    """What a reader should know: rules whose evidence is missing, repeated seeds."""
    found = [
        f"{label}: {check.rule} is unknown: {check.evidence}"
        for label, checks in submission.checks.items()
        for check in checks
        if check.state == "unknown" and check.rule not in NEEDED
    ]
    seeds = repeated_seeds(submission.runs)
    if seeds:
        found.append(f"several runs have seed {', '.join(map(str, seeds))}; they differ by rounding alone")
    return found


def markdown_row(submission: Submission) -> str:
    """The leaderboard's row: record time, description, date, log, contributors."""
    log = f"[log]({submission.fields.log_url})" if submission.fields.log_url else "-"
    cells = (
        f"{submission.record_seconds:.3f} s",
        described(submission),
        submission_date(submission),
        log,
        ", ".join(submission.fields.contributors) or "-",
    )
    return "| " + " | ".join(markdown_cell(cell) for cell in cells) + " |"


def submission_text(submission: Submission) -> str:
    """submission.md."""
    runs, result = submission.runs, submission.significance
    mark = f"{UNOFFICIAL}: " if submission.unofficial else ""
    lines = [f"# {mark}{markdown_cell(submission.fields.description)}", ""]
    if submission.unofficial:
        lines += ["**Unofficial: not a record by the public rules.**", ""]
        lines += [*(f"- {objection}" for objection in submission.objections), ""] if submission.objections else []
    lines += [
        *markdown_table(("record time", "description", "date", "log", "contributors"), ()),
        markdown_row(submission),
        "",
        "![validation and training loss](loss.png)",
        "",
        "## Runs",
        "",
    ]
    rows = []
    for run in runs:
        record = one_record(run)
        cells = (
            run.label,
            str(run.spec.training.seed),
            f"{run.final_loss:.4f}",
            f"{run.train_seconds:.3f} s",
            _job(record) or "-",
            f"{record.ended:%Y-%m-%d %H:%M:%S}" if record.ended else "-",
            _commit(record),
        )
        rows.append([markdown_cell(cell) for cell in cells])
    lines += markdown_table(("run", "seed", "validation loss", "time", "job", "ended (UTC)", "commit"), rows)
    spread = "" if result.sd is None else f", standard deviation {result.sd:.5f}"
    lines += ["", f"n = {result.n}, mean validation loss {result.mean:.5f}{spread}: {result.verdict()}.", ""]
    lines += ["## Local notes", "", f"- Hardware: {hardware(runs[0])}"]
    changes = recipe_changes(runs[0].spec)
    lines += [f"- Config: the shipped {runs[0].spec.model.kind}" + (", changed:" if changes else "")]
    lines += [f"  - `{key}`: {show(there)} -> {show(here)}" for key, there, here in changes]
    lines += [f"- Caveat: {caveat}" for caveat in caveats(submission)]
    lines += [
        "- The logs and records in runs/ name hosts, directories and environment variables: read them before you"
        " publish.",
        "",
        "## Rules",
        "",
        "Passed by all runs, with the first one's evidence, or listed by run; submission.json has everything.",
    ]
    lines += ["", "| rule | | evidence |", "| --- | --- | --- |"]
    for of_runs in zip(*submission.checks.values(), strict=True):
        lines += _rule_rows(list(submission.checks), of_runs)
    return "\n".join(lines) + "\n"


def _rule_rows(labels: Sequence[str], checks: Sequence[Check]) -> list[str]:
    """A rule in one row if all runs passed it, with the first one's evidence, else in a row for each."""
    first = checks[0]
    if all(check.state == "passed" for check in checks):
        return [f"| {first.rule} | passed | {markdown_cell(first.evidence)} |"]
    return [
        f"| {check.rule}, {markdown_cell(label)} | {check.state} | {markdown_cell(check.evidence)} |"
        for label, check in zip(labels, checks, strict=True)
    ]


def described(submission: Submission) -> str:
    """The description on one line, marked if unofficial."""
    description = " ".join(submission.fields.description.split())
    return f"{UNOFFICIAL}: {description}" if submission.unofficial else description


def markdown_cell(text: str) -> str:
    """Text in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def one_record(run: LoadedRun) -> Record:
    """The run's record, which it has."""
    assert run.record is not None  # runs are loaded with need_records
    return run.record


def _job(record: Record) -> str | None:
    slurm = record.slurm
    if slurm is None:
        return None
    return f"{slurm.array_job_id}_{slurm.array_task_id}" if slurm.array_job_id else slurm.job_id


def _commit(record: Record) -> str:
    changed = " with changes" if record.code.clean is False else ""
    return (record.code.commit or "-")[:12] + changed


def submission_date(submission: Submission) -> str:
    """When the last run ended, YYYY-MM-DD."""
    ends = [record.ended or record.updated for record in map(one_record, submission.runs)]
    return f"{max(ends):%Y-%m-%d}"


def hardware(run: LoadedRun) -> str:
    """Such as `8 x NVIDIA H200`."""
    devices = one_record(run).hardware.devices or [str(run.metrics.start.get("device"))]
    return ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
