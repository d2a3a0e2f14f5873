"""Ranks that agree on where to stop, and that notice a lost one: many watches in one process, over a real store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nanogpt.errors import InputError, RunError
from nanogpt.launch.awake import AwakeClock
from nanogpt.launch.signals import StopSignals
from nanogpt.launch.watchdog import Beat, Lost, Watchdog, connect
from nanogpt.runs.record import _started_ticks, this_process
from nanogpt.spec import WatchdogSpec

PATIENCE_S = 120.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """As torchrun's agent hosts one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield server


def in_threads(watches: list[Watchdog], body: object) -> list[object]:
    """`body(watch)` of each in a thread of its own; what it returned or raised, in their order."""
    found: list[object] = [None] * len(watches)

    def run(index: int) -> None:
        try:
            with watches[index]:
                found[index] = body(watches[index])  # type: ignore[operator]
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(watches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_all_stop_after_the_same_step_wherever_they_are(store: dist.TCPStore, seed: int) -> None:
    size, rng = 4, random.Random(seed)
    watches = [Watchdog(rank, size) for rank in range(size)]
    pace = [rng.uniform(0.002, 0.01) for _ in range(size)]
    barrier = threading.Barrier(size) if seed % 2 else None  # in step, as collectives hold them, or each at its pace
    asking, at = rng.randrange(size), rng.randrange(1, 20)

    def body(watch: Watchdog) -> int:
        for step in range(100_000):
            if barrier is not None:
                barrier.wait(PATIENCE_S)
            time.sleep(pace[watch.rank] * random.random())
            if watch.rank == asking and step == at:
                watch._signals._seen = "SIGUSR1"
            if reason := watch.boundary(step + 1):
                assert f"SIGUSR1 to rank {asking} on " in reason
                return step
        raise AssertionError("never asked to stop")

    steps = in_threads(watches, body)
    assert len(set(steps)) == 1, steps
    assert isinstance(steps[0], int) and steps[0] >= at


def test_a_rank_that_fails_ends_the_others_with_its_words(store: dist.TCPStore) -> None:
    watches = [Watchdog(rank, 3) for rank in range(3)]

    def body(watch: Watchdog) -> None:
        if watch.rank == 1:
            raise InputError("shard 7 is broken")
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            watch.boundary()
            time.sleep(0.01)

    first, second, third = in_threads(watches, body)
    assert isinstance(second, InputError)
    for error in (first, third):
        assert isinstance(error, InputError)
        assert str(error) == f"rank 1 on {os.uname().nodename} failed: shard 7 is broken"


def test_a_rank_that_stops_beating_is_named(store: dist.TCPStore) -> None:
    watch = Watchdog(0, 2, WatchdogSpec(silence_seconds=1.0))
    silent = Beat(5, Watchdog(1, 2)._own.process, "training", 41, 41)
    silent.process.host, silent.process.boot_id = "elsewhere", "another boot"
    with pytest.raises(Lost, match=r"rank 1 on elsewhere .* has been silent for 1 s in step 41"), watch:
        connect(10).set("beat/1", silent.encode())
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            watch.boundary()
            time.sleep(0.01)


def test_another_users_words_lead_to_no_log_and_to_no_process(store: dist.TCPStore, tmp_path: Path) -> None:
    """Who writes into the store says what rank 0 is, where its run is, and that it is silent."""
    diary, theirs = tmp_path / "diary", tmp_path / "theirs"
    diary.write_text("mine\n")
    theirs.mkdir()
    (theirs / "log.txt").symlink_to(diary)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as bystander:
        process = this_process()
        process.pid, process.started_ticks = bystander.pid, _started_ticks(bystander.pid)
        forged = Beat(5, process, "\x1b[2Jtraining", 1, 1, run=str(theirs), words="a\nb")
        watch = Watchdog(1, 2, WatchdogSpec(silence_seconds=4.0))
        with pytest.raises(Lost, match=r"has been silent for 4 s") as error, watch:
            connect(10).set("beat/0", forged.encode())
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until:
                watch.boundary()
                time.sleep(0.01)
        assert bystander.poll() is None
        bystander.kill()
    assert diary.read_text() == "mine\n"
    assert str(error.value).isprintable()


def test_the_log_of_a_lost_rank_is_told(store: dist.TCPStore, tmp_path: Path) -> None:
    """By the first rank that lives."""
    (tmp_path / "log.txt").write_text("step:1\n")
    silent = Beat(5, this_process(), "training", 41, 41, run=str(tmp_path))
    silent.process.host, silent.process.boot_id = "elsewhere", "another boot"
    watch = Watchdog(1, 2, WatchdogSpec(silence_seconds=4.0))
    with pytest.raises(Lost), watch:
        connect(10).set("beat/0", silent.encode())
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            watch.boundary()
            time.sleep(0.01)
    assert (tmp_path / "log.txt").read_text().startswith("step:1\nrun failed: rank 0 on elsewhere")


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"count": 1}', '{"process": {"pid": "x"}}'])
def test_what_is_no_beat_is_no_word_of_a_rank(store: dist.TCPStore, text: str) -> None:
    with pytest.raises(ValueError):
        Beat.decode(text.encode())
    watches = [Watchdog(rank, 2) for rank in range(2)]

    def body(watch: Watchdog) -> int:
        if watch.rank == 0:
            connect(10).set("beat/1", text)  # until rank 1's own comes over it
            watch._signals._seen = "SIGUSR1"
        for step in range(100_000):
            time.sleep(0.01)
            if watch.boundary(step + 1):
                return step
        raise AssertionError("never asked to stop")

    first, second = in_threads(watches, body)
    assert isinstance(first, int) and first == second


