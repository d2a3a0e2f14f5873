"""The leaderboard: a folder of submissions as a static page with its data, for any web server.

Every entry is checked again before it is listed, and what fails is listed separately with the reason. The directory is
served as it is, for example by GitHub Pages: no file in it needs Jekyll, and `.nojekyll` says so.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nanogpt import __version__
from nanogpt.console import progress
from nanogpt.errors import InputError, RunError
from nanogpt.files import read_json
from nanogpt.pages.entry import checked_entry, page_name
from nanogpt.pages.page import PLOTLY_NAME, plotly_source, render
from nanogpt.runs.check import TARGET_LOSS
from nanogpt.runs.directory import write_whole
from nanogpt.terminal import printable

DATA_NAME, PAGE_NAME, REPORTS_NAME = "leaderboard.json", "index.html", "reports"
WRITTEN_BY = "nanogpt leaderboard"


def write_leaderboard(submissions: Path, out: Path) -> dict[str, Any]:
    """Check the submissions in `submissions`, a directory each, and write the site to `out`; returns its data.

    Other files in `out` stay: it may be a checkout that gets published.

    Raises:
        InputError: there are no submissions, or `out` has a page that this command did not write.
        RunError: it cannot be written.
    """
    folders = _folders(submissions)
    _refuse_others_page(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".leaderboard-", dir=out) as made:
            data = _data(folders, Path(made))
            page = render("leaderboard.html", target=TARGET_LOSS, **data)
            write_whole(out / PLOTLY_NAME, plotly_source())
            (out / ".nojekyll").touch()
            reports = out / REPORTS_NAME
            reports.mkdir(exist_ok=True)
            for report in Path(made).iterdir():
                report.replace(reports / report.name)
            write_whole(
                out / DATA_NAME, json.dumps({"written_by": WRITTEN_BY, "version": __version__, **data}, indent=2) + "\n"
            )
            write_whole(out / PAGE_NAME, page)
            listed = {Path(entry["report"]).name for entry in data["entries"]}
            for report in reports.glob("*.html"):
                if report.name not in listed:
                    report.unlink()
    except OSError as error:
        raise RunError(f"{out}: the leaderboard cannot be written: {error.strerror or error}") from error
    return data


def _folders(submissions: Path) -> list[Path]:
    try:
        found = sorted(path for path in submissions.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{submissions}: cannot be read: {error.strerror}; expected a folder of submissions"
        ) from error
    if not found:
        raise InputError(f"{submissions}: has no submissions; each is a directory that `nanogpt submission` made")
    return found


def _refuse_others_page(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a directory with --out")
    if not (out / PAGE_NAME).exists():
        return
    try:
        ours = read_json(out / DATA_NAME)["written_by"] == WRITTEN_BY
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"{out / PAGE_NAME}: exists and is not a leaderboard; name another directory with --out")


def _data(folders: list[Path], reports: Path) -> dict[str, Any]:
    """Entries by time, and rejected by name; each with the submission's directory. Reports go into `reports`."""
    entries, rejected = [], []
    with progress("submissions", len(folders)) as advance:
        for folder in folders:
            shown = printable(os.fsencode(folder.name).decode("utf-8", "backslashreplace"))
            name = page_name(folder)
            found = checked_entry(folder.absolute(), (reports / name).absolute())
            if "reason" in found:
                rejected.append({"submission": shown, "reason": found["reason"]})
            else:
                entries.append({"submission": shown, "report": f"{REPORTS_NAME}/{name}", **found})
            advance(1)
    entries.sort(key=lambda entry: (entry["seconds"], entry["date"], entry["submission"]))
    for rank, entry in enumerate(entries, start=1):
        runs = set(entry["metrics_sha256"])
        entry["rank"] = rank
        entry["shares_runs_with"] = [
            other["submission"] for other in entries if other is not entry and runs & set(other["metrics_sha256"])
        ]
    return {"entries": entries, "rejected": rejected}
