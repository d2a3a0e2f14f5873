"""`python -m nanogpt.launch.tied PARENT MODULE [ARGUMENT]...`: MODULE in a process that does not outlive PARENT.

The kernel kills the process when its parent dies, whatever state either is in. This is arranged before anything
else is imported, and a parent that died even earlier is noticed. The kernel means the parent's thread: start it from
one that lasts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def tied_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` as a child of this process, tied to it."""
    return [sys.executable, "-m", "nanogpt.launch.tied", str(os.getpid()), module, *arguments]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); end at once if `parent` is already gone."""
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
