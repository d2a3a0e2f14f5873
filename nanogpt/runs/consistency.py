"""Whether a run's files agree: spec.yaml, record.json, metrics.jsonl and log.txt describe the same run.

A run writes them side by side, each from what happened. Files that were edited, or assembled by hand, contradict
each other or lack something that a run always writes. Agreement proves little: whoever invents
all of them together makes them agree. Only another run can tell.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError
from nanogpt.runs.directory import LOG_NAME, METRICS_NAME, RECORD_NAME, SPEC_NAME
from nanogpt.runs.loaded import LoadedRun
from nanogpt.runs.metrics import Records
from nanogpt.runs.provenance import RULE, package_directory, source_sha256, training_sources
from nanogpt.runs.record import Record
from nanogpt.spec import RunSpec

LOSS_DIGITS = 1e-8  # of a loss, written with nine
ROUNDED_MS = 1.0
START_S = 300.0  # between the metrics' start and the record's, on a slow file system
TRAINER = "training/trainer.py"
SPEC_HEAD = "spec.yaml: the resolved recipe of this run"  # in the log
_SOURCE_HEAD = re.compile(r"(\S+\.py): (\d+) lines, sha256 ([0-9a-f]{64})")
_STEP = re.compile(r"step:(\d+)/(\d+)(?: val_loss:(\d+\.\d+))? train_time:(\d+)ms step_avg:")
_START = re.compile(r"(\d{4}-\d\d-\d\dT\S+) on (\S+), world size (\d+)")


def contradictions(run: LoadedRun, record: Record) -> list[str]:
    """What in a finished run's files is inconsistent or missing; empty if all is in order."""
    return [
        *_record_and_spec(run, record),
        *_record_alone(record),
        *_metrics(run, record),
        *_log(run, record, _read_log(run.path / LOG_NAME)),
    ]


