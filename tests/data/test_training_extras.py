"""What the model adds to training's batches, and the rows that the coming steps read of its tables."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
from listed_batches import SHARD, B, ListedSlot, counting, on_disk, ranks, slow_steps
from pulls import lists_of

from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.errors import InputError
from nanogpt.models.model_spec import PulledTableSpec, Slot, SlotExtras
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim.pull_lists import PullLists

LOSSES = [StageLoss(token_weights=[1.0] * terms) for terms in (1, 2, 3)]
MIXED = [(16, 12)] * 4 + [(4, 6)] * 4 + [(4, 12)] * 4
MIXED_TERMS = [1, 1, 2, 2, 2, 3, 3, 1, 1, 1, 1, 2]
MIXED_REQUESTS = [StepRequest(8 * t, m, loss=LOSSES[k - 1]) for (t, m), k in zip(MIXED, MIXED_TERMS, strict=True)]


def slow_counting(steps: list[list[ListedSlot]], terms: list[int]) -> list[list[list[Any]]]:
    sums, expected = [0] * 8, []
    for number, (step, count) in enumerate(zip(steps, terms, strict=True)):
        expected.append([])
        for slot, (inputs, targets, _) in enumerate(step):
            sums[slot] += sum(inputs) + slot
            shifted = [[target + k for target in targets] for k in range(count + 1)]
            expected[-1].append([[slot, 8, sums[slot], number + 1], shifted, float(len(inputs))])
    return expected


def extras_of(loaders: list[TrainBatches], requests: list[StepRequest]) -> list[list[list[Any]]]:
    steps = []
    for request in requests:
        parts = [loader.next_step(request) for loader in loaders]
        slots = [part[i] for i in range(8 // len(loaders)) for part in parts]
        steps.append([[tensor.tolist() for tensor in batch.extras.values()] for batch in slots])
    return steps


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_extras_have_their_slots_state_whatever_the_world_size(world_size: int, prefetch: bool) -> None:
    shards, requests = [SHARD * 4, SHARD * 4], MIXED_REQUESTS
    expected = slow_counting(list(slow_steps(shards, MIXED)), MIXED_TERMS)
    with on_disk(shards) as files:
        with ranks(files, world_size, prefetch=prefetch, extras=counting) as loaders:
            assert extras_of(loaders, requests) == expected
            for loader in loaders:
                loader.restart()
            assert extras_of(loaders, requests[:5]) == expected[:5]
            states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(state == states[0] for state in states)
        assert [steps for _, steps in states[0]["states"]] == [5] * 8
        for other in (1, 2, 8):
            with ranks(files, other, prefetch=prefetch, extras=counting) as loaders:
                for loader in loaders:
                    loader.load_state_dict(states[0])
                    assert loader.state_dict() == states[0]
                assert extras_of(loaders, requests[5:]) == expected[5:]


def pulled(*extras: str) -> PulledTableSpec:
    return PulledTableSpec(1 << 20, 1, extras, len(extras), "")


def test_other_ranks_extras_are_computed_only_where_there_are_states_or_a_use_for_them() -> None:
    seen: list[int] = []

    def stateless(slot: Slot) -> SlotExtras:
        seen.append(slot.number)
        return SlotExtras({"sum": slot.inputs.sum(dtype=np.int64)[None]})

    def run(**options: Any) -> list[int]:
        with on_disk([SHARD * 4]) as files, ranks(files, 4, prefetch=False, **options) as loaders:
            seen.clear()
            loaders[1].next_step(StepRequest(8 * 16, 12))
            loaders[1].next_step(StepRequest(8 * 16, 12))
            return seen[1:]  # the first call is the one that asks for shapes

    assert run(extras=stateless) == [1, 5] * 2
    assert run(extras=stateless, kept_extras=["sum"]) == [*range(8)] * 2
    assert run(extras=stateless, tables={"table": pulled("sum")}) == [*range(8)] * 2
    assert run(extras=lambda slot: stateless(slot)._replace(state=0)) == [*range(8)] * 2
    late = lambda slot: stateless(slot)._replace(state=slot.state)  # noqa: E731
    with on_disk([SHARD * 4]) as files, ranks(files, 4, prefetch=False, extras=late) as (_, loader, *_others):
        loader.load_state_dict({**loader.state_dict(), "states": [*range(8)]})
        seen.clear()
        loader.next_step(StepRequest(8 * 16, 12))
        assert seen[1:] == [*range(8)]
        assert loader.state_dict()["states"] == [*range(8)]


def test_extras_of_another_dtype_than_the_examples_are_refused() -> None:
    def changing(slot: Slot) -> SlotExtras:
        return SlotExtras({"x": np.zeros(3, dtype=np.int64 if slot.inputs.any() else np.int32)})

    with on_disk([SHARD]) as files, ranks(files, 1, extras=changing) as (loader,), pytest.raises(TypeError):
        loader.next_step(StepRequest(8 * 16, 12))


def test_positions_without_states_and_with_those_of_other_slots() -> None:
    with on_disk([SHARD]) as files, ranks(files, 1, extras=counting) as (loader,):
        request = StepRequest(8 * 4, 6, loss=LOSSES[0])
        loader.next_step(request)
        state = loader.state_dict()
        old = {key: value for key, value in state.items() if key != "states"}
        loader.load_state_dict(old)
        assert [int(batch.extras["place"][3]) for batch in loader.next_step(request)] == [1] * 8
        for wrong in ([1, 2], "12345678", 3):
            with pytest.raises(InputError, match=r"saved data position: states .*expected null or a list of 8"):
                loader.load_state_dict({**state, "states": wrong})


# -- several steps ahead --------------------------------------------------------------------------------------------

AHEAD = {"table": pulled("place", "shifted"), "other": pulled("place"), "nothing": pulled()}


def expected_lists(steps: list[list[list[Any]]], rank: int, size: int) -> dict[str, PullLists]:
    """Of `slow_counting`'s steps."""

    def of(arrays: Callable[[list[Any]], list[list[int]]]) -> PullLists:
        read = [[np.array([row for array in arrays(slot) for row in array]) for slot in step] for step in steps]
        return lists_of(*read, rows=1 << 20, rank=rank, size=size)

    return {
        "table": of(lambda slot: [slot[0], *slot[1]]),
        "other": of(lambda slot: [slot[0]]),
        "nothing": of(lambda _: []),
    }


