"""prep-fineweb and the directory: what is here already, the disk, interruption, and other processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer, shard_bytes
from prep_runs import COMMAND, ONE, SHARD_BYTES, THREE, TWO, VAL, Here, Prep, until, whole

from nanogpt.data import fineweb, manifest, workers
from nanogpt.data.fineweb import read_manifest, verify_directory
from nanogpt.data.manifest import update_manifest
from nanogpt.data.shards import read_count

# What is here


def flip(path: Path, *, keep_time: bool = False, unseen: bool = False) -> None:
    """Change one token of a shard; `keep_time` sets its time back, `unseen` is a disk that loses a bit by itself."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))

    def set_time() -> bool:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time or unseen else 1_000_000_000)))
        return path.stat().st_ctime_ns != status.st_ctime_ns  # a clock that ticks every few milliseconds

    until(set_time)
    if unseen:
        entry = read_manifest(path.parent)[path.name]
        update_manifest(path.parent, {path.name: replace(entry, ctime_ns=path.stat().st_ctime_ns)})


def test_corrupt_files_are_fetched_again(hub: HubServer, here: Here, filled: Path) -> None:
    data = filled
    flip(data / ONE)
    (data / TWO).write_bytes(hub.files[TWO][:70_000])
    run = here.run(data, chunks=3)
    assert run.code == 0, run.err
    assert run.states() == {VAL: "present", ONE: "refetched", TWO: "refetched", THREE: "present"}
    assert f"{ONE}: corrupt (sha256 is " in run.err
    assert f"{TWO}: corrupt (the header promises 50000 tokens" in run.err
    assert whole(hub, data, VAL, ONE, TWO, THREE)
    assert {one.name for one in hub.seen} == {ONE, TWO}


def test_verify_flag_hashes_files_that_look_unchanged(hub: HubServer, here: Here, filled: Path) -> None:
    data = filled
    flip(data / ONE, unseen=True)
    assert here.run(data).states()[ONE] == "present"  # this is what --verify is for
    run = here.run(data, "--verify")
    assert run.states() == {VAL: "present", ONE: "refetched"}
    assert whole(hub, data, ONE)


def test_a_time_that_was_set_back_hides_nothing(hub: HubServer, here: Here, filled: Path) -> None:
    flip(filled / ONE, keep_time=True)
    assert {check.name for check in verify_directory(filled) if check.state == "corrupt"} == {ONE}
    assert here.run(filled).states() == {VAL: "present", ONE: "refetched"}
    assert whole(hub, filled, ONE)


def test_a_manifest_of_an_earlier_version_is_taken_after_hashing(hub: HubServer, here: Here, filled: Path) -> None:
    path = filled / "manifest.json"
    kept = json.loads(path.read_text())
    old = {
        name: {key: entry[key] for key in ("sha256", "bytes", "tokens", "mtime_ns", "revision")}
        for name, entry in kept["shards"].items()
    }
    path.write_text(json.dumps({**kept, "shards": old}))
    assert here.run(filled, chunks=3).states() == dict.fromkeys([VAL, ONE, TWO, THREE], "present")
    assert hub.seen == []
    now = read_manifest(filled)
    assert {name: entry.ctime_ns for name, entry in now.items()} == {
        name: (filled / name).stat().st_ctime_ns for name in now
    }


def test_corrupt_file_is_named_even_without_network(hub: HubServer, prep: Prep, filled: Path) -> None:
    data = filled
    flip(data / ONE)
    prep.env["HF_HUB_OFFLINE"] = "1"
    run = prep.run()
    assert run.code == 1
    assert f"{data / ONE}: corrupt" in run.err


def test_copied_directory_needs_no_network(hub: HubServer, here: Here, filled: Path, tmp_path: Path) -> None:
    data = filled
    copy = tmp_path / "copy"
    shutil.copytree(data, copy, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".prep-fineweb"))
    assert here.run(copy).states() == {VAL: "present", ONE: "present"}
    assert hub.seen == []
    times = {name: entry.mtime_ns for name, entry in read_manifest(copy).items() if name in (VAL, ONE)}
    assert times == {name: (copy / name).stat().st_mtime_ns for name in (VAL, ONE)}


