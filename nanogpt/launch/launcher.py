"""`nanogpt launch`: torchrun, with the signals of a cluster passed on and exit codes that say what happened.

torchrun runs in this process, with the options it always has; what it starts on this node is `nanogpt train`. Beyond
plain `torchrun -m nanogpt train`, which works as well:

- SIGTERM, SIGUSR1 and the first Ctrl-C mean "finish the step, write a checkpoint, stop". They are noted in the launch
  directory (`NANOGPT_LAUNCH_DIR`), where every rank looks once it runs, so a signal that comes before the ranks are
  ready is not lost. SIGUSR1, which Slurm sends to every process of a job and whose default action is death, is blocked
  here before the ranks exist; they inherit that, and one that is sent to a rank too early waits for it. A second
  signal changes nothing, since Slurm and a user's shell may well send them to launcher and ranks alike; a second
  Ctrl-C kills the ranks.
- After `--grace` seconds the ranks are killed.
- A rank that is stopped (SIGSTOP) takes no other signal: after `STOPPED_S` it is killed, whether or not any other
  rank of this node is left to notice.
- The exit code: 0; 75 where every rank that failed said so (an interrupted run, whole: start it again); 2 where the
  ranks refused the user's input; else 1.
- What ranks have to say about that is printed once, not once a rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanogpt.console import say
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError, NanogptError

if TYPE_CHECKING:
    import argparse

    from nanogpt.spec import HardwareSpec

    ChooseHardware = Callable[[Sequence[str]], tuple[HardwareSpec, Sequence[str]]]

LAUNCH_DIRECTORY = "NANOGPT_LAUNCH_DIR"  # a directory that this launcher and its ranks share
STOP_NAME = "stop"  # in it: the signal's name, once a stop has been asked for
GRACE_S = 600.0
STOPPED_S = 25.0  # a rank in state T for so long is killed: later than other ranks find it silent, so that they say so
_POLL_S = 0.5


def launch(arguments: Sequence[str], choose: ChooseHardware | None = None) -> int:
    """Run torchrun on `nanogpt train` and return the exit code; see the module.

    Args:
        arguments: torchrun's options, then the arguments of `nanogpt train`. These begin with the recipe, or after
            a `--`.
        choose: from the arguments of `nanogpt train` to the hardware, and to arguments that say it to the ranks; asked
            where torchrun's options name no number of processes. None: as torchrun, which starts one.

    Raises:
        InputError: torchrun's options do not fit together, or not the hardware; and what `choose` raises.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = parse(arguments)
    if choose is not None and args.nproc_per_node is None:
        _start_on(args, choose)
    args.nproc_per_node = args.nproc_per_node or "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, without its warning
    with tempfile.TemporaryDirectory(prefix="nanogpt-launch-") as name, _Signals(Path(name)) as signals:
        os.environ[LAUNCH_DIRECTORY] = name
        guard = _Guard(signals, args.grace)
        guard.start()
        failures: dict[int, int] = {}
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException as error:
            say(f"nanogpt launch: {error.sigval.name}; the ranks were killed")
            return 128 + error.sigval
        except (ValueError, AssertionError) as error:
            raise InputError(f"nanogpt launch: torchrun: {error}") from error
        except (RuntimeError, OSError) as error:  # rendezvous: no connection, no such host, closed by another node
            _print_messages(Path(name), failures)
            say(f"nanogpt launch on {socket.gethostname()}: {type(error).__name__}: {error}")
            return 1
        finally:
            guard.close()
            del os.environ[LAUNCH_DIRECTORY]
        _print_messages(Path(name), failures)
        return exit_code(failures, stop_asked=signals.asked is not None)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """torchrun's own reading of `arguments`, its program being `-m nanogpt train`; `grace` is our option.

    `nproc_per_node` is None where it is not said.
    """
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "nanogpt launch"
    if not os.environ.get("PET_NPROC_PER_NODE"):  # torchrun's own
        parser.set_defaults(nproc_per_node=None)
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, help="Seconds that ranks have after SIGTERM or SIGUSR1 before SIGKILL."
    )
    ours, separator, of_train = list(arguments), "--" in arguments, []
    if separator:
        at = ours.index("--")
        ours, of_train = ours[:at], ours[at + 1 :]
    args = parser.parse_args([*ours, "-m", "nanogpt"] if separator else ["-m", *ours])
    if not separator:
        of_train = [args.training_script, *args.training_script_args]
    args.training_script, args.training_script_args = "nanogpt", ["train", *of_train]
    args.signals_to_handle = "SIGQUIT,SIGHUP"  # the others are ours
    return args


def _start_on(args: argparse.Namespace, choose: ChooseHardware) -> None:
    """A process a GPU of the hardware that `choose` tells, on this machine if torchrun's options name no others."""
    from torch.distributed.run import get_args_parser

    from nanogpt.hardware import shape

    hardware, said = choose(args.training_script_args[1:])
    args.nproc_per_node = str(hardware.gpus_per_node)
    if args.nnodes != get_args_parser().get_default("nnodes"):
        return  # how many nodes come, the ranks see
    if hardware.nodes > 1:
        raise InputError(
            f"nanogpt launch: {shape(hardware)} is {hardware.nodes} nodes, which have to meet. Start it on each of them"
            f" with --nnodes {hardware.nodes} --rdzv-backend c10d --rdzv-endpoint NODE:29500 --rdzv-id JOB before the"
            " recipe, or as a Slurm job: slurm/run.sh RECIPE"
        )
    args.standalone = args.standalone or not args.rdzv_endpoint
    args.training_script_args += said


