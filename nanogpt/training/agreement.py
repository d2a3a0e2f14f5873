"""Before anything is built: do all ranks start the same run?

Each rank puts what it is about to run into the rendezvous store, before there is a process group (ranks with different
recipes might not even agree on one), and all are compared with rank 0's. A rank that cannot start, say because a
shard is missing, tells the others, and all refuse with the same message.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from nanogpt.data.shards import read_count
from nanogpt.errors import InputError, Interrupted, RunError
from nanogpt.files import open_regular
from nanogpt.launch.watchdog import POLL_S, Watchdog, connect, one_line
from nanogpt.runs.data_files import describe_shards
from nanogpt.runs.provenance import package_versions, source_sha256
from nanogpt.runs.record import Process
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import differences

if TYPE_CHECKING:
    from torch.distributed import Store

SAMPLE_BYTES = 1 << 16  # compared at the start, middle and end of a shard that no manifest covers
LEAVING_S = 30.0  # at most, for all to learn of a refusal
LAST_S = 4.0  # for other nodes' ranks to end
SHOWN = 8  # differences listed for a rank


@dataclass
class Start:
    """What one rank is about to run, as plain values for JSON."""

    host: str
    process: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    source_sha256: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)  # size and digest by name
    resumes: str | None = None  # the newest checkpoint
    refusal: str | None = None  # why this rank cannot start
    interrupted: bool = False  # because of a signal

    @classmethod
    def decode(cls, text: bytes) -> Start:
        """From the store. Raises ValueError if no rank can have written it."""
        start = _STARTS.validate_json(text)
        start.host = one_line(start.host)
        return start


_STARTS = TypeAdapter(Start)


def describe_start(spec: RunSpec, files: Sequence[Path], host: str, resumes: str | None = None) -> Start:
    """This rank's start. `files`: all shards. Raises `InputError` (a `ShardError`) if one is incomplete."""
    return Start(
        host=host,
        spec=spec.model_dump(mode="json"),
        source_sha256=source_sha256(),
        versions={name: version for name, version in package_versions().items() if name != "platform"},
        shards=dict(_describe_files(files)),
        resumes=resumes,
    )


