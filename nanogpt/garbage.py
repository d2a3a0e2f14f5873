"""Python's garbage collector waits until a process has started.

Imports make millions of objects that stay. The collector looks at all of them again and again, a quarter of the time;
hardly any is garbage.
"""

from __future__ import annotations

import gc


def collect_later() -> None:
    """Turn the collector off until `collect_from_now`."""
    gc.disable()


def collect_so_far() -> None:
    """Collect what there is, for a process that waits anyway; `collect_from_now` then looks at the rest alone.

    Does nothing without an earlier `collect_later`.
    """
    if not gc.isenabled():
        gc.collect()
        gc.freeze()


def collect_from_now() -> None:
    """Collect once, then look only at what is made from here on. Does nothing without an earlier `collect_later`."""
    if not gc.isenabled():
        collect_so_far()
        gc.enable()
