"""The figures of docs/performance.md in one go, on a machine with one GPU or several: measurements side by side.

    python tests/gpu/measure.py OUT --data DIR --on 0 fast step profile --on 1 plain record89-step

`--on GPU NAME...`: these measurements one after another on that GPU; several `--on` run at the same time, so give those
that need a quiet host a GPU whose neighbours only train. `--on 0,1,2,3 NAME...` measures on four GPUs at once, with the
recipes on four. Each has a log in OUT, and its compile cache, runs and traces there; what fails is a line of the
table, and the next one goes on. At `--limit` seconds what still runs is ended, so that a machine that is lent for a
time gives its results back. In the end the runs are compared.

`fast:1` is `fast` with seed 1. One pair of runs says little: on the steep parts of the curve two runs of one seed and
path differ by 0.02, as the order of atomic additions does. Of several seeds' pairs the mean and its error are told.
`fast:1@100` ends with the first evaluation at or after step 100: more seeds for the early ones, at a fraction of a run.
`whole` is the whole schedule; `full` that with other ends of it evaluated besides (end_of_run.py), which takes memory.

`--idea NAME KEY=VALUE...` adds NAME, NAME-step and NAME-profile: the fast run, and the benchmarks, with these settings.
They are of record 89 where NAME begins with record89-, and of a recipe past it where it begins with that one's name. In
the end NAME is compared with fast, seed by seed:

    python tests/gpu/measure.py OUT --data DIR --idea record89-lr26 optimizer.normuon.lr=0.026 \
        --on 0 record89-fast:1 record89-lr26:1 --on 1 record89-fast:2 record89-lr26:2

DIR holds own text: prep-text PATH... --dir DIR --unique --shuffle --document-tokens 2048 --val-tokens 31457281.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nanogpt.console import markdown_table
from nanogpt.errors import InputError
from nanogpt.runs.metrics import read_run

EVALUATION = ("--set", "evaluation.tokens=2097152", "--set", "data.epochs=null")
DETERMINISTIC = ("--set", "runtime.deterministic=true")
MODELS = ("", "record89-", "record89-fp8-backward-")  # of which a name begins with the longest that fits; "": speedrun
END_OF_RUN = str(Path(__file__).with_name("end_of_run.py"))
BEFORE = ("1", "2", "4", "8", "12", "16", "24", "32", "48")
ENDS = ("--average", "2", "8", "--before", *BEFORE, "--windows", "6:16", "8:20")
PLAIN = ("attention=varlen", "kernels=plain", "head_precision=bf16", "mlp_precision=bf16")  # of runtime


def measurements(
    gpu: str, steps: int, ideas: dict[str, Sequence[str]] | None = None, *, count: int = 1
) -> dict[str, tuple[str, ...]]:
    """Arguments of `nanogpt`, or a script and its own, by name. Those that train get `--data` and `--out` as well.

    `ideas`: settings, KEY=VALUE, by name. `count`: GPUs of one run.
    """
    plain = [argument for setting in PLAIN for argument in ("--set", f"runtime.{setting}")]
    found: dict[str, tuple[str, ...]] = {}
    for name in MODELS:
        recipe = (name.removesuffix("-") or "speedrun", "--on", f"{count}x{gpu}")
        found |= {
            f"{name}fast": ("train", *recipe, "--steps", str(steps), *EVALUATION),  # cold where it is the first
            f"{name}again": ("train", *recipe, "--steps", str(steps), *EVALUATION),
            f"{name}plain": ("train", *recipe, "--steps", str(steps), *EVALUATION, *plain),
            f"{name}whole": ("train", *recipe, *EVALUATION),
            f"{name}full": (END_OF_RUN, *recipe, *EVALUATION, *ENDS),
            f"{name}warm": ("train", *recipe, "--steps", "40", *EVALUATION),
            f"{name}deterministic": ("train", *recipe, "--steps", "40", *EVALUATION, *DETERMINISTIC),  # cold, if first
            f"{name}deterministic-again": ("train", *recipe, "--steps", "40", *EVALUATION, *DETERMINISTIC),
            f"{name}step": ("bench", "step", *recipe, "--steps", "12", "--warmup", "4"),
            f"{name}profile": ("bench", "profile", *recipe, "--rows", "60"),
        }
        if count > 1:
            found[f"{name}communication"] = ("bench", "communication", *recipe)
    for idea, settings in (ideas or {}).items():
        arguments = [argument for setting in settings for argument in ("--set", setting)]
        for end, like in (("", "fast"), ("-step", "step"), ("-profile", "profile")):
            found[f"{idea}{end}"] = (*found[f"{model_of(idea)}{like}"], *arguments)
    return found | {"kernels": ("bench", "kernels")}


def model_of(name: str) -> str:
    """The one of MODELS that a measurement or idea of this name is of."""
    return max((model for model in MODELS if name.startswith(model)), key=len)


class Name(NamedTuple):
    """What `fast:1@100` says: of which measurement, with which seed, ended by which evaluation."""

    base: str
    seed: str = ""
    until: str = ""

    @classmethod
    def parse(cls, text: str) -> Name:
        """Seed and step may be left out."""
        rest, _, until = text.partition("@")
        base, _, seed = rest.partition(":")
        return cls(base, seed, until)

    @property
    def file(self) -> str:
        """fast-1 of `fast:1` and of `fast:1@100`."""
        return f"{self.base}-{self.seed}" if self.seed else self.base


@dataclass
class Queue:
    """Measurements of one GPU, or several together, in order, and the process of the one that runs."""

    gpu: str  # "0", or "0,1,2,3"
    names: Sequence[str]
    out: Path
    data: Path
    commands: dict[str, tuple[str, ...]]
    rows: list[tuple[str, str, float, int | None]] = field(default_factory=list)  # name, GPU, seconds, exit code
    process: subprocess.Popen[bytes] | None = None
    ended: bool = False

    def run(self) -> None:
        """All of them, until `end`."""
        for name in self.names:
            if self.ended:
                return
            began = time.monotonic()
            parsed = Name.parse(name)
            with (self.out / f"{parsed.file}.txt").open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *self._arguments(parsed)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self._environment(),
                    start_new_session=True,  # its compilers end with it
                )
                code = self._wait(self.process, parsed)
            self.rows.append((name, self.gpu, time.monotonic() - began, None if self.ended else code))

    def _wait(self, process: subprocess.Popen[bytes], name: Name) -> int:
        """The exit code; 0 where it has come to the step at which it is to end, and was ended."""
        if name.until:
            while process.poll() is None:
                if evaluated(self.out / "runs" / name.file, int(name.until)):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return 0
                time.sleep(0.5)
        return process.wait()

    def end(self) -> None:
        """Nothing more, and not what runs."""
        self.ended = True
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _arguments(self, name: Name) -> list[str]:
        what, *options = self.commands[name.base]
        if what in ("train", END_OF_RUN):
            options += ["--data", str(self.data), "--out", str(self.out / "runs" / name.file)]
        if options[:1] == ["profile"]:
            options += ["--traces", str(self.out / "traces" / name.file)]
        if name.seed:
            options += ["--set", f"training.seed={name.seed}"]
        program = [what, *options] if what == END_OF_RUN else ["-m", "nanogpt", what, *options]
        if count_of(self.gpu) == 1:
            return program
        several = ["--standalone", "--nproc-per-node", str(count_of(self.gpu))]
        if what == "train":
            return ["-m", "nanogpt", "launch", *several, *options]
        return ["-m", "torch.distributed.run", *several, *program]

    def _environment(self) -> dict[str, str]:
        scratch = self.out / f"gpu-{self.gpu.replace(',', '-')}"
        scratch.mkdir(exist_ok=True)
        return {
            "CUDA_VISIBLE_DEVICES": self.gpu,
            "TMPDIR": str(scratch),
            "NANOGPT_CACHE": str(self.out / "cache"),
            "PYTHONUNBUFFERED": "1",
        }


def count_of(gpus: str) -> int:
    """4 of "0,1,2,3"."""
    return len(gpus.split(","))


def evaluated(directory: Path, step: int) -> bool:
    """Whether the newest run in `directory` has been evaluated at `step` or later."""
    run = newest_run(directory)
    try:
        return run is not None and any(e["step"] >= step for e in read_run(run).evaluations)
    except InputError:  # it has written nothing yet
        return False


def newest_run(directory: Path) -> Path | None:
    """The newest run directory in `directory`."""
    return max(directory.glob("*/"), default=None)


def compare(out: Path, prefix: str) -> None:
    """`nanogpt compare` of the runs that there are of a model, the fast one first."""
    found = [newest_run(out / "runs" / f"{prefix}{name}") for name in ("fast", "again", "plain")]
    runs = [str(path) for path in found if path is not None]
    if len(runs) > 1:
        subprocess.run([sys.executable, "-m", "nanogpt", "compare", *runs], check=False)


def differences(out: Path, name: str, other: str) -> list[str]:
    """`name` minus `other` at each evaluation, by pairs of one seed, with the pairs' mean and its standard error."""
    pairs: list[dict[int, float]] = []
    for directory in sorted((out / "runs").glob(f"{other}*")):
        seed = directory.name.removeprefix(other)
        if seed and not re.fullmatch(r"-\d+", seed):
            continue
        runs = [newest_run(path) for path in (directory.with_name(f"{name}{seed}"), directory)]
        if None in runs:
            continue
        ours, theirs = ({e["step"]: e["val_loss"] for e in read_run(path).evaluations} for path in runs if path)
        pairs.append({step: ours[step] - theirs[step] for step in ours.keys() & theirs.keys()})
    rows = []
    for step in sorted({step for pair in pairs for step in pair}):
        found = [pair[step] for pair in pairs if step in pair]
        error = f"{statistics.stdev(found) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
        rows.append((step, ", ".join(f"{d:+.4f}" for d in found), f"{statistics.mean(found):+.4f}", error))
    return markdown_table(("step", f"{name} - {other}", "mean", "standard error"), rows) if rows else []