def test_shards_from_elsewhere_are_taken_if_right_and_kept_aside_if_not(hub: HubServer, here: Here, data: Path) -> None:
    data.mkdir()
    (data / ONE).write_bytes(hub.files[ONE])
    own_text = shard_bytes(77)
    (data / TWO).write_bytes(own_text)
    run = here.run(data, chunks=2)
    assert run.states() == {VAL: "downloaded", ONE: "present", TWO: "refetched"}
    assert not hub.gets(ONE)
    assert whole(hub, data, VAL, ONE, TWO)
    assert (data / f"{TWO}.replaced").read_bytes() == own_text
    assert f"kept as {TWO}.replaced" in run.err


def test_damaged_manifest_is_rebuilt(hub: HubServer, here: Here, filled: Path) -> None:
    data = filled
    (data / "manifest.json").write_text('{"shards": {"')
    assert here.run(data).states() == {VAL: "present", ONE: "present"}
    assert {one.method for one in hub.seen} == {"HEAD"}
    assert set(read_manifest(data)) == {VAL, ONE}


def test_verify_directory(hub: HubServer, prep: Prep, filled: Path) -> None:
    data = filled
    (data / VAL).unlink()
    flip(data / ONE)
    flip(data / TWO, unseen=True)
    (data / "fineweb_train_000007.bin").write_bytes(shard_bytes(7, 10))
    (data / "fineweb_train_000008.bin").write_bytes(b"no shard")
    before = sorted(path.stat().st_mtime_ns for path in data.rglob("*"))

    def states(*, rehash: bool) -> dict[str, str]:
        return {check.name: check.state for check in verify_directory(data, rehash=rehash)}

    expected = {
        ONE: "corrupt",
        TWO: "valid",
        THREE: "valid",
        "fineweb_train_000007.bin": "unverified",
        "fineweb_train_000008.bin": "corrupt",
        VAL: "missing",
    }
    assert states(rehash=False) == expected
    assert states(rehash=True) == expected | {TWO: "corrupt"}
    three = next(check for check in verify_directory(data) if check.name == THREE)
    assert (three.tokens, three.sha256) == (50_000, hashlib.sha256(hub.files[THREE]).hexdigest())
    assert sorted(path.stat().st_mtime_ns for path in data.rglob("*")) == before
    assert verify_directory(data / "none") == []


# Disk


