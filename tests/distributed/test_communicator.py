"""Collectives over gloo, with real processes; `collectives.py` has what is checked in each."""

from __future__ import annotations

import warnings

import pytest
from collectives import check
from forked import in_ranks


def check_on_cpus() -> None:
    warnings.simplefilter("error", FutureWarning)
    check("gloo")


@pytest.mark.parametrize("processes", [2, 4])
def test_collectives(processes: int) -> None:
    for done in in_ranks(processes, check_on_cpus):
        assert done.returncode == 0, done.stderr