def as_plain(lists: Mapping[str, PullLists]) -> dict[str, list[Any]]:
    return {table: [np.asarray(part).tolist() for part in parts] for table, parts in lists.items()}


@contextmanager
def counted_builds() -> Iterator[list[StepRequest]]:
    built: list[StepRequest] = []
    original = TrainBatches._build

    def build(self: TrainBatches, before: Any, request: StepRequest, host: Any) -> Any:
        built.append(request)
        return original(self, before, request, host)

    with mock.patch.object(TrainBatches, "_build", build):
        yield built


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("world_size", [1, 4])
def test_looking_ahead_tells_the_rows_of_the_coming_steps(world_size: int, prefetch: bool) -> None:
    shards = [SHARD * 4, SHARD * 4]
    expected = slow_counting(list(slow_steps(shards, MIXED)), MIXED_TERMS)
    options: dict[str, Any] = {"prefetch": prefetch, "extras": counting, "tables": AHEAD}
    with on_disk(shards) as files, ranks(files, world_size, **options) as loaders, counted_builds() as built:
        step = 0
        for steps in (1, 3, 3, 3, 2):  # taken before the next look, which is of four steps or what is left
            for rank, loader in enumerate(loaders):
                lists = loader.look_ahead(MIXED_REQUESTS[step : step + 4])
                assert as_plain(lists) == as_plain(expected_lists(expected[step : step + 4], rank, world_size))
            assert extras_of(loaders, MIXED_REQUESTS[step : step + steps]) == expected[step : step + steps]
            step += steps
        for loader in loaders:
            assert {lists.rows.size for lists in loader.look_ahead([]).values()} == {0}
        for request in MIXED_REQUESTS[:-1]:  # each step is built once; of the last request there is a guess
            assert built.count(request) == world_size * MIXED_REQUESTS.count(request)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_look_ahead_that_was_prepared_is_not_made_again(prefetch: bool) -> None:
    shards = [SHARD * 4, SHARD * 4]
    expected = slow_counting(list(slow_steps(shards, MIXED)), MIXED_TERMS)
    made = mock.patch.object(TrainBatches, "_make_lists", autospec=True, side_effect=TrainBatches._make_lists)
    options: dict[str, Any] = {"prefetch": prefetch, "extras": counting, "tables": {"table": AHEAD["table"]}}
    with on_disk(shards) as files, ranks(files, 2, **options) as (_, loader), made as lists_made:

        def check(first: int, last: int) -> None:
            found = loader.look_ahead(MIXED_REQUESTS[first:last])["table"]
            assert as_plain({"": found}) == as_plain({"": expected_lists(expected[first:last], 1, 2)["table"]})

        check(0, 2)
        loader.gather_ahead(MIXED_REQUESTS[0:5], 2)
        for request in MIXED_REQUESTS[:2]:
            loader.next_step(request)
        check(2, 5)
        assert lists_made.call_count == 2
        check(2, 4)  # other steps
        loader.gather_ahead(MIXED_REQUESTS[2:6], 2)
        loader.restart()
        check(0, 2)
        for request in MIXED_REQUESTS[:4]:
            loader.next_step(request)
        check(4, 6)  # the same requests as were prepared, for steps that were built anew


