"""The documents of one training shard: read piece by piece, found by their BOS tokens, dealt out to slots.

- A shard is usable after its first mebitoken: nobody waits for the other ninety-nine. What is dealt out does not
  depend on how much has been read, because only documents whose end is known are used.
- Any thread may drive the reading (`ShardDocuments.grow`); others wait for the piece, not for the shard.
- Dealing is index arithmetic over the documents: no Python loop over documents or tokens.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogpt.data.shards import HEADER_BYTES, TOKEN_BYTES, ShardError, Tokens, check_tokens, no_document
from nanogpt.errors import InputError
from nanogpt.files import open_regular

PIECE_TOKENS = 1 << 20  # read and scanned at once: 2 MiB, under a millisecond from the page cache
_HASHED_TOKENS = 4 * PIECE_TOKENS  # at once, without holding Python's lock
_FIRST_WINDOW = 2048  # documents tried first when dealing a step; doubled until they suffice

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Which tokens of a shard make up the slots of one step.

    `starts` and `lengths`, both (documents,) int64: first token, and tokens taken, of each document, in order.
    `bounds`, `slots + 1` ints: slot k consists of documents `bounds[k]` to `bounds[k + 1] - 1`.
    The lengths of a slot add up to its tokens + 1.
    """

    starts: Positions
    lengths: Positions
    bounds: list[int]

    @property
    def documents(self) -> int:
        """How many documents the step takes."""
        return self.bounds[-1]

    def running_ends(self, slot: int) -> Positions:
        """(documents of the slot,) int64: end of each document in the slot's stream; the last is tokens + 1."""
        return np.cumsum(self.lengths[self.bounds[slot] : self.bounds[slot + 1]])

    def gather(self, tokens: Tokens, slot: int) -> Tokens:
        """The slot's (tokens + 1,) uint16, out of the shard's `tokens`."""
        documents = slice(self.bounds[slot], self.bounds[slot + 1])
        starts = self.starts[documents]
        ends = starts + self.lengths[documents]
        # Documents taken whole lie side by side in the shard; only a cut document ends a run.
        gaps = np.flatnonzero(ends[:-1] != starts[1:])
        firsts = [int(starts[0]), *starts[gaps + 1].tolist()]
        lasts = [*ends[gaps].tolist(), int(ends[-1])]
        return np.concatenate([tokens[a:b] for a, b in zip(firsts, lasts, strict=True)])


def deal(starts: Positions, ends: Positions, *, slots: int, tokens: int, max_document: int) -> StepPlan | None:
    """Deal documents out to `slots` slots of `tokens + 1` tokens; None if there are too few.

    `starts`, `ends`: (n,) int64, the documents in order. Each is cut at `max_document` tokens, and the last one of a
    slot where the slot is exactly full; the next slot begins with the next document.
    """
    lengths = np.minimum(ends - starts, max_document)
    totals = np.cumsum(lengths)
    bounds = [0]
    taken = 0
    for _ in range(slots):
        wanted = taken + tokens + 1
        last = int(np.searchsorted(totals, wanted))
        if last == totals.size:
            return None
        taken = int(totals[last])
        lengths[last] -= taken - wanted
        bounds.append(last + 1)
    return StepPlan(starts[: bounds[-1]], lengths[: bounds[-1]], bounds)


