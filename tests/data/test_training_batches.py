"""Training's batches against a slow formulation in plain lists, written from the rules alone."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from listed_batches import (
    SHARD,
    B,
    ListedSlot,
    Request,
    as_lists,
    on_disk,
    quick,
    ranks,
    shard_lists,
    slow_steps,
    world_sizes,
    write_shards,
)

from nanogpt.data.documents_index import ShardDocuments
from nanogpt.data.micro_batches import cu_seqlens_length
from nanogpt.data.shards import ShardError, header_bytes, train_name
from nanogpt.data.training_batches import StepRequest, TrainBatches, segment_ends
from nanogpt.errors import InputError

# -- help ------------------------------------------------------------------------------------------------------------


def run_ranks(loaders: list[TrainBatches], requests: list[Request], slots: int = 8) -> list[list[ListedSlot]]:
    """The steps' slots in order, put together from all ranks, until the data end."""
    steps: list[list[ListedSlot]] = []
    for tokens, maximum in requests:
        try:
            parts = [loader.next_step(StepRequest(slots * tokens, maximum)) for loader in loaders]
        except InputError as error:
            assert "used up" in str(error) or "none of them fills" in str(error)
            for loader in loaders:
                with pytest.raises(InputError):
                    loader.next_step(StepRequest(slots * tokens, maximum))
            break
        assert all(batch.max_seqlen == maximum for part in parts for batch in part)
        steps.append([as_lists(part[i]) for i in range(slots // len(loaders)) for part in parts])
    return steps


request_lists = st.lists(
    st.tuples(st.sampled_from([1, 4, 5, 16]), st.sampled_from([1, 2, 5, 12, 40]), st.integers(1, 5)),
    min_size=1,
    max_size=4,
).map(lambda stages: [(tokens, maximum) for tokens, maximum, steps in stages for _ in range(steps)])


# -- steps -----------------------------------------------------------------------------------------------------------


@quick
@given(shard_lists, request_lists, world_sizes, st.booleans(), st.integers(1, 40))
def test_steps_are_those_of_the_slow_formulation(
    shards: list[list[int]], requests: list[Request], world_size: int, prefetch: bool, piece: int
) -> None:
    with on_disk(shards, piece) as files, ranks(files, world_size, prefetch=prefetch) as loaders:
        assert run_ranks(loaders, requests) == list(slow_steps(shards, requests))


@quick
@given(shard_lists, request_lists, world_sizes, world_sizes, st.data())
def test_resuming_at_any_step_gives_the_rest_of_the_run(
    shards: list[list[int]], requests: list[Request], before: int, after: int, data: st.DataObject
) -> None:
    expected = list(slow_steps(shards, requests))
    stop = data.draw(st.integers(0, len(expected)))
    with on_disk(shards) as files:
        with ranks(files, before) as loaders:
            assert run_ranks(loaders, requests[:stop]) == expected[:stop]
            states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(state == states[0] for state in states)
        with ranks(files, after) as loaders:
            for loader in loaders:
                loader.load_state_dict(states[0])
                assert loader.state_dict() == states[0]
            assert run_ranks(loaders, requests[stop:]) == expected[stop:]


@quick
@given(shard_lists, request_lists, st.integers(1, 3), st.booleans())
def test_epochs_repeat_the_files(shards: list[list[int]], requests: list[Request], epochs: int, prefetch: bool) -> None:
    with on_disk(shards) as files, ranks(files, 2, epochs=epochs, prefetch=prefetch) as loaders:
        got = run_ranks(loaders, requests)
    # Where no shard fills a step on its own, the loader stops at once instead of passing over the files again.
    assert got == list(slow_steps(shards * epochs, requests))


@quick
@given(shard_lists, request_lists)
def test_endless_epochs_go_on_until_no_shard_fills_a_step(shards: list[list[int]], requests: list[Request]) -> None:
    with on_disk(shards) as files, ranks(files, 1, epochs=None) as loaders:
        assert run_ranks(loaders, requests) == list(slow_steps(shards * (len(requests) + 1), requests))


def test_a_position_in_a_later_epoch_is_resumed() -> None:
    shards, requests = [SHARD, SHARD[1:]], [(16, 12)] * 12
    expected = list(slow_steps(shards * 12, requests))
    with on_disk(shards) as files, ranks(files, 1, epochs=None) as (loader,):
        run_ranks([loader], requests[:9])
        state = loader.state_dict()
        assert state["epoch"] > 1
        assert (state["steps"], state["tokens"]) == (9, 9 * 8 * 16)
        with ranks(files, 1, epochs=None) as (other,):
            other.load_state_dict(state)
            assert run_ranks([other], requests[9:]) == expected[9:]


def test_shapes_dtypes_and_cu_seqlens() -> None:
    with on_disk([SHARD]) as files, ranks(files, 4) as loaders:
        for loader in loaders:
            batches = loader.next_step(StepRequest(8 * 16, 12))
            assert len(batches) == 2
            for batch in batches:
                assert batch.inputs.shape == batch.targets.shape == (16,)
                assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int32, torch.int64)
                assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
                cu = batch.cu_seqlens
                assert (cu.dtype, cu.shape) == (torch.int32, (128,))
                assert cu[[0, -1]].tolist() == [0, 16]
                lengths = cu.diff()
                assert lengths.min() >= 0
                assert lengths.max() <= 12
                assert torch.equal(batch.targets[:-1], batch.inputs[1:].long())
                assert torch.equal(cu[:-1][lengths > 0], torch.nonzero(batch.inputs == B)[:, 0].int())


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(16, 128), (16_384, 128), (32_768, 128), (38_700, 256), (38_699, 128), (49_152, 256), (262_144, 896)],
)
def test_cu_seqlens_length(tokens: int, length: int) -> None:
    assert cu_seqlens_length(tokens) == length


