"""The batches of a run: document-aligned micro-batches for training, a contiguous stream for validation.

Notable features:
- A step is `slots` equal slots of the token stream whatever the world size; rank r's micro-step i is slot
  `i * world_size + r`. Where a step lies in the shards is decided for the whole step, by every rank alike, so runs on
  1, 2, 4 and 8 GPUs see the same tokens.
- The next step is built in a background thread, and the next shard read in another, while the GPU computes.
- Shapes depend on the micro-batch size alone, `cu_seqlens` included, so nothing is compiled twice.
- What was read is hashed in the background as well, from memory: a run can say what it was trained on.
- The position in the data can be saved and resumed at any step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogpt.background import GivenUp, Worker, wait_for
from nanogpt.data.documents_index import ShardDocuments, StepPlan
from nanogpt.data.shards import HEADER_BYTES, ShardError, Tokens, check_tokens, read_count
from nanogpt.errors import InputError, RunError
from nanogpt.files import open_regular

# What a micro-batch brings besides its tokens (T,), by name, T numbers each: computed while it is built.
Extras = Callable[[Tokens], Mapping[str, npt.NDArray[Any]]]


def no_extras(tokens: Tokens) -> Mapping[str, npt.NDArray[Any]]:
    """Nothing but the tokens."""
    return {}


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One slot of a step on one rank: T tokens of consecutive documents as a flat stream."""

    inputs: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64: inputs moved on by one; a document's last target is the next one's BOS
    cu_seqlens: Tensor  # (n,) int32: 0, the documents' running ends, then T repeated; see cu_seqlens_length
    max_seqlen: int  # no document in it is longer: the stage's maximum in training, T in validation
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # (T,) each: what `Extras` gave for the inputs