def _record_and_spec(run: LoadedRun, record: Record) -> Iterator[str]:
    spec, training, hardware = run.spec, run.spec.training, run.spec.hardware
    try:
        digest = hashlib.sha256((run.path / SPEC_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{run.path / SPEC_NAME}: cannot be read: {error.strerror}") from error
    if digest != record.spec_sha256:
        yield f"{SPEC_NAME} has sha256 {digest[:12]}, by {RECORD_NAME} {record.spec_sha256[:12]}"
    claimed = record.hardware.claimed
    for what, ours, theirs in (
        ("name", record.name, spec.name),
        ("seed", record.seed, training.seed),
        ("steps in all", record.total_steps, training.total_steps),
        ("tokens in all", record.total_tokens, training.total_tokens),
        ("target loss", record.target_loss, spec.evaluation.target_loss),
        ("world size", record.hardware.world_size, spec.world_size),
        (
            "hardware",
            (claimed.nodes, claimed.gpus_per_node, claimed.gpu),
            (hardware.nodes, hardware.gpus_per_node, hardware.gpu),
        ),
    ):
        if ours != theirs:
            yield f"{what}: {ours} by {RECORD_NAME}, {theirs} by {SPEC_NAME}"
    if record.state == "finished" and len(record.end_of_run) != len(training.end_lines):  # words may change
        told, expected = ("; ".join(lines) or "nothing" for lines in (record.end_of_run, training.end_lines))
        yield f"end of the run: {told} by {RECORD_NAME}, {expected} by {SPEC_NAME}"


def _record_alone(record: Record) -> Iterator[str]:
    if record.state == "finished":
        for what, found, expected in (
            ("steps", record.steps, record.total_steps),
            ("tokens", record.tokens, record.total_tokens),
            ("step of the last validation", record.val_loss_step, record.total_steps),
            ("training time", record.train_seconds, record.record_seconds),
        ):
            if found != expected:
                yield f"{RECORD_NAME}: {what}: {found}, of a finished run {expected}"
    last = record.starts[-1]
    times = [record.created, *(start.time for start in record.starts), last.clock_started, record.ended]
    known = [time for time in times if time is not None]
    if known != sorted(known) or record.updated < known[-1]:
        yield f"{RECORD_NAME}: its times are not in their order"
    if last.source_sha256 != record.code.source_sha256:
        yield f"{RECORD_NAME}: source {record.code.source_sha256[:12]}, of the last start {last.source_sha256[:12]}"


# --- metrics.jsonl ---


def _metrics(run: LoadedRun, record: Record) -> Iterator[str]:
    metrics, spec = run.metrics, run.spec
    start = metrics.start
    for what, found, expected in (
        ("name", start.get("name"), spec.name),
        ("steps in all", start.get("total_steps"), spec.training.total_steps),
        ("world size", start.get("world_size"), spec.world_size),
        ("state", metrics.state, record.state),
        ("starts", metrics.starts, sum(one.clock_started is not None for one in record.starts)),
    ):
        if found != expected:
            yield f"{METRICS_NAME}: {what}: {found}, expected {expected}"
    began, clock = _time(start.get("time")), record.starts[-1].clock_started
    if began is None or clock is None or abs((clock - began).total_seconds()) > START_S:
        yield f"{METRICS_NAME} begins at {start.get('time')}, the clock by {RECORD_NAME} at {clock}"
    yield from _series(spec, metrics.steps, "steps", list(range(1, spec.training.total_steps + 1)))
    total = spec.training.total_steps
    yield from _series(spec, metrics.evaluations, "evaluations", [*spec.evaluation.steps(total), total])
    yield from _stages(spec, metrics.steps)
    final = run.final_loss
    if final is None or record.val_loss is None or abs(final - record.val_loss) > LOSS_DIGITS * abs(final):
        yield f"final validation loss: {final} by {METRICS_NAME}, {record.val_loss} by {RECORD_NAME}"
    yield from _evaluation_times(metrics.steps, metrics.evaluations)


def _series(spec: RunSpec, records: Records, what: str, wanted: list[int]) -> Iterator[str]:
    """Every record is present, with the tokens of its step, and consistent times."""
    import numpy as np

    steps, times = records.column("step"), records.column("train_time_ms")
    if steps.tolist() != wanted:
        missing = sorted(set(wanted) - set(map(int, steps.tolist())))
        more = f"; the first that is missing is of step {missing[0]:,}" if missing else ""
        yield f"{METRICS_NAME}: {len(steps):,} {what}, the run has {len(wanted):,}{more}"
        return
    tokens = records.column("tokens")
    expected = _tokens_before(spec, steps)
    if not np.array_equal(tokens, expected):
        place = int(np.argmax(tokens != expected))
        found = f"{tokens[place]:,.0f} tokens at step {wanted[place]:,}"
        yield f"{METRICS_NAME}: {found}, {expected[place]:,.0f} by {SPEC_NAME}"
    averages = records.column("step_avg_ms") * np.maximum(steps, 1)
    if not np.allclose(times, averages, rtol=1e-6, atol=1e-3):  # NaN, where one is missing, equals nothing
        yield f"{METRICS_NAME}: {what}: step_avg_ms is not the time by the steps"


def _tokens_before(spec: RunSpec, steps: Any) -> Any:
    """Tokens trained on after this many steps, (n,)."""
    import numpy as np

    found, first = np.zeros(len(steps)), 0
    for stage in spec.training.all_stages:
        found += stage.batch_tokens * np.clip(steps - first, 0, stage.steps)
        first += stage.steps
    return found


def _stages(spec: RunSpec, records: Records) -> Iterator[str]:
    import numpy as np

    ends = np.cumsum([stage.steps for stage in spec.training.all_stages])
    steps = records.column("step")
    if not np.array_equal(records.column("stage"), np.searchsorted(ends, steps)):
        yield f"{METRICS_NAME}: steps of other stages than the spec's"


def _evaluation_times(steps: Records, evaluations: Records) -> Iterator[str]:
    """The clock stands still while a run evaluates: its time is that of the previous step."""
    import numpy as np

    if not len(steps):
        return
    at, times = evaluations.column("step"), evaluations.column("train_time_ms")
    known, clock = steps.column("step"), steps.column("train_time_ms")
    place = np.searchsorted(known, at, side="right") - 1
    before = np.where(place < 0, 0.0, clock[np.maximum(place, 0)])
    after = clock[np.minimum(place + 1, len(clock) - 1)]
    late = (times > np.maximum(after, before) + ROUNDED_MS) & (place + 1 < len(clock))
    if ((times < before - ROUNDED_MS) | late).any():
        yield f"{METRICS_NAME}: the times of evaluations do not lie between those of the steps"


def _time(text: Any) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else None


# --- log.txt ---


@dataclass
class _Log:
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # sha256 in its header, and of the text
    specs: list[str] = field(default_factory=list)
    source_sha256: list[str] = field(default_factory=list)
    starts: list[tuple[datetime.datetime | None, str, int]] = field(default_factory=list)  # time, host, world size
    totals: set[int] = field(default_factory=set)
    steps: Records = field(default_factory=Records)
    evaluations: Records = field(default_factory=Records)


def _read_log(path: Path) -> _Log | None:
    """The log's lines written by the run; None if there is no log."""
    found = _Log()
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            previous = ""
            for whole_line in file:
                line = whole_line.rstrip()
                if previous == RULE and (head := _SOURCE_HEAD.fullmatch(line)):
                    next(file, "")  # the rule below it
                    digest = hashlib.sha256()
                    for _ in range(int(head[2])):
                        digest.update(next(file, "").encode())
                    found.sources[head[1]] = (head[3], digest.hexdigest())
                elif previous == RULE and line == SPEC_HEAD:
                    next(file, "")
                    text = []
                    for of_spec in file:
                        if of_spec.rstrip() == RULE:
                            break
                        text.append(of_spec)
                    found.specs.append("".join(text))
                    previous = RULE
                    continue
                elif step := _STEP.match(line):
                    number, total, loss, ms = step.groups()
                    found.totals.add(int(total))
                    record = {"step": int(number), "ms": int(ms), "loss": None if loss is None else float(loss)}
                    (found.steps if loss is None else found.evaluations).append(record)
                elif line.startswith("source sha256 "):
                    found.source_sha256.append(line.removeprefix("source sha256 "))
                elif start := _START.fullmatch(line):
                    found.starts.append((_time(start[1]), start[2], int(start[3])))
                previous = line
    except (OSError, ValueError, OverflowError):
        return None
    found.steps.settle()
    found.evaluations.settle()
    return found


def _log(run: LoadedRun, record: Record, log: _Log | None) -> Iterator[str]:
    if log is None:
        yield f"no {LOG_NAME} that can be read"
        return
    changed = [name for name, (head, digest) in log.sources.items() if head != digest]
    if not any(name.endswith(TRAINER) for name in log.sources):
        yield f"{LOG_NAME}: the code that ran is not in it"
    elif changed:
        yield f"{LOG_NAME}: {changed[0]} is not what its sha256 says"
    elif record.code.source_sha256 == source_sha256():
        root = package_directory().parent
        ours = {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in training_sources()
        }
        if ours != {name: digest for name, (_, digest) in log.sources.items()}:
            yield f"{LOG_NAME}: its code is not that of the source that {RECORD_NAME} names"
    if not log.source_sha256 or log.source_sha256[-1] != record.code.source_sha256:
        source = log.source_sha256[-1][:12] if log.source_sha256 else "none"
        yield f"{LOG_NAME}: source sha256 {source}, by {RECORD_NAME} {record.code.source_sha256[:12]}"
    if not log.specs or log.specs[-1] != (run.path / SPEC_NAME).read_text(encoding="utf-8"):
        yield f"{LOG_NAME}: " + ("its spec is not that of spec.yaml" if log.specs else "no spec in it")
    starts = [(start.time, start.process.host, start.world_size) for start in record.starts]
    if log.starts != starts:
        yield f"{LOG_NAME}: {len(log.starts)} starts, at other times or places than the {len(starts)} of {RECORD_NAME}"
    if log.totals != {run.spec.training.total_steps}:
        yield f"{LOG_NAME}: runs of {', '.join(map(str, sorted(log.totals))) or 'no'} steps"
    yield from _log_lines(run, log)


def _log_lines(run: LoadedRun, log: _Log) -> Iterator[str]:
    import numpy as np

    metrics, every = run.metrics, run.spec.output.log_every
    evaluations = metrics.evaluations
    if log.evaluations.column("step").tolist() != evaluations.column("step").tolist():
        yield f"{LOG_NAME}: {len(log.evaluations)} validations, {METRICS_NAME} has {len(evaluations)}"
    elif not (
        np.allclose(log.evaluations.column("loss"), evaluations.column("val_loss"), rtol=0, atol=5.1e-5)
        and np.allclose(log.evaluations.column("ms"), evaluations.column("train_time_ms"), rtol=0, atol=ROUNDED_MS)
    ):
        yield f"{LOG_NAME}: its validations are not those of {METRICS_NAME}"
    steps, times = metrics.steps.column("step"), metrics.steps.column("train_time_ms")
    logged = steps % every == 0
    if log.steps.column("step").tolist() != steps[logged].tolist():
        yield f"{LOG_NAME}: lines of {len(log.steps):,} steps, {METRICS_NAME} has {int(logged.sum()):,} that are logged"
    elif not np.allclose(log.steps.column("ms"), times[logged], rtol=0, atol=ROUNDED_MS):
        yield f"{LOG_NAME}: the times of its steps are not those of {METRICS_NAME}"


# --- between runs ---


def contradictions_between(runs: Sequence[LoadedRun]) -> list[str]:
    """Why runs with records cannot all be different runs; empty if they can."""
    return [text for one, other in itertools.combinations(runs, 2) for text in _pair(one, other)]


def _pair(one: LoadedRun, other: LoadedRun) -> Iterator[str]:
    assert one.record is not None and other.record is not None
    both = f"{one.label} and {other.label}"
    for kind, key, ours, theirs in (
        ("validation", "val_loss", one.metrics.evaluations, other.metrics.evaluations),
        ("training", "train_loss", one.metrics.steps, other.metrics.steps),
    ):
        shared, common = _shared(ours, theirs, key)
        if 2 * shared > common:
            yield f"{both}: {shared:,} of {common:,} {kind} losses are the same to the last digit: a run counts once"
    devices = _devices(one.record) & _devices(other.record)
    for start, later in itertools.product(one.record.starts, other.record.starts):
        if start.process.boot_id is not None and start.process == later.process:
            yield f"{both}: one process ({start.process.pid} on {start.process.host}) wrote both"
        elif devices and _overlap(start.clock_started, start.ended, later.clock_started, later.ended):
            yield f"{both}: trained at one time, {start.clock_started} and {later.clock_started}, on {min(devices)}"


def _shared(one: Records, other: Records, key: str) -> tuple[int, int]:
    """(equal values, common values) after step 0, where all runs of a seed are alike."""
    import numpy as np

    _, ours, theirs = np.intersect1d(one.column("step"), other.column("step"), return_indices=True)
    first, second = one.column(key)[ours], other.column(key)[theirs]
    known = (one.column("step")[ours] > 0) & ~np.isnan(first) & ~np.isnan(second)
    return int((first == second)[known].sum()), int(known.sum())


def _devices(record: Record) -> set[str]:
    return {rank.device_uuid for rank in record.hardware.ranks if rank.device_uuid}


def _overlap(begin: Any, end: Any, other_begin: Any, other_end: Any) -> bool:
    return None not in (begin, end, other_begin, other_end) and begin < other_end and other_begin < end
