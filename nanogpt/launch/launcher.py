"""`nanogpt launch`: starts `nanogpt train` as the ranks of this node, and ends when they do.

It takes torchrun's options as far as they fit a run whose processes are all known beforehand, and sets the same
variables for its ranks (plain `torchrun -m nanogpt train` works too). In addition:

- Nothing from the network is unpickled, and on one node everything listens on the loopback address; see
  `nanogpt.launch.meeting`.
- SIGTERM, SIGUSR1 and the first Ctrl-C mean "finish the step, write a checkpoint, stop". They are noted in the launch
  directory (`NANOGPT_LAUNCH_DIR`), where every rank looks once it runs, so a signal that arrives before the ranks are
  ready is not lost. SIGUSR1, which Slurm sends to every process of a job and whose default action is death, is blocked
  here before the ranks exist; they inherit that, so one sent to a rank too early waits for it. A second
  signal changes nothing, since Slurm and a user's shell may send them to launcher and ranks alike; a second
  Ctrl-C, SIGHUP or SIGQUIT kills the ranks.
- After `--grace` seconds the ranks are killed.
- Ctrl-Z (SIGTSTP) stops the ranks and then the launcher; SIGCONT lets them continue. Time in which the launcher itself
  was stopped counts towards no limit.
- A stopped rank (SIGSTOP) takes no other signal: after `STOPPED_S` it is killed, whether or not another
  rank of this node is left to notice.
- If a rank fails, the others have `ENDING_S` to say so and end; then come SIGTERM and, after `KILLING_S`, SIGKILL.
- The kernel kills the ranks when the launcher dies. Each is a session of its own.
- The exit code is 0; 75 if every failed rank said so (an interrupted run with its checkpoint: start it again); 2 if the
  ranks refused the user's input; else 1.
- Messages of the ranks are printed once, not once per rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from nanogpt.console import say
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError, NanogptError, RunError
from nanogpt.launch.awake import AwakeClock
from nanogpt.launch.meeting import JOIN_S, Cancelled, Meeting, Place, meet
from nanogpt.launch.tied import tied_command
from nanogpt.private_directories import private_directory

if TYPE_CHECKING:  # every command imports this module, and `nanogpt --help` needs no specs
    from nanogpt.spec import HardwareSpec

    ChooseHardware = Callable[[str, Sequence[str]], tuple[HardwareSpec, Sequence[str]]]

LAUNCH_DIRECTORY = "NANOGPT_LAUNCH_DIR"  # a directory that this launcher and its ranks share
PREFIX = "nanogpt-launch-"  # how its name begins
NUMA = "NANOGPT_NUMA"  # bind: each rank to the CPUs nearest to its GPU
STOP_NAME = "stop"  # in it: the signal's name, once a stop has been asked for
GRACE_S = 600.0
STOPPED_S = 25.0  # a rank in state T for this long is killed, later than other ranks notice its silence and say so
ENDING_S = 15.0  # for the other ranks to notice by themselves that one has failed, and to say so
KILLING_S = 45.0
_POLL_S = 0.1
_STOOD_STILL_S = 2.0  # between two checks: the launcher was stopped
_taking = threading.Lock()


@dataclass(frozen=True)
class Options:
    """What a launcher should do."""

    meeting: Meeting
    train: Sequence[str]  # arguments of the command
    grace_s: float = GRACE_S
    command: str = "train"  # of nanogpt: train, bench or experiment


def launch(arguments: Sequence[str], choose: ChooseHardware | None = None) -> int:
    """Run the ranks of this node and return the exit code; see the module. Main thread only.

    Args:
        arguments: of the launcher, then those of `nanogpt train`. These begin with the recipe, or after a `--`.
        choose: maps the command, train or bench, and its arguments to the hardware, and to arguments that tell the
            ranks; used if the options give no number of processes. None: one process.

    Raises:
        InputError: the options do not fit together or the hardware; the address is wrong; what `choose` raises.
        RunError: the nodes do not meet, or there is no space for the launch directory or the ranks.
    """
    options = parse(arguments, choose)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        try:
            directory = stack.enter_context(private_directory(PREFIX))
        except OSError as error:
            raise RunError(f"nanogpt launch: {error.filename or 'TMPDIR'}: {error.strerror}") from error
        signals.announce_in(directory)
        try:
            place = stack.enter_context(
                meet(options.meeting, lambda: signals.asked is not None, lambda: signals.deadly is not None)
            )
        except Cancelled:
            if signals.deadly is not None:
                return 128 + signals.deadly
            say(f"{signals.asked} to the launcher on {socket.gethostname()}: stopped before all nodes arrived")
            return REQUEUE_EXIT_CODE
        ranks = stack.enter_context(_started(options, place, directory, signals))
        place.serve()
        _supervise(ranks, signals, options.grace_s)
        if signals.deadly is not None:
            say(f"nanogpt launch: {signal.Signals(signals.deadly).name}; the ranks were killed")
            return 128 + signals.deadly
        failures = {rank: code for rank, process in ranks.items() if (code := process.returncode)}
        _print_messages(directory, failures)
        return exit_code(failures, stop_asked=signals.asked is not None)


# --- options --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(
            f"nanogpt launch: {message}. `nanogpt launch --help` lists its options; torchrun has others, as in"
            " torchrun OPTIONS -m nanogpt train RECIPE"
        )


def parse(arguments: Sequence[str], choose: ChooseHardware | None = None) -> Options:
    """Read the launcher's arguments. Raises `InputError`."""
    parser = _Parser(prog="nanogpt launch", allow_abbrev=False, add_help=False)

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(name, *({name.replace("-", "_").replace("__", "--", 1)} - {name}), **settings)

    add("--standalone", action="store_true")
    add("--nnodes")
    add("--nproc-per-node")
    add("--node-rank", type=int)
    add("--master-addr")
    add("--master-port", type=int, default=29500)
    add("--rdzv-backend", choices=("static", "c10d"))
    add("--rdzv-endpoint")
    add("--rdzv-id", default="none")
    add("--rdzv-conf", default="")
    add("--local-addr")
    add("--max-restarts", type=int, choices=(0,))
    add("--grace", type=float)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--bench", action="store_true")
    other.add_argument("--experiment", action="store_true")
    ours, of_train = list(arguments), []
    if separated := "--" in ours:
        at = ours.index("--")
        ours, of_train = ours[:at], ours[at + 1 :]
    else:
        parser.add_argument("train", nargs=argparse.REMAINDER)
    args = parser.parse_args(ours)
    command = "bench" if args.bench else "experiment" if args.experiment else "train"
    if not separated:
        of_train = args.train
    if choose is not None and args.nproc_per_node is None and command != "experiment":
        of_train = [*of_train, *_start_on(args, *choose(command, of_train))]
    args.nnodes, args.nproc_per_node = args.nnodes or "1", args.nproc_per_node or "1"
    grace = GRACE_S if command == "train" else 0.0  # others have nothing to keep
    grace = grace if args.grace is None else args.grace
    return Options(_meeting(args), of_train, grace, command)


