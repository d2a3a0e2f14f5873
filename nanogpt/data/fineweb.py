"""Download FineWeb's token shards and verify them.

The hub data set kjj0/fineweb10B-gpt2 holds FineWeb-10B in GPT-2 tokens: 103 training shards and one validation shard
of 100 M tokens (200 MB) each. A run needs at most 9 training shards.

- A shard gets its name only when its sha256 is the hub's and its header fits; until then it is a partial file in
  `.prep-fineweb/`, which the next call continues.
- For the first shards the package knows the sha256 itself (nanogpt/data/official.py): a mirror that serves others is
  refused. For the rest the first download's counts from then on; `nanogpt check` trusts it if it came from the hub.
- Verified files are recorded in `manifest.json` (see nanogpt/data/manifest.py). A complete directory needs neither
  network nor write permission.
- A lock per shard keeps two processes apart; files are whole even if the lock fails (see `Hub.fetch`).
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanogpt.console import human_bytes, new_table, progress, say
from nanogpt.data import official
from nanogpt.data.hub import Hub, RemoteFile, Report, disk_errors
from nanogpt.data.manifest import (
    DATA_SETS,
    MANIFEST,
    REPOSITORY,
    WORK_DIRECTORY,
    DataSet,
    Entry,
    ShardCheck,
    check_shard,
    file_sha256,
    known_sha256,
    pinned_sha256,
    read_manifest,
    shard_lock,
    update_manifest,
    verify_directory,
)
from nanogpt.data.shards import ShardError, read_count, train_name, val_name
from nanogpt.data.workers import Done, FatalError, Interrupted, Stop, Stopped, in_parallel
from nanogpt.environment import path_of
from nanogpt.errors import InputError, NanogptError, RunError

if TYPE_CHECKING:
    from rich.table import Table

FINEWEB = DATA_SETS["fineweb10B"]
DEFAULT_CHUNKS = 9
DEFAULT_WORKERS = 4  # a few connections fill a login node's share of the network; other users share the rest
DEFAULT_RETRIES = 6
CHECKSUM_ATTEMPTS = 2
OFFLINE_ADVICE = (
    "Compute nodes often have no internet: run prep-fineweb on the login node, or on any machine that shares this "
    "directory; HTTPS_PROXY names your site's proxy, SSL_CERT_FILE its certificates, HF_ENDPOINT a mirror of the hub"
)


@dataclass(frozen=True)
class Outcome:
    """One line of the final table."""

    name: str
    state: Literal["present", "downloaded", "refetched", "failed", "missing"]
    tokens: int | None = None


class DownloadError(RunError):
    """Some shards could not be fetched; `outcomes` has all of them."""

    def __init__(self, message: str, outcomes: list[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


def default_directory(data_set: str = "fineweb10B") -> Path:
    """Where the shards are, unless a flag says otherwise: NANOGPT_DATA, else `data/fineweb10B` here."""
    return path_of("NANOGPT_DATA") or Path("data") / data_set


def shard_names(chunks: int, stem: str = FINEWEB.stem) -> list[str]:
    """The validation shard and the first `chunks` training shards."""
    return [val_name(0, stem), *(train_name(index, stem) for index in range(1, chunks + 1))]


def download(
    directory: Path,
    *,
    data_set: DataSet = FINEWEB,
    chunks: int = DEFAULT_CHUNKS,
    workers: int = DEFAULT_WORKERS,
    retries: int = DEFAULT_RETRIES,
    verify: bool = False,
) -> list[Outcome]:
    """Make `directory` hold the validation shard and the first `chunks` training shards, all verified.

    Args:
        directory: created if missing.
        data_set: which of `DATA_SETS`.
        chunks: 1 to as many as the data set has.
        workers: parallel connections.
        retries: how many times in a row a request that brought nothing is repeated.
        verify: hash the files that are here even if their length and time of change are as recorded.

    Raises:
        InputError: an argument is out of bounds, or the directory cannot be made.
        DownloadError: some shards could not be fetched; the others are here.
        Interrupted: SIGINT or SIGTERM came. What has arrived is kept.
        RunError: no network, too little space, a file is not in the data set.
    """
    if not 1 <= chunks <= data_set.train_shards:
        raise InputError(
            f"--chunks, FINEWEB_CHUNKS: found {chunks}, {data_set.repository} has 1 to {data_set.train_shards} training"
            " shards"
        )
    if workers < 1 or retries < 0:
        raise InputError(f"workers: found {workers}, expected at least 1; retries: found {retries}, at least 0")
    names = shard_names(chunks, data_set.stem)
    stop = Stop()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory}: is not a directory and cannot be made one: {error.strerror}. Choose another with --dir or "
            "NANOGPT_DATA"
        ) from error

    with stop.on_signals():
        others = {entry.repository for entry in read_manifest(directory).values()} - {data_set.repository}
        if others:
            raise InputError(
                f"{directory}: holds shards of {others.pop()}, and {data_set.repository} has others of the same names;"
                " choose another directory with --dir or NANOGPT_DATA"
            )
        checks = _check_present(directory, names, workers, rehash=verify, stop=stop)
        for check in checks.values():
            if check.state == "corrupt":
                say(f"{directory / check.name}: corrupt: {check.detail}")
        if all(check.state == "valid" for check in checks.values()):
            return [Outcome(name, "present", checks[name].tokens) for name in names]

        present = sum(check.state == "valid" for check in checks.values())
        hub = Hub(
            data_set.repository,
            retries=retries,
            stop=stop,
            advice=f"{OFFLINE_ADVICE}. In {directory}, {present} of {len(names)} shards are present and verified",
        )
        wanted = [name for name in names if checks[name].state != "valid"]
        remote = _describe(hub, wanted, _revision(directory, names, data_set), workers)
        _refuse_others(directory, hub, remote)
        todo = _Todo(directory, hub, remote, frozenset(n for n in wanted if checks[n].state == "corrupt"), stop)
        todo.make_room()
        settled = todo.settle_all(wanted, workers)

    outcomes = [settled.get(name, Outcome(name, "present", checks[name].tokens)) for name in names]
    if todo.errors:
        raise DownloadError("; ".join(str(error) for error in todo.errors), outcomes)
    return outcomes


def outcomes_table(outcomes: list[Outcome]) -> Table:
    """A row for each file, and the total."""
    table = new_table("file", "tokens", "state", wrap=("state",))
    for one in outcomes:
        table.add_row(one.name, "-" if one.tokens is None else f"{one.tokens:,}", one.state)
    counts = Counter(one.state for one in outcomes)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    table.add_row("total", f"{sum(one.tokens or 0 for one in outcomes):,}", states)
    return table


class _Todo:
    """The shards that are missing, corrupt or not yet verified, and how to make each a verified file."""

    def __init__(
        self, directory: Path, hub: Hub, remote: dict[str, RemoteFile], corrupt: frozenset[str], stop: Stop
    ) -> None:
        self.directory = directory
        self.work = directory / WORK_DIRECTORY
        self.hub = hub
        self.remote = remote
        self.corrupt = corrupt
        self.stop = stop
        self.errors: list[NanogptError] = []
        try:
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{directory}: cannot be written to: {error.strerror}. Choose another with --dir or NANOGPT_DATA"
            ) from error

    def make_room(self) -> None:
        """Raise `RunError` if the file system has no room for what is still to come."""
        needed = 0
        for name, file in self.remote.items():
            with suppress(OSError):
                if name not in self.corrupt and (self.directory / name).stat().st_size == file.bytes:
                    continue
            have = 0
            with suppress(OSError):
                have = self._partial(name).stat().st_size
            needed += max(0, file.bytes - have)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise RunError(
                f"{self.directory}: {human_bytes(needed)} are needed and {human_bytes(free)} are free. Free some "
                "space, ask for fewer shards with --chunks, or point elsewhere with --dir or NANOGPT_DATA"
            )

    def settle_all(self, names: list[str], workers: int) -> dict[str, Outcome]:
        """Fetch and verify; failures are kept in `errors`. Raises `Interrupted`."""
        total = sum(file.bytes for file in self.remote.values())
        say(f"prep-fineweb: {len(names)} shards ({human_bytes(total)}) from {self.hub.repository} to {self.directory}")
        settled: dict[str, Outcome] = {}
        with progress("prep-fineweb", total, bytes_unit=True) as advance:
            meters = {name: _meter(advance) for name in names}
            # Shards that another process holds come last, so that two processes share the work.
            for wait in (False, True):
                left = [name for name in names if name not in settled]
                done = in_parallel(partial(self._settle, meters=meters, wait=wait), left, workers, self.stop)
                for name, one in zip(left, done, strict=True):
                    self._book(name, one, settled)
        return settled

    def _book(self, name: str, done: Done[Outcome | None], settled: dict[str, Outcome]) -> None:
        if done.error is not None:
            stopped = isinstance(done.error, Stopped)
            settled[name] = Outcome(name, "missing" if stopped else "failed")
            if not stopped:
                self.errors.append(done.error)
        elif done.result is not None:
            settled[name] = done.result

    def _settle(self, name: str, *, meters: dict[str, Report], wait: bool) -> Outcome | None:
        """Bring one shard to a verified file; None if another process is at it and `wait` is off."""
        path, file, report = self.directory / name, self.remote[name], meters[name]
        with shard_lock(self.work / f"{name}.lock", name, wait=wait, stop=self.stop) as mine:
            if not mine:
                return None
            entry = read_manifest(self.directory).get(name)
            check = check_shard(path, entry, rehash=name in self.corrupt, stop=self.stop)
            if check.state == "unverified":
                check = check_shard(path, self._as_entry(file), rehash=True, stop=self.stop)
            if check.state == "valid" and check.entry is not None:
                update_manifest(self.directory, {name: check.entry})
                report(file.bytes)
                say(f"{name}: present, verified")
                return Outcome(name, "present", check.tokens)
            refetch = check.state == "corrupt"
            if refetch:
                self._put_away(path, check, known=entry is not None)
            tokens = self._fetch(file, path, report)
            say(f"{name}: {'fetched again' if refetch else 'downloaded'}, {tokens:,} tokens, verified")
            return Outcome(name, "refetched" if refetch else "downloaded", tokens)

    def _put_away(self, path: Path, check: ShardCheck, *, known: bool) -> None:
        """Take a corrupt file's name away now, so that no run reads it while the good one is on its way.

        A file that prep-fineweb did not download may be someone's own text: it is renamed, not removed.
        """
        if known:
            say(f"{path.name}: corrupt ({check.detail}): removed, fetching it again")
            with disk_errors(path):
                path.unlink(missing_ok=True)
            return
        aside = path.with_name(f"{path.name}.replaced")
        say(f"{path.name}: not the hub's file ({check.detail}): kept as {aside.name}, fetching the hub's")
        with disk_errors(path):
            path.replace(aside)

    def _fetch(self, file: RemoteFile, path: Path, report: Report) -> int:
        """Download to the partial file, verify it, give it its name; returns its token count."""
        partial_path = self._partial(file.name)
        for attempt in range(1, CHECKSUM_ATTEMPTS + 1):
            self.hub.fetch(file, partial_path, report)
            try:
                # From the disk, not from what passed through memory: this also checks a resumed part and the disk.
                digest = file_sha256(partial_path, self.stop)
                if digest == file.sha256:
                    return self._accept(file, partial_path, path)
                partial_path.unlink()
            except FileNotFoundError:
                # Only where locks do not work: another process has finished this same partial file.
                check = check_shard(path, self._as_entry(file), rehash=True, stop=self.stop)
                if check.state == "valid" and check.tokens is not None:
                    return check.tokens
                continue
            except OSError as error:
                raise FatalError(f"{partial_path}: {error.strerror}. Run the same command again") from error
            report(0)
            last = attempt == CHECKSUM_ATTEMPTS
            say(
                f"{file.name}: what arrived has sha256 {digest}, but the hub's is {file.sha256}: thrown away"
                + ("" if last else "; fetching it again")
            )
        raise RunError(
            f"{file.name}: {CHECKSUM_ATTEMPTS} downloads did not have the hub's sha256 {file.sha256}: a proxy or "
            f"mirror on the way ({self.hub.endpoint}) may change the file. Try later, or from another network"
        )

    def _accept(self, file: RemoteFile, partial_path: Path, path: Path) -> int:
        try:
            tokens = read_count(partial_path)
        except ShardError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            partial_path.unlink(missing_ok=True)
            detail = str(error).removeprefix(f"{partial_path}: ")
            raise RunError(
                f"{file.name}: the hub's own file ({self.hub.endpoint}, {self.hub.repository}) is not a token shard:"
                f" {detail}"
            ) from error
        partial_path.replace(path)
        status = path.stat()
        entry = replace(self._as_entry(file), tokens=tokens, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
        update_manifest(self.directory, {file.name: entry})
        return tokens

    def _as_entry(self, file: RemoteFile) -> Entry:
        hub = self.hub
        return Entry(file.sha256, file.bytes, 0, 0, file.revision, None, hub.endpoint, hub.repository)

    def _partial(self, name: str) -> Path:
        return self.work / f"{name}.partial"


def _meter(advance: Report) -> Report:
    """Turn positions within one file into steps of the shared bar."""
    last = 0

    def report(position: int) -> None:
        nonlocal last
        if position != last:
            advance(position - last)
            last = position

    return report


def _revision(directory: Path, names: list[str], data_set: DataSet) -> str:
    """The revision that the shards here came from, so that they stay one set; else the pinned one, or the newest."""
    entries = {name: entry for name, entry in read_manifest(directory).items() if name in names}
    known = (entry.revision for name, entry in entries.items() if known_sha256(name, entry) == entry.sha256)
    return next(known, official.REVISION if data_set is FINEWEB else "main")


def _refuse_others(directory: Path, hub: Hub, remote: dict[str, RemoteFile]) -> None:
    """Raise `RunError` if the hub announces a different sha256 than the known one, before anything is downloaded.

    The known one is the package's, or for other shards the one in the manifest from the first download.
    """
    manifest, found = read_manifest(directory), []
    for name, file in remote.items():
        pinned = pinned_sha256(name, hub.repository)
        known = pinned or known_sha256(name, manifest.get(name))
        if known not in (None, file.sha256):
            of_manifest = f"{directory / MANIFEST} has, from its first download,"
            whose = "the data set's is" if pinned else of_manifest
            found.append(f"{name}: {hub.endpoint} announces sha256 {file.sha256}, {whose} {known}")
    if found:
        raise RunError(
            f"{'; '.join(found)}. These are not the shards of {hub.repository}; nothing was downloaded. Unset"
            " HF_ENDPOINT, or name another mirror"
        )


def _check_present(
    directory: Path, names: list[str], workers: int, *, rehash: bool, stop: Stop
) -> dict[str, ShardCheck]:
    """Check what is here, and update the manifest's times of change for files found unchanged."""
    manifest = read_manifest(directory)
    done = in_parallel(
        lambda name: check_shard(directory / name, manifest.get(name), rehash=rehash, stop=stop), names, workers, stop
    )
    checks: dict[str, ShardCheck] = {}
    for name, one in zip(names, done, strict=True):
        if one.result is None:
            raise one.error or RuntimeError("no result")
        checks[name] = one.result
    touched = {name: c.entry for name, c in checks.items() if c.entry is not None and c.entry != manifest[name]}
    if touched:
        with suppress(FatalError):  # a read-only directory is still a good one
            update_manifest(directory, touched)
    return checks


def _describe(hub: Hub, names: list[str], revision: str, workers: int) -> dict[str, RemoteFile]:
    """Size and checksum of each file; the first request finds out whether the hub can be reached at all.

    Raises:
        RunError: the first error, before anything is downloaded.
    """
    first = hub.first_contact(names[0], revision)

    def describe(name: str) -> RemoteFile:
        try:
            return hub.describe(name, first.revision)
        except RunError as error:
            if isinstance(error, Stopped):
                raise
            raise FatalError(str(error)) from error

    done = in_parallel(describe, names[1:], workers, hub.stop)
    for one in done:
        if one.error is not None and not isinstance(one.error, Stopped):
            raise one.error
    return {first.name: first} | {one.result.name: one.result for one in done if one.result is not None}


__all__ = [
    "DATA_SETS",
    "DEFAULT_CHUNKS",
    "DEFAULT_RETRIES",
    "DEFAULT_WORKERS",
    "REPOSITORY",
    "DownloadError",
    "Entry",
    "Interrupted",
    "Outcome",
    "ShardCheck",
    "check_shard",
    "default_directory",
    "download",
    "outcomes_table",
    "read_manifest",
    "shard_names",
    "verify_directory",
]