@pytest.mark.parametrize("prefetch", [True, False])
def test_other_steps_than_those_looked_ahead_are_built_anew_with_the_right_states(prefetch: bool) -> None:
    shards, wrong = [SHARD * 4, SHARD * 4], StepRequest(8 * 5, 7, loss=LOSSES[2])
    expected = slow_counting(list(slow_steps(shards, MIXED)), MIXED_TERMS)
    options: dict[str, Any] = {"prefetch": prefetch, "extras": counting, "tables": AHEAD}
    with on_disk(shards) as files, ranks(files, 2, **options) as loaders:
        for step in range(0, 12, 3):
            for loader in loaders:
                loader.build_ahead([*MIXED_REQUESTS[step : step + 2], wrong, wrong, *MIXED_REQUESTS[:2]])
                state = loader.state_dict()
                assert state["steps"] == step
                assert loader.look_ahead(MIXED_REQUESTS[step : step + 3]).keys() == AHEAD.keys()
            assert extras_of(loaders, MIXED_REQUESTS[step : step + 1]) == expected[step : step + 1]
            for loader in loaders:
                loader.look_ahead([wrong])
            assert extras_of(loaders, MIXED_REQUESTS[step + 1 : step + 3]) == expected[step + 1 : step + 3]
        for loader in loaders:
            loader.load_state_dict(state)
        assert extras_of(loaders, MIXED_REQUESTS[9:]) == expected[9:]
        for loader in loaders:
            loader.look_ahead([wrong] * 3)
            loader.restart()
        assert extras_of(loaders, MIXED_REQUESTS) == expected


@pytest.mark.parametrize("prefetch", [True, False])
def test_steps_beyond_the_end_fail_when_their_turn_comes(prefetch: bool) -> None:
    request = StepRequest(8 * 16, 30)
    with on_disk([SHARD, SHARD]) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        loader.build_ahead([request] * 8)
        assert len(loader.look_ahead([request] * 4)) == 0
        with pytest.raises(InputError, match="used up after 4 steps"):
            loader.look_ahead([request] * 5)
        for _ in range(4):
            loader.build_ahead([request] * 8)
            assert len(loader.next_step(request)) == 8
        for _ in range(2):
            with pytest.raises(InputError, match="used up after 4 steps"):
                loader.next_step(request)


def test_building_ahead_does_not_wait_and_looking_ahead_does() -> None:
    go_on = threading.Event()

    def held(slot: Slot) -> SlotExtras:
        if threading.current_thread() is not threading.main_thread():
            assert go_on.wait(60)
        return SlotExtras({"row": slot.inputs[:1].astype(np.int64)})

    def wait(future: Future[Any]) -> Any:
        time.sleep(0.1)
        go_on.set()
        return future.result(60)

    request = StepRequest(8 * 4, 6)
    with (
        on_disk([SHARD * 3]) as files,
        ranks(files, 1, extras=held, tables={"table": pulled("row")}) as (loader,),
        counted_builds() as built,
    ):
        loader.build_ahead([request] * 3)
        assert loader.state_dict()["steps"] == 0
        before = loader.wait_seconds
        with mock.patch.object(loader, "_wait", wait):
            assert loader.look_ahead([request] * 3)["table"].rows.tolist() == [B]
        assert loader.wait_seconds - before >= 0.1
        assert len(built) == 3


def test_close_drops_the_coming_steps() -> None:
    with on_disk([SHARD * 3]) as files, ranks(files, 1) as (loader,):
        loader.build_ahead([StepRequest(8 * 4, 6)] * 5)
        loader.close()
        for ask in (loader.build_ahead, loader.look_ahead):
            with pytest.raises(RuntimeError, match="after close"):
                ask([StepRequest(8 * 4, 6)])


@pytest.mark.parametrize("ask", ["build_ahead", "look_ahead"])
def test_looking_ahead_at_what_does_not_fit_the_slots(ask: str) -> None:
    with on_disk([SHARD]) as files, ranks(files, 1) as (loader,):
        with pytest.raises(InputError, match=r"batch_tokens: 100, must be a positive multiple of the 8 slots"):
            getattr(loader, ask)([StepRequest(128, 12), StepRequest(100, 12)])
        assert len(loader.next_step(StepRequest(128, 12))) == 8