def _start_on(args: argparse.Namespace, hardware: HardwareSpec, said: Sequence[str]) -> Sequence[str]:
    """One process per GPU of `hardware`, on this machine unless the options name others; what the ranks are told."""
    from nanogpt.hardware import shape

    args.nproc_per_node = str(hardware.gpus_per_node)
    if args.nnodes is not None:
        return ()  # the ranks see how many nodes arrive
    if hardware.nodes > 1:
        raise InputError(
            f"nanogpt launch: {shape(hardware)} is {hardware.nodes} nodes, which have to meet. Start it on each of them"
            f" with --nnodes {hardware.nodes} --rdzv-endpoint NODE:29500 --rdzv-id JOB before the recipe, or as a Slurm"
            " job: slurm/run.sh RECIPE"
        )
    return said


def _meeting(args: argparse.Namespace) -> Meeting:
    nodes = _count("--nnodes", args.nnodes.removesuffix(f":{args.nnodes.partition(':')[0]}"))  # torchrun's 2:2 is 2
    processes = _processes(args.nproc_per_node)
    conf = _conf(args.rdzv_conf)
    if args.node_rank is not None and not 0 <= args.node_rank < nodes:
        raise InputError(
            f"nanogpt launch: --node-rank {args.node_rank}: expected 0 to {nodes - 1}, since --nnodes is {nodes}"
        )
    host, port = args.master_addr, args.master_port
    if args.rdzv_endpoint:
        host, port = _endpoint(args.rdzv_endpoint, args.master_port)
    if args.standalone or (nodes == 1 and host is None):
        if nodes > 1 or host is not None:
            raise InputError(
                "nanogpt launch: --standalone means one node; leave out --nnodes, --rdzv-endpoint, --master-addr"
            )
        return Meeting(1, processes, local_address=args.local_addr)
    if host is None:
        raise InputError(
            f"nanogpt launch: --nnodes {nodes}: where do they meet? Give each of them --rdzv-endpoint HOST:PORT,"
            " the first node's address in the cluster's network"
        )
    return Meeting(
        nodes,
        processes,
        host,
        port,
        node=args.node_rank,
        is_first=conf.is_first,
        local_address=args.local_addr,
        run_id=args.rdzv_id,
        join_s=conf.join_s,
    )


@dataclass
class _Conf:
    is_first: bool | None = None
    join_s: float = JOIN_S


