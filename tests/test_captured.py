"""When a function is called, captured and replayed; the graphs themselves are made up, as there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanogpt.captured import Captured


class MadeUpGraph:
    """Counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[MadeUpGraph]:
    """All graphs that are captured."""
    made: list[MadeUpGraph] = []

    @contextlib.contextmanager
    def capture(graph: MadeUpGraph, **how: Any) -> Iterator[None]:
        assert how == {"pool": "the pool", "capture_error_mode": "thread_local"}
        yield
        made.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", MadeUpGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    return made


def test_the_second_call_of_a_kind_is_captured_and_all_later_ones_replayed(graphs: list[MadeUpGraph]) -> None:
    called: list[tuple[Any, ...]] = []
    function = Captured(lambda *args: called.append(args), active=True)
    x, y = torch.zeros(4), torch.zeros(4)
    function(x, 0.5)
    assert len(called) == 1 and not graphs and function.lines("updates") == []
    function(x, 0.5)
    assert len(called) == 2 and [graph.replays for graph in graphs] == [1], "capturing computes nothing"
    function(x[:], 0.5)
    assert len(called) == 2 and [graph.replays for graph in graphs] == [2], "the same place"
    assert function.lines("updates") == ["CUDA graphs: updates, 1 captured"]
    for args in ((y, 0.5), (x, 0.25), (x[:2], 0.5), (x.view(2, 2), 0.5), (x.view(torch.int32), 0.5), (None, 0.5)):
        function(*args)
    assert len(called) == 8 and [graph.replays for graph in graphs] == [2], "other places, shapes, types and values"
    function(y, 0.5)
    function(x, 0.5)
    assert len(called) == 9 and [graph.replays for graph in graphs] == [3, 1]
    assert function.lines("updates") == ["CUDA graphs: updates, 2 captured"]


def test_what_cannot_be_captured_is_called(graphs: list[MadeUpGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    function = Captured(called.append, active=True)

    def refuse(graph: MadeUpGraph, **_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for calls in (1, 2, 3):
        function(7)
        assert called == [7] * calls
    refused = "CUDA graphs: updates, no longer captured: operation not permitted when stream is capturing"
    assert not function.active and function.lines("updates") == [refused]


def test_without_capturing_it_is_always_called(graphs: list[MadeUpGraph]) -> None:
    called: list[Any] = []
    function = Captured(called.append, active=False)
    for _ in range(3):
        function(7)
    assert called == [7] * 3 and not graphs and function.lines("updates") == []
