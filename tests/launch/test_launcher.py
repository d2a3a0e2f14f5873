"""The launcher with real processes as ranks: what it leaves, what it survives, what it hands on."""

from __future__ import annotations

import functools
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import launched
import pynvml
import pytest
from launched import children, descendants, lives, read
from made_nvml import MadeNvml

from nanogpt.errors import REQUEUE_EXIT_CODE, InputError
from nanogpt.launch import launcher

HERE = Path(__file__).parent
PATIENCE_S = 100.0
wait_until = functools.partial(launched.wait_until, within_s=PATIENCE_S)

SLEEPS = "import time; print('up', flush=True); time.sleep(1000)"
# Ends as a run does that is asked to stop.
LISTENS = (
    "import sys, time; from nanogpt.launch.signals import StopSignals; signals = StopSignals(); signals.__enter__();"
    "print('up', flush=True)\nwhile not signals.seen(): time.sleep(0.02)\nprint('heard', signals.seen()); sys.exit(75)"
)


class Alone:
    """A launcher of `processes` ranks that run `code`; its temporary directory is `place`."""

    def __init__(self, place: Path, code: str, *options: str, processes: int = 1, alone: bool = True):
        self.place = place
        where = ["--standalone"] if alone else []
        self.process = subprocess.Popen(
            [sys.executable, HERE / "launcher_alone.py", code, *where, f"--nproc-per-node={processes}", *options, "--"],
            env={
                **os.environ,
                "TMPDIR": str(place),
                "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
                "TEST_SERVE": "" if alone else "yes",
            },
            stdout=(place / "out").open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.seen: list[int] = []

    @property
    def output(self) -> str:
        return (self.place / "out").read_text()

    def ranks(self) -> list[int]:
        self.seen = [*dict.fromkeys([*self.seen, *children(self.process.pid)])]
        return self.seen

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, lambda: self.output)

    def wait_for_ranks(self, count: int = 1) -> None:
        self.until(lambda: self.output.count("up\n") == count)
        assert len(self.ranks()) == count

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self.until(lambda: not any(map(lives, self.seen)))
        return code

    @property
    def left(self) -> set[str]:
        return {path.name for path in self.place.iterdir()} - {"out"}


@contextmanager
def ended(launcher: Alone) -> Iterator[Alone]:
    try:
        yield launcher
    finally:
        for pid in (launcher.process.pid, *launcher.ranks(), *descendants(launcher.process.pid)):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.process.wait(PATIENCE_S)


