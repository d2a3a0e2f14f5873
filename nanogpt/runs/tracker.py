"""Optional trackers behind `output.tracker`: the run's metrics for TensorBoard, Weights & Biases or Trackio.

Step records are held back until the next evaluation, when the clock is stopped, so a tracker's threads and files
cost no training time. Nothing leaves the machine unless `output.online` is set: Weights & Biases writes a directory
that `wandb sync` can upload, Trackio a database that `trackio show` reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from nanogpt.console import say
from nanogpt.errors import InputError, RunError
from nanogpt.image.labels import inside_labels
from nanogpt.spec import RunSpec

SCALARS = ("train_loss", "val_loss", "reference_loss", "step_avg_ms", "lr_factor", "tokens", "train_time_ms")
PROJECT = "nanogpt-speedrun"
MODULES = {"tensorboard": "tensorboardX"}  # others have their tracker's name
TRACKIO_SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def check_tracker(spec: RunSpec) -> None:
    """Raise `InputError`, with the way out, if the package of the spec's tracker is not installed."""
    name = spec.output.tracker
    module = MODULES.get(name, name)
    if name == "none" or importlib.util.find_spec(module) is not None:
        return
    where, way_out = "installed", f"`pip install {module}`"
    if inside_labels():  # pip cannot write there
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        options = f"--target DIR --python-version {python} --only-binary :all:"
        where, way_out = (
            "in the image",
            f"On a machine with a network, `pip install {options} {module}`; NANOGPT_EXTRA=DIR",
        )
    raise InputError(
        f"output.tracker: is {name}, whose package is not {where}. {way_out}, or leave output.tracker at none"
    )


class _Sink(Protocol):
    """Where figures go: `values` by name, after `step` steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, spec: RunSpec):
        from tensorboardX import SummaryWriter

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
            mode="online" if spec.output.online else "offline",
            project=PROJECT,
            name=directory.resolve().name,
            dir=str(directory),
            config=spec.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, directory: Path, spec: RunSpec):
        os.environ.setdefault("TRACKIO_DIR", str(directory.resolve() / "trackio"))  # read at its import
        for name in () if spec.output.online else TRACKIO_SERVERS:
            os.environ.pop(name, None)
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):
            trackio.init(
                project=PROJECT,
                name=directory.resolve().name,
                config=spec.model_dump(mode="json"),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


_SINKS: dict[str, Callable[[Path, RunSpec], _Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


class Tracker:
    """Passes on the figures of metrics.jsonl's records.

    Args:
        spec: the run; its `output.tracker` is not none.
        directory: the run's.

    Raises `InputError` as `check_tracker`, `RunError` if the tracker cannot start. Later errors are reported
    and end the tracker, not the run.
    """

    def __init__(self, spec: RunSpec, directory: Path):
        check_tracker(spec)
        self._name = spec.output.tracker
        self._waiting: list[Mapping[str, Any]] = []
        self._sink: _Sink | None
        try:
            self._sink = _SINKS[self._name](directory, spec)
        except Exception as error:
            raise RunError(
                f"output.tracker: {self._name} cannot start: {error}; run without it: --set output.tracker=none"
            ) from error

    def metric(self, record: Mapping[str, Any]) -> None:
        """Keep a step's record; write all kept records at an evaluation, a checkpoint or the end."""
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
            say(f"output.tracker: {self._name} failed: {error}. The run continues without it; metrics.jsonl has all")


def tracker_for(spec: RunSpec, directory: Path) -> Tracker | None:
    """The spec's tracker for the run in `directory`; None if it has none."""
    return None if spec.output.tracker == "none" else Tracker(spec, directory)
