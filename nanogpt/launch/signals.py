"""SIGTERM, SIGUSR1 and the first Ctrl-C: please finish the step, write a checkpoint and stop.

SIGTERM has a handler. SIGUSR1 is blocked and polled: Slurm sends it to every process of a job, including the compiler's
workers, and these inherit the blocking, whereas a handler would be reset to the default, death. The launcher's word
(`nanogpt.launch.launcher`) counts as a signal. A second signal changes nothing: launcher, batch script and user may
all send one. A second Ctrl-C ends a run at once, as a KeyboardInterrupt, and a third without any message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from nanogpt.launch.launcher import asked_to_stop, take_pending

INTERRUPT_EXIT_CODE = 130


class StopSignals:
    """Notes signals; a context manager. Outside the main thread it only hears the launcher."""

    def __init__(self) -> None:
        self._seen: str | None = None
        self._interrupts = 0
        self._old: dict[int, Any] = {}
        self._mask: set[signal.Signals | int] = set()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # An older thread may have SIGUSR1 unblocked: hence a handler for it too.
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # in a shell's background
                    self._old[number] = signal.signal(number, self._handle)
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            self.seen()
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._old = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                _say_now("Second Ctrl-C: ending at once, without a checkpoint of this step")
                raise KeyboardInterrupt("second Ctrl-C: ended at once, without a checkpoint of that step")
            if self._interrupts > 2:
                os._exit(INTERRUPT_EXIT_CODE)
            if "RANK" not in os.environ:  # a launcher speaks for all
                _say_now("Ctrl-C: finishing the step, then writing a checkpoint; press it again to end the run at once")
        self._seen = self._seen or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def seen(self) -> str | None:
        """The first signal so far, by name, and whether it went to the launcher. Takes microseconds."""
        if self._seen is None and (heard := self._heard()) is not None:  # if not, the handler may have run meanwhile
            self._seen = heard
        return self._seen

    def _heard(self) -> str | None:
        """What comes without a handler."""
        if self._old and take_pending(signal.SIGUSR1):
            return "SIGUSR1"
        launcher = asked_to_stop()
        return None if launcher is None else f"{launcher} to the launcher"


def _say_now(line: str) -> None:
    """From a handler, which may have interrupted a `print`."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