def cu_seqlens_length(tokens: int, max_documents: int | None = None) -> int:
    """Entries of `cu_seqlens` for a micro-batch of `tokens`: one more than the documents that it has room for.

    Without `max_documents`: floor(tokens / 300), up to a multiple of 128, at least 128.
    """
    return max(128, -(-(tokens // 300) // 128) * 128) if max_documents is None else max_documents + 1


class TrainBatches:
    """Training micro-batches of one rank, from shards in sorted order; a context manager.

    Args:
        files: The training shards; every rank names the same.
        slots: Micro-batches in a step over all ranks.
        rank: This process's rank.
        world_size: Number of ranks; divides `slots`.
        bos: The token that starts every document.
        vocab_size: Tokens from this one on are refused, when they are read.
        device: Where micro-batches go. On CUDA they are copied from pinned memory on a stream of their own, which
            the current stream waits for; the host never waits.
        prefetch: Build the next step and read the next shard in background threads. The batches are the same
            without.
        epochs: Passes over the files; None repeats for ever. The speedrun makes one pass at most.
        run_tokens: Tokens that the whole run will take, if known: a data set that is smaller is refused at once.
        hashed: Hash each shard in the background once it is read, for `sha256`.
        extras: Called with the inputs of every slot, (T,) uint16, while a step is built.
        kept_extras: Names of those that are also kept on the host, of all ranks' slots in order, in `step_extras` for
            the step that was handed out last.
        asked: Says why the run is to stop, if it is: then nobody waits for ever for a file system that does not answer.

    Only the files' headers are read here, and nothing by `restart`: the first `next_step` opens the first shard, so
    that a clock started before it covers the opening. All methods belong to one thread.

    Raises:
        ShardError: a file is missing or not a shard.
        InputError: no files, slots that the ranks cannot share, or too few tokens for `run_tokens`.
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
        asked: Callable[[], str | None] = lambda: None,
    ):
        _check_ranks(slots, rank, world_size)
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs: {epochs}, must be at least 1, or None to repeat the data for ever")
        self._files = _sorted_shards(files, "training")
        self._counts = [read_count(path) for path in self._files]
        self._own_slots = range(rank, slots, world_size)
        self._slots = slots
        self._bos = bos
        self._vocab_size = vocab_size
        self._epochs = epochs
        self._run_tokens = run_tokens
        if run_tokens is not None and epochs is not None and run_tokens > epochs * sum(self._counts):
            raise InputError(f"training data: {self._inventory()}; the run takes {run_tokens:,}. {_MORE_DATA}")

        self._copier = _Copier(torch.device(device), extras)
        self._shards: dict[int, ShardDocuments] = {}
        self._asked = asked
        self._builder = Worker("next-step") if prefetch else None
        self._reader = Worker("next-shard") if prefetch else None
        self._pending: tuple[_Request, Future[_Step]] | None = None
        self._hashed = hashed
        self._to_hash: list[ShardDocuments] = []  # steps were made of them; the last one is the present one
        self._hashes: dict[str, list[str]] = {}
        self._closed = False
        self._position = _START
        self._extras = extras
        self._kept_extras = kept_extras
        self.step_extras: dict[str, list[npt.NDArray[Any]]] = {}
        self.wait_seconds = 0.0  # spent inside `next_step` since the start or the last `restart`

    def next_step(
        self, batch_tokens: int, max_document_tokens: int, max_documents: int | None = None
    ) -> list[MicroBatch]:
        """This rank's `slots / world_size` micro-batches of the next step, each of `batch_tokens / slots` tokens.

        Documents are cut at `max_document_tokens`; `max_documents` of them fit in a micro-batch (see
        `cu_seqlens_length`). A call with the arguments of the last one finds its step built; one with others builds
        it now, from the same document on.

        Raises:
            InputError: the data are used up, or a slot has more documents than `cu_seqlens` has room for, or the
                arguments do not fit the slots.
            ShardError: a shard cannot be read, has a token outside of the vocabulary, or no BOS.
            RunError: the run is to stop, and the step has not come for `nanogpt.background.GRACE_S` since.
        """
        began = time.perf_counter()
        if self._closed:
            raise RuntimeError("TrainBatches.next_step after close")
        if batch_tokens < 1 or batch_tokens % self._slots:
            raise InputError(f"batch_tokens: {batch_tokens}, must be a positive multiple of the {self._slots} slots")
        if max_document_tokens < 1:
            raise InputError(f"maximum document length: {max_document_tokens} tokens, must be at least 1")
        tokens = batch_tokens // self._slots
        request = _Request(tokens, max_document_tokens, cu_seqlens_length(tokens, max_documents))

        step = self._take_pending(request)
        if step is None:
            arguments = self._position, request, self._host_step(request)
            step = self._build(*arguments) if self._builder is None else self._wait(self._submit(*arguments))
        self._position = step.after
        self.step_extras = step.extras
        batches = self._copier.hand_out(step.host, max_document_tokens)
        if self._builder is not None:
            # Pinned memory is asked for here: the background threads make no CUDA calls, so they can disturb neither
            # a graph capture nor the choice of device.
            host = self._host_step(request)
            self._pending = request, self._submit(self._position, request, host)
        self.wait_seconds += time.perf_counter() - began
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, JSON-able and the same on every rank."""
        position = self._position
        return {**position._asdict(), "file": self._files[position.shard].name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state`, of `state_dict`, was taken; the world size may be another.

        Raises:
            InputError: the state names another file, or lacks an entry. A document beyond the shard's end is found
                by the next `next_step`.
        """
        try:
            position = _Position(**{key: int(state[key]) for key in _Position._fields})
            name = state["file"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"saved data position: {state!r} is not one of TrainBatches.state_dict") from error
        if min(position) < 0 or position.shard >= len(self._files) or self._files[position.shard].name != name:
            raise InputError(
                f"saved data position: shard {position.shard} (from 0) called {name}, document {position.document}; "
                f"here are {self._inventory()}. Resume with the data that the run was started with"
            )
        self._forget()
        self._position = position

    def restart(self) -> None:
        """Back to the start of the stream, with nothing read and nothing prefetched; `wait_seconds` is 0 again."""
        self._forget()
        self._position = _START
        self.wait_seconds = 0.0

    def sha256(self) -> dict[str, list[str]]:
        """sha256 of each shard that steps were made of since the start or the last `restart`, by name.

        From the bytes that were read; more than one where a later pass read others. Finishes reading and hashing: to be
        called when time does not matter. Empty without `hashed`. Raises `ShardError` where a shard cannot be read.
        """
        self._drop_pending()
        for shard in self._to_hash:
            shard.hash()
        self._note_hashes()
        return self._hashes

    def close(self) -> None:
        """End the background threads; one that hangs is left behind. May be called again; `next_step` may not."""
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

    def _host_step(self, request: _Request) -> _HostStep:
        return self._copier.host_step(len(self._own_slots), request.tokens, request.bounds)

    def _submit(self, position: _Position, request: _Request, host: _HostStep) -> Future[_Step]:
        assert self._builder is not None
        return self._builder.submit(self._build, position, request, host)

    def _wait(self, future: Future[_Step]) -> _Step:
        try:
            return wait_for(future, self._asked)
        except GivenUp as error:
            position = self._position
            raise RunError(
                f"{error}: step {position.steps + 1} waits for tokens of {self._files[position.shard].parent}, which"
                " does not answer. The run ended without a checkpoint of where it was: resume it once the files can be"
                " read"
            ) from None

    # -- building a step: in the builder's thread, or in the caller's where there is none -------------------------

    def _take_pending(self, request: _Request) -> _Step | None:
        """The prefetched step if it is the one asked for; in any case the builder is idle afterwards."""
        if self._pending is not None and self._pending[0] == request:
            future = self._pending[1]
            self._pending = None
            return self._wait(future)
        self._drop_pending()
        return None

    def _drop_pending(self) -> None:
        if self._pending is not None:
            future = self._pending[1]
            self._pending = None
            if not future.cancel():  # what goes wrong there is not wanted
                wait([future], _CLOSING_S if self._closed else None)

    def _forget(self) -> None:
        self._drop_pending()
        for shard in self._shards.values():
            shard.stop()
        self._shards.clear()
        self._to_hash, self._hashes = [], {}

    def _build(self, position: _Position, request: _Request, host: _HostStep) -> _Step:
        following = self._following(position)
        for index in self._shards.keys() - {position.shard, following.shard}:
            self._shards.pop(index).stop()

        position, plan = self._plan(position, request)
        shard = self._shard(position.shard)
        if self._hashed and (not self._to_hash or self._to_hash[-1] is not shard):
            self._note_hashes()
            self._to_hash.append(shard)
        self._check_documents(shard, position, plan, request)
        kept: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._kept_extras}
        for slot in range(self._slots) if kept else self._own_slots:
            piece = plan.gather(shard.tokens, slot)
            extras = self._extras(piece[:-1])
            for name, slots in kept.items():
                slots.append(extras[name])
            if slot in self._own_slots:
                host.fill(self._own_slots.index(slot), piece, plan.running_ends(slot), extras)
        if self._reader is not None:
            # Not before the step is built: it needs a piece of the shard, not all of it.
            self._read_ahead(position)
        after = position._replace(
            document=position.document + plan.documents,
            steps=position.steps + 1,
            tokens=position.tokens + self._slots * request.tokens,
        )
        return _Step(host, after, kept)

    def _plan(self, position: _Position, request: _Request) -> tuple[_Position, StepPlan]:
        """The first place at or after `position` that fills a whole step: from one shard, its rest being skipped."""
        barren = 0
        while not self._is_over(position):
            plan = self._shard(position.shard).plan(
                position.document, slots=self._slots, tokens=request.tokens, max_document=request.max_document
            )
            if plan is not None:
                return position, plan
            barren = barren + 1 if position.document == 0 else 0
            if barren == len(self._files):
                raise InputError(
                    f"training data: {self._inventory()}, and none of them fills one step of "
                    f"{self._slots * request.tokens:,} tokens in {self._slots} slots with documents cut at "
                    f"{request.max_document:,} (the largest has {max(self._counts):,}). {_MORE_DATA}, or lower "
                    "batch_tokens"
                )
            position = self._following(position)
        whole_run = f"; the whole run takes {self._run_tokens:,}" if self._run_tokens is not None else ""
        passes = "" if self._epochs == 1 else f" {self._epochs} times"
        raise InputError(
            f"training data: {self._inventory()}, used up{passes} after {position.steps:,} steps of together "
            f"{position.tokens:,} tokens (what exceeds {request.max_document:,} in a document is not used); the next "
            f"step takes {self._slots * request.tokens:,} more{whole_run}. {_MORE_DATA}, or allow more epochs"
        )

    def _check_documents(self, shard: ShardDocuments, position: _Position, plan: StepPlan, request: _Request) -> None:
        room = request.bounds - 1
        for slot, (first, last) in enumerate(zip(plan.bounds, plan.bounds[1:], strict=False)):
            # A last document of one token is a target only.
            documents = last - first - int(plan.lengths[last - 1] == 1)
            if documents > room:
                raise InputError(
                    f"{shard.path}: from document {position.document + first:,} on, slot {slot} of a step takes "
                    f"{documents:,} documents for its {request.tokens:,} tokens; cu_seqlens has room for {room:,}. "
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
                # What goes wrong there goes wrong again, and is raised, where the tokens are wanted.
                self._reader.submit(shard.hash if self._hashed else shard.read_all)

    def _note_hashes(self) -> None:
        """Keep the hashes that are known, and let those shards go."""
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
        return f"{_shards(len(self._files))} in {first.parent} ({names}) of {sum(self._counts):,} tokens"


class ValBatches:
    """Validation micro-batches of one rank: the first `tokens` of the stream, cut into pieces of equal size.

    Piece p, the tokens from `p * micro_batch_tokens` on plus one for the last target, is slot `p % slots` of its
    group, and belongs to rank `p % world_size`. Documents are not cut at a maximum; they begin at BOS tokens, and a
    piece that begins inside a document counts that rest as one. Iterating starts anew each time. A shard that ends
    early is followed by the next. Everything is read and checked here, by every rank alike; `sha256` is of the stream
    as it was read: `tokens` + 1 little-endian uint16.

    Args:
        files: The validation shards; every rank names the same.
        tokens: Tokens to evaluate, over all ranks; a multiple of `slots * micro_batch_tokens`.
        micro_batch_tokens: T of a micro-batch.
        slots: Micro-batches in a group over all ranks.
        rank: This process's rank.
        world_size: Number of ranks; divides `slots`.
        bos: The token that starts every document.
        vocab_size: Tokens from this one on are refused.
        device: Where micro-batches go.
        extras: As for `TrainBatches`.

    Raises:
        ShardError: a file is missing or not a shard, or has a token outside of the vocabulary.
        InputError: no files, too few tokens, sizes that do not divide, or more documents in a piece than
            `cu_seqlens` has room for.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        tokens: int,
        micro_batch_tokens: int,
        slots: int,
        rank: int = 0,
        world_size: int = 1,
        bos: int,
        vocab_size: int = 1 << 16,
        device: torch.device | str = "cpu",
        extras: Extras = no_extras,
    ):
        _check_ranks(slots, rank, world_size)
        self._extras = extras
        if micro_batch_tokens < 1 or tokens < 1 or tokens % (slots * micro_batch_tokens):
            raise InputError(
                f"validation: {tokens:,} tokens, must be a positive multiple of {slots} slots of "
                f"{micro_batch_tokens:,} tokens ({slots * micro_batch_tokens:,})"
            )
        paths = _sorted_shards(files, "validation")
        stream = read_stream(paths, tokens + 1, vocab_size)
        self.sha256 = hashlib.sha256(stream.view(np.uint8).data).hexdigest()
        self._tokens = micro_batch_tokens
        self._copier = _Copier(torch.device(device), extras)
        self._pieces: list[tuple[Tokens, npt.NDArray[np.int64]]] = []
        room = cu_seqlens_length(micro_batch_tokens) - 1
        for piece, first in enumerate(range(0, tokens, micro_batch_tokens)):
            own = stream[first : first + micro_batch_tokens + 1]
            ends = np.append(np.flatnonzero(own[1:-1] == bos) + 1, micro_batch_tokens)
            if ends.size > room:
                raise InputError(
                    f"{paths[0]}: validation tokens {first:,} to {first + micro_batch_tokens:,} hold {ends.size:,} "
                    f"documents; cu_seqlens has room for {room:,}. Join short texts into longer documents before "
                    "prep-text, or lower the validation micro-batch"
                )
            if piece % world_size == rank:
                self._pieces.append((own.copy(), ends))

    def __iter__(self) -> Iterator[MicroBatch]:
        for piece, ends in self._pieces:
            host = self._copier.host_step(1, self._tokens, cu_seqlens_length(self._tokens))
            host.fill(0, piece, ends, self._extras(piece[:-1]))
            yield self._copier.hand_out(host, self._tokens)[0]

    def __len__(self) -> int:
        return len(self._pieces)


# -- parts ---------------------------------------------------------------------------------------------------

_CLOSING_S = 3.0
_MORE_DATA = "Get more shards (prep-fineweb --chunks N) or prepare more text (prep-text)"


class _Request(NamedTuple):
    tokens: int  # of one slot: T
    max_document: int
    bounds: int  # entries of cu_seqlens


class _Position(NamedTuple):
    epoch: int
    shard: int
    document: int  # the next to be taken, 0-based, in the shard
    steps: int  # handed out since the start of the stream
    tokens: int  # handed out since the start of the stream


_START = _Position(0, 0, 0, 0, 0)


class _HostStep:
    """Room for a rank's micro-batches in host memory: inputs (n, T), targets (n, T), cu_seqlens (n, bounds), extras."""

    def __init__(
        self, micro_batches: int, tokens: int, bounds: int, extras: Mapping[str, torch.dtype], *, pinned: bool
    ):
        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((micro_batches, columns), dtype=dtype, pin_memory=pinned)

        self.inputs = empty(tokens, torch.int32)
        self.targets = empty(tokens, torch.int64)
        self.cu_seqlens = empty(bounds, torch.int32)
        self.extras = {name: empty(tokens, dtype) for name, dtype in extras.items()}
        # NumPy does the filling: torch's operators would start a thread pool in the builder's thread.
        self._arrays = self.inputs.numpy(), self.targets.numpy(), self.cu_seqlens.numpy()
        self._extras = {name: room.numpy() for name, room in self.extras.items()}

    def fill(
        self, row: int, piece: Tokens, ends: npt.NDArray[np.int64], extras: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Write micro-batch `row`: `piece` (T + 1,) uint16, `ends` the documents' running ends, the last >= T."""
        for name, values in extras.items():
            self._extras[name][row] = values
        inputs, targets, cu_seqlens = self._arrays
        tokens = inputs.shape[1]
        inputs[row] = piece[:-1]
        targets[row] = piece[1:]
        fitting = min(ends.size, cu_seqlens.shape[1] - 1)  # one too many only if its one token is a target only
        cu_seqlens[row] = tokens
        cu_seqlens[row, 0] = 0
        cu_seqlens[row, 1 : fitting + 1] = np.minimum(ends[:fitting], tokens)


class _Step(NamedTuple):
    host: _HostStep
    after: _Position
    extras: dict[str, list[npt.NDArray[Any]]]


class _Copier:
    """Host memory for micro-batches, and their way from there to the device."""

    def __init__(self, device: torch.device, extras: Extras):
        self._device = device
        # Asked once, of a micro-batch of one token, for their names and dtypes.
        asked = extras(np.zeros(1, dtype=np.uint16))
        self._extras = {name: torch.from_numpy(values).dtype for name, values in asked.items()}
        self._cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None

    def host_step(self, micro_batches: int, tokens: int, bounds: int) -> _HostStep:
        """Fresh memory. Pinned memory returns to torch's pool when dropped, and is used again once copied."""
        return _HostStep(micro_batches, tokens, bounds, self._extras, pinned=self._cuda)

    def hand_out(self, host: _HostStep, max_seqlen: int) -> list[MicroBatch]:
        """The micro-batches on the device; on CUDA the copies may still be on their way, in stream order."""
        parts = [host.inputs, host.targets, host.cu_seqlens, *host.extras.values()]
        if self._cuda:
            parts = self._copy(parts)
        elif self._device.type != "cpu":
            parts = [part.to(self._device) for part in parts]
        rows = zip(*(part.unbind() for part in parts), strict=True)
        return [
            MicroBatch(inputs, targets, cu_seqlens, max_seqlen, dict(zip(host.extras, extras, strict=True)))
            for inputs, targets, cu_seqlens, *extras in rows
        ]

    def _copy(self, parts: list[Tensor]) -> list[Tensor]:
        # On a stream of its own, a copy runs beside the kernels of the step before.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [part.to(self._device, non_blocking=True) for part in parts]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)
        return copies


def _check_ranks(slots: int, rank: int, world_size: int) -> None:
    if world_size < 1 or slots < 1 or slots % world_size:
        raise InputError(f"world size: {world_size}, must divide the {slots} slots of a step")
    if not 0 <= rank < world_size:
        raise InputError(f"rank: {rank}, must lie in 0..{world_size - 1}")


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _sorted_shards(files: Sequence[Path], kind: str) -> list[Path]:
    if not files:
        raise InputError(f"{kind} data: no shards found; run prep-fineweb or prep-text first, and check the directory")
    return sorted(Path(file) for file in files)


def read_stream(paths: Sequence[Path], wanted: int, vocab_size: int = 1 << 16) -> Tokens:
    """The first `wanted` tokens of the validation shards one after another, (wanted,) uint16.

    Raises:
        ShardError: a file is missing or not a shard, or has a token from `vocab_size` on.
        InputError: too few tokens.
    """
    counts = [read_count(path) for path in paths]
    if sum(counts) < wanted:
        raise InputError(
            f"validation data: {_shards(len(paths))} in {paths[0].parent} of {sum(counts):,} tokens, {wanted:,} are "
            "needed (one more than are evaluated). Prepare more (prep-text --val-tokens N), or evaluate fewer "
            "(evaluation.tokens in the recipe; nanogpt evaluate --tokens N)"
        )
    parts: list[Tokens] = []
    for path, count in zip(paths, counts, strict=True):
        take = min(count, wanted)
        with open_regular(path) as file:
            file.seek(HEADER_BYTES)
            part = np.fromfile(file, dtype="<u2", count=take)
        if part.size != take:
            raise ShardError(f"{path}: {part.size:,} tokens could be read of {take:,}: the file changed while read")
        check_tokens(path, part, vocab_size)
        parts.append(part)
        wanted -= take
        if not wanted:
            break
    return np.concatenate(parts)
