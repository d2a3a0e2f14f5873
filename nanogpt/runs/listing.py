"""The runs in a directory, a row for each: what it is, how far it got, whether it is alive.

A run whose record is missing or unreadable is listed from its spec.yaml and metrics.jsonl; `problem`
says what is wrong. A run that has not reported its end is read from its metrics, which are newer than
its record.
"""

from __future__ import annotations

import datetime
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.console import say
from nanogpt.errors import InputError
from nanogpt.runs.directory import RECORD_NAME, is_run
from nanogpt.runs.display import ms_text
from nanogpt.runs.metrics import UNFINISHED, RunMetrics, iter_metrics, run_metrics
from nanogpt.runs.record import Record, live_state, read_record
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

DEPTH = 3  # directories below the given one


@dataclass
class RunRow:
    """A run in a list. None: unknown.

    `state`: running, finished, failed, interrupted, killed, stale (see `nanogpt.runs.record.live_state`), or
    unfinished if there is no record to tell running from killed.
    """

    name: str  # of the directory
    path: Path
    state: str
    reason: str | None = None
    steps: int = 0  # done
    total_steps: int | None = None
    tokens: int = 0
    val_loss: float | None = None
    target_loss: float | None = None
    train_seconds: float | None = None
    ms_per_step: float | None = None
    world_size: int | None = None
    gpus: str | None = None  # "8 x NVIDIA H100 80GB HBM3"; what the recipe claims if nothing was detected yet
    hosts: str | None = None
    job: str | None = None  # Slurm's, 123 or 120_3
    starts: int = 0
    commit: str | None = None  # with + if the tree was not clean
    seed: int | None = None
    created: datetime.datetime | None = None
    problem: str | None = None  # why the row is incomplete

    @property
    def progress(self) -> str:
        """`512/1,555`."""
        return f"{self.steps:,}" + ("" if self.total_steps is None else f"/{self.total_steps:,}")

    def as_json(self) -> dict[str, Any]:
        """The fields in JSON's types."""
        data = asdict(self)
        data["path"] = str(self.path)
        data["created"] = None if self.created is None else self.created.isoformat()
        return data