def _describe_files(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    by_directory: dict[Path, list[Path]] = {}
    for file in files:
        by_directory.setdefault(file.parent, []).append(file)
    for group in by_directory.values():
        for path, shard in zip(group, describe_shards(group), strict=True):
            count = read_count(path)
            known = shard.expected_sha256
            digest = f"sha256 {known[:16]}" if known else f"samples' hash {_sample(path, shard.bytes)}"
            yield shard.name, f"{count} tokens, {digest}"


def _sample(path: Path, size: int) -> str:
    """A hash of the file's start, middle and end."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for at in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def start_differences(first: Start, other: Start) -> Iterator[str]:
    """How two ranks' starts differ, a line each. Digests are compared if both are of one kind."""
    for key, theirs, ours in differences(first.spec, other.spec):
        yield f"recipe: {key}: {theirs} and {ours}"
    if first.source_sha256 != other.source_sha256:
        yield f"code: source sha256 {first.source_sha256[:16]} and {other.source_sha256[:16]}"
    for name in sorted({*first.versions, *other.versions}):
        if first.versions.get(name) != other.versions.get(name):
            yield f"version of {name}: {first.versions.get(name)} and {other.versions.get(name)}"
    for name in sorted({*first.shards, *other.shards}):
        one, two = first.shards.get(name, "missing"), other.shards.get(name, "missing")
        if one != two and not _other_kind(one, two):
            yield f"data: {name}: {one} and {two}"
    if first.resumes != other.resumes:
        yield f"resumes from: {first.resumes or 'the start'} and {other.resumes or 'the start'}"


def _other_kind(one: str, two: str) -> bool:
    """Equal sizes, but one digest of the whole file and one of samples: nothing to compare."""
    (count, _, digest), (other_count, _, other) = one.partition(", "), two.partition(", ")
    return count == other_count and digest.partition(" ")[0] != other.partition(" ")[0]


def compare_starts(starts: Sequence[Start]) -> None:
    """Raise `InputError`, with the same message on every rank, if they differ or one cannot start.

    Or `Interrupted`, if a signal reached one that was waiting for a file.
    """
    refusals: dict[str, list[int]] = {}
    for rank, start in enumerate(starts):
        if start.refusal is not None:
            refusals.setdefault(start.refusal, []).append(rank)
    if stopped := [start.refusal for start in starts if start.interrupted]:
        raise Interrupted(one_line(stopped[0] or ""))
    if refusals:
        everywhere = len(refusals) == 1 and len(next(iter(refusals.values()))) == len(starts)
        lines = [
            text if everywhere else f"{_ranks(ranks)} on {starts[ranks[0]].host}: {text}"
            for text, ranks in refusals.items()
        ]
        raise InputError("\n".join(lines))
    found: dict[tuple[str, ...], list[int]] = {}
    for rank, start in enumerate(starts):
        unlike = tuple(start_differences(starts[0], start))
        if unlike:
            found.setdefault(unlike, []).append(rank)
    if found:
        message = ["the ranks differ; every node needs the same recipe, installation and data:"]
        for unlike, ranks in found.items():
            message.append(f"  rank 0 on {starts[0].host} and {_ranks(ranks)} on {starts[ranks[0]].host}:")
            message += [f"    {line}" for line in unlike[:SHOWN]]
            message += [f"    and {len(unlike) - SHOWN} more"] if len(unlike) > SHOWN else []
        raise InputError("\n".join(message))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def agree(prepare: Callable[[], Start], watch: Watchdog) -> None:
    """Run `prepare` on every rank and compare the results; see the module. A single process just runs it.

    Raises:
        InputError, Interrupted: from `prepare` on some rank, or because ranks differ; the same on all ranks.
        RunError: the others do not arrive, or are lost.
    """
    if watch.size == 1:
        prepare()
        return
    host = watch.host
    try:
        start = prepare()
    except (InputError, Interrupted) as error:
        start = Start(host, refusal=str(error), interrupted=isinstance(error, Interrupted))
    start.process = watch.process.model_dump()
    try:
        store = connect(watch.limits.phase_seconds)
        store.set(f"start/{watch.rank}", json.dumps(asdict(start)))
        keys = [f"start/{rank}" for rank in range(watch.size)]
        until = time.monotonic() + watch.limits.phase_seconds
        while missing := [key for key in keys if not store.check([key])]:
            watch.check()
            if time.monotonic() > until:
                raise RunError(f"rank {watch.rank} on {host}: {', '.join(missing)}: no answer; not all ranks arrived")
            time.sleep(POLL_S / 2)
        starts = [Start.decode(store.get(key)) for key in keys]
        for rank, found in enumerate(starts):
            watch.expect(rank, Process(**found.process))
    except RuntimeError as error:
        raise RunError(f"rank {watch.rank} on {host}: cannot join the other processes: {error}") from error
    except ValueError as error:
        raise RunError(
            f"rank {watch.rank} on {host}: the launcher's store has data that no rank wrote, so somebody else on the"
            f" node or its network writes to it: {error}"
        ) from error
    try:
        compare_starts(starts)
    except (InputError, Interrupted):
        _leave_together(store, watch, several_nodes=len({start.host for start in starts}) > 1)
        raise


def _leave_together(store: Store, watch: Watchdog, *, several_nodes: bool) -> None:
    """Wait until all ranks know of the refusal; with several nodes, rank 0's leaves last.

    The store ends with the launcher of rank 0's node. Ranks that have not read it by then cannot say why the run
    ended, and a launcher that still has ranks takes the loss for its own failure.
    """
    with contextlib.suppress(RuntimeError):  # somebody left early after all
        store.set(f"start/read/{watch.rank}", "")
        until = time.monotonic() + LEAVING_S
        while time.monotonic() < until and not store.check([f"start/read/{rank}" for rank in range(watch.size)]):
            time.sleep(POLL_S / 2)
        if several_nodes and watch.rank == 0:
            time.sleep(LAST_S)
