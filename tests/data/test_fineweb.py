"""prep-fineweb against a hub on loopback: flags, connections that fail, statuses, no network, wrong bytes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Fault, HubServer, shard_bytes
from prep_runs import COMMAND, ONE, PINNED, SHARD_BYTES, THREE, TWO, VAL, Here, Prep, Run, partial, whole

from nanogpt.data import official
from nanogpt.data.fineweb import default_directory, download, read_manifest, shard_names, verify_directory
from nanogpt.data.hub import _retry_after
from nanogpt.data.manifest import SHA256
from nanogpt.data.shards import header_bytes, train_name, val_name
from nanogpt.data.surroundings import is_private_way
from nanogpt.errors import InputError

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


def test_a_mirror_does_not_vouch_for_itself(hub: HubServer, prep: Prep, data: Path) -> None:
    run = prep.start(command=PINNED).wait()
    assert run.code == 1
    assert f"{VAL}: {hub.endpoint} announces sha256 {hashlib.sha256(hub.files[VAL]).hexdigest()}, the data" in run.err
    assert official.REVISION in {one.revision for one in hub.seen}
    assert not [one for one in hub.seen if one.method == "GET"] and not list(data.glob("*.bin"))


def test_what_is_not_pinned_is_trusted_on_first_use(hub: HubServer, here: Here, data: Path) -> None:
    assert here.run(data, chunks=2).code == 0
    entries = json.loads((data / "manifest.json").read_text())["shards"]
    assert {(entry["trust"], entry["endpoint"]) for entry in entries.values()} == {("first use", hub.endpoint)}
    first = hub.files[ONE]
    (data / ONE).unlink()
    hub.files[ONE] = shard_bytes(99)
    run = here.run(data, chunks=2)
    assert run.code == 1 and "has, from its first download," in run.err and not (data / ONE).exists()
    hub.files[ONE] = first
    assert here.run(data, chunks=2).states() == {VAL: "present", ONE: "downloaded", TWO: "present"}


def test_a_manifest_does_not_overrule_the_package(
    hub: HubServer, here: Here, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror's shard of a time without pins: it is corrupt, whatever the manifest says, and the right one is got."""
    right = shard_bytes(99)
    monkeypatch.setattr(official, "SHA256", {ONE: hashlib.sha256(right).hexdigest()})
    assert [check.name for check in verify_directory(filled) if check.state == "corrupt"] == [ONE]
    assert here.run(filled).code == 1  # the mirror still serves its own
    hub.files[ONE] = right
    assert here.run(filled).states() == {VAL: "present", ONE: "refetched"}
    assert whole(hub, filled, ONE)
    assert json.loads((filled / "manifest.json").read_text())["shards"][ONE]["trust"] == "pinned"


def test_the_pinned_hashes_are_hashes() -> None:
    from importlib import reload

    pinned = reload(official).SHA256
    assert list(pinned) == [VAL, *(train_name(index) for index in range(1, 19))]
    assert len(set(pinned.values())) == 19 and all(SHA256.fullmatch(sha256) for sha256 in pinned.values())
    # No digit slips unseen: the sha256 over the lines of such a list.
    listed = "".join(f"{sha256}  {name}\n" for name, sha256 in pinned.items())
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "089beb315d6fc015d5898a25d8764f89abae8245ccae0298478fccd45a3a001d"
    )


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


@pytest.mark.parametrize(("name", "stem"), [("fineweb100B", "fineweb"), ("finewebedu10B", "finewebedu")])
def test_other_data_sets(data: Path, name: str, stem: str) -> None:
    """Their shards are not held to the hashes of fineweb10B's, and do not mix with those."""
    with HubServer(2, repository=f"kjj0/{name}-gpt2", stem=stem) as hub:
        prep = Prep(hub, data)
        run = prep.run("--dataset", name, chunks=2, command=PINNED)
        assert run.code == 0, run.err
        names = [val_name(0, stem), train_name(1, stem), train_name(2, stem)]
        assert run.states() == dict.fromkeys(names, "downloaded")
        assert whole(hub, data, *names)
        manifest = json.loads((data / "manifest.json").read_text())
        assert manifest["repository"] == f"kjj0/{name}-gpt2"
        assert {shard["trust"] for shard in manifest["shards"].values()} == {"first use"}
        assert {check.state for check in verify_directory(data, rehash=True)} == {"valid"}
        seen = len(hub.seen)
        assert prep.run("--dataset", name, chunks=2, command=PINNED).states() == dict.fromkeys(names, "present")
        mixed = prep.run(chunks=2)
        assert mixed.code == 2
        assert f"{data}: holds shards of kjj0/{name}-gpt2" in mixed.err
        assert len(hub.seen) == seen


def test_fineweb100b_has_ten_times_as_many_shards(data: Path) -> None:
    prep = Prep(None, data)
    prep.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    asked = prep.run("--dataset", "fineweb100B", chunks=1030)
    assert asked.code == 1 and "127.0.0.1:9" in asked.err
    assert "1 to 103 training shards" in prep.run("--dataset", "finewebedu10B", chunks=104).err
    wrong = prep.run("--dataset", "c4")
    assert wrong.code == 2 and "--dataset: found 'c4', expected fineweb10B, fineweb100B, finewebedu10B" in wrong.err


