"""Work in threads that may be left behind: a read that never ends must not keep the process from ending."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_S = 10.0  # after a request to stop, for work that others wait for
_POLL_S = 0.2
_AT_EXIT_S = 2.0  # what is cut off in the middle of a computation, rather than a read, would take the process with it


class Worker:
    """One thread that does what it is given, in order. It dies with the process, whatever it is at."""

    def __init__(self, name: str):
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._leaving = False
        _workers.add(self)
        self._thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have `function(*arguments)` done."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(work)
        return future

    def close(self, wait_s: float) -> None:
        """End once all that was given is done; wait for it at most that long."""
        self._work.put(None)
        self._thread.join(wait_s)

    def _run(self) -> None:
        while (work := self._work.get()) is not None and not self._leaving:
            work()

    def _leave(self) -> None:
        self._leaving = True
        self.close(_AT_EXIT_S)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for worker in list(_workers):
        worker._leave()


class GivenUp(Exception):
    """The process is asked to stop, and what it waits for has not come; the text is the request."""


def wait_for(future: Future[T], asked: Callable[[], str | None]) -> T:
    """The future's result. Raises `GivenUp` once `asked` has said why for `GRACE_S`; else what the work raised."""
    since: float | None = None
    while True:
        try:
            return future.result(_POLL_S)
        except TimeoutError:
            if future.done():  # with one of its own, or just now
                return future.result()
        if reason := asked():
            since = since or time.monotonic()
            if time.monotonic() - since > GRACE_S:
                raise GivenUp(reason)
