"""The garbage collector while a process starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_spec, train

from nanogpt.garbage import collect_from_now, collect_later, collect_so_far


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


class Cycle:
    """Garbage that only the collector can free."""

    freed = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Cycle.freed += 1


def test_nothing_is_collected_until_the_process_has_started():
    collect_later()
    before = Cycle.freed
    for _ in range(100_000):
        Cycle()
    assert Cycle.freed == before
    collect_from_now()
    assert Cycle.freed == before + 100_000
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_who_never_waited_has_nothing_frozen():
    collect_from_now()
    assert gc.get_freeze_count() == 0


def test_a_run_collects_again_once_it_trains(tmp_path: Path):
    collect_later()
    train(tiny_spec(), make_data(tmp_path / "data"), tmp_path / "run")
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_what_is_collected_while_waiting_is_not_looked_at_again():
    collect_later()
    before = Cycle.freed
    Cycle()
    collect_so_far()
    assert Cycle.freed == before + 1 and not gc.isenabled() and gc.get_freeze_count() > 0
    gc.enable()
    gc.unfreeze()
    collect_so_far()  # the collector is at work: nothing to do
    assert gc.get_freeze_count() == 0
