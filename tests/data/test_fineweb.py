"""prep-fineweb as a process of its own against a hub on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Fault, HubServer, shard_bytes

from nanogpt.cli.prep import fineweb_main
from nanogpt.data import fineweb, manifest, workers
from nanogpt.data.fineweb import default_directory, download, read_manifest, shard_names, verify_directory
from nanogpt.data.hub import _retry_after
from nanogpt.data.shards import header_bytes, read_count, train_name, val_name
from nanogpt.errors import InputError

COMMAND = [sys.executable, "-c", "from nanogpt.cli.prep import fineweb_main; fineweb_main()"]
ONE, TWO, THREE = (train_name(index) for index in (1, 2, 3))
VAL = val_name(0)
SHARD_BYTES = 1024 + 2 * 50_000


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def filled(hub: HubServer, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three training shards, downloaded in this process."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert {one.state for one in download(data, chunks=3)} == {"downloaded"}
    hub.seen.clear()
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "shards"


class Prep:
    """Starts the command with a clean environment."""

    def __init__(self, hub: HubServer | None, data: Path) -> None:
        self.data = data
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(data.parent),
            "HF_HOME": str(data.parent / "hf"),
            "COLUMNS": "200",
            "TERM": "dumb",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
        }
        if hub is not None:
            self.env["HF_ENDPOINT"] = hub.endpoint

    def start(self, *flags: str, chunks: int | None = 1, command: list[str] = COMMAND, **more: object) -> Run:
        arguments = [*command, "--dir", str(self.data), *flags]
        if chunks is not None:
            arguments += ["--chunks", str(chunks)]
        return Run(arguments, self.env, **more)

    def run(self, *flags: str, chunks: int | None = 1, **more: object) -> Run:
        return self.start(*flags, chunks=chunks, **more).wait()

    def partial(self, name: str) -> Path:
        return partial(self.data, name)

    def until_partial(self, name: str, size: int) -> None:
        until(lambda: self.partial(name).exists() and self.partial(name).stat().st_size >= size)


class Ended:
    """What an ended run has left: exit code, output and errors."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def states(self) -> dict[str, str]:
        """State by file, from the table."""
        rows = [line.split() for line in self.out.splitlines()]
        return {row[0]: row[2] for row in rows if row[0].endswith(".bin")}


class Run(Ended):
    """A process, and after `wait` its exit code, output, errors and duration."""

    def __init__(self, arguments: list[str], env: dict[str, str], **more: object) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
        )

    def wait(self) -> Run:
        self.out, self.err = self.process.communicate(timeout=60)
        self.code = self.process.returncode
        self.seconds = time.monotonic() - self.began
        assert "Traceback" not in self.err, self.err
        return self


@pytest.fixture
def prep(hub: HubServer, data: Path) -> Prep:
    return Prep(hub, data)


class Here:
    """The command in this process, for tests in which a process of its own would only take longer."""

    def __init__(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.hub, self.monkeypatch, self.capsys = hub, monkeypatch, capsys

    def run(self, data: Path, *flags: str, chunks: int = 1) -> Ended:
        with self.monkeypatch.context() as patch:
            patch.setenv("HF_ENDPOINT", self.hub.endpoint)
            patch.setattr("sys.argv", ["prep-fineweb", "--dir", str(data), "--chunks", str(chunks), *flags])
            with pytest.raises(SystemExit) as ended:
                fineweb_main()
        out, err = self.capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)


@pytest.fixture
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(hub, monkeypatch, capsys)


def partial(data: Path, name: str) -> Path:
    return data / ".prep-fineweb" / f"{name}.partial"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def whole(hub: HubServer, data: Path, *names: str) -> bool:
    return all((data / name).read_bytes() == hub.files[name] for name in names)


# The plain way


def test_downloads_verifies_and_is_quick_the_second_time(hub: HubServer, prep: Prep, data: Path) -> None:
    prep.env["HF_TOKEN"] = "hf_of_a_test"
    run = prep.run(chunks=3)
    assert run.code == 0, run.err
    assert run.states() == dict.fromkeys([VAL, ONE, TWO, THREE], "downloaded")
    assert re.search(r"total +200,000 +4 downloaded", run.out)
    assert whole(hub, data, VAL, ONE, TWO, THREE)
    assert {name: entry.sha256 for name, entry in read_manifest(data).items()} == {
        name: hashlib.sha256(body).hexdigest() for name, body in hub.files.items()
    }
    assert {entry.revision for entry in read_manifest(data).values()} == {COMMIT}
    assert not list(data.rglob("*.partial"))
    # The token goes to the hub and not to where it redirects; the revision is one for all.
    assert {one.authorization for one in hub.seen if one.revision} == {"Bearer hf_of_a_test"}
    assert {one.authorization for one in hub.seen if not one.revision} == {None}
    assert {one.revision for one in hub.seen if one.method == "GET" and one.revision} == {COMMIT}

    hub.seen.clear()
    again = prep.run(chunks=3)
    assert (again.code, again.err) == (0, "")
    assert set(again.states().values()) == {"present"}
    assert hub.seen == []
    # Of more shards, only the new one is fetched, at the revision of the others.
    (data / TWO).unlink()
    assert prep.run(chunks=3).states()[TWO] == "downloaded"
    assert {one.name for one in hub.seen} == {TWO}
    assert {one.revision for one in hub.seen} == {COMMIT, ""}


