"""How CPU threads wait for one another; called before torch is loaded, which reads it once."""

from __future__ import annotations

import os


def wait_briefly() -> None:
    """Let OpenMP threads spin for microseconds and then sleep while they wait, unless the user has said otherwise.

    Spinning on takes the time of the very thread that is waited for where the machine has other work; sleeping at once
    costs half as much again where it has none.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
