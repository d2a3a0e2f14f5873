"""Threads at a command's start: how those of the CPU wait for one another, and one that initialises CUDA's driver."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading


def wait_briefly() -> None:
    """Let OpenMP threads spin for microseconds and then sleep while they wait, unless the user has said otherwise.

    On a busy machine, spinning on takes time from the very thread that is waited for; on an idle one, sleeping at once
    costs half as much again. Call it before torch is loaded, which reads this once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def initialise_driver() -> None:
    """Have a thread initialise CUDA's driver, if there is one, while this one imports torch. It takes no GPU memory.

    Not for one of several ranks, which first chooses the GPU that the driver will see (`see_own_gpu`).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        threading.Thread(target=_initialise, name="driver", daemon=True).start()


def _initialise() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)