def test_space_is_checked_before(hub: HubServer, here: Here, data: Path) -> None:
    hub.sizes[ONE] = 10**17
    run = here.run(data)
    assert run.code == 1
    assert re.search(r"100000\.0 TB are needed and [\d.]+ \w+ are free", run.err)
    assert "--dir" in run.err
    assert not [one for one in hub.seen if one.method == "GET"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs; the file size limit is tested in its place")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_disk_that_fills_up_meanwhile(hub: HubServer, small_disk: Path) -> None:
    prep = Prep(hub, small_disk)
    ballast = small_disk / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        os.truncate(ballast, ballast.stat().st_size - 40960)

    hub.fault("GET", VAL, Fault(before=fill))
    run = prep.run("--workers", "1")
    assert run.code == 1
    assert "No space left on device" in run.err
    assert set(run.states().values()) <= {"failed", "missing"}
    kept = prep.partial(VAL).stat().st_size
    assert 0 < kept < SHARD_BYTES

    run = prep.run()
    assert run.code == 1
    assert "are needed and" in run.err
    ballast.unlink()
    run = prep.run()
    assert run.code == 0, run.err
    assert hub.gets(VAL)[-1].range == f"bytes={kept}-"
    assert whole(hub, small_disk, VAL, ONE)


def test_file_size_limit(hub: HubServer, prep: Prep, data: Path) -> None:
    limit = 60_000
    run = prep.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert run.code == 1
    assert "cannot be written: File too large" in run.err
    assert "the same command again" in run.err
    kept = {name: prep.partial(name).stat().st_size for name in (VAL, ONE) if prep.partial(name).exists()}
    assert limit in kept.values()
    assert prep.run().code == 0
    assert whole(hub, data, VAL, ONE)


# Interruption


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_run_is_continued_by_the_next(
    hub: HubServer, prep: Prep, data: Path, number: signal.Signals, code: int
) -> None:
    hub.fault("GET", ONE, Fault(pause_after=40_000))
    run = prep.start()
    prep.until_partial(ONE, 40_000)
    until((data / VAL).exists)
    run.process.send_signal(number)
    run.wait()  # the hub would never continue
    assert run.code == code
    assert not (data / ONE).exists()
    if number != signal.SIGKILL:
        assert run.err.splitlines()[-1].startswith(f"prep-fineweb: interrupted ({number.name})")

    again = prep.run()
    assert again.code == 0, again.err
    assert again.states() == {VAL: "present", ONE: "downloaded"}
    assert [one.range for one in hub.gets(ONE)] == [None, "bytes=40000-"]
    assert len(hub.gets(VAL)) == 1
    assert whole(hub, data, VAL, ONE)


def test_interrupt_during_a_wait(hub: HubServer, prep: Prep) -> None:
    hub.always("HEAD", VAL, Fault(status=429, headers={"Retry-After": "200"}))
    run = prep.start()
    until(lambda: len(hub.seen) > 0)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    run.wait()
    assert run.code == 130  # long before the hub would answer


# Company


def test_two_at_once_share_the_work(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("GET", ONE, Fault(pause_after=40_000))
    first = prep.start("--workers", "1", chunks=2)
    until(lambda: len(hub.gets(VAL)) == 1)
    second = prep.start("--workers", "1", chunks=2)
    prep.until_partial(ONE, 40_000)
    until((data / TWO).exists)
    time.sleep(0.3)
    hub.release.set()
    for run in (first.wait(), second.wait()):
        assert run.code == 0, run.err
        assert set(run.states()) == {VAL, ONE, TWO}
    assert whole(hub, data, VAL, ONE, TWO)
    assert [len(hub.gets(name)) for name in (VAL, ONE, TWO)] == [1, 1, 1]
    assert set(read_manifest(data)) == {VAL, ONE, TWO}


def test_two_at_once_where_locks_do_nothing(hub: HubServer, prep: Prep, data: Path) -> None:
    """As on some Lustre and NFS mounts, where every node gets every lock."""
    lockless = [sys.executable, "-c", f"import fcntl; fcntl.flock = lambda *_: None; {COMMAND[-1]}"]
    hub.fault("GET", ONE, Fault(pause_after=40_000), Fault(pause_after=30_000))
    runs = [prep.start(command=lockless) for _ in range(2)]
    until(lambda: sum(one.sent > 0 for one in hub.gets(ONE)) == 2)
    time.sleep(0.2)
    hub.release.set()
    for run in runs:
        assert run.wait().code == 0, run.err
    assert whole(hub, data, VAL, ONE)
    assert len(hub.gets(ONE)) == 2


def test_another_process_takes_the_finished_partial_file(
    hub: HubServer, here: Here, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_file = fineweb.file_sha256

    def hash_and_lose(path: Path, stop: workers.Stop | None = None) -> str:
        digest = hash_file(path, stop)
        path.replace(data / path.name.removesuffix(".partial"))
        return digest

    monkeypatch.setattr(fineweb, "file_sha256", hash_and_lose)
    run = here.run(data)
    assert (run.code, run.states()) == (0, {VAL: "downloaded", ONE: "downloaded"}), run.err
    assert whole(hub, data, VAL, ONE)


def test_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    inside: list[str] = []
    lock = tmp_path / "shard.lock"

    def hold(name: str) -> None:
        with manifest.shard_lock(lock, name, wait=True, stop=None):
            inside.append(name)
            time.sleep(0.2)
            inside.append(name)

    with manifest.shard_lock(lock, "first", wait=True, stop=None) as held:
        assert held
        with manifest.shard_lock(lock, "second", wait=False, stop=None) as also:
            assert not also
    threads = [threading.Thread(target=hold, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside[0::2] == inside[1::2]
    assert sorted(inside) == list("aabbcc")


def test_in_parallel_shows_an_error_of_ours() -> None:
    def work(item: int) -> int:
        return 10 // item

    with pytest.raises(ZeroDivisionError):
        workers.in_parallel(work, [1, 0, 2], 2, workers.Stop())
    assert [one.result for one in workers.in_parallel(work, [1, 2, 5], 2, workers.Stop())] == [10, 5, 2]


def test_served_shards_are_shards(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / ONE).write_bytes(hub.files[ONE])
    assert read_count(tmp_path / ONE) == 50_000
