"""Reading metrics.jsonl: the records of a run, and the run that they tell of.

Each line is a JSON object whose `kind` is one of

- `start`: time, name, total_steps, world_size, device, resumed_at (null, or the step of the checkpoint)
- `step`: step, total_steps, stage, train_loss (weighted, a token; may be absent), train_time_ms, step_avg_ms, tokens,
  data_wait_ms (what the step waited for its batch, on the rank that waited longest)
- `evaluation`: step, total_steps, val_loss, train_time_ms, step_avg_ms, tokens
- `checkpoint`: step, path
- `checkpoint_failure`: step, reason: the run went on without this one
- `end`: state (finished, failed or interrupted), reason, train_time_ms

`step` counts the steps done, `tokens` those trained on, both since the run's start. A loss that was not finite is null.
A run that was resumed appends to the same file; what it had done after the checkpoint stands there twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError
from nanogpt.files import read_regular

Record = dict[str, Any]

UNFINISHED = "unfinished"


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl, in the order in which they were written.

    A last line without its newline, which a killed run may leave, is read if it is whole and left out if not.

    Raises:
        InputError: no such file, or a line before the last that is no JSON object.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: metrics cannot be read: {error.strerror}; expected the metrics of a run") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            shown = line[:60].decode("utf-8", errors="replace")
            raise InputError(
                f"{path}:{number}: expected a JSON object, found {shown!r}; delete the line to read the rest"
            )
    return records


@dataclass
class RunMetrics:
    """A run as its records tell it, with what a resumed run did again counted once."""

    name: str
    start: Record = field(default_factory=dict)  # the last start record
    starts: int = 0  # 1, and 1 more for each resume
    steps: list[Record] = field(default_factory=list)  # by step
    evaluations: list[Record] = field(default_factory=list)  # by step
    checkpoints: list[Record] = field(default_factory=list)  # by step
    end: Record | None = None  # of the last start; None while the run goes on, and after a kill

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to make, if it has said so."""
        for record in (self.start, *self.steps[-1:], *self.evaluations[-1:]):
            if record.get("total_steps") is not None:
                return int(record["total_steps"])
        return None

    @property
    def state(self) -> str:
        """finished, failed, interrupted, or `UNFINISHED`: still running, or killed."""
        return str(self.end.get("state", UNFINISHED)) if self.end else UNFINISHED

    @property
    def last(self) -> Record:
        """The step or evaluation record that got farthest, the evaluation on a tie; empty if there is none."""
        candidates = [*self.steps[-1:], *self.evaluations[-1:]]
        return max(reversed(candidates), key=lambda record: int(record["step"])) if candidates else {}


def run_metrics(records: Iterable[Record], name: str = "run") -> RunMetrics:
    """Put a run together from its records; `name` is used where no start record has one.

    A start record that resumes at step s takes back what was recorded after s; of two records of one kind and step the
    later one counts. Kinds that are not known are left out.
    """
    run = RunMetrics(name)
    by_kind: dict[str, dict[int, Record]] = {"step": {}, "evaluation": {}, "checkpoint": {}}
    for record in records:
        kind = record.get("kind")
        if kind == "start":
            run.start, run.end = record, None
            run.starts += 1
            run.name = str(record.get("name") or name)
            kept = record.get("resumed_at") or 0
            for entries in by_kind.values():
                for step in [step for step in entries if step > kept]:
                    del entries[step]
        elif kind == "end":
            run.end = record
        elif kind in by_kind and isinstance(record.get("step"), int):
            by_kind[kind][record["step"]] = record
    run.steps, run.evaluations, run.checkpoints = (
        [entries[step] for step in sorted(entries)] for entries in by_kind.values()
    )
    return run


def read_run(path: Path) -> RunMetrics:
    """The run of which `path` is the directory. Raises `InputError` as `RunDirectory.open` and `read_metrics` do."""
    from nanogpt.runs.directory import RunDirectory

    run = RunDirectory.open(path)
    return run_metrics(read_metrics(run.metrics_path), name=run.path.resolve().name)
