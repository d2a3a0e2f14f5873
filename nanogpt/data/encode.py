"""Units of documents to tokens, in this process or in several.

The workers are plain child processes with a pipe each, not a `multiprocessing` pool: they need no guard in the
caller's script, inherit no threads or CUDA state, and end by themselves when the parent is killed, because their
pipe then closes. A message is a unit of about half a megabyte one way and its tokens the other way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nanogpt.data.documents import SegmentUnit, Unit, read_unit
from nanogpt.data.shards import Tokens
from nanogpt.data.skips import Skip
from nanogpt.data.tokenizer import BOS, encode_utf8
from nanogpt.errors import NanogptError, RunError

# Numeric libraries start a thread a core when they are imported: 64 workers on 64 cores need none of them.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(slots=True)
class Encoded:
    """The tokens of a unit, a BOS before each document.

    Where `continued`, the unit goes on with the document of the unit before and starts without a BOS.
    """

    input: int
    done: int
    tokens: Tokens  # (sum of lengths,)
    lengths: npt.NDArray[np.int64]  # (documents,) tokens of each, its BOS included
    keys: npt.NDArray[np.uint64]  # (documents,) what the split goes by
    text_bytes: int
    skipped: list[Skip]
    continued: bool


def encode_unit(unit: Unit, document_tokens: int | None = None) -> Encoded:
    """Read and tokenize one unit, cutting documents above `document_tokens` (BOS included) into several.

    Raises:
        RunError: a file changed since it was planned.
    """
    continued = isinstance(unit, SegmentUnit) and not unit.first and document_tokens is None
    bos = np.full(1, BOS, dtype=np.uint32)
    arrays = [np.empty(0, dtype=np.uint32)]
    lengths: list[int] = []
    keys: list[int] = []
    skipped: list[Skip] = []
    text_bytes = 0
    for item in read_unit(unit):
        if isinstance(item, Skip):
            skipped.append(item)
            continue
        tokens = encode_utf8(item.text)
        text_bytes += len(item.text)
        step = document_tokens - 1 if document_tokens else tokens.size
        for start in range(0, tokens.size, step):
            part = tokens[start : start + step]
            arrays.extend([part] if continued else [bos, part])
            lengths.append(part.size + (not continued))
            keys.append(item.key)
    return Encoded(
        input=unit.input,
        done=unit.done,
        tokens=np.concatenate(arrays, dtype=np.uint16, casting="unsafe"),
        lengths=np.array(lengths, dtype=np.int64),
        keys=np.array(keys, dtype=np.uint64),
        text_bytes=text_bytes,
        skipped=skipped,
        continued=continued,
    )


def available_cores() -> int:
    """The cores that this process may use, which is what Slurm gave it and not what the node has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(fd: int) -> None:
    """What a worker does: encode units that arrive on the connection `fd` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection = Connection(fd)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            arguments = connection.recv()
            answer: Encoded | NanogptError
            try:
                answer = encode_unit(*arguments)
            except NanogptError as error:
                answer = error
            except BaseException:
                answer = RunError(f"a tokenizing worker failed:\n{traceback.format_exc()}")
            connection.send(answer)


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        # The interpreter takes our own import path, so that it finds the package that is running.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from nanogpt.data.encode import serve; serve({theirs.fileno()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ONE_THREAD},
        )
        theirs.close()

    def encode(self, unit: Unit, document_tokens: int | None) -> Encoded:
        try:
            self.connection.send((unit, document_tokens))
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            status = self.process.wait()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise RunError(
                f"a tokenizing worker ended ({how}); if memory was short, run again with fewer --workers"
            ) from error
        if isinstance(answer, NanogptError):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Encoder:
    """Encodes units with `workers` processes; with 1 in the calling process. Use it in a `with` statement."""

    def __init__(self, workers: int, document_tokens: int | None = None) -> None:
        self.workers = workers
        self.document_tokens = document_tokens
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        if self.workers > 1:
            self._threads = ThreadPoolExecutor(self.workers)
            for _ in range(self.workers):
                worker = _Worker()
                self._all.append(worker)
                self._idle.put(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all:  # killed, so that no thread waits for an answer that nobody wants
            worker.close()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def encode(self, units: Iterable[Unit]) -> Iterator[Encoded]:
        """The units' tokens in the units' order; no more than two units a worker are held at a time."""
        if self._threads is None:
            for unit in units:
                yield encode_unit(unit, self.document_tokens)
            return
        waiting: deque[Future[Encoded]] = deque()
        for unit in units:
            waiting.append(self._threads.submit(self._encode, unit))
            if len(waiting) >= 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, unit: Unit) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(unit, self.document_tokens)
        finally:
            self._idle.put(worker)