def test_time_in_which_a_process_stands_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    clock = AwakeClock(1.0)
    began = clock.now()
    at += 0.5
    assert clock.now() - began == 0.5
    at += 3600
    assert clock.now() - began == clock.now() - began == 1.5


def test_a_suspension_while_the_store_is_asked_does_not_count(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By anybody: neither who waits for an answer, nor who has been in a step since before."""
    asleep, monotonic, exchange = [0.0], time.monotonic, Watchdog._exchange
    monkeypatch.setattr("nanogpt.launch.awake.time.monotonic", lambda: monotonic() + asleep[0])
    limits = WatchdogSpec(silence_seconds=20, step_seconds=20)
    watches, rounds = [Watchdog(rank, 2, limits) for rank in range(2)], {0: 0, 1: 0}

    def asked(watch: Watchdog, *arguments: Any) -> None:
        exchange(watch, *arguments)
        rounds[watch.rank] += 1
        if watch.rank == 0 and rounds[0] == 3:
            asleep[0] += 3600

    monkeypatch.setattr(Watchdog, "_exchange", asked)
    monkeypatch.setattr(Watchdog, "_kill_silent_peers", lambda watch: None)  # this very process

    def body(watch: Watchdog) -> None:
        watch.training(0)
        while min(rounds.values()) < 6:
            time.sleep(0.05)
            watch.check()

    assert in_threads(watches, body) == [None, None]


def test_hanging_is_told_from_silence_and_names_who_is_behind(store: dist.TCPStore) -> None:
    limits = WatchdogSpec(step_seconds=2.0)
    watches = [Watchdog(rank, 2, limits) for rank in range(2)]
    release = threading.Event()

    steps = (8, 5)

    def body(watch: Watchdog) -> None:
        for step in range(steps[watch.rank]):
            watch.boundary(step + 1)
        other = 1 - watch.rank
        until = time.monotonic() + PATIENCE_S
        while other not in watch._peers or watch._peers[other].segment < steps[other]:  # heard of, at its last step
            assert time.monotonic() < until
            time.sleep(0.01)
        watch.training(steps[watch.rank])
        while not release.wait(0.05):
            watch.check()  # a collective in which nothing happens, seen from the outside

    errors = in_threads(watches, body)
    assert any("hangs: 2 s in step " in str(error) for error in errors), errors
    assert all("behind: rank 1 on " in str(error) for error in errors), errors


def test_what_a_collective_says_is_explained(store: dist.TCPStore) -> None:
    watches = [Watchdog(rank, 2) for rank in range(2)]

    def body(watch: Watchdog) -> None:
        if watch.rank == 1:
            raise ValueError("a bug")
        raise watch.explain(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))

    first, second = in_threads(watches, body)
    assert isinstance(second, ValueError)
    assert isinstance(first, Lost)
    assert str(first).endswith(" failed: ValueError: a bug")
    own = ValueError("a bug of its own")
    assert watches[0].explain(own) is own


def test_one_process_has_signals_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "TCPStore", None)  # a call would fail
    before = threading.active_count()
    with Watchdog() as watch:
        assert threading.active_count() == before
        assert watch.boundary(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.boundary(2) == "SIGTERM"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.boundary(3) == "SIGTERM"  # the first one counts
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_while_one_looks_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("nanogpt.launch.signals.asked_to_stop", asked_to_stop)
    with StopSignals() as signals:
        assert signals.seen() == "SIGTERM"
        assert signals.seen() == "SIGTERM"


def test_usr1_does_not_reach_what_the_rank_starts() -> None:
    """The compiler's workers, which a batch system signals too."""
    with StopSignals() as signals:
        child = subprocess.Popen([sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert child.stdout and child.stdout.readline()
        child.send_signal(signal.SIGUSR1)
        child.communicate(timeout=PATIENCE_S)
        assert child.returncode == 0
        assert signals.seen() is None


def test_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        connect(1)
    assert issubclass(Lost, RunError)
