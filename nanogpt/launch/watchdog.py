"""The watchdog: ranks notice when another one is gone, and agree on the step at which to stop.

- A thread in each rank exchanges heartbeats with the others through the TCPStore that the launcher serves, which
  outlives every rank. It makes no CUDA call and no collective; a step costs a lock and a counter.
- Death: a process that is gone from this host is noticed at the next beat; one that is silent (stopped, or its host
  or network is down) after `watchdog.silence_seconds`. A beat says "the process runs", whatever its main thread does,
  so compiling and writing do not count as silence.
- Suspension: time in which this process was stopped counts towards no limit, its own or another's, so a job
  stopped as a whole and continued is unharmed. A second thread does nothing but keep that clock, as the first may be
  stopped while it waits for the store. A rank stopped alone is silent: nobody can know that it will come back.
- Anybody on the node can write into the store. What is read from it is text for a message, never a command: it is
  made printable, a process is killed only if it is a child of the same launcher, and a log is written to only if
  this user owns it.
- Hanging: threads continue while a collective never ends. A rank whose main thread has been in a step for
  `watchdog.step_seconds`, or in any other phase for `watchdog.phase_seconds`, gives up, and says who is behind.
- The end: every other rank says who was lost and at which step, writes that into the run's log, and exits, by force
  if its main thread is stuck. A stopped process takes no signal but SIGKILL, from a rank of its host or
  from the launcher. The kernel kills ranks whose launcher dies.
- Stopping: once a signal has come to any rank or launcher, each rank's thread reports the segment (a step, or one of
  the warm-up) that its main thread is in, and holds the main thread at the end of it until all have reported. All
  then continue to the end of the farthest reported segment and stop there. Without a signal no rank waits for
  another, and no device is ever synchronized.

A run on one process has signals only: no store, no thread.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from nanogpt.console import say
from nanogpt.environment import number_of
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError, NanogptError, RunError
from nanogpt.launch.awake import AwakeClock
from nanogpt.launch.launcher import leave_message
from nanogpt.launch.meeting import STORE_TIMEOUT_S, listen, serve
from nanogpt.launch.signals import StopSignals
from nanogpt.launch.tied import die_with_parent
from nanogpt.runs.record import Process, process_lives, this_process
from nanogpt.spec import WatchdogSpec

POLL_S = 0.2
BEAT_S = 1.0
LEAVING_S = 3.0  # for the main thread to notice a lost rank; then the process ends by force
CLEANING_S = 10.0  # likewise once it has noticed
START_FACTOR = 2  # silence while starting: CUDA's start may hold the interpreter's lock for long
STOOD_STILL_S = 1.0  # between two looks at the clock: this process was stopped, or the interpreter's lock was held
WORDS = 2000  # characters of another rank's text to show


@dataclass
class Beat:
    """What a rank says about itself."""

    count: int
    process: Process
    phase: str
    step: int  # steps done
    segment: int  # segments begun
    run: str | None = None  # the run's directory, as rank 0 knows it
    asked: str | None = None  # why it wants to stop
    frozen: int | None = None  # the segment at whose end its main thread waits
    left: int | None = None  # exit code, if it has ended
    words: str | None = None  # why

    def encode(self) -> str:
        """For the store."""
        return json.dumps({**asdict(self), "process": self.process.model_dump()})

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        """From the store. Raises ValueError where it is not a beat."""
        try:
            beat = cls(**json.loads(text))
            beat.process = Process.model_validate(beat.process)
            numbers = (beat.count, beat.step, beat.segment, beat.frozen or 0, beat.left or 0)
            texts = (beat.phase, beat.run or "", beat.asked or "", beat.words or "", beat.process.host)
            if not all(isinstance(n, int) for n in numbers) or not all(isinstance(t, str) for t in texts):
                raise ValueError("fields of a wrong type")
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        beat.phase, beat.asked, beat.words = one_line(beat.phase), _maybe(beat.asked), _maybe(beat.words)
        beat.process.host = one_line(beat.process.host)
        return beat

    @property
    def where(self) -> str:
        """What it was doing."""
        return f"in step {self.step}" if self.phase == "training" else f"while {self.phase}, {self.step} steps done"


class Lost(RunError):
    """Another rank is gone, or all of them hang; the message says which and where."""


class Watchdog:
    """See the module. A context manager of the main thread, for the whole of a run.

    Args:
        rank: this process's.
        size: the world size.
        limits: may be set later, once the recipe has been read.
    """

    def __init__(self, rank: int = 0, size: int = 1, limits: WatchdogSpec | None = None):
        self.rank = rank
        self.size = size
        self.limits = limits or WatchdogSpec()
        self.run_path: Path | None = None  # rank 0's
        self.on_lost: Callable[[str], None] | None = None  # rank 0's last words into its files
        self._signals = StopSignals()
        self._lock = threading.Condition()
        self._own = Beat(0, this_process(), "starting", 0, 0)
        self._clock = AwakeClock(STOOD_STILL_S)
        self._progress_at = self._clock.now()
        self._stop_at: int | None = None  # the last segment, agreed on
        self._lost: NanogptError | None = None
        self._lost_at = 0.0
        self._noticed = False  # the main thread knows
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True) if size > 1 else None
        self._peers: dict[int, Beat] = {}
        self._heard_at: dict[int, float] = {}

    def __enter__(self) -> Watchdog:
        self._signals.__enter__()
        if self._thread is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, which does not tie its children; our launcher does
                die_with_parent(os.getppid())
            self._thread.start()
            threading.Thread(target=self._clock.keep, args=(POLL_S, self._closing), name="clock", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is not None:
            code = 0 if kind is None else getattr(error, "exit_code", 1)
            with self._lock:
                self._own.left = code
                self._own.words = None if error is None else str(error) or type(error).__name__
                if not isinstance(error, NanogptError | None):
                    self._own.words = f"{type(error).__name__}: {self._own.words}"
            if isinstance(error, Lost):
                self._kill_silent_peers()
                with contextlib.suppress(OSError):
                    self.log_loss(str(error))
            self._closing.set()
            self._thread.join(STORE_TIMEOUT_S)
        self._signals.__exit__()

    # --- the main thread ---

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Whatever happens inside may take `watchdog.phase_seconds`."""
        before = self._own.phase
        self.enter(name)
        yield
        self.enter(before)

    def training(self, step: int, *, compiling: bool = False) -> None:
        """Steps begin, with `step` done: from here on each may take `watchdog.step_seconds`.

        `compiling`: `watchdog.phase_seconds`, as steps may have to be compiled first.
        """
        self._own.step = step
        self.enter("training and compiling" if compiling else "training")

    @property
    def host(self) -> str:
        """This rank's host name."""
        return self._own.process.host

    def enter(self, phase: str) -> None:
        """From here on the rank is `phase`."""
        self._own.phase, self._progress_at = phase, self._clock.now()

    def boundary(self, step: int | None = None) -> str | None:
        """End a segment and begin another, unless this returns why the run should stop here, on all ranks.

        Every rank calls it at the same places. `step`: steps done; None: unchanged. Raises `Lost`.
        """
        self.check()
        self._progress_at = self._clock.now()
        if step is not None:
            self._own.step = step
        if self._thread is None:
            return self._signals.seen()
        with self._lock:
            while self._own.frozen is not None and self._stop_at is None:
                self._lock.wait(POLL_S)
                self.check()
            if self._stop_at is not None and self._own.segment >= self._stop_at:
                return self._own.asked
            self._own.segment += 1
        return None

    @property
    def asked(self) -> str | None:
        """Why the run should stop, as soon as this rank knows."""
        return self._own.asked if self._thread is not None else self._signals.seen()

    def check(self) -> None:
        """Raise `Lost`, or another rank's `InputError`, if one is gone."""
        if self._lost is not None:
            self._noticed = True
            raise self._lost

    def explain(self, error: BaseException) -> BaseException:
        """The error to report for `error`: if a collective failed, what became of the rank at its other end.

        May take as long as noticing a silent rank.
        """
        if self._thread is None or isinstance(error, NanogptError) or not _is_communication(error):
            return error
        until = time.monotonic() + START_FACTOR * self.limits.silence_seconds + LEAVING_S
        while self._lost is None and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(POLL_S / 4)
        self._noticed = True
        return self._lost or error

    def expect(self, rank: int, process: Process) -> None:
        """That rank has been seen, as this process: from now on it should be heard from."""
        if rank != self.rank and rank not in self._peers:
            self._heard_at[rank] = self._clock.now()
            self._peers.setdefault(rank, Beat(0, process, "starting", 0, 0))

    @property
    def process(self) -> Process:
        """How others can find this process."""
        return self._own.process

    # --- the thread ---

    def _watch(self) -> None:
        began = answered = self._clock.now()
        beat_at = began - BEAT_S
        store: dist.Store | None = None
        unanswered = 0  # failed beats in a row
        while True:
            leaving = self._closing.wait(POLL_S)
            now = self._clock.now()
            self._hear_signals()
            if leaving or now - beat_at >= BEAT_S or self._own.asked:
                beat_at = now
                try:
                    store = store or connect(STORE_TIMEOUT_S)
                    self._exchange(store)
                    now = self._clock.now()
                    if unanswered:  # nobody could be heard
                        self._heard_at = dict.fromkeys(self._heard_at, now)
                    answered, unanswered = now, 0
                except RuntimeError as error:  # torch's DistError is one
                    store, unanswered = None, unanswered + 1
                    now = self._clock.now()
                    if unanswered > 1 and now - answered > self._silence():
                        self._give_up(RunError(f"{self._name()}: the run's launcher does not answer ({_first(error)})"))
            if leaving:
                return
            self._agree()
            if self._lost is None:
                self._look_for_losses(began, now, heard=not unanswered)
                self._look_at_progress(now)
            elif now - self._lost_at > (LEAVING_S + CLEANING_S if self._noticed else LEAVING_S):
                self._leave_by_force()

    def _hear_signals(self) -> None:
        name = self._signals.seen()
        if name and self._own.asked is None:
            to = "" if "launcher" in name else f" to rank {self.rank}"
            self._own.asked = f"{name}{to} on {self.host}"

    def _exchange(self, store: dist.Store) -> None:
        with self._lock:
            self._own.count += 1
            self._own.run = None if self.run_path is None else str(self.run_path)
            text = self._own.encode()
        store.set(_key(self.rank), text)
        others = [rank for rank in range(self.size) if rank != self.rank]
        known = [
            rank for rank in others if (rank in self._peers and self._peers[rank].count) or store.check([_key(rank)])
        ]
        for rank, found in zip(known, store.multi_get([_key(rank) for rank in known]) if known else (), strict=True):
            try:
                beat = Beat.decode(found)
            except ValueError:  # not that rank's message: ignore it
                continue
            if rank not in self._peers or beat.count != self._peers[rank].count:
                self._heard_at[rank] = self._clock.now()
            self._peers[rank] = beat
            if beat.asked and self._own.asked is None:
                self._own.asked = beat.asked

    def _agree(self) -> None:
        """Hold the main thread at the end of its segment until the last segment of all ranks is known."""
        if self._own.asked is None or self._stop_at is not None:
            return
        with self._lock:
            if self._own.frozen is None:
                if self.rank == 0:
                    say(f"{self._own.asked}: finishing the step, then writing a checkpoint")
                self._own.frozen = self._own.segment
            reports = [self._peers[r].frozen if r in self._peers else None for r in range(self.size) if r != self.rank]
            found = [report for report in reports if report is not None]
            if len(found) == self.size - 1:
                self._stop_at = max(self._own.frozen, *found)
                self._lock.notify_all()

    def _look_for_losses(self, began: float, now: float, *, heard: bool) -> None:
        """`heard`: the store answered, so others could be heard."""
        for rank in range(self.size):
            peer = self._peers.get(rank)
            if rank == self.rank:
                continue
            if peer is None:
                if now - began > self.limits.phase_seconds:
                    self._give_up(Lost(f"rank {rank} has not arrived within {self.limits.phase_seconds:g} s"))
            elif peer.left is not None:
                if peer.left not in (0, REQUEUE_EXIT_CODE):
                    kind = InputError if peer.left == InputError.exit_code else Lost
                    # If several report the same loss, one is enough.
                    known = peer.words or ""
                    prefix = "" if known.startswith("rank ") else f"rank {rank} on {peer.process.host} failed: "
                    self._give_up(kind(prefix + known))
            elif process_lives(peer.process) is False:
                # It may have said goodbye since the last beat: it counts as lost at the second check.
                if now - self._heard_at[rank] > 2 * BEAT_S:
                    self._give_up(Lost(f"{_named(rank, peer)} has died {self._where(peer)}"))
            elif heard and now - self._heard_at[rank] > self._silence(peer):
                self._give_up(
                    Lost(
                        f"{_named(rank, peer)} has been silent for {self._silence(peer):g} s {self._where(peer)}"
                        " (watchdog.silence_seconds): it is stopped, or its host or the network is down"
                    )
                )

    def _where(self, peer: Beat) -> str:
        """What a lost rank was doing: not far from where this one waits for it, as its beats may be old."""
        return (peer if self._own.phase == "starting" else self._own).where

    def _silence(self, peer: Beat | None = None) -> float:
        starting = self._own.phase == "starting" and (peer is None or peer.phase == "starting")
        return self.limits.silence_seconds * (START_FACTOR if starting else 1)

    def _look_at_progress(self, now: float) -> None:
        training = self._own.phase == "training"
        limit = self.limits.step_seconds if training else self.limits.phase_seconds
        if now - self._progress_at <= limit:
            return
        beats = {**self._peers, self.rank: self._own}
        last = min(beat.segment for beat in beats.values())
        behind = [_named(rank, beat) for rank, beat in sorted(beats.items()) if beat.segment == last]
        who = "all ranks are at the same place" if len(behind) == len(beats) else f"behind: {', '.join(behind)}"
        key = f"watchdog.{'step' if training else 'phase'}_seconds"
        self._give_up(Lost(f"{self._name()} hangs: {limit:g} s {self._own.where} ({key}); {who}"))

    def _name(self) -> str:
        return _named(self.rank, self._own)

    def _give_up(self, lost: NanogptError) -> None:
        if self._lost is None:
            self._lost, self._lost_at = lost, self._clock.now()
            with self._lock:
                self._lock.notify_all()

    def _leave_by_force(self) -> None:
        """The main thread is stuck: say why, in every way possible, and end."""
        assert self._lost is not None
        self._kill_silent_peers()
        if not leave_message(self._lost):
            say(str(self._lost))
        words = threading.Thread(target=self._last_words, args=(str(self._lost),), daemon=True)
        words.start()
        words.join(5.0)
        sys.stderr.flush()
        os._exit(self._lost.exit_code)

    def _last_words(self, text: str) -> None:
        """Into the run's files: rank 0 writes them, or if it is lost, the first remaining rank writes the log."""
        with contextlib.suppress(Exception):
            self._own.left, self._own.words = 1, text
            connect(STORE_TIMEOUT_S).set(_key(self.rank), self._own.encode())
        with contextlib.suppress(Exception):
            self.log_loss(text)

    def log_loss(self, text: str) -> None:
        """Write `text` where the run's reader will look; only on the first living rank."""
        if self.rank == 0:
            if self.on_lost is not None and not self._noticed:
                self.on_lost(text)
            return
        if self._first_living() != self.rank or 0 not in self._peers or self._peers[0].run is None:
            return
        _append_to_log(Path(self._peers[0].run), f"run failed: {text}\n")

    def _first_living(self, host: str | None = None) -> int:
        """The first rank (of this host) that is not known to be silent or gone."""
        now = self._clock.now()
        for rank in range(self.size):
            peer = self._peers.get(rank)
            if rank == self.rank:
                return rank
            if peer is None or (host is not None and peer.process.host != host):
                continue
            heard = now - self._heard_at[rank] < max(3 * BEAT_S, self.limits.silence_seconds / 2)
            if heard and process_lives(peer.process) is not False:
                return rank
        return self.rank

    def _kill_silent_peers(self) -> None:
        """On this host: nobody else may be left to do it, and a stopped process keeps its GPU forever."""
        if self._first_living(self._own.process.host) != self.rank:
            return
        now = self._clock.now()
        for rank, peer in self._peers.items():
            silent = now - self._heard_at[rank] > self.limits.silence_seconds
            if silent and peer.left is None and process_lives(peer.process) and _is_sibling(peer.process.pid):
                with contextlib.suppress(OSError):
                    os.kill(peer.process.pid, signal.SIGKILL)
                    say(f"{_named(rank, peer)}: killed")


