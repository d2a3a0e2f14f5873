"""Measurements in queues, one for a GPU or for several together; all queues at the same time.

Each leaves NAME.txt, what it printed, and NAME.json, its `Outcome`, in the experiment's directory. One whose outcome
says "done" is not measured again by a later call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanogpt.errors import InputError
from nanogpt.experiment.measurements import Measurement, Name
from nanogpt.files import read_json
from nanogpt.runs.directory import write_whole
from nanogpt.runs.metrics import read_run

POLL_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a measurement ended. `code` None: it was stopped at the limit."""

    name: str
    gpus: str
    seconds: float
    code: int | None
    fingerprint: str
    until: int | None = None  # the evaluation that ended it
    last_line: str = ""
    earlier: bool = False  # measured before this call

    @property
    def text(self) -> str:
        """For a table."""
        if self.code is None:
            return "ended at the limit"
        if self.code:
            return f"exit code {self.code}: {self.last_line}"
        return "done before" if self.earlier else ""

    def covers(self, name: Name) -> bool:
        """Whether it ran as far as `name` requires."""
        return self.code == 0 and (self.until is None or (name.until is not None and name.until <= self.until))


@dataclass(frozen=True)
class Place:
    """Where an experiment's files are, and its data."""

    out: Path
    data: Path | None

    def runs(self, name: str) -> Path:
        """The directory of a measurement's runs: usually one."""
        return self.out / "runs" / name

    def traces(self, name: str) -> Path:
        """The directory of its profile's traces."""
        return self.out / "traces" / name

    def log(self, name: str) -> Path:
        """What it printed."""
        return self.out / f"{name}.txt"

    def outcome(self, name: str) -> Path:
        """Its `Outcome`."""
        return self.out / f"{name}.json"


@dataclass
class Queue:
    """Measurements of one GPU, or of several together, in order."""

    gpus: str  # "0", or "0,1,2,3"
    names: Sequence[Name]
    measurements: dict[str, Measurement]
    place: Place
    outcomes: list[Outcome] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ranks(self) -> int:
        """Processes of a run."""
        return len(self.gpus.split(","))

    def measurement(self, name: Name) -> Measurement:
        """The measurement of that name, with the GPUs and the seed."""
        return self.measurements[name.base].on(self.ranks, name.seed)

    def run(self) -> None:
        """Run all of them, until `end`."""
        for name in self.names:
            measurement = self.measurement(name)
            fingerprint = measurement.fingerprint(self.place.data)
            if (before := finished(self.place, name, fingerprint)) is not None:
                self.outcomes.append(before)
                continue
            began = time.monotonic()
            log = self.place.log(name.file)
            with log.open("wb") as output, self._lock:
                if self._ended:
                    return
                self.process = subprocess.Popen(
                    self.command(name),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self._environment(),
                    start_new_session=True,  # so that Ctrl-C reaches only us
                )
            code = self._wait(self.process, name)
            outcome = Outcome(
                name.file,
                self.gpus,
                time.monotonic() - began,
                None if self._ended else code,
                fingerprint,
                name.until,
                _last_line(log),
            )
            self.outcomes.append(outcome)
            stored = {key: value for key, value in asdict(outcome).items() if key != "earlier"}
            write_whole(self.place.outcome(name.file), json.dumps(stored, indent=1) + "\n")

    def end(self) -> None:
        """Start nothing more, and kill what is running."""
        with self._lock:
            self._ended = True
            if self.process is not None and self.process.poll() is None:
                kill_tree(self.process.pid)

    def command(self, name: Name) -> list[str]:
        """The command for `name`."""
        measurement = self.measurement(name)
        place = self.place
        arguments = measurement.arguments(place.runs(name.file), place.traces(name.file), place.data)
        if self.ranks == 1 or measurement.recipe is None:
            return [sys.executable, "-m", "nanogpt", *arguments]
        what, *rest = arguments
        of_ranks = rest if what == "train" else [f"--{what}", *rest]
        return [sys.executable, "-m", "nanogpt", "launch", "--nproc-per-node", str(self.ranks), *of_ranks]

    def _wait(self, process: subprocess.Popen[bytes], name: Name) -> int:
        """The exit code; 0 where it reached the step at which it should end, and was killed."""
        if name.until is not None:
            while process.poll() is None:
                if evaluated(self.place.runs(name.file), name.until):
                    kill_tree(process.pid)
                    process.wait()
                    return 0
                time.sleep(POLL_S)
        return process.wait()

    def _environment(self) -> dict[str, str]:
        scratch = self.place.out / f"gpu-{self.gpus.replace(',', '-')}"
        scratch.mkdir(exist_ok=True)
        return {
            "CUDA_VISIBLE_DEVICES": self.gpus,
            "TMPDIR": str(scratch),
            "NANOGPT_CACHE": str(self.place.out / "cache"),
            "PYTHONUNBUFFERED": "1",
        }


