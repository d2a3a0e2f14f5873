"""Who writes a run: one process of those that want to, on whatever host, and another one once that is gone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from nanogpt.errors import InputError, Interrupted
from nanogpt.runs import claim
from nanogpt.runs.claim import CLAIMS_NAME, ClaimFile, RunClaim
from nanogpt.runs.directory import write_whole
from nanogpt.runs.record import Process, Slurm, utc_now

FOR_EVER = 1e9

CLAIMER = """
import sys
from nanogpt.errors import InputError
from nanogpt.runs import claim
from pathlib import Path
claim.BEAT_S = float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    with claim.RunClaim(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""


class Claimer:
    """A process that claims a run when told to, and holds it until told to end."""

    def __init__(self, run: Path, beat_s: float = 10.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(run), str(beat_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        return self._stream("stdout").readline().strip()

    def ready(self) -> Claimer:
        """Once it has imported what it needs."""
        assert self.answer() == "ready"
        return self

    def go_on(self) -> None:
        print(file=self._stream("stdin"), flush=True)

    def _stream(self, name: str) -> IO[str]:
        stream: IO[str] = getattr(self.process, name)
        return stream


@pytest.fixture
def claimers(tmp_path: Path) -> Iterator[list[Claimer]]:
    started = [Claimer(tmp_path) for _ in range(4)]
    yield started
    for claimer in started:
        claimer.process.kill()
        claimer.process.communicate()


def elsewhere(run: Path, number: int = 1, **fields: Any) -> Path:
    """A claim of a process that cannot be asked from here."""
    (run / CLAIMS_NAME).mkdir(exist_ok=True)
    path = run / CLAIMS_NAME / f"{number:06d}.json"
    there = ClaimFile(process=Process(pid=77, host="node7", boot_id="another"), time=utc_now(), **fields)
    write_whole(path, there.model_dump_json())
    return path


def test_of_several_at_once_one_gets_it_and_of_those_after_its_death_one(claimers: list[Claimer]) -> None:
    for _ in range(2):
        for claimer in claimers:
            claimer.ready()
        for claimer in claimers:
            claimer.go_on()
        answers = [claimer.answer() for claimer in claimers]
        assert sorted(answer == "won" for answer in answers) == [False] * (len(claimers) - 1) + [True], answers
        winner = claimers[answers.index("won")]
        told = f"process {winner.process.pid} on {os.uname().nodename} is still writing it, and two would corrupt"
        assert all(told in answer for answer in answers if answer != "won"), answers
        run = Path(winner.process.args[3])  # type: ignore[index, arg-type]
        winner.process.send_signal(signal.SIGKILL)
        winner.process.wait()
        for claimer in claimers:
            claimer.process.kill()
            claimer.process.communicate()
        claimers[:] = [Claimer(run) for _ in range(3)]


def test_what_is_released_can_be_had_and_a_second_claim_of_a_process_is_part_of_the_first(tmp_path: Path) -> None:
    other = Claimer(tmp_path).ready()
    with RunClaim(tmp_path):
        with RunClaim(tmp_path):
            pass
        other.go_on()
        assert "is still writing it" in other.answer()  # the inner one has released nothing
    with RunClaim(tmp_path):
        pass
    other.process.communicate()


@pytest.mark.parametrize("written", [True, False])
def test_one_elsewhere_that_gives_signs_of_life_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], written: bool
) -> None:
    monkeypatch.setattr(claim, "WATCH_S", FOR_EVER)
    path = elsewhere(tmp_path)
    if not written:
        path.write_text("")  # where there are no links, between its making and its writing
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    who = "process 77 on node7" if written else "an unknown process"
    try:
        with pytest.raises(InputError, match=f"{who} is still writing it"), RunClaim(tmp_path):
            pass
    finally:
        over.set()
        thread.join()
    assert f"{who} holds or held it, and cannot be asked from here" in capsys.readouterr().err


def test_one_elsewhere_that_gives_none_is_taken_over_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH_S", 0.1)
    elsewhere(tmp_path)
    with RunClaim(tmp_path):
        own = ClaimFile.model_validate_json((tmp_path / CLAIMS_NAME / "000002.json").read_bytes())
        assert own.process.pid == os.getpid()


def test_one_elsewhere_that_releases_it_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH_S", FOR_EVER)
    elsewhere(tmp_path)
    asked = iter([None, None])

    def release() -> str | None:
        if next(asked, "once") == "once":
            elsewhere(tmp_path, released=True)
        return None

    with RunClaim(tmp_path, asked=release):
        pass


def test_a_signal_ends_the_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH_S", FOR_EVER)
    elsewhere(tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM: the run was not resumed"), RunClaim(tmp_path, lambda: "SIGTERM"):
        pass


@pytest.mark.parametrize(("job", "restarts", "taken"), [("5", 1, True), ("5", 0, False), ("6", 1, False)])
def test_a_requeued_job_goes_on_with_its_own_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: int, taken: bool
) -> None:
    monkeypatch.setattr(claim, "WATCH_S", FOR_EVER)
    elsewhere(tmp_path, slurm=Slurm(job_id="5", restart_count=0))
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    if taken:
        with RunClaim(tmp_path):
            pass
    else:
        with pytest.raises(Interrupted), RunClaim(tmp_path, lambda: "watched"):
            pass


def test_a_holder_that_comes_back_too_late_ends(tmp_path: Path) -> None:
    late = Claimer(tmp_path, beat_s=0.05).ready()
    late.go_on()
    assert late.answer() == "won"
    elsewhere(tmp_path, number=2)
    assert late.process.wait(60) == 1
    assert "process 77 on node7 took the run over" in late.process.communicate()[1]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    other = Claimer(tmp_path).ready()
    with RunClaim(tmp_path):
        other.go_on()
        assert "is still writing it" in other.answer()
    other.process.communicate()
    assert [path.name for path in (tmp_path / CLAIMS_NAME).iterdir()] == ["000001.json"]
