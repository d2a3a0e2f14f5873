"""Room for the frames of deep calls: no memory is asked for at each call, at whatever depth."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from nanogpt.frames import with_room

CALLS = 2_000
DEPTHS = 600  # frames of some 100 bytes each: several of CPython's chunks of 16 KB


def faults_in_calls(depth: int) -> int:
    """New pages of memory while a loop `depth` calls down calls a function that does nothing."""
    if depth:
        return faults_in_calls(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        nothing()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def nothing() -> None:
    """A call that needs a frame."""


def most_faults(measure: Callable[[int], int]) -> int:
    """Over all depths."""
    return max(measure(depth) for depth in range(DEPTHS))


def test_calls_at_any_depth_ask_for_no_memory() -> None:
    assert most_faults(with_room(faults_in_calls)) < CALLS // 10


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="may keep a chunk that it will need again")
def test_python_itself_asks_at_each_call_at_some_depths() -> None:
    assert most_faults(faults_in_calls) >= CALLS


def test_arguments_results_and_errors_are_the_functions() -> None:
    @with_room
    def divided(one: int, *, by: int) -> float:
        """Divide."""
        return one / by

    assert divided(1, by=2) == 0.5
    assert (divided.__name__, divided.__doc__) == ("divided", "Divide.")
    with pytest.raises(ZeroDivisionError):
        divided(1, by=0)