class ShardDocuments:
    """A shard of `count` tokens and the positions of its documents, both known as far as it has been read.

    Nothing is read before `grow`, `read_all` or `plan`. `tokens` is (count,) uint16, valid as far as read: each is
    below `vocab_size`.
    """

    def __init__(self, path: Path, count: int, bos: int, vocab_size: int = 1 << 16):
        self.sha256: str | None = None  # of what was read; see `hash`
        self.path = path
        self.count = count
        self.tokens: Tokens = np.empty(count, dtype="<u2")
        self.read_ahead = False  # set by the owner once the rest is being read in the background
        self._bos = bos
        self._vocab_size = vocab_size
        self._starts: Positions = np.empty(1024, dtype=np.int64)
        self._known = (self._starts, 0)  # replaced as one, so that it can be read without the lock
        self._file: BufferedReader | None = None
        self._header = b""
        self._hashing = threading.Lock()
        self._read = 0
        self._reading = False
        self._stopped = False
        self._changed = threading.Condition()

    def grow(self, beyond: int) -> None:
        """Return when more than `beyond` tokens are read, or all: read a piece, or wait for whoever is reading it.

        Raises:
            ShardError: the file cannot be read, ends before the count that its header promises, or has a token outside
                of the vocabulary.
        """
        with self._changed:
            while self._reading and self._read <= beyond:
                self._changed.wait()
            if self._read > beyond or self._read == self.count:
                return
            self._reading = True
        try:
            self._read_piece()
        finally:
            with self._changed:
                self._reading = False
                if self._stopped:
                    self._close()
                self._changed.notify_all()

    def read_all(self) -> None:
        """Read the rest of the shard, unless `stop` is called meanwhile. Raises as `grow` does."""
        while self._read < self.count and not self._stopped:
            self.grow(self._read)

    def hash(self) -> None:
        """Read the rest and set `sha256`: the whole file's, from the bytes in memory that documents are dealt from.

        A shard that was stopped before it was read completely gets none. Raises as `grow` does.
        """
        self.read_all()
        with self._hashing:
            if self.sha256 is not None or self._read < self.count:
                return
            digest = hashlib.sha256(self._header)
            for first in range(0, self.count, _HASHED_TOKENS):
                digest.update(self.tokens[first : first + _HASHED_TOKENS].view(np.uint8).data)
            self.sha256 = digest.hexdigest()

    def stop(self) -> None:
        """Nobody will use the shard again: close the file, and make a `read_all` in another thread return early."""
        with self._changed:
            self._stopped = True
            if not self._reading:
                self._close()

    def plan(self, document: int, *, slots: int, tokens: int, max_document: int) -> StepPlan | None:
        """Deal one step from document number `document` (0-based) on; None if the shard's rest cannot fill it.

        Raises:
            InputError: the shard has fewer than `document` documents (a position saved with other data).
            ShardError: as `grow`, or it has no document.
        """
        window = _FIRST_WINDOW
        while True:
            read = self._read  # before the documents, so that these are at least as new
            starts, known = self._known
            whole = read == self.count
            if whole and not known:
                raise no_document(self.path, self._bos)
            usable = known if whole else known - 1  # the end of the last one is not known yet
            if whole and document > usable:
                raise InputError(
                    f"{self.path}: the saved data position is document {document:,}, but the shard has {usable:,}: "
                    "resume with the data that the run was started with"
                )
            last = min(document + window, usable)
            if document < last:
                ends = starts[document + 1 : last + 1]
                if last == known:
                    ends = np.append(starts[document + 1 : last], self.count)
                plan = deal(starts[document:last], ends, slots=slots, tokens=tokens, max_document=max_document)
                if plan is not None:
                    return plan
            if document + window < usable:
                window *= 2
            elif whole:
                return None
            else:
                self.grow(read)

    def _read_piece(self) -> None:
        first, last = self._read, min(self._read + PIECE_TOKENS, self.count)
        piece = self.tokens[first:last]
        try:
            if self._file is None:
                self._file = open_regular(self.path)
                weakref.finalize(self, self._file.close)  # even if a program ends without closing
                self._header = self._file.read(HEADER_BYTES)
                self._file.seek(HEADER_BYTES + TOKEN_BYTES * first)
            got = self._file.readinto(piece.view(np.uint8).data)
        except OSError as error:
            self._close()
            raise ShardError(f"{self.path}: cannot be read: {error.strerror}") from error
        if got != piece.nbytes:
            self._close()
            found = first + got // TOKEN_BYTES
            raise ShardError(
                f"{self.path}: ends after {found:,} tokens, its header promised {self.count:,}: the file changed after "
                "the run began; run prep-fineweb (or prep-text) again"
            )
        try:
            check_tokens(self.path, piece, self._vocab_size, first)
        except ShardError:
            self._close()  # the next call reads this piece again
            raise
        if last == self.count:
            self._close()
        self._publish(np.flatnonzero(piece == self._bos) + first)
        self._read = last

    def _publish(self, found: Positions) -> None:
        known = self._known[1]
        total = known + found.size
        if total > self._starts.size:
            # A holder of the old array keeps a valid beginning of the new one.
            larger = np.empty(max(total, 2 * self._starts.size), dtype=np.int64)
            larger[:known] = self._starts[:known]
            self._starts = larger
        self._starts[known:total] = found
        self._known = (self._starts, total)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
