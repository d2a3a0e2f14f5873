"""A model drawn ahead is the model that the run would have drawn."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_runs import python, tiny_spec

from nanogpt.models.language_model import Implementations
from nanogpt.training.ahead import begin_drawing, begin_hashing
from nanogpt.training.build import build_model, draw_model, undrawn_model
from nanogpt.training.startup import StartUp

KINDS = ("speedrun", "record89", "record92", "gpt2")
PLAIN = Implementations()
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_same_bit_by_bit(kind: str):
    spec, startup = tiny_spec(model=kind), StartUp()
    begin_drawing(spec, CPU, startup)
    drawn = startup.begun(draw_model)
    assert drawn is not None
    ahead = build_model(spec, device=CPU, implementations=PLAIN, drawn=drawn)
    assert ahead is drawn.model and list(ahead.tables) == list(spec.model.pulled_tables())
    alone = build_model(spec, device=CPU)
    for (name, one), (other_name, other) in zip(ahead.state_dict().items(), alone.state_dict().items(), strict=True):
        assert name == other_name
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other), name


def test_a_model_drawn_for_other_implementations_is_not_used():
    spec = tiny_spec()
    drawn = draw_model(spec, device=CPU, implementations=Implementations(attention="fa4"))
    assert build_model(spec, device=CPU, drawn=drawn) is not drawn.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_helpers_model_has_the_same_graph(kind: str):
    spec = tiny_spec(model=kind)
    helpers, own = undrawn_model(spec, device=CPU, implementations=PLAIN), build_model(spec, device=CPU)
    described = [
        [(name, x.shape, x.dtype, x.stride()) for name, x in (*model.named_parameters(), *model.named_buffers())]
        for model in (helpers, own)
    ]
    assert described[0] == described[1] and list(helpers.tables) == list(own.tables)
    assert not any(parameter.any() for parameter in helpers.parameters())


def test_the_thread_that_hashes_imports_nothing(monkeypatch: pytest.MonkeyPatch):
    startup, begun = StartUp(), list[Any]()
    monkeypatch.setattr(startup, "begin", lambda *call: begun.append(call))
    begin_hashing(startup)
    [(function, *keys)] = begun
    codecache = sys.modules["torch._inductor.codecache"]
    triton_compat = sys.modules["torch._inductor.runtime.triton_compat"]
    called: list[int] = []
    function(lambda: called.append(1), lambda: called.append(2))
    assert called == [1, 2]
    assert keys == [triton_compat.triton_key, codecache.torch_key]


def test_the_thread_that_draws_leaves_the_compiler_to_the_main_one():
    code = (
        "import sys, torch; from tiny_runs import tiny_spec; from nanogpt.training.ahead import begin_drawing;"
        "from nanogpt.training.build import draw_model; from nanogpt.training.startup import StartUp\n"
        f"for kind in {KINDS}:\n"
        "    startup = StartUp(); begin_drawing(tiny_spec(model=kind), torch.device('cpu'), startup);"
        "before = set(sys.modules); startup.begun(draw_model); print(set(sys.modules) - before)"
    )
    done = python("-c", code)
    assert done.stdout.split() == ["set()"] * 4, done.stdout + done.stderr