def test_help_imports_neither_torch_nor_the_hub() -> None:
    run = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
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
    assert process.wait(timeout=150) == 0
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
        ([], {"HF_ENDPOINT": "https://"}, "HF_ENDPOINT: found 'https://': names no host"),
        ([], {"HF_ENDPOINT": "https://hub:port"}, "HF_ENDPOINT"),
        ([], {"HF_ENDPOINT": "https://ada:hunter2@hub"}, "HF_ENDPOINT: holds a name or a password"),
        ([], {"HF_HUB_ETAG_TIMEOUT": "10s"}, "HF_HUB_ETAG_TIMEOUT: found '10s', expected whole seconds"),
        ([], {"HF_HUB_DOWNLOAD_TIMEOUT": ""}, "HF_HUB_DOWNLOAD_TIMEOUT: found ''"),
        ([], {"HTTPS_PROXY": "http://ada:hunter2@proxy:x"}, "HTTPS_PROXY: found 'http://***@proxy:x'"),
        ([], {"https_proxy": "ftp://proxy"}, "https_proxy: found 'ftp://proxy': begins with none of http://"),
        ([], {"ALL_PROXY": "http://"}, "ALL_PROXY: found 'http://': names no host"),
        ([], {"http_proxy": "http://proxy:3128\n"}, "http_proxy: found 'http://proxy:3128\\n': has characters"),
        ([], {"SSL_CERT_FILE": "/none/ca.pem"}, "SSL_CERT_FILE: /none/ca.pem: No such file or directory"),
        ([], {"SSL_CERT_FILE": __file__}, "holds no certificates in PEM format"),
        ([], {"SSL_CERT_FILE": "/tmp"}, "SSL_CERT_FILE: /tmp: "),
        ([], {"SSL_CERT_DIR": "/none"}, "SSL_CERT_DIR: /none: no such directory"),
        ([], {"HF_TOKEN": "hf_hunter2ü"}, "HF_TOKEN: its character 11 cannot be part of a token"),
        ([], {"HF_TOKEN": "hf_hunter2 x"}, "HF_TOKEN: its character 11"),
        ([], {"HUGGING_FACE_HUB_TOKEN": "hf_hunter2\x7f"}, "HUGGING_FACE_HUB_TOKEN: its character 11"),
        ([], {"HF_TOKEN_PATH": "/"}, "/: the stored token cannot be read: Is a directory"),
        (
            [],
            {"HF_TOKEN": "hf_hunter2", "HF_ENDPOINT": "http://mirror.invalid"},
            "plain http, where others can read",
        ),
        ([], {"HF_TOKEN": "hf_hunter2", "ALL_PROXY": "http://proxy.invalid:1"}, "plain http, where others can read"),
    ],
)
def test_bad_input_is_exit_code_2(data: Path, flags: list[str], env: dict[str, str], expected: str) -> None:
    prep = Prep(None, data)
    prep.env |= {"HF_ENDPOINT": "http://127.0.0.1:9"} | env
    run = prep.run(*flags, chunks=None)
    assert run.code == 2
    assert expected in run.err
    assert "hunter2" not in run.err


@pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="socksio is installed")
def test_a_socks_proxy_without_its_package_is_said(data: Path) -> None:
    prep = Prep(None, data)
    prep.env["ALL_PROXY"] = "socks5://ada:hunter2@proxy:1080"
    run = prep.run()
    assert run.code == 2
    assert "ALL_PROXY: found 'socks5://***@proxy:1080', a SOCKS proxy" in run.err
    assert "pip install socksio" in run.err and "HTTPS_PROXY" in run.err


def test_a_stored_token_is_not_sent_in_the_clear_either(data: Path) -> None:
    prep = Prep(None, data)
    (data.parent / "token").write_text("hf_hunter2")
    prep.env |= {"HF_TOKEN_PATH": str(data.parent / "token"), "HF_ENDPOINT": "http://mirror.invalid"}
    run = prep.run()
    assert run.code == 2
    assert f"the token of {data.parent / 'token'}" in run.err and "hunter2" not in run.err
    prep.env |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    run = prep.run()
    assert run.code == 1 and "cannot reach http://mirror.invalid" in run.err


def test_which_ways_are_private(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for endpoint in ("http://[::1]:80", "http://127.0.0.2", "http://localhost:1", "https://hub.example"):
        assert is_private_way(endpoint)
    for endpoint in ("http://localhost.example", "http://128.0.0.1", "http://127.0.0.1.example"):
        assert not is_private_way(endpoint)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
    assert not is_private_way("http://127.0.0.1") and is_private_way("https://hub.example")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert is_private_way("http://127.0.0.1")


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
    for part in ("cannot reach", prep.env["HF_ENDPOINT"], "login node", "0 of 2 shards"):
        assert part in run.err


@pytest.mark.parametrize("trickle", [False, True])
def test_hub_that_never_answers_is_given_up(data: Path, trickle: bool) -> None:
    """Silent, or with a byte of a header now and then, which no timeout of the HTTP client bounds."""
    prep = Prep(None, data)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        def drip() -> None:
            with contextlib.suppress(OSError), silent.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(3000):
                    connection.sendall(b"x")
                    time.sleep(0.2)

        if trickle:
            threading.Thread(target=drip, daemon=True).start()
        prep.env |= {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        run = prep.run()
    assert run.code == 1
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
    assert run.err.count("not a token shard") == 3
    for problem in ("magic number 0", "promises 2000 tokens", "5 bytes long"):
        assert problem in run.err
    assert [path.name for path in data.glob("*.bin")] == [VAL]


def test_mirror_without_checksums(hub: HubServer, here: Here, data: Path) -> None:
    hub.digests[VAL] = "an-etag"
    run = here.run(data)
    assert run.code == 1
    assert "no size and sha256" in run.err
    assert not list(data.glob("*.bin"))
