"""A submission in the layout of the public repository, KellerJordan/modded-nanogpt: records/track_1_short/DATE_Name.

README.md (what is new, and Python that prints the statistics), spec.yaml of the first run, and each run's log,
which begins with the code, named by a UUID like the public code's logs.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import statistics
import uuid
from pathlib import Path

from nanogpt.recipe import publishable_spec
from nanogpt.runs.directory import LOG_NAME, SPEC_NAME
from nanogpt.runs.loaded import IDENTITY_KEYS
from nanogpt.runs.record import Record
from nanogpt.runs.reference import under
from nanogpt.runs.significance import significance
from nanogpt.runs.submission import Submission, described, hardware, markdown_cell, one_record, submission_date

FORMAT = "modded-nanogpt"
TRACK = Path("records/track_1_short")
NAME_WORDS = 6  # words of the description in the directory's name


def directory_name(submission: Submission) -> str:
    """DATE_Name: the date of the last run, and the description's first words, joined."""
    words = re.findall(r"[A-Za-z0-9]+", submission.fields.description)[:NAME_WORDS]
    return f"{submission_date(submission)}_{''.join(word[0].upper() + word[1:] for word in words) or 'Record'}"


def write_public(submission: Submission, out: Path) -> None:
    """Create the record's directory below `out`. Raises OSError."""
    directory = out / TRACK / directory_name(submission)
    directory.mkdir(parents=True)
    logs = []
    for run in submission.runs:
        log = run.path / LOG_NAME
        name = f"{uuid.UUID(hashlib.sha256(log.read_bytes()).hexdigest()[:32])}.txt"
        shutil.copyfile(log, directory / name)
        logs.append(name)
    (directory / SPEC_NAME).write_text(publishable_spec(submission.runs[0].spec), "utf-8")
    (directory / "README.md").write_text(readme(submission, logs), "utf-8")


def readme(submission: Submission, logs: list[str]) -> str:
    """README.md; logs: the files' names, in the order of the runs.

    Losses have four digits, as in the logs, and so have the statistics.
    """
    first = one_record(submission.runs[0])
    losses = [round(run.final_loss or 0.0, 4) for run in submission.runs]
    times = [round(run.train_seconds or 0.0, 3) for run in submission.runs]
    found = significance(losses, target=submission.significance.target)
    lines = [
        f"## {described(submission)}",
        "",
        *(["**Unofficial: not a record by the public rules.**", ""] if submission.unofficial else []),
        *(f"- {objection}" for objection in submission.objections),
        *([""] if submission.objections else []),
        f"Contributors: {', '.join(submission.fields.contributors)}" if submission.fields.contributors else "",
        "",
        f"- Hardware: {hardware(submission.runs[0])}",
        f"- Software: {_software(first)}",
        f"- Steps: {first.total_steps:,}; training tokens: {first.total_tokens:,}",
        f"- Code: nanogpt-speedrun {first.code.package_version}, commit {first.code.commit or 'unknown'}; each log"
        " begins with it",
        "",
        "| log | seed | val loss | train time (s) |",
        "| --- | --- | --- | --- |",
    ]
    rows = zip(logs, submission.runs, losses, times, strict=True)
    lines += [f"| {log} | {run.spec.training.seed} | {loss:.4f} | {time:.3f} |" for log, run, loss, time in rows]
    changes = [c for c in first.spec_differences if not under(c.key, IDENTITY_KEYS)]
    if changes:
        lines += ["", f"What differs from the recipe `{first.base_recipe}`:", ""]
        lines += [f"- `{c.key}`: {markdown_cell(str(c.base))} -> {markdown_cell(str(c.run))}" for c in changes]
    several = len(losses) > 1
    lines += ["", "## Timing and validation", "", "```python", "import scipy.stats", "import torch", ""]
    lines += [f"losses = {losses}", f"times = {times}", ""]
    lines += [f'print("p=%.4f" % scipy.stats.ttest_1samp(losses, {found.target:g}, alternative="less").pvalue)']
    lines += [f"# p={found.p:.4f}" if found.p is not None else "# p=nan", ""]
    for name, values in (("losses", losses), ("times", times)):
        spread = f"{statistics.stdev(values):.4f}" if several else "nan"
        lines += [f'print("{name}:", torch.std_mean(torch.tensor({name})))']
        lines += [f"# {name}: (tensor({spread}), tensor({statistics.fmean(values):.4f}))", ""]
    lines += ["```", "", "## Running it again", "", "    nanogpt launch spec.yaml", ""]
    return "\n".join(lines)


def _software(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items() if version and name != "platform")
