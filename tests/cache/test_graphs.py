"""Kept graphs: one for each kind of call, loaded without tracing, with the tensors of the process that loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nanogpt.cache.graphs import Unkept, compile_whole, kept_graphs, kind_of_call, tilings_solved_once
from nanogpt.optim.adam import adam_updates
from nanogpt.training.compilation import (
    CompileCounts,
    CompiledFunction,
    compile_counts,
    compiled_functions,
    recompilation_reasons,
)


class Inputs(NamedTuple):
    weights: Tensor
    prefix: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    longest: int


def numbers(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def test_a_kind_is_all_that_tracing_may_depend_on():
    x, y = numbers(3, 4), numbers(3, 4, seed=1)
    calls: list[tuple[Any, ...]] = [
        (Batch(x, 5), Inputs(y)),
        (Batch(x, 6), Inputs(y)),
        (Batch(x, 5), Inputs(y, x)),
        (Batch(x, 5), Inputs(y, y)),
        (Batch(x, 5), Inputs(x)),  # the same tensor twice
        (Batch(x, 5), (y, None)),
        (Batch(numbers(3, 4).mT.contiguous().mT, 5), Inputs(y)),
        (Batch(numbers(4, 3), 5), Inputs(y)),
        (Batch(x.double(), 5), Inputs(y)),
        (Batch(numbers(3, 4, requires_grad=True), 5), Inputs(y)),
        (Batch(x.to("meta"), 5), Inputs(y)),
        ([x], True),
        ([x], 1),
        ([x], 1.0),
        ([x], "1"),
        ([x], None),
        ([x, x], None),
        ({"a": x}, None),
        ({"b": x}, None),
    ]
    kinds = [kind_of_call(call, {}) for call in calls]
    kinds += [kind_of_call(calls[0], {"mask": None}), kind_of_call(calls[0], {"embedded": None})]
    with torch.no_grad():
        kinds.append(kind_of_call(calls[0], {}))
    assert len(set(kinds)) == len(kinds) and len({repr(kind) for kind in kinds}) == len(kinds)
    assert kind_of_call((Batch(y, 5), Inputs(x)), {}) == kinds[0]  # values do not count
    with pytest.raises(Unkept, match="an argument is a PosixPath"):
        kind_of_call(([Path()],), {})


def test_a_tiling_is_solved_once(monkeypatch: pytest.MonkeyPatch):
    """Equal indices are one; the answers are those of `torch._inductor`, none included."""
    import sympy
    from torch._inductor import tiling_utils
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    solve, solved = tiling_utils.solve_for_tiling, list[sympy.Expr]()

    def counting(index: sympy.Expr) -> sympy.Expr | None:
        solved.append(index)
        return solve(index)

    def indices(name: str) -> list[sympy.Expr]:
        x = sympy.Symbol(name, integer=True, nonnegative=True)
        return [x, 768 * x, 7 * FloorDiv(x, 6), 768 * ModularIndexing(x, 1, 64) + FloorDiv(x, 64), sympy.Integer(3)]

    monkeypatch.setattr(tiling_utils, "solve_for_tiling", counting)
    for _ in range(2):  # in each, nothing is known of the other
        solved.clear()
        with tilings_solved_once():
            for _layer in range(3):
                found = [tiling_utils.solve_for_tiling(index) for name in "xy" for index in indices(name)]
        assert found == [solve(index) for name in "xy" for index in indices(name)]
        assert found[:4] == [1, None, None, 64] and len(solved) == 9  # a constant is the same for both names
    assert tiling_utils.solve_for_tiling is counting


# --- with a compiler ------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """`loss` in the ways that a model has: parameters, a buffer, numbers of its own and of what it holds."""

    offset: Tensor

    def __init__(self, seed: int, power: int = 2):
        super().__init__()
        self.weight = nn.Parameter(numbers(4, 4, seed=seed))
        self.register_buffer("offset", numbers(4, seed=seed + 1))
        self.powers = {"power": power}
        self.peak = torch.zeros(())

    def loss(self, batch: Batch, inputs: Inputs) -> Tensor:
        """Of (n, 4) rows."""
        x = (batch.inputs @ self.weight + self.offset) ** self.powers["power"]
        with torch.no_grad():
            self.peak.copy_(x.max())
        return (x * inputs.weights).sum() / batch.longest


def run(function: Callable[..., Tensor], model: Scaled, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and what the function has written."""
    model.zero_grad()
    loss = function(Batch(numbers(rows, 4, seed=7), 5), Inputs(numbers(rows, 1, seed=8)))
    loss.backward()
    assert model.weight.grad is not None
    return loss.detach(), model.weight.grad, model.peak.clone()