def started(pid: int) -> str | None:
    """When, which tells a process from a later one of its number; None: it is gone."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19] if lives(pid) else None


def state(pid: int) -> str:
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]


# --- what is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finished", "failed", "SIGTERM", "SIGHUP", "second Ctrl-C"])
def test_nothing_is_left(tmp_path: Path, how: str) -> None:
    code = {"finished": "print('up')", "failed": "import sys; print('up'); sys.exit(1)", "SIGTERM": LISTENS}
    with ended(Alone(tmp_path, code.get(how, SLEEPS))) as launcher:
        if how in {"SIGTERM", "SIGHUP", "second Ctrl-C"}:
            launcher.wait_for_ranks()
            (directory,) = tmp_path.glob("nanogpt-launch-*")
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            for number in {"SIGTERM": [15], "SIGHUP": [1], "second Ctrl-C": [2, 2]}[how]:
                launcher.process.send_signal(number)
                launcher.until(lambda: launcher.process.poll() is not None or (directory / "stop").exists())
        expected = {"finished": 0, "failed": 1, "SIGTERM": REQUEUE_EXIT_CODE, "SIGHUP": 129, "second Ctrl-C": 130}
        assert launcher.end() == expected[how], launcher.output
        assert launcher.left == set()


def test_what_a_killed_launcher_leaves_goes_at_the_next_start(tmp_path: Path) -> None:
    with ended(Alone(tmp_path, SLEEPS)) as launcher:
        launcher.wait_for_ranks()
        (directory,) = launcher.left
        launcher.process.kill()
        launcher.end()
        assert launcher.left == {directory}
    trap, target = tmp_path / f"nanogpt-launch-{os.geteuid()}-link", tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    trap.symlink_to(target)
    with ended(Alone(tmp_path, "print('up')")) as launcher:
        assert launcher.end() == 0, launcher.output
        assert launcher.left == {trap.name, "target"}
        assert (target / "kept").exists()


# --- who outlives whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["a rank's process exists", "it runs"])
def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path, moment: str) -> None:
    """From the first instant."""
    with ended(Alone(tmp_path, SLEEPS, processes=2)) as launcher:
        if moment == "it runs":
            launcher.wait_for_ranks(2)
        launcher.until(launcher.ranks)
        launcher.process.kill()
        launcher.ranks()
        assert launcher.end() == -signal.SIGKILL
        assert launcher.seen


def test_a_parent_that_is_gone_before_the_death_signal_is_noticed() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    tied = [sys.executable, "-m", "nanogpt.launch.tied", str(gone.pid), "this"]
    assert subprocess.run(tied, capture_output=True, timeout=PATIENCE_S, check=False).returncode == -signal.SIGKILL


def test_helpers_that_compile_ahead_die_with_the_run() -> None:
    """Although another process holds the pipe through which the run speaks to them, and so does not close it."""
    code = (
        "import subprocess, time; from nanogpt.training.compile_helper import HelperServer;"
        "server = HelperServer();"
        "other = subprocess.Popen(['sleep', '1000'], pass_fds=[server._process.stdin.fileno()]);"
        "print(server._process.pid, other.pid, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as run:
        assert run.stdout is not None
        server, other = map(int, run.stdout.readline().split())
        before = started(server)
        wait_until(lambda: "libtorch" in read(f"/proc/{server}/maps"))  # it has long begun
        run.kill()
    try:
        wait_until(lambda: started(server) != before, lambda: read(f"/proc/{server}/status"))
    finally:
        os.kill(other, signal.SIGKILL)


def test_what_a_killed_rank_had_started_ends_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, time; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); print('up', flush=True);"
        " time.sleep(1000)"
    )
    with ended(Alone(tmp_path, code)) as launcher:
        launcher.wait_for_ranks()
        (started,) = descendants(launcher.process.pid)[1:]
        os.kill(launcher.seen[0], signal.SIGKILL)
        assert launcher.end() == 1
        wait_until(lambda: not lives(started))
        assert f"rank 0 on {socket.gethostname()} was killed by SIGKILL" in launcher.output


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_launcher_that_is_stopped_and_continued_goes_on(tmp_path: Path) -> None:
    """Nothing has been signalled to it: not SIGUSR1, as sigtimedwait would have it."""
    with ended(Alone(tmp_path, LISTENS)) as launcher:
        launcher.wait_for_ranks()
        for _ in range(3):
            launcher.process.send_signal(signal.SIGSTOP)
            launcher.until(lambda: state(launcher.process.pid) == "T")
            time.sleep(0.6)  # longer than it waits between two looks
            launcher.process.send_signal(signal.SIGCONT)
            launcher.until(lambda: state(launcher.process.pid) != "T")
        (directory,) = launcher.left
        time.sleep(0.3)
        assert not (tmp_path / directory / "stop").exists()
        launcher.process.send_signal(signal.SIGUSR1)
        assert launcher.end() == REQUEUE_EXIT_CODE
        assert "heard SIGUSR1 to the launcher" in launcher.output


def test_a_rank_that_is_stopped_and_continued_has_heard_nothing() -> None:
    code = (
        "import time; from nanogpt.launch.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('up', flush=True)\n"
        "    while not (seen := signals.seen()): time.sleep(0.01)\n"
        "    print(seen, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout is not None and rank.stdout.readline() == "up\n"
            for _ in range(5):
                rank.send_signal(signal.SIGSTOP)
                wait_until(lambda: state(rank.pid) == "T")
                rank.send_signal(signal.SIGCONT)
                wait_until(lambda: state(rank.pid) != "T")
            rank.send_signal(signal.SIGTERM)
            assert rank.stdout.readline() == "SIGTERM\n"
        finally:
            rank.kill()


def test_ctrl_z_stops_the_ranks_and_fg_lets_them_go_on(tmp_path: Path) -> None:
    with ended(Alone(tmp_path, LISTENS, processes=2)) as launcher:
        launcher.wait_for_ranks(2)
        everybody = [launcher.process.pid, *launcher.seen]
        launcher.process.send_signal(signal.SIGTSTP)
        launcher.until(lambda: all(state(pid) == "T" for pid in everybody))
        launcher.process.send_signal(signal.SIGCONT)
        launcher.until(lambda: not any(state(pid) == "T" for pid in everybody))
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end() == REQUEUE_EXIT_CODE, launcher.output


def test_a_long_suspension_of_all_costs_no_rank_its_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks were stopped first, and are seen stopped once more when the launcher continues."""
    monkeypatch.setenv("TEST_STOPPED_S", "3")
    with ended(Alone(tmp_path, LISTENS)) as launcher:
        launcher.wait_for_ranks()
        (rank,) = launcher.seen
        os.kill(rank, signal.SIGSTOP)
        time.sleep(0.5)  # the launcher has seen it
        launcher.process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        launcher.process.send_signal(signal.SIGCONT)
        launcher.until(lambda: state(launcher.process.pid) != "T")
        time.sleep(0.5)  # it has looked
        os.kill(rank, signal.SIGCONT)
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end() == REQUEUE_EXIT_CODE, launcher.output


