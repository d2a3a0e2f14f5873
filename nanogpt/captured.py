"""Functions that are replayed as CUDA graphs: the host then launches one graph, not each of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def capture(compute: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of what `compute` launches, in memory of `pool`, and its result, which a replay fills.

    Raises RuntimeError if it does what cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that loads the next batch, continue meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        return graph, compute()


def reason(error: RuntimeError) -> str:
    """Why nothing was captured, in a line."""
    return (str(error).splitlines() or ["no reason given"])[0]


class Captured:
    """A function that changes tensors in place, captured as a CUDA graph at its second call of a kind, then replayed.

    A call's kind is where its tensors are, and the values of its other arguments. A first call may compile, tune or
    load, which cannot be captured. Numbers that change from call to call are tensors on the GPU.

    Args:
        function: returns nothing, and waits for nothing. Whatever else it reads stays where it is.
        active: whether to capture.
    """

    def __init__(self, function: Callable[..., None], *, active: bool):
        self.function = function
        self.active = active
        self.failure: str | None = None  # why nothing more was captured
        self._called: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]] = {}  # with what they read
        self._pool: Any = None

    def __call__(self, *args: Tensor | Hashable) -> None:
        """Call or replay the function. Arguments are tensors or hashable."""
        if not self.active:
            self.function(*args)
            return
        kind = tuple(map(_kind, args))
        if kind not in self._called:
            self._called.add(kind)
            self.function(*args)
            return
        if kind not in self._graphs:
            try:
                self._graphs[kind] = self._capture(args), args
            except RuntimeError as error:
                self.active, self.failure = False, reason(error)
                self.function(*args)
                return
        self._graphs[kind][0].replay()

    def _capture(self, args: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
        if self._pool is None:  # shared: graphs are replayed one after another, and nothing of them is left
            self._pool = torch.cuda.graph_pool_handle()
        return capture(lambda: self.function(*args), self._pool)[0]

    def lines(self, what: str) -> list[str]:
        """For the log. `what`: what the function does."""
        if self.failure is not None:
            return [f"CUDA graphs: {what}, no longer captured: {self.failure}"]
        return [f"CUDA graphs: {what}, {len(self._graphs)} captured"] if self._graphs else []


def _kind(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.data_ptr(), argument.shape, argument.stride(), argument.dtype
    return argument