def make_queues(
    asked_for: Sequence[tuple[str, Sequence[str]]], measurements: dict[str, Measurement], place: Place
) -> list[Queue]:
    """Queues of (GPUs, names), all of which can begin.

    Raises:
        InputError: an unknown measurement, one or a GPU named twice, a setting that the recipe does not take, or a
            result of something else under the same name.
    """
    queues = []
    names: set[str] = set()
    taken: set[str] = set()
    for gpus, texts in asked_for:
        if not re.fullmatch(r"[\w-]+(,[\w-]+)*", gpus) or not texts:
            found = " ".join((gpus, *texts))
            raise InputError(
                f"--gpus {found}: expected GPUs and measurements, such as --gpus 0 fast:1 or --gpus 0,1 fast"
            )
        for gpu in gpus.split(","):
            if gpu in taken:
                raise InputError(f"--gpus {gpus}: GPU {gpu} is named twice; put its measurements in one list")
            taken.add(gpu)
        queue = Queue(gpus, [Name.parse(text) for text in texts], measurements, place)
        for name, text in zip(queue.names, texts, strict=True):
            if name.base not in measurements:
                raise InputError(f"no measurement {text}; there are {', '.join(measurements)}")
            if name.file in names:
                raise InputError(f"{text}: {name.file} is named twice; its results would be in one place")
            names.add(name.file)
            finished(place, name, queue.measurement(name).fingerprint(place.data))
        queues.append(queue)
    return queues


def run_queues(queues: Sequence[Queue], limit: float | None = None) -> list[Outcome]:
    """Run all queues at once, until all are empty or `limit` seconds have passed; returns the outcomes, queue by queue.

    Whatever ends this call, including Ctrl-C, also ends what it has started.
    """
    with ThreadPoolExecutor(len(queues)) as pool:
        try:
            futures = [pool.submit(queue.run) for queue in queues]
            wait(futures, limit)
        finally:
            for queue in queues:
                queue.end()
    for future in futures:
        future.result()
    return [outcome for queue in queues for outcome in queue.outcomes]


def finished(place: Place, name: Name, fingerprint: str) -> Outcome | None:
    """The outcome of an earlier call that measured this; None if there is none.

    Raises:
        InputError: it has measured something else under this name, or its file cannot be read.
    """
    path = place.outcome(name.file)
    try:
        stored = Outcome(**read_json(path), earlier=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the outcome of a measurement ({error}); delete it to measure again") from error
    if not stored.covers(name):
        return None
    if stored.fingerprint != fingerprint:
        raise InputError(
            f"{path}: {name.file} was measured with another recipe, settings, steps, data or number of GPUs. Delete"
            " this file to measure it again, or name another directory"
        )
    return stored


def evaluated(directory: Path, step: int) -> bool:
    """Whether the newest run in `directory` has been evaluated at `step` or later."""
    run = newest_run(directory)
    try:
        return run is not None and any(e["step"] >= step for e in read_run(run).evaluations)
    except InputError:  # it has written nothing yet
        return False


def newest_run(directory: Path) -> Path | None:
    """The newest run directory in `directory`."""
    return max((path for path in directory.glob("*/") if not path.name.startswith(".")), default=None)


def kill_tree(pid: int) -> None:
    """Kill a process and all below it: a launcher's ranks are in sessions of their own."""
    found = [pid]
    for each in found:
        for tasks in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, tasks.read_text().split())
    for each in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:200]
