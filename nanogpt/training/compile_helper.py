"""A process that compiles graphs for a run: `nanogpt.training.parallel_compile` starts it, and has what it does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nanogpt.garbage import collect_later
from nanogpt.threads import initialise_driver


def main(root: str, task: str) -> None:
    """Import, compile, end. What it leaves is in files."""
    collect_later()
    initialise_driver()
    from nanogpt.training.parallel_compile import help_compiling

    help_compiling(Path(root), task)
    os._exit(0)  # the run waits for it, and taking apart what was imported takes a second


if __name__ == "__main__":
    main(*sys.argv[1:])
