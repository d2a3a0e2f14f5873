"""What is around the scripts in slurm/: the site's file, links, proxies, TMPDIR, signals, other users."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from other_user import ME, as_other, needs_root, shared_place
from recorded import program
from scripts_place import SCRIPTS, Run, bound, executable, job_environment, variables


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


SITE = """\
export BEFORE=$NOT_SET_ANYWHERE
grep -q nothing /dev/null
set -u
cd /
echo loading modules
false || export NCCL_DEBUG=INFO
root=/nowhere PASS=x IFS=/
export NCCL_SOCKET_IFNAME=ib0
grep -q nothing /dev/null
"""


def test_a_site_s_file_cannot_end_the_script(run: Run, place: Path) -> None:
    site = place / "site.sh"
    site.write_text(SITE)
    done = run("in_image.sh", "sh", "-c", "pwd; env", NANOGPT_SITE="site.sh")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(place) and "loading modules" not in done.stdout  # which a script may read
    assert {"NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME=ib0"} <= {*lines}
    for number in (2, 9):
        assert f"NANOGPT_SITE=./site.sh, line {number}: `grep -q nothing /dev/null` failed (exit code 1)" in done.stderr
    assert done.stderr.count("failed") == 2


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("exit 3\n", 2, "has ended the script (exit code 3): take its `exit` out"),
        ("export A=1\nif then\n", 0, "syntax error"),
        ("export A=1\nreturn 0\nfalse\n", 0, ""),
        pytest.param(
            "module load apptainer\n",
            0,
            "there is no command 'module' here",
            marks=pytest.mark.skipif(Path("/etc/profile.d/lmod.sh").exists(), reason="this machine has Lmod"),
        ),
        ("no-such-program x\n", 0, "line 1: `no-such-program x` failed (exit code 127)"),
        (None, 2, "no such file, or not readable"),
    ],
)
def test_what_a_site_s_file_does_wrong_is_said(
    run: Run, place: Path, text: str | None, code: int, message: str
) -> None:
    if text is not None:
        (place / "site.sh").write_text(text)
    done = run("in_image.sh", "echo", "ran", NANOGPT_SITE=str(place / "site.sh"), LMOD_PKG="/none", MODULESHOME="/none")
    assert (done.returncode, done.stdout) == (code, "ran\n" if code == 0 else "")
    assert message in done.stderr if message else not done.stderr


def test_module_is_looked_for_where_a_batch_shell_lacks_it(run: Run, place: Path) -> None:
    (place / "lmod" / "init").mkdir(parents=True)
    (place / "lmod" / "init" / "bash").write_text('module() { export "NCCL_FROM=$*"; }\n')
    (place / "site.sh").write_text("module load apptainer\n")
    done = run("in_image.sh", "env", NANOGPT_SITE=str(place / "site.sh"), LMOD_PKG=str(place / "lmod"))
    assert "NCCL_FROM=load apptainer\n" in done.stdout and not done.stderr


@pytest.mark.parametrize("named", [{"NANOGPT_DATA": "links"}, ("--data", "links"), ("--data=links",)])
def test_what_shards_that_are_links_lead_to_is_shown(
    run: Run, place: Path, tmp_path_factory: pytest.TempPathFactory, named: dict[str, str] | tuple[str, ...]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("store", "between", "a b"):
        (elsewhere / name).mkdir()
    (elsewhere / "store" / "shard").touch()
    (elsewhere / "between" / "shard").symlink_to("../store/shard")
    (place / "links").mkdir()
    (place / "links" / "fineweb_train_000001.bin").symlink_to(elsewhere / "between" / "shard")
    (place / "links" / "fineweb_train_000002.bin").symlink_to(os.path.relpath(elsewhere / "a b" / "x", place / "links"))
    (place / "links" / "fineweb_train_000003.bin").symlink_to(elsewhere / "gone" / "x")
    (place / "links" / "fineweb_train_000004.bin").symlink_to("fineweb_train_000004.bin")
    environment, arguments = (named, ()) if isinstance(named, dict) else ({}, named)
    shown = bound(run, place, "nanogpt", "train", *arguments, **environment)
    assert {str(elsewhere / name) for name in ("store", "between", "a b")} <= shown
    assert str(elsewhere) not in shown and "/" not in shown


def test_a_link_that_leads_nowhere_inside_is_said(run: Run, place: Path) -> None:
    target = place / "not here" / "shard"
    link = place / "data" / "fineweb_val_000000.bin"
    link.unlink()
    link.symlink_to(target)
    done = run("nanogpt.sh", "submit", "demo", "--data=data", "--dry-run")
    assert "Traceback" not in done.stderr
    assert f"is a link to {target}: No such file or directory in the container" in done.stderr
    assert f"export APPTAINER_BIND={target.parent}" in done.stderr
    done = run("in_image.sh", "nanogpt", "train", "demo", "--data=data")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"export APPTAINER_BIND={target.parent}" in done.stderr


def test_proxies_and_certificates_come_in(run: Run, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file itself, wherever it is: at its place the image has its own, or nothing."""
    site = tmp_path_factory.mktemp("site")
    (site / "ca.pem").touch()
    (site / "hashed").mkdir()
    (site / "real").mkdir()
    (site / "real" / "ca.crt").touch()
    (site / "hashed" / "1234abcd.0").symlink_to(site / "real" / "ca.crt")
    environment = {
        "ALL_PROXY": "http://proxy:1",
        "all_proxy": "http://proxy:2",
        "no_proxy": "localhost",
        "SSL_CERT_FILE": str(site / "ca.pem"),
        "SSL_CERT_DIR": str(site / "hashed"),
        "REQUESTS_CA_BUNDLE": str(site / "none.pem"),
        "CURL_CA_BUNDLE": str(site / "ca.pem"),
        "HF_HOME": str(site / "real"),
    }
    program(place / "inside", "prep-fineweb", {"": ""})
    executable(place / "inside" / "prep-fineweb", "#!/bin/sh\nenv\n")
    done = run("prep.sh", **environment)
    assert {f"{name}={value}" for name, value in environment.items()} <= {*done.stdout.splitlines()}, done.stderr
    shown = bound(run, place, "prep-fineweb", **environment)
    assert {str(site / name) for name in ("ca.pem", "hashed", "real")} <= shown and str(site) not in shown


