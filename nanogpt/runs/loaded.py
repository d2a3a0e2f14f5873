"""A run with everything in its directory, and how runs differ: the basis of comparing, testing and checking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.console import say
from nanogpt.data import official
from nanogpt.errors import InputError
from nanogpt.runs.directory import RECORD_NAME, RunDirectory
from nanogpt.runs.metrics import RunMetrics, read_run
from nanogpt.runs.record import Record, live_state, read_record
from nanogpt.runs.reference import under
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import spec_differences

# What may differ between runs of one kind: identity, and where it reads and writes.
IDENTITY_KEYS = ("name", "description", "training.seed", "data.directory", "output", "reference")
VERSIONS = ("torch", "cuda", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")


@dataclass(frozen=True)
class LoadedRun:
    """One run: its directory, spec, metrics and record (None: the run is older than records)."""

    label: str
    path: Path
    spec: RunSpec
    metrics: RunMetrics
    record: Record | None

    @property
    def state(self) -> str:
        """As in `nanogpt runs`, including killed and stale; `unfinished` for a run without a record."""
        return self.metrics.state if self.record is None else live_state(self.record, self.path)

    @property
    def final_loss(self) -> float | None:
        """Validation loss after the last step, in nats; None if there is none, or it is not finite."""
        last = self.metrics.evaluations[-1:]
        if not last or last[0]["step"] != self.metrics.total_steps:
            return None
        return last[0].get("val_loss")

    @property
    def train_seconds(self) -> float | None:
        """The clock, as far as the run got."""
        end = self.metrics.end or {}
        ms = end.get("train_time_ms", self.metrics.last.get("train_time_ms"))
        return None if ms is None else float(ms) / 1000

    @property
    def why_unfinished(self) -> str | None:
        """Why the run has no result; None: it has."""
        state, steps, total = self.state, self.metrics.last.get("step", 0), self.metrics.total_steps
        if state != "finished":
            reason = (self.metrics.end or {}).get("reason")
            return f"{state} at step {steps} of {total}" + (f": {reason}" if reason else "")
        if self.final_loss is None:
            return f"no finite validation loss after its last step, {total}"
        return None

    def curve(self) -> list[tuple[int, float | None, float | None]]:
        """(step, validation loss, milliseconds of the clock) of each evaluation."""
        return [(e["step"], e.get("val_loss"), e.get("train_time_ms")) for e in self.metrics.evaluations]

    @property
    def on_fineweb(self) -> bool:
        """Whether it was validated on FineWeb's shards, by the sha256 of what was read: targets are for this text."""
        files = [] if self.record is None or self.record.data is None else self.record.data.val
        return bool(files) and all(official.SHA256.get(file.name, "") == file.sha256 for file in files)

    @property
    def has_reference(self) -> bool:
        """Whether the run was compared with its recipe's reference curve during training."""
        return self.spec.reference is not None and any("reference_loss" in e for e in self.metrics.evaluations)


def load_runs(paths: Iterable[Path], *, need_records: bool = False) -> list[LoadedRun]:
    """The runs in these directories, each directory once; labels tell them apart.

    Raises `InputError` for what is not a run, or with `need_records` for a run without a record.
    """
    runs, unreadable = load_readable_runs(paths, need_records=need_records)
    if unreadable:
        raise unreadable[0]
    return runs


def load_readable_runs(
    paths: Iterable[Path], *, need_records: bool = False
) -> tuple[list[LoadedRun], list[InputError]]:
    """The readable runs, and why the others are not. Raises `InputError` if none is."""
    unique = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in unique]
    runs, unreadable = [], []
    for path, name in zip(unique, names, strict=True):
        label = name if names.count(name) == 1 else str(path)
        try:
            runs.append(_load(label, path, need_record=need_records))
        except InputError as error:
            unreadable.append(error)
    if unreadable and not runs:
        raise unreadable[0]
    return runs, unreadable


def say_unreadable(unreadable: Sequence[InputError]) -> None:
    """Report which runs were left out."""
    for error in unreadable:
        say(f"left out: {error}")


