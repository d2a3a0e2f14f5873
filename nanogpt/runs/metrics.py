"""Reading metrics.jsonl: a run's records, and the run they describe.

Each line is a JSON object whose `kind` is one of

- `start`: time, name, total_steps, world_size, device, resumed_at (null, or the step of the checkpoint)
- `step`: step, total_steps, stage, train_loss (weighted, per token; may be absent), train_time_ms, step_avg_ms, tokens,
  data_wait_ms (how long the step waited for its batch, on the rank that waited longest)
- `evaluation`: step, total_steps, val_loss, train_time_ms, step_avg_ms, tokens
- `checkpoint`: step, path
- `checkpoint_failure`: step, reason: the run went on without this one
- `end`: state (finished, failed or interrupted), reason, train_time_ms

`step` counts steps done, `tokens` tokens trained on, both since the run's start. A non-finite loss is null.
A resumed run appends to the same file; what it had done after the checkpoint appears twice.

A long run has a million lines: they are read one by one, and kept as columns of numbers (`Records`), 100 bytes per
step.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload

from nanogpt.errors import InputError
from nanogpt.files import open_regular

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Record = dict[str, Any]

UNFINISHED = "unfinished"


LONGEST_LINE = 1 << 20
LARGEST = 1 << 53  # up to which doubles count exactly
_WHOLE = ("step", "total_steps", "stage", "tokens", "world_size", "resumed_at")
_NUMBERS = (*_WHOLE, "train_loss", "val_loss", "train_time_ms", "step_avg_ms", "data_wait_ms", "lr_factor")


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl at once. Raises as `iter_metrics` does."""
    return list(iter_metrics(path))


def iter_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl, in the order they were written.

    A last line without a newline, which a killed run may leave, is read if it is complete and skipped if not.

    Raises:
        InputError: no such file, a line before the last that is not a JSON object, or a value of the wrong type.
    """
    try:
        with open_regular(path) as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if line.strip() and (record := _record(path, number, line)) is not None:
                    yield record
    except OSError as error:
        raise InputError(f"{path}: metrics cannot be read: {error.strerror}; expected the metrics of a run") from error


def _record(path: Path, number: int, line: bytes) -> Record | None:
    """The line's record; None for an incomplete last line."""
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
            return None
        shown = line.rstrip(b"\n")[:60].decode("utf-8", errors="replace")
        raise InputError(f"{path}:{number}: expected a JSON object, found {shown!r}; delete the line to read the rest")
    for key in _NUMBERS:
        value = record.get(key)
        if value is None:
            continue
        kind = int if key in _WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < LARGEST:
            wanted = "a whole number" if key in _WHOLE else "a number"
            raise InputError(
                f"{path}:{number}: {key}: expected {wanted}, found {str(value)[:60]!r}; delete the line to read on"
            )
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Records(Sequence[Record]):
    """Records of one kind by step, each step once: a sequence of dicts, made on access."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._shapes = array("l")  # which keys a record has, in their order
        self._keys: dict[tuple[str, ...], int] = {}
        self._numbers: dict[str, array[float]] = {}  # NaN: null, or not in the record
        self._with_fractions: set[str] = set()
        self._others: dict[str, dict[int, Any]] = {}  # what is neither number nor null, by position
        self._shape_keys: list[tuple[str, ...]] = []
        self._sorted = True

    def append(self, record: Record) -> None:
        """Add a record with an int as `step`; a later one of the same step replaces it."""
        place, keys = len(self._steps), tuple(record)
        self._sorted = self._sorted and (not place or record["step"] > self._steps[-1])
        self._steps.append(record["step"])
        self._shapes.append(self._keys.setdefault(keys, len(self._keys)))
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = self._numbers.setdefault(key, array("d"))
                column.extend(itertools.repeat(math.nan, place - len(column)))
                column.append(value)
                if isinstance(value, float):
                    self._with_fractions.add(key)
            elif value is not None:
                self._others.setdefault(key, {})[place] = value

    def settle(self) -> None:
        """Sort the records by step, keeping the later of two with the same step."""
        if self._sorted:
            return
        order = sorted(range(len(self._steps)), key=self._steps.__getitem__)  # keeps the order of equal steps
        last = [place for place, after in itertools.pairwise([*order, -1]) if after < 0 or self._differ(place, after)]
        new = Records()
        for place in last:
            new.append(self[place])
        self.__dict__ = new.__dict__

    def _differ(self, one: int, other: int) -> bool:
        return self._steps[one] != self._steps[other]

    def drop_after(self, step: int) -> None:
        """Drop what came after `step`."""
        self.settle()
        kept = bisect_right(self._steps, step)
        columns: list[array[Any]] = [self._steps, self._shapes, *self._numbers.values()]
        for column in columns:
            del column[kept:]
        for others in self._others.values():
            for place in [place for place in others if place >= kept]:
                del others[place]

    def column(self, key: str) -> npt.NDArray[np.float64]:
        """A key's numbers, (n,); NaN where missing."""
        import numpy as np

        found = np.full(len(self), np.nan)
        known = self._numbers.get(key, array("d"))
        found[: len(known)] = known
        return found

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if len(self._shape_keys) < len(self._keys):
            self._shape_keys = list(self._keys)
        return {key: self._value(key, place) for key in self._shape_keys[self._shapes[place]]}

    def _value(self, key: str, place: int) -> Any:
        if place in self._others.get(key, ()):
            return self._others[key][place]
        column = self._numbers.get(key, ())
        value = column[place] if place < len(column) else math.nan
        if math.isnan(value):
            return None
        return value if key in self._with_fractions else int(value)


@dataclass
class RunMetrics:
    """A run according to its records; steps that a resumed run repeated count once."""

    name: str
    start: Record = field(default_factory=dict)  # the last start record
    starts: int = 0  # 1, and 1 more for each resume
    steps: Records = field(default_factory=Records)
    evaluations: Records = field(default_factory=Records)
    checkpoints: Records = field(default_factory=Records)
    end: Record | None = None  # of the last start; None while the run lasts, and after a kill

    @property
    def total_steps(self) -> int | None:
        """The number of steps planned, if recorded."""
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
        """The farthest step or evaluation record, the evaluation on a tie; empty if there is none."""
        candidates = [*self.steps[-1:], *self.evaluations[-1:]]
        return max(reversed(candidates), key=lambda record: int(record["step"])) if candidates else {}


def run_metrics(records: Iterable[Record], name: str = "run") -> RunMetrics:
    """Assemble a run from its records; `name` is used if no start record has one.

    A start record that resumes at step s drops what was recorded after s; of two records of one kind and step the
    later one counts. Unknown kinds are skipped.
    """
    run = RunMetrics(name)
    by_kind = {"step": run.steps, "evaluation": run.evaluations, "checkpoint": run.checkpoints}
    for record in records:
        kind = record.get("kind")
        if kind == "start":
            run.start, run.end = record, None
            run.starts += 1
            run.name = str(record.get("name") or name)
            for entries in by_kind.values():
                entries.drop_after(record.get("resumed_at") or 0)
        elif kind == "end":
            run.end = record
        elif isinstance(kind, str) and kind in by_kind and isinstance(record.get("step"), int):
            by_kind[kind].append(record)
    for entries in by_kind.values():
        entries.settle()
    return run


def read_run(path: Path) -> RunMetrics:
    """The run in the directory `path`. Raises `InputError` as `RunDirectory.open` and `iter_metrics` do."""
    from nanogpt.runs.directory import RunDirectory

    run = RunDirectory.open(path)
    return run_metrics(iter_metrics(run.metrics_path), name=run.path.resolve().name)
