"""Check somebody's submission again, in a process of its own, which can neither use up the memory nor hang.

Nothing in it is trusted: rules, test and time are computed from its runs, and what submission.json claims is checked
against them. Links are refused, as they could show a file of this machine.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import stat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt.data.manifest import file_sha256
from nanogpt.errors import InputError
from nanogpt.files import read_json
from nanogpt.pages.page import PLOTLY_NAME
from nanogpt.pages.report import write_report
from nanogpt.runs.directory import LOG_NAME, METRICS_NAME
from nanogpt.runs.loaded import load_runs
from nanogpt.runs.public_layout import TRACK
from nanogpt.runs.submission import Fields, Submission, caveats, hardware, one_record, prepare, submission_date

LIMIT_S = 600.0
LIMIT_BYTES = 4 << 30  # of memory, beyond what the process starts with
MOST_BYTES, MOST_FILES = 2 << 30, 10_000  # of a submission
REASON_CHARACTERS = 4_000
SUBMISSION_NAME = "submission.json"

_processes = multiprocessing.get_context("forkserver")


class _Claimed(BaseModel):
    """What a submission says about itself in submission.json."""

    model_config = ConfigDict(extra="ignore")

    official: bool
    record_time_seconds: float = Field(gt=0, lt=1e7)
    description: str = Field(max_length=500)
    log_url: str | None = Field(default=None, max_length=1000)
    contributors: list[str] = Field(default_factory=list, max_length=50)
    objections: list[str] = []


def checked_entry(directory: Path, report: Path) -> dict[str, Any]:
    """The submission in `directory` as data: its fields and results, or `reason`, why it is not listed.

    Writes its report to the file `report`. Never raises because of what a submission contains.
    """
    receive, send = _processes.Pipe(duplex=False)
    _processes.set_forkserver_preload(["nanogpt.pages.entry"])
    process = _processes.Process(target=_work, args=(directory, report, send), daemon=True)
    process.start()
    send.close()
    try:
        if receive.poll(LIMIT_S):
            found: dict[str, Any] = json.loads(receive.recv_bytes())
            return found
        return {"reason": f"its check took longer than {LIMIT_S:.0f} s"}
    except (EOFError, OSError):
        process.join(10)
        return {"reason": f"its check ended without a result, with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receive.close()


def _work(directory: Path, report: Path, send: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        found = entry_data(directory, report)
    except InputError as error:
        found = {"reason": str(error)}
    except Exception as error:  # whatever somebody put into it
        found = {"reason": f"cannot be checked: {type(error).__name__}: {error}"}
    if "reason" in found:  # without this machine's path to the submissions
        found["reason"] = found["reason"].replace(f"{directory}/", "")[:REASON_CHARACTERS]
    send.send_bytes(json.dumps(found).encode())


def entry_data(directory: Path, report: Path) -> dict[str, Any]:
    """What the leaderboard says about the submission; its report is written to `report`. Raises InputError."""
    _refuse_what_is_odd(directory)
    claimed = _claimed(directory)
    runs = load_runs(_run_directories(directory), need_records=True)
    fields = Fields(claimed.description, tuple(claimed.contributors), claimed.log_url)
    made = prepare(runs, fields, unofficial=True)
    objections = [*made.objections, *_broken_claims(directory, claimed, made)]
    if objections:
        raise InputError("\n".join(objections))
    write_report(runs, report, title=claimed.description, plotly=f"../{PLOTLY_NAME}", back="../index.html")
    result, first = made.significance, one_record(runs[0])
    return {
        "seconds": made.record_seconds,
        "description": " ".join(claimed.description.split()),
        "contributors": list(fields.contributors),
        "date": submission_date(made),
        "log_url": fields.log_url,
        "hardware": hardware(runs[0]),
        "recipe": runs[0].spec.name,
        "steps": first.total_steps,
        "commit": first.code.commit,
        "runs": result.n,
        "mean_loss": result.mean,
        "sd": result.sd,
        "p": result.p,
        "caveats": caveats(made),
        "metrics_sha256": [file_sha256(run.path / METRICS_NAME) for run in runs],
    }


def _refuse_what_is_odd(directory: Path) -> None:
    """Raise InputError for links, devices and pipes, and for more than can be checked."""
    size = count = 0
    if directory.is_symlink():
        raise InputError("is a link; put the submission itself here")
    for parent, folders, files in os.walk(directory, onerror=_cannot_read):
        for name in (*folders, *files):
            path = Path(parent) / name
            status = path.lstat()
            size, count = size + status.st_size, count + 1
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a file"
                raise InputError(f"{path.relative_to(directory)}: is {kind}; a submission has files and directories")
            if size > MOST_BYTES or count > MOST_FILES:
                raise InputError(f"is larger than {MOST_BYTES >> 30} GB, or has more than {MOST_FILES:,} files")


def _cannot_read(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _claimed(directory: Path) -> _Claimed:
    path = directory / SUBMISSION_NAME
    try:
        return _Claimed.model_validate(read_json(path))
    except FileNotFoundError:
        hint = "; logs alone cannot be checked" if (directory / "README.md").exists() else ""
        raise InputError(f"has no {SUBMISSION_NAME}: not what `nanogpt submission` makes{hint}") from None
    except OSError as error:
        raise InputError(f"{SUBMISSION_NAME}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{SUBMISSION_NAME}: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    except ValueError:
        raise InputError(f"{SUBMISSION_NAME}: is not JSON") from None


def _run_directories(directory: Path) -> list[Path]:
    try:
        found = sorted(path for path in (directory / "runs").iterdir() if path.is_dir())
    except OSError:
        found = []
    if not found:
        raise InputError("has no runs: a submission keeps them in runs/")
    return found


def _broken_claims(directory: Path, claimed: _Claimed, made: Submission) -> list[str]:
    """What the submission says about itself that its runs do not show."""
    found = [] if claimed.official else ["marked unofficial by whoever made it"]
    if abs(claimed.record_time_seconds - made.record_seconds) > 0.0015:
        found.append(f"claims {claimed.record_time_seconds:.3f} s, but its runs took {made.record_seconds:.3f} s")
    logs = {file_sha256(run.path / LOG_NAME) for run in made.runs}
    for log in sorted((directory / TRACK).glob("*/*.txt")):
        if file_sha256(log) not in logs:
            found.append(f"{log.relative_to(directory)}: is the log of none of its runs")
    return found


def page_name(directory: Path) -> str:
    """A file's name for a submission's report that any web server, and Jekyll, serves as it is."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", directory.name).strip("-")[:60] or "entry"
    return f"{words}-{hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:8]}.html"
