"""Tail averages with norms restored, against record 92's table written out in numpy, step by step."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import assert_same
from torch import Tensor, nn

from nanogpt.optim.communication import Communicator, Pending, completed
from nanogpt.recipe import find_recipe, load_recipe
from nanogpt.recipe_yaml import RecipeError
from nanogpt.spec_end import TailAverages
from nanogpt.training.end_of_run import RunningAverages, lerp

STEPS = 1194
# Record 92's end, of 1,194 steps.
ENTRY = TailAverages.model_validate(
    {
        "kind": "tail_averages",
        "averages": [
            {
                "blend": {"lm_head": 0.65, "embed": 0.65},
                **{"window_steps": 298, "every": 2, "also": [297]},
                **{"rate": 1 - (1 - 2 / 299) ** 2, "last_rate": 2 / 299},
            },
            {"blend": {"vo": 1, "mlp": 1}, "window_steps": 250, "every": 4, "rate": 4 / 53},
            {"blend": {"value_embed": 1}, "window_steps": 250, "every": 4, "last": 2, "rate": 4 / 53},
            {
                "blend": {"qk": 0.55, "vo": 0.3493, "mlp": 0.3493},
                **{"window_steps": 298, "every": 4, "also": [1], "rate": 2 / 75},
            },
        ],
        "keep_norms": ["embed", "lm_head", "mlp", "qk", "vo"],
    }
)
SHAPES = {
    "lm_head": (4, 6),
    "embed": (6, 4),
    "vo": (4, 2, 3),
    "mlp": (2, 2, 3, 2),
    "value_embed": (8, 3),
    "qk": (4, 3, 2),
    "scalars": (7,),
}


def weights_after(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the optimizer leaves after a step: a drift and noise."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (torch.randn(shape, generator=generator) + 3 * step / STEPS).to(dtype) for name, shape in SHAPES.items()
    }


def model(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def take_steps(followed: Any, parameters: dict[str, nn.Parameter], steps: Iterable[int], dtype: torch.dtype) -> None:
    with torch.no_grad():
        for step in steps:
            for name, value in weights_after(step, dtype).items():
                parameters[name].copy_(value)
            followed.after_step(step)


def by_numpy(start: np.ndarray, end: np.ndarray, weight: float) -> np.ndarray:
    """torch.lerp in fp32: from the nearer of the two."""
    difference = end - start
    return start + difference * np.float32(weight) if weight < 0.5 else end - difference * np.float32(1 - weight)


def averaged(name: str, ticks: list[int], rates: dict[int, float], dtype: torch.dtype) -> np.ndarray:
    average = np.zeros(0, dtype=np.float32)
    for step in ticks:
        value = weights_after(step, dtype)[name].float().numpy()
        average = value.copy() if step == ticks[0] else by_numpy(average, value, rates[step])
    return average


def definition(dtype: torch.dtype) -> dict[str, Tensor]:
    """Record 92's table, its steps typed in."""
    last = {name: value.float().numpy() for name, value in weights_after(1193, dtype).items()}

    def rounded(value: np.ndarray) -> np.ndarray:
        return torch.from_numpy(value).to(dtype).float().numpy()

    end = dict(last)
    head = [896, *range(897, 1194, 2)]
    assert len(head) == 150
    rates = {**dict.fromkeys(head, 1 - (1 - 2 / 299) ** 2), 1193: 2 / 299}
    for name in ("lm_head", "embed"):
        end[name] = rounded(by_numpy(end[name], averaged(name, head, rates, dtype), 0.65))
    tail = list(range(945, 1194, 4))
    assert len(tail) == 63
    for name in ("vo", "mlp"):
        end[name] = rounded(averaged(name, tail, dict.fromkeys(tail, 4 / 53), dtype))
    events = list(range(947, 1192, 4))
    assert len(events) == 62
    end["value_embed"] = rounded(averaged("value_embed", events, dict.fromkeys(events, 4 / 53), dtype))
    banks = sorted([*range(897, 1194, 4), 1192])
    assert len(banks) == 76
    for name, blend in (("qk", 0.55), ("vo", 0.3493), ("mlp", 0.3493)):
        end[name] = rounded(by_numpy(end[name], averaged(name, banks, dict.fromkeys(banks, 2 / 75), dtype), blend))
    for name in ("embed", "lm_head", "mlp", "qk", "vo"):
        before, after = (float(torch.linalg.vector_norm(torch.from_numpy(x[name]))) for x in (last, end))
        end[name] = rounded(end[name] * np.float32(before / after))
    return {name: torch.from_numpy(value).to(dtype) for name, value in end.items()}