def test_environment_gives_chunks_and_directory(hub: HubServer, data: Path) -> None:
    env = Prep(hub, data).env | {"FINEWEB_CHUNKS": "2", "NANOGPT_DATA": str(data)}
    run = Run(COMMAND, env).wait()
    assert run.code == 0, run.err
    assert whole(hub, data, VAL, ONE, TWO)
    assert not (data / THREE).exists()


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    assert default_directory() == Path("data/fineweb10B")
    monkeypatch.setenv("NANOGPT_DATA", "/somewhere")
    assert default_directory() == Path("/somewhere")


def test_default_is_nine_training_shards_of_a_hundred_and_three() -> None:
    assert shard_names(9) == [VAL, *(f"fineweb_train_{index:06d}.bin" for index in range(1, 10))]
    with pytest.raises(InputError, match="1 to 103"):
        download(Path("unused"), chunks=104)


def test_help_is_quick_and_imports_neither_torch_nor_the_hub() -> None:
    began = time.monotonic()
    run = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5
    for flag in ("--chunks", "FINEWEB_CHUNKS", "--dir", "NANOGPT_DATA", "--verify", "data/fineweb10B"):
        assert flag in run.stdout
    code = (
        "import sys, nanogpt.cli.prep, nanogpt.data.fineweb as f; print(*{'torch', 'huggingface_hub'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_progress_bar_on_a_terminal(hub: HubServer, prep: Prep, data: Path) -> None:
    main, other = pty.openpty()
    prep.env["TERM"] = "xterm"
    process = subprocess.Popen(
        [*COMMAND, "--dir", str(data), "--chunks", "1"], env=prep.env, stdout=subprocess.DEVNULL, stderr=other
    )
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # EIO at the end of a pty
        while block := os.read(main, 65536):
            shown += block
    assert process.wait(timeout=20) == 0
    assert "━".encode() in shown
    assert b"202.0/202.0 kB" in shown


# Bad input


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        (["--chunks", "0"], {}, "--chunks"),
        (["--chunks", "104"], {}, "103"),
        (["--chunks", "nine"], {}, "--chunks"),
        ([], {"FINEWEB_CHUNKS": "200"}, "FINEWEB_CHUNKS"),
        (["--workers", "0"], {}, "--workers"),
        (["--chunk", "3"], {}, "--chunks"),
        ([], {"HF_ENDPOINT": "huggingface.co"}, "HF_ENDPOINT"),
    ],
)
def test_bad_input_is_exit_code_2(data: Path, flags: list[str], env: dict[str, str], expected: str) -> None:
    prep = Prep(None, data)
    prep.env |= {"HF_ENDPOINT": "http://127.0.0.1:9"} | env
    run = prep.run(*flags, chunks=None)
    assert run.code == 2
    assert expected in run.err


def test_directory_that_is_a_file(prep: Prep, data: Path) -> None:
    data.write_text("no directory")
    run = prep.run()
    assert run.code == 2
    assert str(data) in run.err
    assert "--dir" in run.err


# Connections that fail