def test_batches_handed_out_stay_as_they_are() -> None:
    with on_disk([SHARD * 2]) as files, ranks(files, 1) as (loader,):
        held = [loader.next_step(StepRequest(8 * 4, 6)) for _ in range(4)]
        expected = list(slow_steps([SHARD * 2], [(4, 6)] * 4))
        assert [[as_lists(batch) for batch in step] for step in held] == expected


def test_restart_forgets_everything_and_opens_the_files_again() -> None:
    changed = [token if token == B else 8 - token for token in SHARD]
    requests = [(16, 12), (4, 6)]
    with on_disk([SHARD]) as files, ranks(files, 1) as (loader,):
        first = run_ranks([loader], requests)
        assert loader.wait_seconds > 0
        loader.restart()
        assert loader.wait_seconds == 0
        assert run_ranks([loader], requests) == first
        loader.restart()
        write_shards(files[0].parent, [changed])
        assert run_ranks([loader], requests) == list(slow_steps([changed], requests)) != first


def test_every_step_is_built_in_the_background() -> None:
    """So that the caller hears signals while it waits for a file system."""
    built_in: list[str] = []

    class Watched(TrainBatches):
        def _build(self, *args: Any) -> Any:
            built_in.append(threading.current_thread().name)
            return super()._build(*args)

    with on_disk([SHARD * 2, SHARD * 2]) as files, Watched(files, slots=8, bos=B) as loader:
        for tokens, maximum in [(4, 6), (4, 6), (4, 6), (16, 12), (16, 12)]:
            loader.next_step(StepRequest(8 * tokens, maximum))
    assert set(built_in) == {"next-step"}
    assert 5 <= len(built_in) <= 7  # three were guessed right; the wrong guess and the last may not have started