# --- parts ----------------------------------------------------------------------------------------------------------


_served: list[dist.Store] = []  # by this process
_serving = threading.Lock()


def connect(timeout_s: float) -> dist.Store:
    """A separate connection to the launcher's store, from the environment. Raises RuntimeError."""
    env = os.environ
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise RuntimeError("MASTER_ADDR and MASTER_PORT are not set: start it with nanogpt launch or torchrun")
    address, port = env["MASTER_ADDR"], number_of("MASTER_PORT", least=1, most=65535)
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and env.get("RANK") == "0":
        with _serving:  # no launcher does, as when srun starts the ranks: rank 0 serves it, at that address alone
            if not _served:
                try:
                    _served.append(serve(listen(address, port)))
                except (OSError, RunError) as error:
                    raise RuntimeError(f"cannot listen at {address} port {port}: {error}") from error
    store = dist.TCPStore(
        address, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False
    )
    prefix = f"nanogpt/{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(prefix, store)


def one_line(text: str) -> str:
    """One line without control characters, as anybody may have written `text`."""
    return "".join(c if c.isprintable() else " " for c in "; ".join(text[:WORDS].splitlines()))


def _maybe(text: str | None) -> str | None:
    return None if text is None else one_line(text)


def _append_to_log(run: Path, text: str) -> None:
    """The run's log if this user owns it; another rank's word for where it is could lead elsewhere."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError), os.fdopen(os.open(run / "log.txt", flags), "w") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1:
            file.write(text)


def _is_sibling(pid: int) -> bool:
    """Whether this rank's launcher also started that process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getppid()
    except (OSError, IndexError):
        return False


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _named(rank: int, beat: Beat) -> str:
    return f"rank {rank} on {beat.process.host} (process {beat.process.pid})"


def _is_communication(error: BaseException) -> bool:
    """Whether a collective raised it: gloo's errors are RuntimeErrors naming its source files."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed"))
    )


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0]