def test_dropped_connection_continues_where_it_ended(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("GET", ONE, Fault(drop_after=30_000), Fault(drop_after=20_000))
    run = prep.run()
    assert run.code == 0, run.err
    assert [one.range for one in hub.gets(ONE)] == [None, "bytes=30000-", "bytes=50000-"]
    assert whole(hub, data, ONE, VAL)


def test_body_that_ends_early_and_looks_whole(hub: HubServer, here: Here, data: Path) -> None:
    hub.fault("GET", ONE, Fault(drop_after=40_000, whole_length=False))
    run = here.run(data)
    assert run.code == 0, run.err
    assert "ended before the file did (40.0 kB of 101.0 kB are kept)" in run.err
    assert [one.range for one in hub.gets(ONE)] == [None, "bytes=40000-"]
    assert whole(hub, data, ONE)


def test_connection_that_hangs(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("GET", ONE, Fault(pause_after=30_000))
    prep.env["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    run = prep.run()
    assert run.code == 0, run.err
    assert [one.range for one in hub.gets(ONE)] == [None, "bytes=30000-"]
    assert whole(hub, data, ONE)


def test_server_that_ignores_range_starts_over(hub: HubServer, here: Here, data: Path) -> None:
    hub.fault("GET", ONE, Fault(drop_after=30_000), Fault(ignore_range=True))
    assert here.run(data).code == 0
    assert whole(hub, data, ONE)
    assert [one.sent for one in hub.gets(ONE)] == [30_000, SHARD_BYTES]


def test_connection_that_never_lasts_ends_the_run(hub: HubServer, here: Here, data: Path) -> None:
    hub.always("GET", ONE, Fault(drop_after=0))
    run = here.run(data, "--retries", "1")
    assert run.code == 1
    assert "2 times in a row" in run.err
    assert run.states() == {VAL: "downloaded", ONE: "failed"}
    assert len(hub.gets(ONE)) == 2


# Statuses


def test_429_waits_as_long_as_retry_after_says(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("GET", ONE, Fault(status=429, headers={"Retry-After": "1"}))
    hub.fault("HEAD", VAL, Fault(status=429, headers={"Retry-After": "0"}))
    run = prep.run()
    assert run.code == 0, run.err
    first, second = hub.gets(ONE)
    assert second.at - first.at > 0.95
    assert "the hub answered 429; next attempt in 1 s (1 of 6 retries)" in run.err
    assert whole(hub, data, VAL, ONE)


def test_429_that_asks_for_too_long_ends_the_run(hub: HubServer, here: Here, data: Path) -> None:
    hub.fault("HEAD", VAL, Fault(status=429, headers={"Retry-After": "4000"}))
    run = here.run(data)
    assert run.code == 1
    assert "asks to wait 4000 s" in run.err
    assert len(hub.seen) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, 3600),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=12;t=55'}, None),
    ],
)
def test_retry_after_forms(headers: dict[str, str], seconds: float | None) -> None:
    error = Exception()
    error.response = SimpleNamespace(headers=headers)  # type: ignore[attr-defined]
    found = _retry_after(error)
    assert found == seconds if seconds in (None, 0, 7, 55) else found == pytest.approx(seconds, abs=600)


def test_503_that_recovers(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("HEAD", VAL, Fault(status=503))
    hub.fault("HEAD", ONE, Fault(status=503))
    hub.fault("GET", ONE, Fault(status=503))
    run = prep.run()
    assert run.code == 0, run.err
    assert run.err.count("the hub answered 503") == 3
    assert whole(hub, data, VAL, ONE)


def test_503_that_does_not_recover_leaves_the_others_whole(hub: HubServer, prep: Prep, data: Path) -> None:
    hub.fault("GET", TWO, Fault(drop_after=30_000))
    hub.always("GET", TWO, Fault(status=503))
    run = prep.run("--retries", "1", chunks=3)
    assert run.code == 1
    assert f"{TWO}: the hub answered 503, 2 times in a row (30.0 kB of 101.0 kB are kept)" in run.err
    assert run.states() == {VAL: "downloaded", ONE: "downloaded", TWO: "failed", THREE: "downloaded"}
    assert whole(hub, data, VAL, ONE, THREE)
    assert not (data / TWO).exists()
    hub._always.clear()
    run = prep.run(chunks=3)
    assert run.states()[TWO] == "downloaded"
    assert hub.gets(TWO)[-1].range == "bytes=30000-"


def test_404_names_file_and_data_set_and_nothing_is_downloaded(hub: HubServer, prep: Prep, data: Path) -> None:
    run = prep.run(chunks=4)
    assert run.code == 1
    assert "fineweb_train_000004.bin: not found in the hub data set kjj0/fineweb10B-gpt2" in run.err
    assert hub.endpoint in run.err
    assert not [one for one in hub.seen if one.method == "GET"]


def test_404_of_the_data_set(hub: HubServer, here: Here, data: Path) -> None:
    hub.always("HEAD", VAL, Fault(status=404, headers={"X-Error-Code": "RepoNotFound"}))
    run = here.run(data)
    assert run.code == 1
    assert "no such data set" in run.err


@pytest.mark.parametrize(("method", "status"), [("HEAD", 401), ("GET", 403)])
def test_no_access_speaks_of_the_token(hub: HubServer, here: Here, data: Path, method: str, status: int) -> None:
    hub.always(method, VAL, Fault(status=status))
    hub.always(method, ONE, Fault(status=status))
    run = here.run(data)
    assert run.code == 1
    assert "HF_TOKEN" in run.err
    assert str(status) in run.err


# No network


def test_no_network_is_said_within_seconds(data: Path) -> None:
    prep = Prep(None, data)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        prep.env["HF_ENDPOINT"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
        run = prep.run()
    assert run.code == 1
    assert run.seconds < 8
    for part in ("cannot reach", prep.env["HF_ENDPOINT"], "login node", "0 of 2 shards"):
        assert part in run.err


@pytest.mark.parametrize("trickle", [False, True])
def test_hub_that_never_answers_is_given_up_within_seconds(data: Path, trickle: bool) -> None:
    """Silent, or with a byte of a header now and then, which no timeout of the HTTP client bounds."""
    prep = Prep(None, data)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        def drip() -> None:
            with contextlib.suppress(OSError), silent.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.2)

        if trickle:
            threading.Thread(target=drip, daemon=True).start()
        prep.env |= {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        run = prep.run()
    assert run.code == 1
    assert run.seconds < 8
    assert "cannot reach" in run.err


def test_offline_switch(hub: HubServer, prep: Prep, filled: Path) -> None:
    prep.env["HF_HUB_OFFLINE"] = "1"
    assert set(prep.run(chunks=3).states().values()) == {"present"}
    run = prep.run(chunks=4)
    assert run.code == 1
    assert "HF_HUB_OFFLINE" in run.err
    assert "4 of 5 shards are present and verified" in run.err
    assert hub.seen == []


# What arrives is wrong


def test_wrong_bytes_are_thrown_away_and_fetched_again(hub: HubServer, here: Here, data: Path) -> None:
    hub.fault("GET", ONE, Fault(body=shard_bytes(99)))
    run = here.run(data)
    assert run.code == 0, run.err
    assert hashlib.sha256(shard_bytes(99)).hexdigest() in run.err
    assert whole(hub, data, ONE)


def test_wrong_checksum_twice_never_takes_the_name(hub: HubServer, here: Here, data: Path) -> None:
    hub.digests[ONE] = "0" * 64
    run = here.run(data, chunks=2)
    assert run.code == 1
    assert f"{ONE}: 2 downloads did not have the hub's sha256 {'0' * 64}" in run.err
    assert not (data / ONE).exists()
    assert not partial(data, ONE).exists()
    assert whole(hub, data, VAL, TWO)


def test_partial_file_of_something_else_is_started_over(hub: HubServer, here: Here, data: Path) -> None:
    partial(data, ONE).parent.mkdir(parents=True)
    partial(data, ONE).write_bytes(b"x" * 30_000)
    partial(data, VAL).write_bytes(b"x" * (SHARD_BYTES + 1))
    run = here.run(data)
    assert run.code == 0, run.err
    assert whole(hub, data, VAL, ONE)
    assert [one.range for one in hub.gets(ONE)] == ["bytes=30000-", None]
    assert [one.range for one in hub.gets(VAL)] == [None]


def test_hub_files_that_are_no_shards(hub: HubServer, here: Here, data: Path) -> None:
    hub.files[ONE] = b"\0" * 5000
    hub.files[TWO] = header_bytes(2000) + b"\0" * 3998
    hub.files[THREE] = b"short"
    run = here.run(data, chunks=3)
    assert run.code == 1
    assert run.err.count("no token shard") == 3
    for problem in ("magic number 0", "promises 2000 tokens", "5 bytes long"):
        assert problem in run.err
    assert [path.name for path in data.glob("*.bin")] == [VAL]


def test_mirror_without_checksums(hub: HubServer, here: Here, data: Path) -> None:
    hub.digests[VAL] = "an-etag"
    run = here.run(data)
    assert run.code == 1
    assert "no size and sha256" in run.err
    assert not list(data.glob("*.bin"))


# What is here


def flip(path: Path, *, keep_time: bool = False) -> None:
    """Change one token of a shard."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time else 1_000_000_000)))


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
    flip(data / ONE, keep_time=True)
    assert here.run(data).states()[ONE] == "present"  # this is what --verify is for
    run = here.run(data, "--verify")
    assert run.states() == {VAL: "present", ONE: "refetched"}
    assert whole(hub, data, ONE)


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
    flip(data / TWO, keep_time=True)
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
    stopped = time.monotonic()
    run.process.send_signal(number)
    run.wait()
    assert run.code == code
    assert time.monotonic() - stopped < 8
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
    hub.always("HEAD", VAL, Fault(status=429, headers={"Retry-After": "60"}))
    run = prep.start()
    until(lambda: len(hub.seen) > 0)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    run.wait()
    assert run.code == 130
    assert run.seconds < 10


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