def counted(function: Callable[[], Any]) -> tuple[Any, CompileCounts]:
    before = compile_counts()
    return function(), compile_counts() - before


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_graph_is_compiled_once_and_then_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    first, second = Scaled(0), Scaled(10)
    with kept_graphs(tmp_path):
        made, counts = counted(lambda: run(compile_whole(first.loss), first))
        assert (counts.graphs, counts.from_cache, counts.parts_compiled) == (1, 0, 2)
        [path] = tmp_path.iterdir()
        assert path.name.startswith("Scaled.loss-")

        # As in another process: nothing is traced, and the tensors are this object's.
        loaded, counts = counted(lambda: run(compile_whole(first.loss), first))
        assert (counts.graphs, counts.from_cache, counts.parts_compiled) == (1, 1, 0)
        assert all(torch.equal(a, b) for a, b in zip(made, loaded, strict=True))
        function = compile_whole(second.loss)
        for actual, expected in zip(run(function, second), run(second.loss, second), strict=True):
            torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            second.weight.mul_(2)
        for actual, expected in zip(run(function, second), run(second.loss, second), strict=True):
            torch.testing.assert_close(actual, expected)
        assert capfd.readouterr().err == ""

        # Another kind of call is another graph, and its reason is known.
        known = set(recompilation_reasons())
        _, counts = counted(lambda: run(function, second, rows=2))
        assert (counts.graphs, counts.from_cache) == (1, 0) and len(list(tmp_path.iterdir())) == 2
        assert [line for line in recompilation_reasons() if line not in known] == ["loss: 2 instead of 3"]

        # A number that tracing has read is not what it was: in this process, and in a later one.
        second.powers["power"] = 3
        for place in (function, compile_whole(second.loss)):
            loss, counts = counted(partial(run, place, second))
            torch.testing.assert_close(loss, run(second.loss, second))
        assert (counts.graphs, counts.from_cache) == (1, 1)
        assert "was 2 and is 3; compiling it again" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_damaged_file_is_compiled_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = Scaled(0)
    with kept_graphs(tmp_path):
        before = run(compile_whole(model.loss), model)
        [path] = tmp_path.iterdir()
        whole = path.read_bytes()
        for damaged in (b"", whole[:-9], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
            path.write_bytes(damaged)
            after, counts = counted(lambda: run(compile_whole(model.loss), model))
            assert (counts.graphs, counts.from_cache) == (1, 0)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert f"{path.name}: not used: Unkept: damaged; compiling it again" in capfd.readouterr().err
            assert path.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_cannot_be_kept_is_compiled_as_usual(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """One line says so, once, and later processes do not try again."""

    class Evaluated(Scaled):
        loss = torch.no_grad()(Scaled.loss)  # a closure, which the bytecode reads

    model = Evaluated(0)
    arguments = (Batch(numbers(3, 4, seed=7), 5), Inputs(numbers(3, 1, seed=8)))
    with kept_graphs(tmp_path):
        for graphs in (1, 0):  # torch itself remembers it in this process
            loss, counts = counted(lambda: compile_whole(model.loss)(*arguments))
            torch.testing.assert_close(loss, model.loss(*arguments))
            assert counts.graphs == graphs
        assert capfd.readouterr().err.count("loss: its graph cannot be kept, and is traced at every start: ") == 1
        assert [path.suffix for path in tmp_path.iterdir()] == [".refused"]

        # An argument of unknown type; nothing is tried.
        doubled = compile_whole(lambda x, values: len(values) * x)
        for _ in range(2):
            assert torch.equal(doubled(numbers(3), {1, 2}), 2 * numbers(3))
        assert capfd.readouterr().err.count("an argument is a set") == 1
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_updates_in_place_are_equal_bit_for_bit(tmp_path: Path):
    """Adam's update of two parameters, as the optimizer calls it; and what it costs is in the table of functions."""

    def spent() -> CompiledFunction:
        found = (entry for entry in compiled_functions() if entry.name == "adam_updates")
        return next(found, CompiledFunction("adam_updates"))

    def update(function: Callable[..., None]) -> list[Tensor]:
        parameters = [numbers(5, 3), numbers(4, seed=1)]
        states = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        for step in range(3):
            gradients = [numbers(*p.shape, seed=10 * step) for p in parameters]
            sizes = [torch.tensor(0.1 / (step + 1)) for _ in parameters]
            function(parameters, gradients, *states, sizes, sizes, [(0.9, 0.95), (0.8, 0.95)], 1e-8)
        return [*parameters, *states[0], *states[1]]

    before = spent()
    with torch.no_grad(), kept_graphs(tmp_path):
        made, counts = counted(lambda: update(compile_whole(adam_updates)))
        assert (counts.graphs, counts.from_cache, counts.parts_compiled) == (1, 0, 1)
        compiled = spent()
        loaded, counts = counted(lambda: update(compile_whole(adam_updates)))
        assert (counts.graphs, counts.from_cache, counts.parts_compiled) == (1, 1, 0)
    after = spent()
    assert after.graphs - before.graphs == 2 and after.operations - before.operations > 20
    assert compiled.tracing_s > before.tracing_s and compiled.forward_s > before.forward_s
    plain = update(adam_updates)
    for one, other, expected in zip(made, loaded, plain, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected)
