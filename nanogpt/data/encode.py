"""Turn units of documents into tokens, in this process or in several.

Processes, because reading and parsing hold Python's lock: beyond a few cores, threads would queue for it. One child
process builds the encoding and forks the workers: that costs the start of one interpreter and the memory of one
encoding, however many cores there are, and it is safe in a caller that runs threads or CUDA, whose state is not
inherited. It is not a `multiprocessing` pool: the caller's script needs no guard, and workers end by themselves when
the caller is killed, because their pipes then close. A message is a unit of about half a megabyte one way and its
tokens the other way.
"""

from __future__ import annotations

import gc
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
from typing import cast

import numpy as np
import numpy.typing as npt

from nanogpt.data.documents import SegmentUnit, Unit, held_bytes, read_unit
from nanogpt.data.near_duplicates import Signatures, signatures
from nanogpt.data.shards import Tokens
from nanogpt.data.skips import Skip
from nanogpt.data.tokenizer import BOS, encode_text, gpt2_encoding
from nanogpt.errors import NanogptError, RunError

HELD_BYTES = 128 << 20  # of text waiting for workers: no more than four of the longest records

# Numeric libraries start one thread per core when they are imported; 64 workers on 64 cores need none of them.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


@dataclass(slots=True)
class Encoded:
    """The tokens of a unit, a BOS before each document.

    If `continued`, the unit continues the document of the unit before and starts without a BOS.
    """

    input: int
    done: int
    tokens: Tokens  # (sum of lengths,)
    lengths: npt.NDArray[np.int64]  # (documents,) tokens of each, including its BOS
    keys: npt.NDArray[np.uint64]  # (documents,) what the split goes by
    ordinals: npt.NDArray[np.int64]  # (documents,) which part of its text this is: 0, 1, ... if a length limit cuts it
    sources: list[str]  # (documents,) what each belongs to
    signatures: Signatures | None  # (documents, minima) of MinHash, on request
    text_bytes: int
    skipped: list[Skip]
    continued: bool


def encode_unit(unit: Unit, document_tokens: int | None = None, with_signatures: bool = False) -> Encoded:
    """Read and tokenize one unit, cutting documents above `document_tokens` (BOS included) into several.

    A large file's signature is that of its first segment.

    Raises:
        RunError: a file changed since it was planned.
    """
    continued = isinstance(unit, SegmentUnit) and not unit.first and document_tokens is None
    # Later segments of a large file are later parts of its text; there are never more parts before one than bytes.
    before = unit.start if isinstance(unit, SegmentUnit) and not unit.first else 0
    bos = BOS.to_bytes(4, sys.byteorder)
    buffers: list[bytes | memoryview] = []
    lengths: list[int] = []
    keys: list[int] = []
    ordinals: list[int] = []
    sources: list[str] = []
    parts: list[npt.NDArray[np.uint32]] = []
    skipped: list[Skip] = []
    text_bytes = 0
    for item in read_unit(unit):
        if isinstance(item, Skip):
            skipped.append(item)
            continue
        tokens = encode_text(item.text)
        text_bytes += item.bytes
        step = document_tokens - 1 if document_tokens else tokens.size
        for start in range(0, tokens.size, step):
            part = tokens[start : start + step]
            if not continued:
                buffers.append(bos)
            buffers.append(part.data)
            lengths.append(part.size + (not continued))
            keys.append(item.key)
            ordinals.append(before + start // step)
            sources.append(item.source)
            if with_signatures and not continued:
                parts.append(part)
    return Encoded(
        input=unit.input,
        done=unit.done,
        tokens=np.frombuffer(b"".join(buffers), dtype=np.uint32).astype(np.uint16),
        lengths=np.array(lengths, dtype=np.int64),
        keys=np.array(keys, dtype=np.uint64),
        ordinals=np.array(ordinals, dtype=np.int64),
        sources=sources,
        signatures=signatures(parts) if with_signatures else None,
        text_bytes=text_bytes,
        skipped=skipped,
        continued=continued,
    )


def available_cores() -> int:
    """The cores that this process may use: those that Slurm gave it, not all of the node's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(fds: list[int]) -> None:
    """What the child process does: fork a worker for each of the connections `fds`, and wait until all have ended."""
    gpt2_encoding()
    gc.freeze()
    workers = []
    for fd in fds:
        pid = os.fork()
        if pid == 0:
            for other in fds:
                if other != fd:
                    os.close(other)
            _work(Connection(fd))
            os._exit(0)
        workers.append(pid)
    for fd in fds:
        os.close(fd)
    for worker in workers:
        os.waitpid(worker, 0)


def _work(connection: Connection) -> None:
    """Encode the units that arrive until the connection closes."""
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


class Encoder:
    """Encodes units with `workers` processes; with 1 in the calling process. Use it in a `with` statement."""

    def __init__(self, workers: int, document_tokens: int | None = None, with_signatures: bool = False) -> None:
        self.workers = workers
        self._options = (document_tokens, with_signatures)
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[Connection] = SimpleQueue()

    def __enter__(self) -> Encoder:
        if self.workers == 1:
            return self
        ours, theirs = zip(*(Pipe() for _ in range(self.workers)), strict=True)
        fds = [connection.fileno() for connection in theirs]
        # The interpreter gets our own import path, so that it finds the package that is running.
        code = f"import sys; sys.path[:] = {sys.path!r}; from nanogpt.data.encode import serve; serve({fds})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is for the parent to decide on
            env={**os.environ, **ONE_THREAD},
        )
        for connection in theirs:
            connection.close()
        self._threads = ThreadPoolExecutor(self.workers)
        for connection in ours:
            self._idle.put(connection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self._process and self._threads):
            return
        if error is not None or self._idle.qsize() < self.workers:
            self._kill()  # no thread should wait for an answer that nobody needs
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()
        try:
            self._process.wait(10)  # the workers saw their pipes close, and the child waited for them
        except subprocess.TimeoutExpired:  # a process forked meanwhile by the caller holds the pipes open
            self._kill()

    def _kill(self) -> None:
        """Kill all at once, as a group: the child may be forking a worker, or waiting, deaf to what Python handles."""
        assert self._process
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def encode(self, units: Iterable[Unit]) -> Iterator[Encoded]:
        """The units' tokens in order; no more than two units per worker and `HELD_BYTES` are held at a time."""
        if self._threads is None:
            for unit in units:
                yield encode_unit(unit, *self._options)
            return
        waiting: deque[tuple[Future[Encoded], int]] = deque()
        held = 0
        for unit in units:
            waiting.append((self._threads.submit(self._encode, unit), held_bytes(unit)))
            held += waiting[-1][1]
            while len(waiting) >= 2 * self.workers or (waiting and held > HELD_BYTES):
                future, size = waiting.popleft()
                yield future.result()
                held -= size
        while waiting:
            yield waiting.popleft()[0].result()

    def _encode(self, unit: Unit) -> Encoded:
        connection = self._idle.get()
        try:
            connection.send((unit, *self._options))
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise RunError("a tokenizing worker was killed; if memory was short, use fewer --workers") from error
        finally:
            self._idle.put(connection)
        if isinstance(answer, NanogptError):
            raise answer
        return cast(Encoded, answer)
