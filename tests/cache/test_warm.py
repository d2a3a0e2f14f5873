"""`nanogpt warm`, with torch.compile tracing only: that takes seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_spec, write_recipe

from nanogpt.cache import graphs
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam
from nanogpt.training import trainer
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch._dynamo
    from torch._dynamo.utils import clear_compilation_metrics, counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "kept_graphs", lambda _: nullcontext())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    clear_compilation_metrics()
    counters[graphs.SPENT].clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tiny_spec("runtime.compile=on", "hardware.gpus_per_node=4"))


@pytest.mark.usefixtures("traced_only")
def test_a_recipe_for_four_is_warmed_up_for_four(
    recipe: Path, tmp_path: Path, nanogpt: Callable, monkeypatch: pytest.MonkeyPatch
):
    begun: list[object] = []
    evaluate, updates = Trainer.evaluate, NorMuonAdam.warm_up
    monkeypatch.setattr(trainer, "compile_in_parallel", lambda *_, **__: begun.append("helpers"))

    def first_evaluation(self: Trainer, *arguments: Any, **options: Any) -> float:
        if "warm-up" not in begun:
            begun.append("warm-up")
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "evaluate", first_evaluation)
    monkeypatch.setattr(NorMuonAdam, "warm_up", lambda self, size: (begun.append(size), updates(self, size)))
    result = nanogpt("warm", recipe, "--out", tmp_path / "kept")
    assert result.code == 0 and begun == ["helpers", "warm-up", 4]
    lines = result.out.splitlines()
    assert any(line.startswith("compile cache: ") and "not there yet" in line for line in lines)
    [optimizer] = [line for line in lines if line.startswith("| optimizer for 4 ranks |")]
    assert int(optimizer.split("|")[3]) > 0
    assert any(line.startswith("| training_loss | 3 |") for line in lines)
    assert any(line.startswith("| start to first timed step |") for line in lines)
    assert not list(tmp_path.glob("tiny-*"))  # no run


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        (("--world-size", 3), "", "--world-size: 3 does not fit; it can be 1, 2, 4, 8, and must divide"),
        (("--set", "runtime.compile=off"), "", "runtime.compile is off: nothing is compiled here"),
        ((), "off", "NANOGPT_CACHE: is off; name the directory of the cache file with --out"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused(
    recipe: Path,
    nanogpt: Callable,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    variable: str,
    message: str,
):
    monkeypatch.setenv("NANOGPT_CACHE", variable)
    result = nanogpt("warm", recipe, *arguments)
    assert result.code == 2
    assert message in result.err