def _load(label: str, path: Path, *, need_record: bool) -> LoadedRun:
    directory = RunDirectory.open(path)
    record = None
    try:
        if need_record or (path / RECORD_NAME).exists():
            record = read_record(path)
    except InputError as error:
        if need_record:
            raise
        say(f"{error}; continuing without the record")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return LoadedRun(label, path, directory.spec(), read_run(path), record)


def plot_runs(runs: Sequence[LoadedRun], path: Path) -> None:
    """Draw the runs' losses into `path`, with targets of those on FineWeb and references of those compared with one.

    Raises as `nanogpt.runs.plot.plot_loss`.
    """
    from nanogpt.runs.plot import Reference, plot_loss

    targets = {run.spec.evaluation.target_loss for run in runs if run.on_fineweb} - {None}
    curves = {
        curve.name: curve.points
        for run in runs
        if run.has_reference and run.spec.reference is not None
        for curve in run.spec.reference.curves
    }
    lines = [Reference(target, "target") for target in sorted(filter(None, targets))]
    plot_loss({run.label: run.metrics for run in runs}, path, lines, curves)


@dataclass(frozen=True)
class Difference:
    """A key in which runs differ; `values` are in the order of the runs, None if missing."""

    part: str  # spec, code, hardware or data
    key: str
    values: tuple[Any, ...]

    def line(self, labels: Sequence[str]) -> str:
        """For an error message."""
        return f"{self.part}: {self.key}: " + ", ".join(
            f"{show(value)} in {label}" for label, value in zip(labels, self.values, strict=True)
        )


def differences(runs: Sequence[LoadedRun], *, ignore: tuple[str, ...] = ()) -> list[Difference]:
    """Everything in which the runs differ: spec key by key without `ignore`, then code, hardware and data."""
    found = _spec_differences(runs, ignore)
    for part, key, value_of in _FACTS:
        values = tuple(None if run.record is None else value_of(run.record) for run in runs)
        if any(value != values[0] for value in values):
            found.append(Difference(part, key, values))
    return found


def _spec_differences(runs: Sequence[LoadedRun], ignore: tuple[str, ...]) -> list[Difference]:
    keys: dict[str, None] = {}
    for run in runs[1:]:
        keys |= dict.fromkeys(key for key, _, _ in spec_differences(runs[0].spec, run.spec))
    # If lists of different lengths differ as a whole in one pair of runs, their entries are not listed too.
    whole = [key for key in keys if not any(under(key, (other,)) for other in keys if other != key)]
    specs = [run.spec.model_dump(mode="json") for run in runs]
    return [Difference("spec", key, tuple(_at(spec, key) for spec in specs)) for key in whole if not under(key, ignore)]


def _at(data: Any, key: str) -> Any:
    for word in key.split("."):
        if isinstance(data, dict):
            data = data.get(word)
        elif isinstance(data, list) and int(word) < len(data):
            data = data[int(word)]
        else:
            return None
    return data


def _version(name: str) -> Callable[[Record], Any]:
    return lambda record: record.versions.get(name)


def _counted(names: Sequence[str]) -> str | None:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or None


_FACTS: tuple[tuple[str, str, Callable[[Record], Any]], ...] = (
    ("code", "source_sha256", lambda record: record.code.source_sha256),
    *(("code", name, _version(name)) for name in VERSIONS),
    ("code", "attention", lambda record: record.computation and record.computation.attention),
    ("code", "head_precision", lambda record: record.computation and record.computation.head_precision),
    ("code", "kernels", lambda record: record.computation and record.computation.kernels),
    ("hardware", "world_size", lambda record: record.hardware.world_size),
    ("hardware", "devices", lambda record: _counted(record.hardware.devices)),
    ("data", "val_stream_sha256", lambda record: record.data and record.data.val_stream_sha256),
)


def show(value: Any) -> str:
    """A value for a table or message, with hashes and long values cut."""
    text = "-" if value is None else str(value)
    if len(text) in (40, 64) and all(c in "0123456789abcdef" for c in text):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."


def require(runs: Sequence[LoadedRun], count: int, command: str) -> None:
    """Raise `InputError` if fewer than `count` runs are named."""
    if len(runs) < count:
        raise InputError(f"{command}: needs at least {count} different runs, found {len(runs)}")
