"""How CPU threads wait for one another; set before torch is loaded, which reads it once."""

from __future__ import annotations

import os


def wait_briefly() -> None:
    """Let OpenMP threads spin for microseconds and then sleep while they wait, unless the user has said otherwise.

    On a busy machine, spinning on takes time from the very thread that is waited for; on an idle one, sleeping at once
    costs half as much again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
