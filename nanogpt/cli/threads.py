"""How CPU threads wait for one another; called before torch is loaded, which reads it once."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let waiting OpenMP threads sleep, unless the user has said otherwise.

    On a machine with other work, threads that spin while they wait take the time of the thread that they wait for: a
    step took 3 to 7 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
