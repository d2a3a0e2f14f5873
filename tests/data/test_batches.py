"""The batch loaders against a slow formulation in plain lists, written from the rules alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data import documents_index
from nanogpt.data.batches import MicroBatch, TrainBatches, ValBatches, cu_seqlens_length
from nanogpt.data.documents_index import ShardDocuments
from nanogpt.data.shards import ShardError, header_bytes, train_name, val_name
from nanogpt.errors import InputError

B = 9  # BOS of the small examples; their other tokens are 0..8
Slot = tuple[list[int], list[int], list[int]]  # inputs, targets, cu_seqlens
Request = tuple[int, int]  # tokens of a slot, maximum document length


# -- the rules, slowly -----------------------------------------------------------------------------------------------


def split_documents(shard: list[int]) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in shard:
        if token == B:
            documents.append([token])
        elif documents:
            documents[-1].append(token)
    return documents


def padded(boundaries: list[int], tokens: int) -> list[int]:
    length = 128
    while length < tokens // 300:
        length += 128
    return boundaries + [tokens] * (length - len(boundaries))


def slow_steps(shards: list[list[int]], requests: list[Request], slots: int = 8) -> Iterator[list[Slot]]:
    """The steps, ending early where the data do."""
    left = [split_documents(shard) for shard in shards]
    for tokens, maximum in requests:
        while left:
            queue = list(left[0])
            step: list[Slot] = []
            while len(step) < slots:
                stream: list[int] = []
                boundaries = [0]
                while queue and len(stream) < tokens + 1:
                    for token in queue.pop(0)[:maximum]:
                        if len(stream) < tokens + 1:
                            stream.append(token)
                    boundaries.append(min(len(stream), tokens))
                if len(stream) < tokens + 1:
                    break
                step.append((stream[:-1], stream[1:], padded(boundaries, tokens)))
            if len(step) == slots:
                left[0] = queue
                yield step
                break
            left.pop(0)
        else:
            return


# -- help ------------------------------------------------------------------------------------------------------------


def as_lists(batch: MicroBatch) -> Slot:
    return batch.inputs.tolist(), batch.targets.tolist(), batch.cu_seqlens.tolist()


def write_shards(folder: Path, shards: list[list[int]], name: Any = train_name) -> list[Path]:
    paths = [folder / name(index) for index in range(1, len(shards) + 1)]
    for path, tokens in zip(paths, shards, strict=True):
        path.write_bytes(header_bytes(len(tokens)) + np.array(tokens, dtype="<u2").tobytes())
    return paths


@contextmanager
def on_disk(shards: list[list[int]], piece: int = 7, window: int = 2) -> Iterator[list[Path]]:
    """The shards as files, read in pieces of a few tokens and dealt from windows of a few documents."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(documents_index, "PIECE_TOKENS", piece),
        mock.patch.object(documents_index, "_FIRST_WINDOW", window),
    ):
        yield write_shards(Path(folder), shards)