def test_the_background_reads_the_rest_of_the_shard_and_the_next_one() -> None:
    with on_disk([SHARD, SHARD, SHARD]) as files, ranks(files, 1) as (loader,):
        loader.next_step(StepRequest(8 * 4, 6))
        read = {}
        for _ in range(15_000):
            read = {index: shard._read for index, shard in list(loader._shards.items())}
            if read == {0: len(SHARD), 1: len(SHARD)}:
                break
            time.sleep(0.01)
        assert read == {0: len(SHARD), 1: len(SHARD)}


def test_many_threads_on_one_shard_agree() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, B, 200_000)
    tokens[rng.random(tokens.size) < 0.05] = B
    with on_disk([tokens.tolist()], piece=500, window=64) as (path,):
        shard = ShardDocuments(path, tokens.size, B)
        expected = np.flatnonzero(tokens == B)
        plans: list[Any] = []

        def deal() -> None:
            plans.append(shard.plan(3000, slots=8, tokens=5000, max_document=50))

        threads = [threading.Thread(target=f) for f in (shard.read_all, deal, shard.read_all, deal, deal)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert np.array_equal(shard.tokens, tokens)
        assert len(plans) == 3
        for plan in plans:
            assert plan.bounds == plans[0].bounds
            assert np.array_equal(plan.starts, expected[3000 : 3000 + plan.documents])
        whole, known = shard._known
        assert np.array_equal(whole[:known], expected)


def test_a_token_outside_of_the_vocabulary_is_named_when_its_shard_is_read() -> None:
    wrong = [*SHARD]
    wrong[7] = 77
    for prefetch in (False, True):
        with on_disk([SHARD, wrong], piece=5) as files, ranks(files, 1, prefetch=prefetch, vocab_size=B + 1) as (one,):
            with pytest.raises(ShardError) as caught:  # the first shard is handed out whole
                for _ in range(100):
                    one.next_step(StepRequest(8 * 16, 12))
            taken = one.state_dict()["steps"]
            assert str(caught.value).startswith(f"{files[1]}: token 7 (from 0) is 77, the vocabulary is 0..{B} (model.")
            with pytest.raises(ShardError, match="token 7 "):  # again, and not what lies after it
                one.next_step(StepRequest(8 * 16, 12))
        with on_disk([SHARD], piece=5) as files, ranks(files, 1, vocab_size=B + 1) as (good,):
            for _ in range(taken):
                good.next_step(StepRequest(8 * 16, 12))


@pytest.mark.parametrize("without", [[3] * 40, []])
def test_a_shard_without_a_document_is_an_error_where_it_is_reached(without: list[int]) -> None:
    """And not passed over: a run on fewer tokens than its shards promise would not be seen."""
    for prefetch in (False, True):
        with on_disk([SHARD, without, SHARD]) as files, ranks(files, 1, prefetch=prefetch) as (one,):
            one.next_step(StepRequest(8 * 16, 12))
            for _ in range(2):
                with pytest.raises(ShardError) as caught:
                    for _ in range(10):
                        one.next_step(StepRequest(8 * 16, 12))
                assert str(caught.value).startswith(f"{files[1]}: has no token {B}, which begins each document")
            assert one.state_dict()["steps"] == len(list(slow_steps([SHARD], [(16, 12)] * 10)))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_used_up_data_say_how_much_there_was_and_what_to_do() -> None:
    with on_disk([SHARD, SHARD]) as files, ranks(files, 1, run_tokens=900) as (loader,):
        with pytest.raises(InputError) as caught:
            for _ in range(20):
                loader.next_step(StepRequest(8 * 16, 30))
        message = str(caught.value)
        state = loader.state_dict()
    assert (state["steps"], state["tokens"]) == (4, 512)
    for part in (
        "2 shards",
        "930 tokens",
        "4 steps",
        "512 tokens",
        "128 more",
        "900",
        "--chunks",
        "prep-text",
        "epochs",
    ):
        assert part in message, message


def test_a_step_larger_than_every_shard() -> None:
    with on_disk([SHARD, SHARD[:40]]) as files, ranks(files, 1, epochs=None) as (loader,):
        with pytest.raises(InputError, match=r"none of them fills one step of 4,096 tokens.*the largest has 465"):
            loader.next_step(StepRequest(8 * 512, 30))
        assert len(loader.next_step(StepRequest(8 * 16, 30))) == 8  # a smaller one still works


def test_too_few_tokens_for_the_run_are_refused_before_it() -> None:
    with on_disk([SHARD]) as files:
        with pytest.raises(InputError, match=r"465 tokens; the run takes 1,000\..*--chunks"):
            TrainBatches(files, slots=8, bos=B, run_tokens=1000)
        TrainBatches(files, slots=8, bos=B, run_tokens=1000, epochs=3).close()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("world_size", [1, 8])
def test_too_many_documents_for_cu_seqlens(prefetch: bool, world_size: int) -> None:
    fitting = [B] * 126 + [B] + [1] * 400  # 127 documents: as many as fit
    with on_disk([(fitting * 9)]) as files, ranks(files, world_size, prefetch=prefetch) as loaders:
        (step,) = run_ranks(loaders, [(500, 500)])
        assert all(cu == [*range(127), 500] for _, _, cu in step)
    # A 128th that is a target only takes no room, a 128th with an input does.
    with on_disk([([*fitting[:300], B] * 9)]) as files, ranks(files, world_size, prefetch=prefetch) as loaders:
        (step,) = run_ranks(loaders, [(300, 500)])
        assert all(cu == [*range(127), 300] and targets[-1] == B for _, targets, cu in step)
    bad = fitting * 5 + [B] * 127 + [B, *([1] * 400)]
    with on_disk([bad + fitting * 3]) as files, ranks(files, world_size, prefetch=prefetch) as loaders:
        for loader in loaders:  # every rank says so, whosever slot it is
            with pytest.raises(InputError, match=rf"{train_name(1)}.*slot 5.*128 documents.*500 tokens.*room for 127"):
                loader.next_step(StepRequest(8 * 500, 500))


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_stage_may_set_the_room_for_documents(prefetch: bool) -> None:
    with on_disk([[B, 1, 2, 3] * 300]) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        for room in (5, 9, None):
            batches = loader.next_step(StepRequest(8 * 16, 30, room))
            length = 128 if room is None else room + 1
            assert [len(batch.cu_seqlens) for batch in batches] == [length] * 8
            assert all(batch.cu_seqlens[:5].tolist() == [0, 4, 8, 12, 16] for batch in batches)
            assert all((batch.cu_seqlens[5:] == 16).all() for batch in batches)
        with pytest.raises(InputError, match=r"takes 4 documents for its 16 tokens; cu_seqlens has room for 3.*raise"):
            loader.next_step(StepRequest(8 * 16, 30, 3))


def with_segments(bounds: list[int], tokens: int, longest: int, length: int) -> list[int]:
    """`cu_seqlens` with ends every `longest` tokens inside its documents."""
    found = [0]
    for first, last in pairwise(bounds):
        found += [*range(first + longest, last, longest)] + [last] * (last > first)
    return found + [tokens] * (length - len(found))


@quick
@given(shard_lists, request_lists, world_sizes, st.sampled_from([1, 2, 3, 7, 100]), st.sampled_from([None, 40]))
def test_segments_end_every_so_many_tokens_inside_a_document(
    shards: list[list[int]], requests: list[Request], world_size: int, longest: int, room: int | None
) -> None:
    length = 128 if room is None else 41
    with on_disk(shards) as files, ranks(files, world_size) as loaders:
        for (tokens, maximum), expected in zip(requests, slow_steps(shards, requests), strict=False):
            request = StepRequest(8 * tokens, maximum, room, max_segment_tokens=longest)
            parts = [loader.next_step(request) for loader in loaders]
            assert all(batch.max_seqlen == min(longest, maximum) for part in parts for batch in part)
            step = [as_lists(part[i]) for i in range(8 // world_size) for part in parts]
            assert step == [(a, b, with_segments(cu, tokens, longest, length)) for a, b, cu in expected]


def test_segments_by_hand() -> None:
    def ends(lengths: list[int], tokens: int, longest: int | None) -> list[int]:
        return segment_ends(np.cumsum(lengths), tokens, longest).tolist()

    assert ends([5, 10, 3], 17, 4) == [4, 5, 9, 13, 15, 18]
    assert ends([5, 10, 3], 17, None) == [5, 15, 18]
    assert ends([5, 10, 3], 17, 5) == [5, 10, 15, 18]
    assert ends([5, 10, 1], 15, 5) == [5, 10, 15]  # the last token is a target only
    assert ends([5, 11], 15, 5) == [5, 10, 15]  # in a segment of its own, too
    assert ends([3072, 2561, 2560, 2048], 10_240, 2560) == [2560, 3072, 5632, 5633, 8193, 10_241]


@pytest.mark.parametrize("prefetch", [True, False])
def test_too_many_segments_for_cu_seqlens(prefetch: bool) -> None:
    with on_disk([[B, *[1] * 15, B] * 30]) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        assert len(loader.next_step(StepRequest(8 * 16, 30, 5, max_segment_tokens=4))) == 8
        message = r"slot 0 of a step takes 6 segments of up to 3 tokens of documents for its 16 tokens.*room for 5"
        with pytest.raises(InputError, match=message):
            loader.next_step(StepRequest(8 * 16, 30, 5, max_segment_tokens=3))


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_shard_cut_short_during_the_run_is_named_when_its_turn_comes(prefetch: bool) -> None:
    shards = [SHARD, SHARD]
    with on_disk(shards) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        with files[1].open("r+b") as file:
            file.truncate(1024 + 2 * 30)
        expected = list(slow_steps(shards[:1], [(16, 12)] * 9))
        assert [[as_lists(b) for b in loader.next_step(StepRequest(8 * 16, 12))] for _ in expected] == expected
        for _ in range(2):  # and again, should somebody go on
            with pytest.raises(ShardError, match=rf"{train_name(2)}: ends after 30 tokens.*promised 465"):
                loader.next_step(StepRequest(8 * 16, 12))


def test_a_shard_that_vanishes_is_named() -> None:
    with on_disk([SHARD]) as files, ranks(files, 1) as (loader,):
        files[0].unlink()
        with pytest.raises(ShardError, match=rf"{train_name(1)}: cannot be read: No such file"):
            loader.next_step(StepRequest(8 * 16, 12))


def test_wrong_arguments(tmp_path: Path) -> None:
    with on_disk([SHARD]) as files:
        with pytest.raises(InputError, match="no shards found; run prep-fineweb"):
            TrainBatches([], slots=8, bos=B)
        with pytest.raises(ShardError, match="cannot be read"):
            TrainBatches([tmp_path / "absent.bin"], slots=8, bos=B)
        with pytest.raises(InputError, match=r"world size: 3, must divide the 8 slots"):
            TrainBatches(files, slots=8, bos=B, world_size=3)
        with pytest.raises(InputError, match=r"rank: 2, must lie in 0\.\.1"):
            TrainBatches(files, slots=8, bos=B, world_size=2, rank=2)
        with pytest.raises(InputError, match="epochs: 0"):
            TrainBatches(files, slots=8, bos=B, epochs=0)
        with TrainBatches(files, slots=8, bos=B) as loader:
            with pytest.raises(InputError, match=r"batch_tokens: 100, must be a positive multiple of the 8 slots"):
                loader.next_step(StepRequest(100, 12))
            with pytest.raises(InputError, match="maximum document or segment length: 0"):
                loader.next_step(StepRequest(128, 0))
        with pytest.raises(RuntimeError, match="after close"):
            loader.next_step(StepRequest(128, 12))
        loader.close()


def test_files_are_taken_in_sorted_order() -> None:
    shards = [SHARD, SHARD[100:], SHARD[200:]]
    with on_disk(shards) as files, ranks(files[::-1], 1) as loaders:
        assert run_ranks(loaders, [(4, 12)] * 20) == list(slow_steps(shards, [(4, 12)] * 20))


def test_a_position_in_other_data_is_refused() -> None:
    with on_disk([SHARD, SHARD]) as files, ranks(files, 1) as (loader,):
        for _ in range(4):
            loader.next_step(StepRequest(8 * 16, 30))
        state = loader.state_dict()
        assert state["shard"] == 1
        with ranks(files[:1], 1) as (other,), pytest.raises(InputError, match=r"shard 1 .*000002.*1 shard in"):
            other.load_state_dict(state)
        with pytest.raises(InputError, match="not from TrainBatches"):
            loader.load_state_dict({"shard": 0})
        loader.load_state_dict({**state, "document": 31})
        with pytest.raises(
            InputError, match=r"000002.bin: the saved data position is document 31, but the shard has 30"
        ):
            loader.next_step(StepRequest(8 * 16, 30))


# -- threads ---------------------------------------------------------------------------------------------------------


def test_close_ends_the_threads() -> None:
    before = set(threading.enumerate())
    with on_disk([SHARD, SHARD]) as files, TrainBatches(files, slots=8, bos=B) as loader:
        loader.next_step(StepRequest(8 * 4, 6))
        assert set(threading.enumerate()) > before
        loader.close()
        assert set(threading.enumerate()) == before


def test_a_program_that_never_closes_ends(tmp_path: Path) -> None:
    write_shards(tmp_path, [SHARD * 1000, SHARD * 1000])
    program = f"""
        import nanogpt.data.documents_index as index
        from pathlib import Path
        from nanogpt.data.training_batches import StepRequest, TrainBatches
        index.PIECE_TOKENS = 1000
        batches = TrainBatches(list(Path({str(tmp_path)!r}).iterdir()), slots=8, bos={B})
        print(len(batches.next_step(StepRequest(8 * 4, 6))), flush=True)
        raise SystemExit(3)
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, "8", "")


# -- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what a step costs on a shard of 20 M tokens with the lengths of web text; run with -m slow."""
    count, bos = 20_000_000, 50256
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, bos, count, dtype=np.uint16)
    starts = np.cumsum(np.maximum(2, rng.lognormal(np.log(400), 1.05, count // 300).astype(np.int64)))
    tokens[np.append(0, starts[starts < count])] = bos
    path = tmp_path / train_name(1)
    path.write_bytes(header_bytes(count) + tokens.tobytes())
    lines = [f"mean document {np.diff(starts).mean():.0f} tokens"]
    for world_size in (1, 8):
        for batch_tokens in (131_072, 262_144, 393_216):
            steps = 12_000_000 // batch_tokens
            with TrainBatches([path], slots=8, bos=bos, world_size=world_size, prefetch=False) as loader:
                times = []
                for _ in range(steps):
                    began = time.thread_time()
                    loader.next_step(StepRequest(batch_tokens, 2048))
                    times.append(1e3 * (time.thread_time() - began))
            with TrainBatches([path], slots=8, bos=bos, world_size=world_size) as loader:
                loader.next_step(StepRequest(batch_tokens, 2048))
                opened = 1e3 * loader.wait_seconds
                for _ in range(steps):
                    time.sleep(0.01)  # the device computes
                    loader.next_step(StepRequest(batch_tokens, 2048))
                waited = (1e3 * loader.wait_seconds - opened) / steps
            lines.append(
                f"world size {world_size}, {batch_tokens:,} tokens: built in {np.median(times):.2f} ms (median), "
                f"{np.mean(times):.2f} ms (mean, reading included); prefetched: {opened:.1f} ms waited for the first, "
                f"{waited:.2f} ms for each of the others"
            )
    with capsys.disabled():
        print("", *lines, sep="\n")
