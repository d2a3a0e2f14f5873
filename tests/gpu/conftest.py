"""What a part of the GPU tests has left out is said at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

_LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note tests that `-m` or `-k` leaves out."""
    for item in items:
        item.config.stash.setdefault(_LEFT_OUT, []).append(item.nodeid.partition("[")[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name them, each with how often."""
    left_out = Counter(terminalreporter.config.stash.get(_LEFT_OUT, []))
    if left_out:
        terminalreporter.section(f"{left_out.total()} GPU tests not run", sep="=")
        for name, count in left_out.items():
            terminalreporter.line(f"{name}{f', {count} cases' if count > 1 else ''}")