def exit_code(failures: Mapping[int, int], *, stop_asked: bool = False) -> int:
    """The launcher's exit code for those of the ranks that failed (negative: the signal that killed one).

    A rank that SIGTERM or SIGUSR1 killed had no handler yet. That is an early end of one that was asked to stop, or
    torchrun's way to end the siblings of one that failed.
    """
    early = {-signal.SIGTERM, -signal.SIGUSR1}
    codes = set(failures.values())
    if not codes:
        return 0
    if codes <= {REQUEUE_EXIT_CODE} | early and (REQUEUE_EXIT_CODE in codes or stop_asked):
        return REQUEUE_EXIT_CODE
    if InputError.exit_code in codes and codes <= {InputError.exit_code, REQUEUE_EXIT_CODE} | early:
        return InputError.exit_code
    return 1


# --- what ranks tell the launcher, and it them --------------------------------------------------------------------


def leave_message(error: NanogptError) -> bool:
    """Hand the last word of this rank to its launcher, to be printed once for all; False where there is none."""
    directory, rank = os.environ.get(LAUNCH_DIRECTORY), os.environ.get("RANK")
    if directory is None or rank is None:
        return False
    try:
        (Path(directory) / f"message-{int(rank):04d}.json").write_text(
            json.dumps({"text": str(error), "exit_code": error.exit_code})
        )
    except OSError:
        return False
    return True


def asked_to_stop() -> str | None:
    """The signal by which this rank's launcher was asked to stop; None: not so far, or no launcher."""
    directory = os.environ.get(LAUNCH_DIRECTORY)
    if directory is None:
        return None
    try:
        return (Path(directory) / STOP_NAME).read_text()
    except OSError:
        return None


def _print_messages(directory: Path, failures: Mapping[int, int]) -> None:
    """What each rank left, equal words once; and the ranks that a signal killed, which could say nothing."""
    by_text: dict[str, list[int]] = {}
    interrupted = False
    for file in sorted(directory.glob("message-*.json")):
        message = json.loads(file.read_text())
        interrupted = interrupted or message["exit_code"] == REQUEUE_EXIT_CODE
        if not interrupted or not by_text:  # of those that were interrupted the first says it for all
            by_text.setdefault(message["text"], []).append(int(file.stem.rpartition("-")[2]))
    for text, ranks in by_text.items():
        every = len(by_text) == 1
        say(text if every else f"{_named(ranks)} on {socket.gethostname()}: {text}")
    for rank, code in sorted(failures.items()):
        if code < 0 and -code != signal.SIGTERM:
            say(f"rank {rank} on {socket.gethostname()} was killed by {signal.Signals(-code).name}")


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class _Signals:
    """The launcher's signals; a context manager that puts the old handlers back."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.asked: str | None = None
        self.asked_at = 0.0
        self._old: dict[signal.Signals, Any] = {}
        self._mask: set[signal.Signals | int] = set()

    def __enter__(self) -> _Signals:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # the guard waits for it
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        while signal.sigtimedwait({signal.SIGUSR1}, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        if number == signal.SIGINT and self.asked == "SIGINT":
            raise SignalException("second Ctrl-C", sigval=signal.SIGKILL)
        self.ask(signal.Signals(number).name)

    def ask(self, name: str) -> None:
        """Tell the ranks, once."""
        if self.asked is None:
            self.asked, self.asked_at = name, time.monotonic()
            partial = self.directory / f".{STOP_NAME}"
            partial.write_text(name)
            partial.rename(self.directory / STOP_NAME)


class _Guard(threading.Thread):
    """Takes SIGUSR1, and kills ranks that are stopped or have had their grace."""

    def __init__(self, signals: _Signals, grace_s: float):
        super().__init__(name="launch-guard", daemon=True)
        self._signals = signals
        self._grace_s = grace_s
        self._stopped_since: dict[int, float] = {}
        self._closing = threading.Event()

    def run(self) -> None:
        while not self._closing.is_set():
            if signal.sigtimedwait({signal.SIGUSR1}, _POLL_S):
                self._signals.ask("SIGUSR1")
            self._look()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self.join()

    def _look(self) -> None:
        now, states = time.monotonic(), dict(_children())
        stopped = {pid for pid, state in states.items() if state == "T"}
        self._stopped_since = {pid: self._stopped_since.get(pid, now) for pid in stopped}
        for pid, since in self._stopped_since.items():
            if now - since > STOPPED_S:
                self._kill(pid, f"has been stopped for {now - since:.0f} s")
        if self._signals.asked is not None and now - self._signals.asked_at > self._grace_s:
            for pid in states:
                self._kill(pid, f"has not ended {self._grace_s:.0f} s after {self._signals.asked} (--grace)")

    def _kill(self, pid: int, why: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            say(f"nanogpt launch: rank's process {pid} on {socket.gethostname()} {why}: killed")


def _children() -> Iterator[tuple[int, str]]:
    """Process id and state (R, S, D, T, Z, ...) of this process's children."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        try:
            pids = tasks.read_text().split()
        except OSError:  # the thread is gone
            continue
        for pid in pids:
            with contextlib.suppress(OSError, IndexError):
                yield int(pid), Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
