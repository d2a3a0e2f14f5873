"""The batches of a run's steps: micro-batches that begin with a document.

- A step is `slots` equal slots of the token stream for any world size; rank r's micro-step i is slot
  `i * world_size + r`. Every rank decides alike where the whole step lies in the shards, so runs on
  1, 2, 4 and 8 GPUs see the same tokens.
- While the GPU computes, one background thread builds the next steps, and another reads the next shard.
- What was read is also hashed in the background, from memory: a run can say what it was trained on.
- The position in the data can be saved and resumed at any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nanogpt.background import GivenUp, Worker, wait_for
from nanogpt.data.documents_index import ShardDocuments, StepPlan
from nanogpt.data.micro_batches import Copier, Extras, HostStep, MicroBatch, check_ranks, cu_seqlens_length, no_extras
from nanogpt.data.shards import number_of_shards, read_count, sorted_shards
from nanogpt.errors import InputError, RunError
from nanogpt.models.model_spec import PulledTableSpec, Slot, SlotExtras
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim.pull_lists import PullLists, Share, StepReader, StepReads

T = TypeVar("T")
_CLOSING_S = 3.0
_MORE_DATA = "Get more shards (prep-fineweb --chunks N) or prepare more text (prep-text)"


class StepRequest(NamedTuple):
    """What a step consists of, according to the schedule."""

    batch_tokens: int  # of all slots
    max_document_tokens: int  # where documents are cut
    max_documents: int | None = None  # room for segments, see `cu_seqlens_length`; None: from a micro-batch's tokens
    loss: StageLoss | None = None  # passed to the extras
    max_segment_tokens: int | None = None  # of a document's segments, except the last; None: it is one segment

    @property
    def max_seqlen(self) -> int:
        """No segment is longer."""
        return min(self.max_document_tokens, self.max_segment_tokens or self.max_document_tokens)


def segment_ends(ends: npt.NDArray[np.int64], tokens: int, longest: int | None) -> npt.NDArray[np.int64]:
    """Ends of a micro-batch's segments: those of its documents and, in each, one every `longest` tokens.

    ends: (documents,) int64, running. The last segment returned is the first that reaches `tokens`: a document beyond
    them, whose first token is a target, has none.
    """
    if longest is not None:
        starts = np.append(0, ends[:-1])
        counts = -(-(ends - starts) // longest)
        number = np.arange(1, counts.sum() + 1) - np.repeat(np.cumsum(counts) - counts, counts)  # in its document
        ends = np.minimum(np.repeat(starts, counts) + longest * number, np.repeat(ends, counts))
    return ends[: int(np.searchsorted(ends, tokens)) + 1]


class _Position(NamedTuple):
    epoch: int
    shard: int
    document: int  # the next one, 0-based, in the shard
    steps: int  # used since the start of the stream
    tokens: int  # used since the start of the stream
    states: list[Any] | None = None  # of the slots' extras, in order; None if there are none


_START = _Position(0, 0, 0, 0, 0)


class _Step(NamedTuple):
    host: HostStep
    after: _Position
    extras: dict[str, list[npt.NDArray[Any]]]  # the kept ones
    reads: dict[str, StepReads]  # by table


class TrainBatches:
    """Training micro-batches of one rank, from shards in sorted order; a context manager.

    Args:
        files: The training shards, the same on every rank.
        slots: Micro-batches in a step over all ranks.
        rank: This process's rank.
        world_size: Number of ranks; divides `slots`.
        bos: The token that starts every document.
        vocab_size: Tokens from this one on are refused when read.
        device: Where micro-batches go. On CUDA they are copied from pinned memory on a separate stream, which
            the current stream waits for; the host never waits.
        prefetch: Build the next step and read the next shard in background threads. Batches are the same
            without.
        epochs: Passes over the files; None repeats forever. The speedrun makes at most one pass.
        run_tokens: Tokens that the whole run needs, if known: a smaller data set is refused at once.
        hashed: Hash each shard in the background once it is read, for `sha256`.
        extras: Called for this rank's slots while a step is built, or for all slots, on every rank alike, if it returns
            states, which are part of the position in the data, or if other ranks pull from this one's tables.
        kept_extras: Names of extras that are also kept on the host, for all ranks' slots in order, in `step_extras`,
            for the most recent step.
        tables: For `look_ahead`, by name: their extras have the rows that a slot's tokens read.
        asked: Says why the run should stop, if so: then nobody waits forever for an unresponsive file system.

    Only the files' headers are read here, and nothing in `restart`: the first `next_step` opens the first shard, so
    that a clock started before it covers the opening. All methods belong to one thread.

    Raises:
        ShardError: a file is missing or not a shard.
        InputError: no files, slots not divisible among the ranks, or too few tokens for `run_tokens`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        slots: int,
        rank: int = 0,
        world_size: int = 1,
        bos: int,
        vocab_size: int = 1 << 16,
        device: torch.device | str = "cpu",
        prefetch: bool = True,
        epochs: int | None = 1,
        run_tokens: int | None = None,
        hashed: bool = False,
        extras: Extras = no_extras,
        kept_extras: Collection[str] = (),
        tables: Mapping[str, PulledTableSpec] = MappingProxyType({}),
        asked: Callable[[], str | None] = lambda: None,
    ):
        check_ranks(slots, rank, world_size)
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs: {epochs}, must be at least 1, or None to repeat the data forever")
        self._files = sorted_shards(files, "training")
        self._counts = [read_count(path) for path in self._files]
        self._own_slots = range(rank, slots, world_size)
        self._world_size = world_size
        self._slots = slots
        self._bos = bos
        self._vocab_size = vocab_size
        self._epochs = epochs
        self._run_tokens = run_tokens
        if run_tokens is not None and epochs is not None and run_tokens > epochs * sum(self._counts):
            raise InputError(f"training data: {self._inventory()}; the run takes {run_tokens:,}. {_MORE_DATA}")

        self._copier = Copier(torch.device(device))
        self._shards: dict[int, ShardDocuments] = {}
        self._asked = asked
        self._builder = Worker("next-step") if prefetch else None
        self._reader = Worker("next-shard") if prefetch else None
        self._coming: list[tuple[StepRequest, Future[_Step]]] = []  # built or being built, in order
        self._example: tuple[StepRequest, SlotExtras] | None = None
        self._hashed = hashed
        self._to_hash: list[ShardDocuments] = []  # used for steps; the last one is current
        self._hashes: dict[str, list[str]] = {}
        self._closed = False
        self._position = _START
        self._extras = extras
        self._kept_extras = kept_extras
        self._tables = tables
        self._shares = {name: Share(table.rows, rank, world_size) for name, table in tables.items()}
        self._gathered: tuple[list[Future[_Step]], Future[dict[str, PullLists]]] | None = None  # of which steps
        self.step_extras: dict[str, list[npt.NDArray[Any]]] = {}
        self.wait_seconds = 0.0  # spent in the step methods since the start or the last `restart`

    def next_step(self, request: StepRequest) -> list[MicroBatch]:
        """This rank's `slots / world_size` micro-batches of the next step, each of `batch_tokens / slots` tokens.

        Steps requested with `build_ahead` are built, or being built; without it, a call that repeats the last request
        finds its step built. For a different request the step is built now, from the same document.

        Raises:
            InputError: the data are used up, a slot has more segments than `cu_seqlens` has room for, or the
                request does not fit the slots.
            ShardError: a shard cannot be read, has a token outside the vocabulary, or no BOS.
            RunError: the run should stop, and the step has not arrived for `nanogpt.background.GRACE_S` since.
        """
        began = time.perf_counter()
        self._ask_for([request])
        try:
            step = self._wait(self._coming[0][1])
        except BaseException:
            for _, future in self._coming:  # they continue from this one; nobody waits for one that hangs
                future.cancel()
            self._coming.clear()
            raise
        del self._coming[0]
        self._position = step.after
        self.step_extras = step.extras
        batches = self._copier.hand_out(step.host, request.max_seqlen)
        if self._builder is not None and not self._coming:
            self._submit(request)
        self.wait_seconds += time.perf_counter() - began
        return batches

    def build_ahead(self, requests: Sequence[StepRequest]) -> None:
        """Build the coming steps, those of `requests`: in the background, or at once without one.

        Steps already built that fit are kept, as are further ones. Errors are raised by the `next_step` that
        reaches them.

        Raises InputError if a request does not fit the slots.
        """
        began = time.perf_counter()
        self._ask_for(requests)
        self.wait_seconds += time.perf_counter() - began

    def look_ahead(self, requests: Sequence[StepRequest]) -> dict[str, PullLists]:
        """`build_ahead`, and by table what those steps read. Waits for them, and raises what `next_step` would."""
        began = time.perf_counter()
        lists = self._wait(self._gather(requests, 0))
        self.wait_seconds += time.perf_counter() - began
        return lists

    def gather_ahead(self, requests: Sequence[StepRequest], first: int) -> None:
        """`build_ahead`, and prepare what `look_ahead` will tell about the steps from number `first` of `requests`."""
        began = time.perf_counter()
        self._gather(requests, first)
        self.wait_seconds += time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """The position after the most recent step, including the slots' states; JSON-able, the same on every rank."""
        position = self._position
        return {**position._asdict(), "file": self._files[position.shard].name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, a `state_dict`; the world size may differ.

        Raises:
            InputError: the state names another file, or lacks an entry. A document beyond the shard's end is found
                by the next `next_step`.
        """
        try:
            numbers = {key: int(state[key]) for key in _Position._fields if key != "states"}
            name, states = state["file"], state.get("states")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"saved data position: {state!r} is not from TrainBatches.state_dict") from error
        if states is not None and (not isinstance(states, list) or len(states) != self._slots):
            raise InputError(
                f"saved data position: states {states!r}, expected null or a list of {self._slots}, one per slot"
            )
        position = _Position(**numbers, states=states)
        if min(numbers.values()) < 0 or position.shard >= len(self._files) or self._files[position.shard].name != name:
            raise InputError(
                f"saved data position: shard {position.shard} (from 0) called {name}, document {position.document}; "
                f"here are {self._inventory()}. Resume with the data the run was started with"
            )
        self._forget()
        self._position = position

    def restart(self) -> None:
        """Back to the start of the stream, with nothing read and nothing prefetched; `wait_seconds` is 0 again."""
        self._forget()
        self._position = _START
        self.wait_seconds = 0.0

    def sha256(self) -> dict[str, list[str]]:
        """sha256 of each shard used for steps since the start or the last `restart`, by name.

        From the bytes that were read; more than one if a later pass read different bytes. Finishes reading and hashing:
        call it when time does not matter. Empty without `hashed`. Raises `ShardError` if a shard cannot be read.
        """
        self._drop_from(0)
        for shard in self._to_hash:
            shard.hash()
        self._note_hashes()
        return self._hashes

    def close(self) -> None:
        """End the background threads; one that hangs is abandoned. May be called again; `next_step` may not."""
        if not self._closed:
            self._closed = True
            self._forget()
            for worker in (self._builder, self._reader):
                if worker is not None:
                    worker.close(_CLOSING_S)

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _host_step(self, request: StepRequest) -> HostStep:
        tokens = request.batch_tokens // self._slots
        if self._example is None or self._example[0] != request:
            nothing = np.zeros(tokens, dtype=np.uint16)
            self._example = request, self._extras(Slot(nothing, nothing, request.loss, slots=self._slots))
        bounds = cu_seqlens_length(tokens, request.max_documents)
        return self._copier.host_step(len(self._own_slots), tokens, bounds, self._example[1])

    def _ask_for(self, requests: Sequence[StepRequest]) -> None:
        """Make the coming steps those of `requests`, possibly with more after them."""
        if self._closed:
            raise RuntimeError("TrainBatches was asked for a step after close")
        for request in requests:
            tokens, longest = request.batch_tokens, request.max_seqlen
            if tokens < 1 or tokens % self._slots:
                raise InputError(f"batch_tokens: {tokens}, must be a positive multiple of the {self._slots} slots")
            if longest < 1:
                raise InputError(f"maximum document or segment length: {longest} tokens, must be at least 1")
        for index, ((coming, _), request) in enumerate(zip(self._coming, requests, strict=False)):
            if coming != request:
                self._drop_from(index)
                break
        for request in requests[len(self._coming) :]:
            self._submit(request)

    def _submit(self, request: StepRequest) -> None:
        """Build one more step, after the coming ones."""
        before = self._coming[-1][1] if self._coming else self._position
        # Pinned memory is allocated here: the background threads make no CUDA calls, so they can disturb neither a
        # graph capture nor the choice of device.
        self._coming.append((request, self._have_done(self._build, before, request, self._host_step(request))))

    def _gather(self, requests: Sequence[StepRequest], first: int) -> Future[dict[str, PullLists]]:
        """Ask for `requests`; the lists of those from number `first`."""
        self._ask_for(requests)
        steps = [future for _, future in self._coming[first : len(requests)]]
        if self._gathered is None or self._gathered[0] != steps:
            self._gathered = steps, self._have_done(self._make_lists, steps)
        return self._gathered[1]

    def _have_done(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """By the builder's thread, after what it was given before; without one, at once."""
        if self._builder is not None:
            return self._builder.submit(function, *arguments)
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def _wait(self, future: Future[T]) -> T:
        try:
            return wait_for(future, self._asked)
        except GivenUp as error:
            position = self._position
            raise RunError(
                f"{error}: step {position.steps + 1} waits for tokens of {self._files[position.shard].parent}, which"
                " does not answer. The run ended without a checkpoint of its present state: resume it once the files"
                " are readable"
            ) from None

    # -- building a step: in the builder's thread, or in the caller's where there is none -------------------------

    def _drop_from(self, first: int) -> None:
        """Drop the coming steps from number `first`; none of them is being built afterwards."""
        dropped = [future for _, future in self._coming[first:]]
        del self._coming[first:]
        running = [future for future in reversed(dropped) if not future.cancel()]
        wait(running, _CLOSING_S if self._closed else None)  # errors there do not matter

    def _forget(self) -> None:
        self._drop_from(0)
        self._gathered = None
        for shard in self._shards.values():
            shard.stop()
        self._shards.clear()
        self._to_hash, self._hashes = [], {}

    def _build(self, before: _Position | Future[_Step], request: StepRequest, host: HostStep) -> _Step:
        position = before.result().after if isinstance(before, Future) else before
        following = self._following(position)
        for index in self._shards.keys() - {position.shard, following.shard}:
            self._shards.pop(index).stop()

        position, plan = self._plan(position, request)
        shard = self._shard(position.shard)
        if self._hashed and (not self._to_hash or self._to_hash[-1] is not shard):
            self._note_hashes()
            self._to_hash.append(shard)
        longest = request.max_segment_tokens
        ends = [segment_ends(plan.running_ends(slot), host.tokens, longest) for slot in range(self._slots)]
        self._check_room(shard, position, plan, request, host, ends)
        kept: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._kept_extras}
        readers = {name: StepReader(share) for name, share in self._shares.items()}
        states: list[Any] = [None] * self._slots
        of_all = bool(kept) or host.has_state or position.states is not None or (self._world_size > 1 and bool(readers))
        for slot in range(self._slots) if of_all else self._own_slots:
            piece = plan.gather(shard.tokens, slot)
            state = None if position.states is None else position.states[slot]
            extras, states[slot] = self._extras(Slot(piece[:-1], piece[1:], request.loss, slot, self._slots, state))
            for name, slots in kept.items():
                slots.append(extras[name])
            for name, reader in readers.items():
                for extra in self._tables[name].extras:
                    reader.add(slot % self._world_size, extras[extra].ravel())
            if slot in self._own_slots:
                host.fill(self._own_slots.index(slot), piece, ends[slot], extras)
        if self._reader is not None:
            # Only once the step is built: it needs a piece of the shard, not all of it.
            self._read_ahead(position)
        after = position._replace(
            document=position.document + plan.documents,
            steps=position.steps + 1,
            tokens=position.tokens + request.batch_tokens,
            states=None if all(state is None for state in states) else states,
        )
        return _Step(host, after, kept, {name: reader.reads() for name, reader in readers.items()})

    def _make_lists(self, steps: Sequence[Future[_Step]]) -> dict[str, PullLists]:
        built = [step.result() for step in steps]
        return {name: share.lists([step.reads[name] for step in built]) for name, share in self._shares.items()}

    def _plan(self, position: _Position, request: StepRequest) -> tuple[_Position, StepPlan]:
        """The first position at or after `position` that fills a whole step from one shard, skipping its rest."""
        barren = 0
        tokens, longest = request.batch_tokens // self._slots, request.max_document_tokens
        while not self._is_over(position):
            plan = self._shard(position.shard).plan(
                position.document, slots=self._slots, tokens=tokens, max_document=longest
            )
            if plan is not None:
                return position, plan
            barren = barren + 1 if position.document == 0 else 0
            if barren == len(self._files):
                raise InputError(
                    f"training data: {self._inventory()}, and none of them fills one step of "
                    f"{request.batch_tokens:,} tokens in {self._slots} slots with documents cut at {longest:,} "
                    f"(the largest has {max(self._counts):,}). {_MORE_DATA}, or lower batch_tokens"
                )
            position = self._following(position)
        whole_run = f"; the whole run takes {self._run_tokens:,}" if self._run_tokens is not None else ""
        passes = "" if self._epochs == 1 else f" {self._epochs} times"
        raise InputError(
            f"training data: {self._inventory()}, used up{passes} after {position.steps:,} steps of together "
            f"{position.tokens:,} tokens (what exceeds {longest:,} in a document is not used); the next "
            f"step takes {request.batch_tokens:,} more{whole_run}. {_MORE_DATA}, or allow more epochs"
        )

    def _check_room(
        self,
        shard: ShardDocuments,
        position: _Position,
        plan: StepPlan,
        request: StepRequest,
        host: HostStep,
        ends: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        longest = request.max_segment_tokens
        kind = "documents" if longest is None else f"segments of up to {longest:,} tokens of documents"
        for slot, (first, found) in enumerate(zip(plan.bounds, ends, strict=False)):
            if found.size > host.room:
                raise InputError(
                    f"{shard.path}: from document {position.document + first:,} on, slot {slot} of a step takes "
                    f"{found.size:,} {kind} for its {host.tokens:,} tokens; cu_seqlens has room for {host.room:,}. "
                    "Join short texts into longer documents before prep-text, or lower the stage's batch_tokens, or "
                    "raise its max_documents"
                )

    def _shard(self, index: int) -> ShardDocuments:
        if index not in self._shards:
            self._shards[index] = ShardDocuments(self._files[index], self._counts[index], self._bos, self._vocab_size)
        return self._shards[index]

    def _read_ahead(self, position: _Position) -> None:
        for place in (position, self._following(position)):
            if self._is_over(place):
                continue
            shard = self._shard(place.shard)
            if not shard.read_ahead and self._reader is not None:
                shard.read_ahead = True
                # Errors there occur again, and are raised, when the tokens are needed.
                self._reader.submit(shard.hash if self._hashed else shard.read_all)

    def _note_hashes(self) -> None:
        """Keep the known hashes, and release those shards."""
        for shard in self._to_hash:
            known = self._hashes.setdefault(shard.path.name, [])
            if shard.sha256 is not None and shard.sha256 not in known:
                known.append(shard.sha256)
        self._to_hash = [shard for shard in self._to_hash if shard.sha256 is None]

    def _following(self, position: _Position) -> _Position:
        """The start of the next shard, in the next pass after the last one."""
        shard = position.shard + 1
        if shard == len(self._files):
            return position._replace(epoch=position.epoch + 1, shard=0, document=0)
        return position._replace(shard=shard, document=0)

    def _is_over(self, position: _Position) -> bool:
        return self._epochs is not None and position.epoch >= self._epochs

    def _inventory(self) -> str:
        first, last = self._files[0], self._files[-1]
        names = first.name if first == last else f"{first.name} to {last.name}"
        return f"{number_of_shards(len(self._files))} in {first.parent} ({names}) of {sum(self._counts):,} tokens"
