"""Optional trackers behind `output.tracker`: the run's metrics for TensorBoard, or for Weights & Biases offline.

Step records are held back until the next evaluation, while the clock stands still: a tracker's own threads and files
cost no training time. Nothing leaves the machine: Weights & Biases writes a directory that `wandb sync` can upload.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from nanogpt.console import say
from nanogpt.errors import InputError, RunError
from nanogpt.spec import RunSpec

SCALARS = ("train_loss", "val_loss", "reference_loss", "step_avg_ms", "lr_factor", "tokens", "train_time_ms")


def check_tracker(spec: RunSpec) -> None:
    """Raise `InputError` with the way out where the package of the spec's tracker is not installed."""
    name = spec.output.tracker
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(
            f"output.tracker: is {name}, whose package is not installed. Install it with `pip install {name}`, or"
            " leave output.tracker at none"
        )


class _Sink(Protocol):
    """Where the figures go: `values` by name, after `step` steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, spec: RunSpec):
        from torch.utils.tensorboard import SummaryWriter

        from nanogpt.recipe import dump_spec

        self._writer = SummaryWriter(str(directory / "tensorboard"))
        self._writer.add_text("spec", f"```yaml\n{dump_spec(spec)}```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, spec: RunSpec):
        import wandb

        self._run = wandb.init(
            mode="offline",
            project="nanogpt-speedrun",
            name=directory.resolve().name,
            dir=str(directory),
            config=spec.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tracker:
    """Takes the records of metrics.jsonl and passes their figures on.

    Args:
        spec: the run; its `output.tracker` is not none.
        directory: the run's.

    Raises `InputError` as `check_tracker`, `RunError` where the tracker cannot start. Once it runs, its errors are said
    and end it, not the run.
    """

    def __init__(self, spec: RunSpec, directory: Path):
        check_tracker(spec)
        kind = _TensorBoard if spec.output.tracker == "tensorboard" else _Wandb
        self._name = spec.output.tracker
        self._waiting: list[Mapping[str, Any]] = []
        self._sink: _Sink | None
        try:
            self._sink = kind(directory, spec)
        except Exception as error:
            raise RunError(
                f"output.tracker: {self._name} cannot start: {error}; run without it: --set output.tracker=none"
            ) from error

    def metric(self, record: Mapping[str, Any]) -> None:
        """Keep a record of a step; write all that are kept at an evaluation, a checkpoint or the end."""
        if record.get("kind") in ("step", "evaluation"):
            self._waiting.append(record)
        if record.get("kind") != "step":
            self._flush()

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        with self._given_up_on_error():
            if self._sink is not None:
                self._sink.close()

    def _flush(self) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for record in self._waiting:
            values = by_step.setdefault(int(record["step"]), {})
            values |= {name: float(record[name]) for name in SCALARS if record.get(name) is not None}
        self._waiting.clear()
        with self._given_up_on_error():
            for step in sorted(by_step):
                if self._sink is not None:
                    self._sink.write(step, by_step[step])

    @contextlib.contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sink = None
            say(f"output.tracker: {self._name} failed: {error}. The run goes on without it; metrics.jsonl has it all")


def tracker_for(spec: RunSpec, directory: Path) -> Tracker | None:
    """The spec's tracker for the run in `directory`; None where it has none."""
    return None if spec.output.tracker == "none" else Tracker(spec, directory)