def test_a_rank_that_stays_stopped_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_STOPPED_S", "1")
    with ended(Alone(tmp_path, SLEEPS)) as launcher:
        launcher.wait_for_ranks()
        os.kill(launcher.seen[0], signal.SIGSTOP)
        assert launcher.end() == 1
        assert f"rank 0 on {socket.gethostname()} (process {launcher.seen[0]}) has been stopped for " in launcher.output


def test_ranks_have_their_grace(tmp_path: Path) -> None:
    with ended(Alone(tmp_path, SLEEPS, "--grace=0.5")) as launcher:
        launcher.wait_for_ranks()
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end() == 1
        assert "has not ended 0 s after SIGTERM (--grace): killed" in launcher.output


def test_under_nohup_a_hangup_means_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = Alone(tmp_path, LISTENS)
    finally:
        signal.signal(signal.SIGHUP, before)
    with ended(launcher):
        launcher.wait_for_ranks()
        launcher.process.send_signal(signal.SIGHUP)
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end() == REQUEUE_EXIT_CODE, launcher.output


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_where_one_rank_fails_the_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ENDING_S", "0.5")
    code = f"import os, sys; print('up', flush=True); sys.exit(3) if os.environ['RANK'] == '1' else None; {SLEEPS}"
    with ended(Alone(tmp_path, code, processes=2)) as launcher:
        assert launcher.end() == 1, launcher.output


def test_what_ranks_are_told(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = f"import os, sys; sys.stdout.write(' '.join(os.environ[name] for name in {names}) + '\\n')"  # one write
    with ended(Alone(tmp_path, code, processes=2)) as launcher:
        assert launcher.end() == 0, launcher.output
        assert sorted(launcher.output.splitlines()) == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_ranks_are_bound_to_the_cpus_near_their_gpus(
    nvml: MadeNvml, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = sorted(os.sched_getaffinity(0))
    near = [mine[0], mine[-1]]
    sets = [[(1 << cpu) >> 64 * word & 2**64 - 1 for word in range(cpu // 64 + 1)] for cpu in near]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", lambda index, size: sets[index])
    waits = "import os, time\nwhile len(os.sched_getaffinity(0)) > 1: time.sleep(0.01)\n"
    says = "os.write(1, f\"{os.environ['RANK']} {min(os.sched_getaffinity(0))}\\n\".encode())"
    monkeypatch.setattr(launcher, "tied_command", lambda *_: [sys.executable, "-c", waits + says])
    monkeypatch.setenv("NANOGPT_NUMA", "bind")
    nvml.show("NVIDIA H200", "NVIDIA H200")
    assert launcher.launch(["--standalone", "--nproc-per-node=2", "--", "demo"]) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"0 {near[0]}", f"1 {near[1]}"]
    assert f"CPUs near each rank's GPU: 1, 1, of {len(mine)}" in err
    monkeypatch.setenv("NANOGPT_NUMA", "yes")
    with pytest.raises(InputError, match="NANOGPT_NUMA: found 'yes', expected bind or off"):
        launcher.launch(["--standalone", "--nproc-per-node=2", "--", "demo"])