def run_ranks(loaders: list[TrainBatches], requests: list[Request], slots: int = 8) -> list[list[Slot]]:
    """The steps' slots in order, put together from all ranks, until the data end."""
    steps: list[list[Slot]] = []
    for tokens, maximum in requests:
        try:
            parts = [loader.next_step(slots * tokens, maximum) for loader in loaders]
        except InputError as error:
            assert "used up" in str(error) or "none of them fills" in str(error)
            for loader in loaders:
                with pytest.raises(InputError):
                    loader.next_step(slots * tokens, maximum)
            break
        assert all(batch.max_seqlen == maximum for part in parts for batch in part)
        steps.append([as_lists(part[i]) for i in range(slots // len(loaders)) for part in parts])
    return steps


@contextmanager
def ranks(files: list[Path], world_size: int, **options: Any) -> Iterator[list[TrainBatches]]:
    loaders = [TrainBatches(files, rank=r, world_size=world_size, slots=8, bos=B, **options) for r in range(world_size)]
    try:
        yield loaders
    finally:
        for loader in loaders:
            loader.close()


@st.composite
def a_shard(draw: st.DrawFn) -> list[int]:
    """One to some hundred documents; none, a few or many of them longer than the maxima asked for below."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tokens = rng.integers(0, B, draw(st.integers(0, 3))).tolist()  # before the first BOS
    longest = draw(st.sampled_from([1, 2, 8, 30]))
    for length in rng.integers(1, longest + 1, draw(st.integers(1, 1500 // longest))).tolist():
        tokens += [B, *rng.integers(0, B, length - 1).tolist()]
    return tokens


shard_lists = st.lists(a_shard(), min_size=1, max_size=4)
request_lists = st.lists(
    st.tuples(st.sampled_from([1, 4, 5, 16]), st.sampled_from([1, 2, 5, 12, 40]), st.integers(1, 5)),
    min_size=1,
    max_size=4,
).map(lambda stages: [(tokens, maximum) for tokens, maximum, steps in stages for _ in range(steps)])
world_sizes = st.sampled_from([1, 2, 4, 8])
quick = settings(max_examples=60, deadline=None)


# -- training --------------------------------------------------------------------------------------------------------


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


SHARD = [token for length in range(1, 31) for token in [B, *([length % B] * (length - 1))]]  # 465 tokens


def test_shapes_dtypes_and_cu_seqlens() -> None:
    with on_disk([SHARD]) as files, ranks(files, 4) as loaders:
        for loader in loaders:
            batches = loader.next_step(8 * 16, 12)
            assert len(batches) == 2
            for batch in batches:
                assert batch.inputs.shape == batch.targets.shape == (16,)
                assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int32, torch.int64)
                assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
                cu = batch.cu_seqlens
                assert (cu.dtype, cu.shape) == (torch.int32, (128,))
                assert (cu[0], cu[-1]) == (0, 16)
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
        held = [loader.next_step(8 * 4, 6) for _ in range(4)]
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
            loader.next_step(8 * tokens, maximum)
    assert set(built_in) == {"next-step"}
    assert 5 <= len(built_in) <= 7  # three were guessed right; the wrong guess and the last may not have started


def test_the_background_reads_the_rest_of_the_shard_and_the_next_one() -> None:
    with on_disk([SHARD, SHARD, SHARD]) as files, ranks(files, 1) as (loader,):
        loader.next_step(8 * 4, 6)
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
                    one.next_step(8 * 16, 12)
            taken = one.state_dict()["steps"]
            assert str(caught.value).startswith(f"{files[1]}: token 7 (from 0) is 77, the vocabulary is 0..{B} (model.")
            with pytest.raises(ShardError, match="token 7 "):  # again, and not what lies after it
                one.next_step(8 * 16, 12)
        with on_disk([SHARD], piece=5) as files, ranks(files, 1, vocab_size=B + 1) as (good,):
            for _ in range(taken):
                good.next_step(8 * 16, 12)


@pytest.mark.parametrize("without", [[3] * 40, []])
def test_a_shard_without_a_document_is_an_error_where_it_is_reached(without: list[int]) -> None:
    """And not passed over: a run on fewer tokens than its shards promise would not be seen."""
    for prefetch in (False, True):
        with on_disk([SHARD, without, SHARD]) as files, ranks(files, 1, prefetch=prefetch) as (one,):
            one.next_step(8 * 16, 12)
            for _ in range(2):
                with pytest.raises(ShardError) as caught:
                    for _ in range(10):
                        one.next_step(8 * 16, 12)
                assert str(caught.value).startswith(f"{files[1]}: has no token {B}, with which each document begins")
            assert one.state_dict()["steps"] == len(list(slow_steps([SHARD], [(16, 12)] * 10)))


def test_validation_tokens_are_checked_as_far_as_they_are_evaluated() -> None:
    stream = np.full(2000, 3)
    stream[::50] = B
    stream[1000] = B + 1
    sizes: dict[str, Any] = {"micro_batch_tokens": 64, "slots": 8, "bos": B, "vocab_size": B + 1}
    with on_disk([stream[:900].tolist(), stream[900:].tolist()]) as files:
        assert len(ValBatches(files, tokens=512, **sizes)) == 8
        with pytest.raises(ShardError) as caught:
            ValBatches(files, tokens=1024, **sizes)
        assert str(caught.value).startswith(
            f"{files[1]}: token 100 (from 0) is {B + 1}, the vocabulary is 0..{B} (model."
        )


# -- training: what goes wrong ---------------------------------------------------------------------------------------


def test_used_up_data_say_how_much_there_was_and_what_to_do() -> None:
    with on_disk([SHARD, SHARD]) as files, ranks(files, 1, run_tokens=900) as (loader,):
        with pytest.raises(InputError) as caught:
            for _ in range(20):
                loader.next_step(8 * 16, 30)
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
            loader.next_step(8 * 512, 30)
        assert len(loader.next_step(8 * 16, 30)) == 8  # a smaller one still works


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
                loader.next_step(8 * 500, 500)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_stage_may_set_the_room_for_documents(prefetch: bool) -> None:
    with on_disk([[B, 1, 2, 3] * 300]) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        for room in (5, 9, None):
            batches = loader.next_step(8 * 16, 30, room)
            length = 128 if room is None else room + 1
            assert [len(batch.cu_seqlens) for batch in batches] == [length] * 8
            assert all(batch.cu_seqlens[:5].tolist() == [0, 4, 8, 12, 16] for batch in batches)
            assert all((batch.cu_seqlens[5:] == 16).all() for batch in batches)
        with pytest.raises(InputError, match=r"takes 4 documents for its 16 tokens; cu_seqlens has room for 3.*raise"):
            loader.next_step(8 * 16, 30, 3)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_shard_cut_short_during_the_run_is_named_when_its_turn_comes(prefetch: bool) -> None:
    shards = [SHARD, SHARD]
    with on_disk(shards) as files, ranks(files, 1, prefetch=prefetch) as (loader,):
        with files[1].open("r+b") as file:
            file.truncate(1024 + 2 * 30)
        expected = list(slow_steps(shards[:1], [(16, 12)] * 9))
        assert [[as_lists(b) for b in loader.next_step(8 * 16, 12)] for _ in expected] == expected
        for _ in range(2):  # and again, should somebody go on
            with pytest.raises(ShardError, match=rf"{train_name(2)}: ends after 30 tokens.*promised 465"):
                loader.next_step(8 * 16, 12)


def test_a_shard_that_vanishes_is_named() -> None:
    with on_disk([SHARD]) as files, ranks(files, 1) as (loader,):
        files[0].unlink()
        with pytest.raises(ShardError, match=rf"{train_name(1)}: cannot be read: No such file"):
            loader.next_step(8 * 16, 12)


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
                loader.next_step(100, 12)
            with pytest.raises(InputError, match="maximum document length: 0"):
                loader.next_step(128, 0)
        with pytest.raises(RuntimeError, match="after close"):
            loader.next_step(128, 12)
        loader.close()


def test_files_are_taken_in_sorted_order() -> None:
    shards = [SHARD, SHARD[100:], SHARD[200:]]
    with on_disk(shards) as files, ranks(files[::-1], 1) as loaders:
        assert run_ranks(loaders, [(4, 12)] * 20) == list(slow_steps(shards, [(4, 12)] * 20))


def test_a_position_in_other_data_is_refused() -> None:
    with on_disk([SHARD, SHARD]) as files, ranks(files, 1) as (loader,):
        for _ in range(4):
            loader.next_step(8 * 16, 30)
        state = loader.state_dict()
        assert state["shard"] == 1
        with ranks(files[:1], 1) as (other,), pytest.raises(InputError, match=r"shard 1 .*000002.*1 shard in"):
            other.load_state_dict(state)
        with pytest.raises(InputError, match="not one of TrainBatches"):
            loader.load_state_dict({"shard": 0})
        loader.load_state_dict({**state, "document": 31})
        with pytest.raises(InputError, match=r"000002.bin: the saved data position is document 31, the shard has 30"):
            loader.next_step(8 * 16, 30)


# -- training: threads -----------------------------------------------------------------------------------------------


def test_close_ends_the_threads() -> None:
    before = set(threading.enumerate())
    with on_disk([SHARD, SHARD]) as files, TrainBatches(files, slots=8, bos=B) as loader:
        loader.next_step(8 * 4, 6)
        assert set(threading.enumerate()) > before
        loader.close()
        assert set(threading.enumerate()) == before


def test_a_program_that_never_closes_ends(tmp_path: Path) -> None:
    write_shards(tmp_path, [SHARD * 1000, SHARD * 1000])
    program = f"""
        import nanogpt.data.documents_index as index
        from pathlib import Path
        from nanogpt.data.batches import TrainBatches
        index.PIECE_TOKENS = 1000
        batches = TrainBatches(list(Path({str(tmp_path)!r}).iterdir()), slots=8, bos={B})
        print(len(batches.next_step(8 * 4, 6)), flush=True)
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


# -- validation ------------------------------------------------------------------------------------------------------


def slow_pieces(stream: list[int], tokens: int, size: int) -> list[Slot]:
    pieces = []
    for first in range(0, tokens, size):
        piece = stream[first : first + size + 1]
        boundaries = [0] + [i for i in range(1, size) if piece[i] == B] + [size]
        pieces.append((piece[:-1], piece[1:], padded(boundaries, size)))
    return pieces


@quick
@given(shard_lists, world_sizes, st.sampled_from([1, 4, 16]), st.integers(1, 3))
def test_validation_is_the_contiguous_stream(shards: list[list[int]], world_size: int, size: int, groups: int) -> None:
    stream = [token for shard in shards for token in shard]
    tokens = groups * 8 * size
    with on_disk(shards) as files:

        def loader(rank: int) -> ValBatches:
            return ValBatches(
                files, tokens=tokens, micro_batch_tokens=size, rank=rank, world_size=world_size, slots=8, bos=B
            )

        if len(stream) < tokens + 1:
            with pytest.raises(InputError, match=rf"of {len(stream)} tokens, {tokens + 1} are needed"):
                loader(0)
            return
        loaders = [loader(rank) for rank in range(world_size)]
        assert all(len(one) == groups * 8 // world_size for one in loaders)
        for _ in range(2):
            parts = [list(one) for one in loaders]
            assert all(batch.max_seqlen == size for part in parts for batch in part)
            assert [as_lists(part[i]) for i in range(len(parts[0])) for part in parts] == slow_pieces(
                stream, tokens, size
            )


def test_validation_documents_are_not_cut_and_have_the_right_types(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [[1, 2, B, *([3] * 4000)], [4, B, *([5] * 4500)]], val_name)
    batches = list(ValBatches(files, tokens=8192, micro_batch_tokens=1024, slots=8, bos=B))
    assert [batch.cu_seqlens.unique().tolist() for batch in batches] == [
        [0, 2, 1024], [0, 1024], [0, 1024], [0, 4003 + 1 - 3 * 1024, 1024], *[[0, 1024]] * 4
    ]  # fmt: skip
    for batch in batches:
        assert (batch.inputs.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (
            torch.int32,
            torch.int64,
            torch.int32,
        )


def test_wrong_validation_data(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [[B] * 2049], val_name)
    with pytest.raises(InputError, match=r"1,000 tokens, must be a positive multiple of 8 slots of 64 tokens \(512\)"):
        ValBatches(files, tokens=1000, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match=r"of 2,049 tokens, 2,561 are needed.*--val-tokens"):
        ValBatches(files, tokens=2560, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match=r"tokens 0 to 256 hold 256 documents; cu_seqlens has room for 127"):
        ValBatches(files, tokens=2048, micro_batch_tokens=256, slots=8, bos=B)
    assert len(ValBatches(files, tokens=1016, micro_batch_tokens=127, slots=8, bos=B)) == 8
    with pytest.raises(InputError, match="validation data: no shards found"):
        ValBatches([], tokens=512, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match="world size: 5"):
        ValBatches(files, tokens=512, micro_batch_tokens=64, slots=8, bos=B, world_size=5)


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
                    loader.next_step(batch_tokens, 2048)
                    times.append(1e3 * (time.thread_time() - began))
            with TrainBatches([path], slots=8, bos=bos, world_size=world_size) as loader:
                loader.next_step(batch_tokens, 2048)
                opened = 1e3 * loader.wait_seconds
                for _ in range(steps):
                    time.sleep(0.01)  # the device computes
                    loader.next_step(batch_tokens, 2048)
                waited = (1e3 * loader.wait_seconds - opened) / steps
            lines.append(
                f"world size {world_size}, {batch_tokens:,} tokens: built in {np.median(times):.2f} ms (median), "
                f"{np.mean(times):.2f} ms (mean, reading included); prefetched: {opened:.1f} ms waited for the first, "
                f"{waited:.2f} ms for each of the others"
            )
    with capsys.disabled():
        print("", *lines, sep="\n")
