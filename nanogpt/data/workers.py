"""Work in threads that ends at once on Ctrl-C, on SIGTERM, or on an error that concerns all of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from nanogpt.errors import NanogptError, RunError

T = TypeVar("T")
R = TypeVar("R")
GRACE_S = 1.0  # for threads to end in good order after a stop


class FatalError(RunError):
    """A failure that every other file would meet too (disk full, not authorised): the others are stopped."""


class Interrupted(NanogptError):
    """Stopped by a signal; `exit_code` is 128 + its number, as in a shell."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"interrupted ({name}): what has arrived is kept, the same command continues from there")
        self.exit_code = 128 + number


class Stopped(RunError):
    """Raised inside a worker that was told to stop; never shown."""


@dataclass
class Stop:
    """Tells workers to stop: after a signal, or after an error that makes their work pointless."""

    event: threading.Event = field(default_factory=threading.Event)
    signal_number: int | None = None

    def check(self) -> None:
        """Raise `Stopped` if the work should end."""
        if self.event.is_set():
            raise Stopped("stopped")

    def wait(self, seconds: float) -> None:
        """Sleep, unless the work should end meanwhile. Raises `Stopped` then."""
        self.event.wait(seconds)
        self.check()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop; a second signal acts as it did before. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(number: int, _frame: object) -> None:
            self.signal_number = number
            self.event.set()
            restore()

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            restore()

    def raise_if_signalled(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)


@dataclass(frozen=True)
class Done(Generic[R]):
    """What became of one item: a result, or the error that a user sees."""

    result: R | None = None
    error: NanogptError | None = None


def in_parallel(work: Callable[[T], R], items: Sequence[T], workers: int, stop: Stop) -> list[Done[R]]:
    """`work` on every item in `workers` threads; the outcomes in the items' order.

    The threads are daemons and are not waited for after a stop: one that hangs in a read would hold the process for
    as long as the read's timeout. A `FatalError` stops the others, any other `NanogptError` is that item's outcome.

    Raises:
        Interrupted: a signal came.
    """
    todo: SimpleQueue[tuple[int, T]] = SimpleQueue()
    outcomes: SimpleQueue[tuple[int, Done[R] | BaseException]] = SimpleQueue()
    for job in enumerate(items):
        todo.put(job)

    def loop() -> None:
        while not stop.event.is_set():
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                outcome: Done[R] | BaseException = Done(result=work(item))
            except NanogptError as error:
                if isinstance(error, FatalError):
                    stop.event.set()
                outcome = Done(error=error)
            except BaseException as error:
                stop.event.set()
                outcome = error
            outcomes.put((index, outcome))

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    found: dict[int, Done[R]] = {}
    give_up_at: float | None = None
    while len(found) < len(items):
        try:
            index, outcome = outcomes.get(timeout=0.1)
        except Empty:
            if stop.event.is_set():
                give_up_at = give_up_at or time.monotonic() + GRACE_S
                alive = any(thread.is_alive() for thread in threads)
                if (not alive and outcomes.empty()) or time.monotonic() > give_up_at:
                    break
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        found[index] = outcome
    stop.raise_if_signalled()
    return [found.get(index, Done(error=Stopped("not started"))) for index in range(len(items))]