def list_runs(directory: Path | str) -> list[RunRow]:
    """The runs in `directory` and below, oldest first; `directory` may be a run itself.

    Raises:
        InputError: `directory` does not exist or cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise InputError(f"{directory}: {what}; expected a directory of runs (nanogpt train --out DIR, NANOGPT_RUNS)")
    try:
        rows = [_row_whatever_happens(path) for path in _find(directory, DEPTH)]
    except OSError as error:
        raise InputError(f"{directory}: cannot be read: {error}") from error
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(rows, key=lambda row: (row.created or oldest, row.name))


def _find(directory: Path, depth: int) -> Iterator[Path]:
    if is_run(directory) or (directory / RECORD_NAME).is_file():
        yield directory
    elif depth:
        for child in sorted(directory.iterdir()):
            try:
                if not child.name.startswith(".") and child.is_dir():
                    yield from _find(child, depth - 1)
            except OSError as error:  # this one's; the others are fine
                say(f"{child}: cannot be read: {error.strerror}")


def _row_whatever_happens(path: Path) -> RunRow:
    """`run_row`; even a run with unforeseen files gets a row, and hides no other."""
    try:
        return run_row(path)
    except Exception as error:
        return RunRow(path.name, path, UNFINISHED, problem=f"cannot be read: {type(error).__name__}: {error}")


def run_row(path: Path) -> RunRow:
    """The row of the run in the directory `path`, from whatever can be read."""
    name = path.resolve().name
    problems: list[str] = []
    try:
        record = read_record(path)
        if live_state(record, path) == "killed":  # unless it ended in the meantime
            record = read_record(path)
    except InputError as error:
        problems.append(str(error))
        row = _row_without_record(path, name, problems)
    else:
        row = _row_of(record, path, name, problems)
    row.problem = "; ".join(problem.removeprefix(f"{path}/") for problem in problems) or None
    return row


def _row_of(record: Record, path: Path, name: str, problems: list[str]) -> RunRow:
    start, hardware = record.starts[-1], record.hardware
    devices = hardware.devices or [hardware.claimed.gpu] * hardware.world_size
    slurm = record.slurm
    row = RunRow(
        name=name,
        path=path,
        state=live_state(record, path),
        reason=record.reason,
        steps=record.steps,
        total_steps=record.total_steps,
        tokens=record.tokens,
        val_loss=record.val_loss,
        target_loss=record.target_loss,
        train_seconds=record.train_seconds if record.clock_started else None,
        ms_per_step=record.ms_per_step,
        world_size=hardware.world_size,
        gpus=", ".join(f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices)),
        hosts=", ".join(hardware.hosts) or start.process.host,
        job=None
        if slurm is None
        else (f"{slurm.array_job_id}_{slurm.array_task_id}" if slurm.array_job_id else slurm.job_id),
        starts=len(record.starts),
        commit=None if record.code.commit is None else record.code.commit + ("+" if record.code.clean is False else ""),
        seed=record.seed,
        created=record.created,
    )
    if record.state == "running":
        metrics = _metrics(path, name, problems)
        if metrics is not None and metrics.starts:
            _take_metrics(row, metrics)
            # Its end may be in the metrics but not in the record; if it belongs to this start.
            if metrics.end and start.clock_started:
                row.state, row.reason = metrics.state, metrics.end.get("reason")
    return row


def _row_without_record(path: Path, name: str, problems: list[str]) -> RunRow:
    from nanogpt.runs.directory import RunDirectory

    row = RunRow(name=name, path=path, state=UNFINISHED)
    try:
        spec = RunDirectory(path).spec()
        row.total_steps, row.world_size = spec.training.total_steps, spec.world_size
        row.gpus, row.seed = f"{spec.world_size} x {spec.hardware.gpu}", spec.training.seed
        row.target_loss = spec.evaluation.target_loss
        row.created = datetime.datetime.fromtimestamp((path / "spec.yaml").stat().st_mtime, datetime.UTC)
    except (InputError, OSError) as error:
        problems.append(str(error))
    metrics = _metrics(path, name, problems)
    if metrics is not None:
        row.state, row.starts = metrics.state, metrics.starts
        row.reason = metrics.end.get("reason") if metrics.end else None
        _take_metrics(row, metrics)
    return row


def _metrics(path: Path, name: str, problems: list[str]) -> RunMetrics | None:
    file = path / "metrics.jsonl"
    if not file.exists():
        return None
    try:
        return run_metrics(iter_metrics(file), name)
    except InputError as error:
        problems.append(str(error))
        return None


def _take_metrics(row: RunRow, metrics: RunMetrics) -> None:
    last = metrics.last
    row.steps, row.tokens = int(last.get("step") or 0), int(last.get("tokens") or 0)
    row.total_steps = metrics.total_steps or row.total_steps
    if metrics.evaluations:
        row.val_loss = metrics.evaluations[-1].get("val_loss")
    if last.get("train_time_ms") is not None:
        row.train_seconds = float(last["train_time_ms"]) / 1000
        row.ms_per_step = float(last["train_time_ms"]) / row.steps if row.steps else None


# --- filter and sort --------------------------------------------------------------------------------------------

COLUMNS = tuple(field.name for field in fields(RunRow))
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_FILTER = re.compile(r"\s*([a-z_]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")


def filter_runs(rows: Sequence[RunRow], filters: Sequence[str]) -> list[RunRow]:
    """The rows that match all filters: `state=finished`, `val_loss<3.28`, `created>=2026-01-31`, `job=` (none).

    Text after = and != ignores case and matches the beginning of the column: `commit=3f2a`,
    `state=fin`. < and > leave out rows without a value.

    Raises:
        InputError: malformed, no such column, or a value that does not suit the column.
    """
    for text in filters:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise InputError(f"--filter {text}: expected KEY=VALUE, or !=, <, <=, >, >=; such as val_loss<3.28")
        key, sign, wanted = match.groups()
        rows = [row for row in rows if _fits(getattr(row, _column(key, "--filter")), sign, wanted, text)]
    return list(rows)


def sort_runs(rows: Sequence[RunRow], key: str) -> list[RunRow]:
    """Sorted by column `key`, or `-key` for the largest first; rows without a value come last. Raises InputError."""
    column = _column(key.removeprefix("-"), "--sort")
    known = [row for row in rows if getattr(row, column) is not None]
    unknown = [row for row in rows if getattr(row, column) is None]
    return sorted(known, key=lambda row: getattr(row, column), reverse=key.startswith("-")) + unknown


def _column(key: str, flag: str) -> str:
    if key not in COLUMNS:
        raise InputError(f"{flag} {key}: no such column; the columns are {', '.join(COLUMNS)}")
    return key


def _fits(value: Any, sign: str, wanted: str, text: str) -> bool:
    if value is None or not wanted:
        empty = value is None and not wanted
        return empty if sign == "=" else not empty if sign == "!=" else False
    if isinstance(value, datetime.datetime | int | float):
        try:
            if isinstance(value, datetime.datetime):
                other: Any = datetime.datetime.fromisoformat(wanted)
                other = other if other.tzinfo else other.astimezone()
            else:
                other = float(wanted.replace(",", ""))
        except ValueError:
            kind = "a date such as 2026-01-31" if isinstance(value, datetime.datetime) else "a number"
            raise InputError(f"--filter {text}: {wanted!r} is not {kind}") from None
        return _OPERATORS[sign](value, other)
    if sign in ("=", "!="):
        return str(value).lower().startswith(wanted.lower()) == (sign == "=")
    return _OPERATORS[sign](str(value), wanted)


# --- table ------------------------------------------------------------------------------------------------------


def runs_table(rows: Sequence[RunRow]) -> Table:
    """The rows as a table; a terminal of 80 columns drops some columns."""
    from rich.text import Text

    from nanogpt.console import new_table

    columns = ("run", "state", "steps", "val loss", "time", "GPUs", "ms/step", "commit", "date")
    table = new_table(*columns, wrap=("run", "GPUs"), spare=("commit", "ms/step", "date", "GPUs"))
    for row in rows:
        commit = row.commit or ""
        table.add_row(
            Text(printable(row.name)),
            row.state,
            row.progress,
            "" if row.val_loss is None else f"{row.val_loss:.4f}",
            "" if row.train_seconds is None else f"{row.train_seconds:,.1f} s",
            Text(printable(_short(row.gpus or ""))),
            "" if row.ms_per_step is None else ms_text(row.ms_per_step),
            commit[:7] + ("+" if commit.endswith("+") else ""),
            "" if row.created is None else row.created.astimezone().strftime("%Y-%m-%d %H:%M"),
        )
    return table


def _short(gpus: str) -> str:
    """`8 x H100` of `8 x NVIDIA H100 80GB HBM3`, `cpu` of `1 x cpu`."""
    return re.sub(r"NVIDIA | \d+GB\b| HBM\w+|^1 x (?=cpu$)", "", gpus)