def same_bits(out: Path, prefix: str) -> list[str]:
    """Whether both deterministic runs of a model, where there are two, have the same losses to the last bit."""
    runs = [newest_run(out / "runs" / f"{prefix}{name}") for name in ("deterministic", "deterministic-again")]
    if None in runs:
        return []
    a, b = (read_run(path) for path in runs if path)
    losses = [
        ([e["val_loss"] for e in run.evaluations], [s["train_loss"] for s in run.steps if s["train_loss"] is not None])
        for run in (a, b)
    ]
    return [f"{prefix}deterministic, twice: losses {'equal bit by bit' if losses[0] == losses[1] else 'DIFFER'}"]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--on", nargs="+", action="append", required=True, metavar=("GPU", "NAME"))
    parser.add_argument("--idea", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--recipe-gpu", default="h100", help="h100, h200 or a100: that of the machine")
    parser.add_argument("--steps", type=int, default=300, help="of the runs that are compared")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    chosen = parser.parse_args()
    ideas = {name: settings for name, *settings in chosen.idea}
    if taken := ideas.keys() & measurements(chosen.recipe_gpu, chosen.steps).keys():
        parser.error(f"--idea: {', '.join(sorted(taken))} is a measurement already; name the idea otherwise")
    out = chosen.out.resolve()
    queues = []
    for gpu, *names in chosen.on:
        commands = measurements(chosen.recipe_gpu, chosen.steps, ideas, count=count_of(gpu))
        unknown = [name for name in names if Name.parse(name).base not in commands]
        if unknown:
            parser.error(f"no measurement {', '.join(unknown)}; there are {', '.join(commands)}")
        queues.append(Queue(gpu, names, out, chosen.data.resolve(), commands))
    out.mkdir(parents=True, exist_ok=True)
    threads = [threading.Thread(target=queue.run) for queue in queues]
    deadline = time.monotonic() + chosen.limit
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))
    for queue in queues:
        queue.end()
    for thread in threads:
        thread.join()
    rows = [row for queue in queues for row in queue.rows]
    outcome = {None: "ended at the limit", 0: ""}
    table = [(name, gpu, f"{s:.0f}", outcome.get(code, f"exit code {code}")) for name, gpu, s, code in rows]
    print("\n".join(markdown_table(("measurement", "GPU", "s", "outcome"), table)), flush=True)
    for prefix in MODELS:
        compare(out, prefix)
        for line in (*differences(out, f"{prefix}fast", f"{prefix}plain"), *same_bits(out, prefix)):
            print(line, flush=True)
    pairs = [(f"{model}whole", "whole") for model in MODELS[1:]] + [(idea, f"{model_of(idea)}fast") for idea in ideas]
    for name, other in pairs:
        for line in differences(out, name, other):
            print(line, flush=True)
    return 1 if any(code != 0 for *_, code in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