def run_on_one(dtype: torch.dtype, resume_after: int | None = None) -> dict[str, Tensor]:
    parameters = model(dtype)
    followed = RunningAverages(ENTRY, parameters, STEPS, Communicator())
    if resume_after is None:
        take_steps(followed, parameters, range(STEPS), dtype)
    else:
        take_steps(followed, parameters, range(resume_after), dtype)
        state = {name: value.clone() for name, value in followed.state_dict().items()}
        parameters = model(dtype)
        followed = RunningAverages(ENTRY, parameters, STEPS, Communicator())
        followed.load_state_dict(state)
        take_steps(followed, parameters, range(resume_after, STEPS), dtype)
    with torch.no_grad():
        followed.finish()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_is_the_definitions_bit_for_bit(dtype: torch.dtype):
    assert_same(run_on_one(dtype), definition(dtype))


@pytest.mark.parametrize("step", [896, 897, 898, 1000, 1193])
def test_going_on_in_the_middle_changes_nothing(step: int):
    assert_same(run_on_one(torch.bfloat16, resume_after=step), run_on_one(torch.bfloat16))


class Together(Communicator):
    """A rank that is a thread, with its fellows' tensors at hand."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shards: list[Tensor]):
        super().__init__()
        self.rank, self.size, self.barrier, self.shards = rank, size, barrier, shards

    def gather(self, full: Tensor) -> Pending:
        self.shards[self.rank] = self.shard(full).clone()
        self.barrier.wait()
        full.copy_(torch.cat(self.shards))
        self.barrier.wait()
        return completed(full)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_parts_and_end_alike(size: int):
    dtype, barrier, shards = torch.bfloat16, threading.Barrier(size, timeout=60), [torch.zeros(0)] * size
    ends: list[Any] = [None] * size
    held: list[int] = [0] * size
    states: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            parameters = model(dtype)
            followed = RunningAverages(ENTRY, parameters, STEPS, Together(number, size, barrier, shards))
            take_steps(followed, parameters, range(1000), dtype)
            states[number] = followed.state_dict()
            followed.load_state_dict(states[number])
            take_steps(followed, parameters, range(1000, STEPS), dtype)
            held[number] = sum(average.numel() for average in followed._averages.values())
            with torch.no_grad():
                followed.finish()
            ends[number] = {name: parameter.detach() for name, parameter in parameters.items()}
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = model(dtype)
    followed = RunningAverages(ENTRY, alone, STEPS, Communicator())
    take_steps(followed, alone, range(1000), dtype)
    for number in range(size):
        assert_same(ends[number], definition(dtype))
        assert_same(states[number], followed.state_dict())
    averages = 2 * 24 + 2 * 24 + 24 + 3 * 24  # numbers of all
    assert held == [averages // size] * size


def test_what_does_not_divide_is_whole_on_every_rank():
    entry = ENTRY.model_copy(
        update={"averages": [ENTRY.averages[0].model_copy(update={"blend": {"scalars": 0.5}})], "keep_norms": []}
    )
    parameters = model(torch.float32)
    followed = RunningAverages(entry, parameters, STEPS, Together(1, 2, threading.Barrier(1), []))
    take_steps(followed, parameters, range(900), torch.float32)
    assert followed.state_dict()["0/scalars"].shape == (7,)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.4999, 0.5, 0.65, 1.0])
def test_lerp_is_torchs_wherever_a_tensor_is_cut(weight: float):
    torch.manual_seed(0)
    start, end = torch.randn(2, 101)
    whole = lerp(start, end, weight)
    torch.testing.assert_close(whole, torch.lerp(start, end, weight), rtol=2e-6, atol=1e-7)
    for cut in range(1, 20):
        assert torch.equal(lerp(start[cut:], end[cut:], weight), whole[cut:])
    if weight in (0.0, 1.0):
        assert torch.equal(whole, end if weight else start)


# --- the recipe's say ---


def test_record_92s_recipe_says_the_same():
    shipped = load_recipe("record92").training.end[0]
    assert isinstance(shipped, TailAverages) and shipped.keep_norms == ENTRY.keep_norms
    for found, expected in zip(shipped.averages, ENTRY.averages, strict=True):
        assert found.blend == expected.blend
        assert found.ticks(STEPS) == pytest.approx(expected.ticks(STEPS), rel=1e-8)


def tail(**changes: Any) -> dict[str, Any]:
    return {"blend": {"qk": 0.5}, "window_steps": 100, "every": 4, "rate": 0.1, **changes}


def spec_with(*averages: dict[str, Any], steps: int | None = None, keep_norms: tuple[str, ...] = ()) -> Any:
    entry = {"kind": "tail_averages", "averages": list(averages), "keep_norms": list(keep_norms)}
    with tempfile.TemporaryDirectory() as directory:  # what --set says is not shortened
        recipe = Path(directory) / "averaged.yaml"
        recipe.write_text(json.dumps({"base": str(find_recipe("record89")), "training": {"end": [entry]}}))
        return load_recipe(recipe, steps=steps)


def test_a_shortened_run_averages_the_same_share():
    whole, short = (
        spec_with(tail(window_steps=257, last=9, also=[1284, 256, 1]), tail(last_rate=0.05), steps=steps).training
        for steps in (None, 257)
    )
    first, second = short.end[0].averages
    assert (first.window_steps, first.every, first.last, first.also) == (51, 4, 2, [256, 51, 0])
    assert (1 - first.rate) == pytest.approx((1 - 0.1) ** 5)  # a fifth of the ticks
    assert (second.window_steps, second.last, second.last_rate) == (20, 0, pytest.approx(1 - 0.95**5))
    assert list(second.ticks(257)) == [240, 244, 248, 252, 256]
    assert list(first.ticks(257))[:4] == [0, 205, 206, 210]
    # An average forgets the same: what the first copy still is worth at the end.
    worth = [
        (1 - each.end[0].averages[1].rate) ** len(each.end[0].averages[1].ticks(each.total_steps))
        for each in (whole, short)
    ]
    assert worth[0] == pytest.approx(worth[1], rel=0.01)


def test_every_length_is_a_valid_run():
    for steps in (4, 5, 7, 30, 311, 2000):
        spec = spec_with(tail(last=99, also=[1284]), keep_norms=("qk",), steps=steps)
        assert all(0 <= step < steps for step in spec.training.end[0].averages[0].ticks(steps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": {"kq": 0.5}}, r"training\.end\.0\.averages\.0\.blend\.kq: is not a parameter of the model"),
        ({"window_steps": 1286}, r"averages\.0\.window_steps: is 1286, the run has 1285 steps"),
        ({"last": 100}, r"averages\.0\.last: is 100, outside the last 100 steps"),
        ({"also": [3, 1285]}, r"averages\.0\.also: has 1285, the run has 1285 steps"),
        ({"rate": 1.5}, r"averages\.0\.rate: must be less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        spec_with(tail(**changes))


def test_norms_of_what_is_not_averaged_are_refused():
    with pytest.raises(RecipeError, match=r"keep_norms\.0: mlp is not averaged"):
        spec_with(tail(), keep_norms=("mlp",))
    with pytest.raises(RecipeError, match=r"keep_norms\.1: qk is there twice"):
        spec_with(tail(), keep_norms=("qk", "qk"))