def _conf(text: str) -> _Conf:
    found = _Conf()
    for entry in filter(None, text.split(",")):
        key, _, value = entry.partition("=")
        if key == "is_host" and value.lower() in {"true", "false", "0", "1"}:
            found.is_first = value.lower() in {"true", "1"}
        elif key in {"join_timeout", "timeout"} and value.isdecimal():
            found.join_s = float(value)
        else:
            raise InputError(
                f"nanogpt launch: --rdzv-conf {entry}: expected is_host=true, is_host=false or join_timeout=SECONDS"
            )
    return found


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"nanogpt launch: {name} {text}: expected a number of at least 1")
    return int(text)


def _processes(text: str) -> int:
    if text in {"gpu", "auto"}:
        import torch

        if count := torch.cuda.device_count():
            return count
        if text == "gpu":
            raise InputError("nanogpt launch: --nproc-per-node gpu: this machine shows no GPU to PyTorch")
    if text in {"cpu", "auto"}:
        return os.cpu_count() or 1
    return _count("--nproc-per-node", text)


def _endpoint(text: str, default_port: int) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPv6 address]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host.strip("[]") and not host.startswith("[")):
        host, port = text, str(default_port)
    if not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise InputError(f"nanogpt launch: --rdzv-endpoint {text}: expected HOST:PORT, PORT from 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


# --- the ranks ------------------------------------------------------------------------------------------------------

Ranks = dict[int, subprocess.Popen[bytes]]


@contextmanager
def _started(options: Options, place: Place, directory: Path, signals: _Signals) -> Iterator[Ranks]:
    """This node's ranks; none is left at the end."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ, LAUNCH_DIRECTORY: str(directory)}
    if options.meeting.nodes == 1:  # ranks talk to one another within the node
        environ = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo", **environ}
    cpus = _nearest_cpus(options.meeting.processes)
    ranks: Ranks = {}
    try:
        for local_rank in range(options.meeting.processes):
            if signals.deadly is not None:
                break
            own = place.environment(local_rank)
            try:
                ranks[int(own["RANK"])] = subprocess.Popen(
                    tied_command("nanogpt", options.command, *options.train),
                    stdin=subprocess.DEVNULL,
                    env={**environ, **own},
                    start_new_session=True,
                )
            except OSError as error:
                raise RunError(f"nanogpt launch: rank {own['RANK']} cannot be started: {error}") from error
            signals.ranks = list(ranks.values())
            if local_rank < len(cpus) and cpus[local_rank]:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(ranks[int(own["RANK"])].pid, cpus[local_rank])  # before it has threads
        yield ranks
    finally:
        signals.ranks = []
        for process in ranks.values():
            _signal(process, signal.SIGKILL)
        for process in ranks.values():
            process.wait()


def _nearest_cpus(processes: int) -> list[set[int]]:
    """The CPUs that each local rank is bound to, those of its GPU's NUMA node, if NANOGPT_NUMA asks for it."""
    if os.environ.get(NUMA, "off") == "off":
        return []
    if os.environ[NUMA] != "bind":
        raise InputError(f"{NUMA}: found {os.environ[NUMA]!r}, expected bind or off")
    from nanogpt.cluster.gpus import nearest_cpus, visible_gpus

    allowed = os.sched_getaffinity(0)
    try:
        near = [nearest_cpus(gpu) & allowed for gpu in visible_gpus(os.environ)[:processes]]
    except RunError as error:
        say(f"nanogpt launch: {NUMA}=bind: {error}; ranks are not bound")
        return []
    counts = ", ".join(str(len(cpus) or "unknown: all") for cpus in near)
    say(f"nanogpt launch: {NUMA}=bind: CPUs near each rank's GPU: {counts}, of {len(allowed)}")
    return near


def _supervise(ranks: Ranks, signals: _Signals, grace_s: float) -> None:
    """Wait until all ranks have ended, or a signal says to kill them."""
    clock = AwakeClock(_STOOD_STILL_S)
    asked_at = failed_at = None
    stopped_since: dict[int, float] = {}
    told: set[int] = set()  # has had SIGTERM
    while signals.deadly is None:
        living = {rank: process for rank, process in ranks.items() if not _has_ended(process)}
        if not living:
            return
        time.sleep(_POLL_S)
        signals.look()
        now = clock.now()
        if signals.asked is not None and asked_at is None:
            asked_at = now
        if failed_at is None and any(process.returncode for process in ranks.values()):
            failed_at = now
        stopped_since = {rank: stopped_since.get(rank, now) for rank, process in living.items() if _is_stopped(process)}
        for rank, process in living.items():
            if now - stopped_since.get(rank, now) > STOPPED_S:
                _kill(rank, process, f"has been stopped for {now - stopped_since[rank]:.0f} s")
            elif asked_at is not None and now - asked_at > grace_s:
                _kill(rank, process, f"has not ended {grace_s:.0f} s after {signals.asked} (--grace)")
            elif failed_at is not None and now - failed_at > KILLING_S:
                _kill(rank, process, f"has not ended {KILLING_S:.0f} s after another rank failed")
            elif failed_at is not None and now - failed_at > ENDING_S and rank not in told:
                told.add(rank)
                _signal(process, signal.SIGTERM)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if process.returncode is None:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None and found.si_code != os.CLD_EXITED:  # a signal: its children have lost their parent
            _signal(process, signal.SIGKILL)
    return process.poll() is not None


def _kill(rank: int, process: subprocess.Popen[bytes], why: str) -> None:
    if process.poll() is None:
        _signal(process, signal.SIGKILL)
        process.wait()
        say(f"nanogpt launch: rank {rank} on {socket.gethostname()} (process {process.pid}) {why}: killed")


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send it to the rank; if it kills or stops, also to its children."""
    if process.returncode is None:  # not reaped: the process id is still its own
        with contextlib.suppress(ProcessLookupError):
            (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def exit_code(failures: Mapping[int, int], *, stop_asked: bool = False) -> int:
    """The launcher's exit code, from those of the failed ranks (negative: the signal that killed one).

    A rank killed by SIGTERM or SIGUSR1 had no handler yet: either it was asked to stop early, or
    the launcher ended it because another one failed.
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


# --- between the launcher and its ranks ---------------------------------------------------------------------------


def leave_message(error: NanogptError) -> bool:
    """Leave this rank's last message with its launcher, to be printed once for all; False if there is no launcher."""
    directory, rank = os.environ.get(LAUNCH_DIRECTORY), os.environ.get("RANK")
    if directory is None or rank is None or not rank.isdecimal():
        return False
    name = f"message-{int(rank):04d}.json"
    partial = Path(directory) / f".{name}"
    try:
        partial.write_text(json.dumps({"text": str(error), "exit_code": error.exit_code}))
        partial.rename(Path(directory) / name)  # complete, even if this process is killed now
    except OSError:
        return False
    return True


def asked_to_stop() -> str | None:
    """The signal that asked this rank's launcher to stop; None: none so far, or no launcher."""
    directory = os.environ.get(LAUNCH_DIRECTORY)
    if directory is None:
        return None
    try:
        return (Path(directory) / STOP_NAME).read_text()
    except OSError:
        return None


def _print_messages(directory: Path, failures: Mapping[int, int]) -> None:
    """What each rank left, equal messages once; and the ranks killed by a signal, which could say nothing."""
    by_text: dict[str, list[int]] = {}
    interrupted = False
    for file in sorted(directory.glob("message-*.json")):
        message = json.loads(file.read_text())
        interrupted = interrupted or message["exit_code"] == REQUEUE_EXIT_CODE
        if not interrupted or not by_text:  # the first interrupted rank speaks for all
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

    def __init__(self) -> None:
        self.asked: str | None = None
        self.deadly: int | None = None  # the number of a signal after which the ranks are killed
        self.ranks: Iterable[subprocess.Popen[bytes]] = ()
        self._directory: Path | None = None
        self._old: dict[int, Any] = {}
        self._mask: set[signal.Signals | int] = set()

    def __enter__(self) -> _Signals:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # `look` takes it
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), self._ask)
        for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                handlers[number] = self._suspend if number == signal.SIGTSTP else self._end
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        take_pending(signal.SIGUSR1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def announce_in(self, directory: Path) -> None:
        """Where the ranks look for it."""
        self._directory = directory
        self._tell()

    def look(self) -> None:
        """Take blocked signals."""
        if take_pending(signal.SIGUSR1):
            self._ask(signal.SIGUSR1)

    def _ask(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            self.deadly = self.deadly or signal.SIGINT
        elif self.asked is None:
            self.asked = signal.Signals(number).name
            self._tell()

    def _tell(self) -> None:
        if self.asked is not None and self._directory is not None:
            partial = self._directory / f".{STOP_NAME}"
            partial.write_text(self.asked)
            partial.rename(self._directory / STOP_NAME)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.deadly = self.deadly or number
        self.asked = self.asked or signal.Signals(number).name

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """The terminal does not reach the ranks."""
        for process in self.ranks:
            _signal(process, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in self.ranks:
            _signal(process, signal.SIGCONT)


def take_pending(number: signal.Signals) -> bool:
    """Whether this blocked signal has arrived since it was last taken.

    Not with `sigtimedwait`: if a stop and SIGCONT interrupt it, Python returns a signal that never came.
    """
    with _taking:
        if number not in signal.sigpending():
            return False
        signal.sigwait({number})
        return True
