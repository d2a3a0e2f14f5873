"""The thread that initialises CUDA's driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.threads import initialise_driver


def calls(monkeypatch: pytest.MonkeyPatch, library: Callable[[str], Any]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    initialise_driver()
    for thread in threading.enumerate():
        if thread.name == "driver":
            thread.join(10)


def test_the_driver_is_initialised_once_and_not_for_one_of_several_ranks(monkeypatch: pytest.MonkeyPatch):
    flags: list[int] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    calls(monkeypatch, lambda name: SimpleNamespace(cuInit=flags.append))
    assert flags == [0]
    monkeypatch.setenv("WORLD_SIZE", "2")  # a rank sets CUDA_VISIBLE_DEVICES first, which the driver reads once
    calls(monkeypatch, lambda name: SimpleNamespace(cuInit=flags.append))
    assert flags == [0]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_machine_without_a_driver_goes_on(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    calls(monkeypatch, missing)