def test_a_tmpdir_that_is_not_there_is_named(run: Run, place: Path) -> None:
    """It is often the login node's."""
    done = run("nanogpt.sh", "status", TMPDIR=str(place / "none"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"TMPDIR={place}/none: no directory here that can be written to; /tmp is used.") == 1
    assert "export TMPDIR=" in done.stderr
    done = run("in_image.sh", "env", TMPDIR=str(place / "none"))
    assert "TMPDIR=/tmp\n" in done.stdout and f"TMPDIR={place}/none" in done.stderr


def start_and_wait(place: Path) -> subprocess.Popen[bytes]:
    """slurm/nanogpt.sh, in a session of its own, once its command runs."""
    ready = place / "ready"
    ready.unlink(missing_ok=True)
    executable(place / "inside" / "nanogpt", f"#!/bin/sh\ntouch {ready}\nexec sleep 300\n")
    started = subprocess.Popen(
        [SCRIPTS / "nanogpt.sh", "x"],
        cwd=place,
        env=variables(place, {"TMPDIR": str(place)}),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(ready.exists)
    return started


def session(number: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == number and fields[0] != "Z":
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("whom", ["script", "group"])
def test_a_relay_is_removed_when_the_script_is_ended(place: Path, whom: str) -> None:
    started = start_and_wait(place)
    try:
        assert len(list(place.glob("nanogpt-relay.*"))) == 1
        (os.kill if whom == "script" else os.killpg)(started.pid, signal.SIGTERM)
        assert started.wait(60) != 0
        assert not list(place.glob("nanogpt-relay.*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_a_killed_script_s_relay_is_removed_by_the_next_one(run: Run, place: Path) -> None:
    killed = start_and_wait(place)
    (relay,) = place.glob("nanogpt-relay.*")
    living = start_and_wait(place)
    try:
        (other,) = {*place.glob("nanogpt-relay.*")} - {relay}
        killed.kill()
        killed.wait(60)
        sleeper = next(pid for pid in session(killed.pid) if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())
        for path in (relay, other):
            os.utime(path, (0, 0))
        executable(place / "inside" / "nanogpt", "#!/bin/sh\n")
        run("nanogpt.sh", "x", TMPDIR=str(place))
        assert relay.exists()  # something of its container still runs
        os.kill(sleeper, signal.SIGKILL)
        until(lambda: sleeper not in session(killed.pid))
        run("nanogpt.sh", "x", TMPDIR=str(place))
        assert {*place.glob("nanogpt-relay.*")} == {other}
        until(lambda: not session(killed.pid))  # what has answered there
    finally:
        for one in (killed, living):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
        living.wait(60)


FAKE_SRUN = """\
#!/usr/bin/env bash
export SLURM_NODEID=0
for word in "$@"; do if [[ $word == --overlap ]]; then overlap=yes; fi; done
if [[ -n ${overlap:-} ]]; then
    while [[ $1 == --* ]]; do shift; done
    exec "$@"
fi
trap 'exit 75' USR1
echo $$ > "$NANOGPT_PID_FILE.0"
echo "$NANOGPT_PID_FILE" > ready
while :; do sleep 0.05; done
"""


def test_before_the_time_limit_the_launcher_is_told(place: Path) -> None:
    environment = variables(place, job_environment(place))
    executable(place / "bin" / "srun", FAKE_SRUN)
    started = subprocess.Popen(
        [SCRIPTS / "run.sh", "demo", "--data=data"], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    )
    until(lambda: (place / "ready").exists() and (place / "ready").read_text().endswith("\n"))
    name = (place / "ready").read_text().strip()
    assert re.fullmatch("/tmp/nanogpt-7-[0-9a-f]{32}", name)
    try:
        started.send_signal(signal.SIGUSR1)
        _, said = started.communicate(timeout=60)
    finally:
        Path(f"{name}.0").unlink()
    assert started.returncode == 75 and "time is nearly up" in said and "names no process" not in said


def tell_launcher(file: Path) -> subprocess.CompletedProcess[str]:
    """What run.sh does on each node, as the user ME: were it wrong, it would signal all that user's processes."""
    found = re.search(r"^tell_launcher='(.*?)'$", (SCRIPTS / "run.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    command = ["setpriv", f"--reuid={ME}", f"--regid={ME}", "--clear-groups", "bash", "-c", found.group(1), "_", file]
    return subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "SLURM_NODEID": "0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@needs_root
@pytest.mark.parametrize("whose", ["theirs", "mine"])
def test_a_planted_process_number_is_not_signalled(whose: str) -> None:
    command = ["setpriv", f"--reuid={ME}", f"--regid={ME}", "--clear-groups", "sleep", "300"]
    with shared_place() as node, subprocess.Popen(command) as process:
        until(lambda: Path(f"/proc/{process.pid}").stat().st_uid == ME)
        file = node / "pid.0"
        contents = ("-1", "0", "1", "", "12 34", f"-{process.pid}", "junk") + (
            (process.pid,) if whose == "theirs" else ()
        )
        for content in contents:
            file.unlink(missing_ok=True)
            if whose == "theirs":
                as_other('echo "$1" > "$2"', content, file)
            else:
                file.write_text(f"{content}\n")
                os.chown(file, ME, ME)
            done = tell_launcher(node / "pid")
            assert "names no process of this run" in done.stderr, content
            assert process.poll() is None
        file.unlink()
        (node / "real").write_text(f"{process.pid}\n")
        os.chown(node / "real", ME, ME)
        file.symlink_to(node / "real")
        assert "names no process" in tell_launcher(node / "pid").stderr and process.poll() is None
        file.unlink()
        (node / "real").rename(file)
        assert not tell_launcher(node / "pid").stderr
        assert process.wait(30) == -signal.SIGUSR1


def test_a_launcher_s_process_number_is_left_for_run_sh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanogpt.cli.job import _pid_file

    monkeypatch.setenv("NANOGPT_PID_FILE", str(tmp_path / "pid"))
    with _pid_file(1):
        assert (tmp_path / "pid.1").read_text() == f"{os.getpid()}\n"
        assert (tmp_path / "pid.1").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.iterdir())


@needs_root
def test_a_staged_image_of_another_user_is_not_run(run: Run, place: Path) -> None:
    with shared_place() as node:
        mine = node / "nanogpt-0" / "tag"
        as_other('mkdir -p "$1" && echo theirs > "$1/nanogpt.sif"', mine)
        environment = {"NANOGPT_SIF": str(mine / "nanogpt.sif"), "NANOGPT_STAGED_BELOW": str(node)}
        done = run("in_image.sh", "echo", "ran", **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert "NANOGPT_STAGE: " in done.stderr and "another's" in done.stderr
        for path in (mine.parent, mine, mine / "nanogpt.sif"):
            os.chown(path, 0, 0)
        assert run("in_image.sh", "echo", "ran", **environment).stdout == "ran\n"
        mine.parent.chmod(0o775)
        assert run("in_image.sh", "echo", "ran", **environment).returncode == 2
        mine.parent.rename(node / "moved")
        mine.parent.symlink_to(node / "moved")
        assert run("in_image.sh", "echo", "ran", **environment).returncode == 2
