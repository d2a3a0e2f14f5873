"""Work in threads that may be abandoned: a read that never returns must not keep the process from ending."""

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
_AT_EXIT_S = 2.0  # cutting off a computation, unlike a read, would crash the process


class Worker:
    """One thread that does what it is given, in order. It dies with the process, whatever it is doing."""

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
        """End once all given work is done; wait at most that long."""
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
    """The process was asked to stop while it waited for something that did not come; the text is the request."""


def wait_for(future: Future[T], asked: Callable[[], str | None]) -> T:
    """The future's result. Raises `GivenUp`, `GRACE_S` after `asked` gives a reason, or what the work raised."""
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
