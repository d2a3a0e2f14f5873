"""Room for the frames of deep calls.

CPython (3.11 to 3.14) keeps the frames of Python functions in chunks of 16 KB. It maps another one when a call finds no
room, and unmaps it as soon as that call returns. So a loop at such a depth that each of its calls crosses the end of a
chunk asks the operating system for memory at each call: 147,000 times while one training graph of record 92 is traced
and compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# One more than half of a power of two, of 8 bytes each: a frame that fits no chunk gets one of 4 MB, and what is
# called from it shares the other half. Only what is used of it takes memory.
SLOTS = 2**18 + 1


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """Call the function from a frame so large that all others fit behind it, 2 MB of them."""

    def call(*args: P.args, **named: P.kwargs) -> R:
        return function(*args, **named)

    call.__code__ = call.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(call)
