"""Helpers of a cold start: the process that they are forked from, and when it starts."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import launched
import pytest
import torch
from launched import children, lives
from tiny_runs import tiny_spec

from nanogpt.cache.key import cache_key, key_sha256
from nanogpt.cache.pack import SUFFIX, write_pack
from nanogpt.spec import RunSpec
from nanogpt.training import compile_helper
from nanogpt.training.compile_helper import HelperServer, Order
from nanogpt.training.parallel_compile import KERNELS, Helper, begin_helpers, on_one_gpu

SPEC = tiny_spec()
wait_until = functools.partial(launched.wait_until, within_s=300.0)


@contextmanager
def helper_for(spec: RunSpec, root: Path, task: str) -> Iterator[Helper]:
    server = HelperServer()
    try:
        (helper,) = begin_helpers(server, on_one_gpu(spec), root, [task], turns=1)
        yield helper
    finally:
        server.end()


def test_a_helper_of_a_rank_is_a_world_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name, value in {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    spec = tiny_spec("hardware.nodes=2", "hardware.gpus_per_node=2", model="record92")
    with helper_for(spec, tmp_path, KERNELS[0]) as helper:
        wait_until(lambda: helper.exit_code() is not None)
        assert helper.exit_code() == 0, (tmp_path / f".helper-{KERNELS[0]}.txt").read_text()
        assert [row.name for row in helper.times()] == ["start", "launching kernels"]
        helper.wait(lambda: False)
    assert capfd.readouterr().err == ""


def test_a_helper_that_fails_is_a_line_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    broken = SPEC.model_copy(update={"name": "not a name"})  # which the helper refuses to read
    with helper_for(broken, tmp_path, "0") as helper:
        helper.wait(lambda: False)
    assert "helper 1, compiling ahead: ended with exit code 1: " in capfd.readouterr().err
    with helper_for(SPEC, tmp_path, "1") as helper:
        helper.wait(lambda: True)  # a signal has asked the run to stop
        assert helper.exit_code() is None
    assert helper.exit_code() == -signal.SIGKILL
    assert capfd.readouterr().err == ""


def test_what_helpers_cannot_import_is_a_line_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: not there')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with helper_for(SPEC, tmp_path, "0") as helper:
        helper.wait(lambda: False)
    failed = "helper 1, compiling ahead: ended with exit code 1: OSError: libcudart.so.13: not there; the run compiles"
    assert failed in capfd.readouterr().err


@pytest.mark.parametrize("what", ["the helper", "the process that it is forked from"])
def test_a_killed_helper_is_a_line_and_leaves_nothing_behind(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
):
    with helper_for(SPEC, tmp_path, "0") as helper:
        server = helper._server._process.pid
        wait_until(lambda: children(server))
        (child,) = children(server)
        os.kill(child if what == "the helper" else server, signal.SIGKILL)
        helper.wait(lambda: False)
        wait_until(lambda: not lives(child))
    assert "helper 1, compiling ahead: ended with exit code -9; the run compiles by itself" in capfd.readouterr().err


HELPER_WITH_COMPILERS = """
import os, time
from nanogpt.training import compile_helper, parallel_compile

def help_compiling(root, task, turns, spec):
    from torch._inductor.async_compile import AsyncCompile
    parallel_compile.start_kernel_compilers()
    (root / "pids").write_text(f"{os.getpid()} {AsyncCompile.process_pool().submit(os.getpid).result()}\\n")
    time.sleep(600)

parallel_compile.help_compiling = help_compiling
compile_helper.main()
"""


def test_what_compiles_a_helpers_kernels_is_forked_from_it_and_dies_with_it(tmp_path: Path):
    order = Order(str(tmp_path), ["0"], 1, SPEC.model_dump_json(), dict(os.environ))
    settings = {**os.environ, **compile_helper.SETTINGS, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    process = subprocess.Popen([sys.executable, "-c", HELPER_WITH_COMPILERS], stdin=subprocess.PIPE, env=settings)
    try:
        assert process.stdin is not None
        process.stdin.write(f"{json.dumps(asdict(order))}\n".encode())
        process.stdin.close()
        pids = tmp_path / "pids"
        wait_until(lambda: (pids.exists() and pids.read_text().endswith("\n")) or process.poll() is not None)
        helper, compiler = map(int, pids.read_text().split())
        compilers = children(helper)
        assert len(compilers) == 2 and compiler in compilers
        assert Path(f"/proc/{compiler}/cmdline").read_bytes() == Path(f"/proc/{helper}/cmdline").read_bytes()
        os.kill(helper, signal.SIGKILL)
        # torch's own watch over them looks once a minute
        wait_until(lambda: not any(map(lives, compilers)), within_s=30)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("file", "settings", "begun"),
    [
        (None, (), True),
        ("this run's", (), False),
        ("another recipe's", (), True),
        ("other source's", (), True),
        ("another machine's", (), False),  # it is found out later, and the process starts then
        ("broken", (), True),
        ("this run's, fresh", (), True),
        (None, ("runtime.compile=off",), False),
        (None, ("runtime.compile=auto",), False),  # on a CPU
        (None, ("training.warmup=false",), False),
        ("off", (), False),
        ("a second rank's", (), False),
        ("two cores", (), False),
        ("none, as the user keeps compiled code elsewhere", (), False),
    ],
)
def test_what_helpers_need_is_imported_ahead_if_no_file_can_have_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, settings: tuple[str, ...], begun: bool
):
    started: list[str] = []

    class Recorded:
        def __init__(self) -> None:
            started.append("server")

        def end(self) -> None:
            started.append("ended")

    monkeypatch.setattr(compile_helper, "HelperServer", Recorded)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2 if file == "two cores" else 4))
    spec = tiny_spec("runtime.compile=on", "training.warmup=true", *settings)
    key = cache_key(spec, torch.device("cpu"))
    if file == "another recipe's":
        key = cache_key(tiny_spec("runtime.compile=on", "training.warmup=true", model="record89"), torch.device("cpu"))
    elif file == "other source's":
        key["source"] = "0" * 64
    elif file == "another machine's":
        key["device"] = ["cuda"]
    if file == "broken":
        (tmp_path / f"file{SUFFIX}").write_bytes(b"broken")
    elif file in ("this run's", "this run's, fresh", "another recipe's", "other source's", "another machine's"):
        (tmp_path / "root").mkdir()
        write_pack(tmp_path / f"file{SUFFIX}", tmp_path / "root", key=key, key_sha256=key_sha256(key), recipe="")
    if file == "a second rank's":
        monkeypatch.setenv("LOCAL_RANK", "1")
    if file == "none, as the user keeps compiled code elsewhere":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compile_helper.import_ahead(spec, None if file == "off" else tmp_path, fresh=file == "this run's, fresh")
    assert started == ["server"] * begun
    if begun:
        assert isinstance(compile_helper.helper_server(), Recorded) and started == ["server"]
    compile_helper.end_unneeded()
    assert "ended" not in started


def test_an_order_is_done_although_another_process_holds_the_pipe(tmp_path: Path):
    """As one does that is forked meanwhile."""
    server = HelperServer()
    assert server._process.stdin is not None
    held = os.dup(server._process.stdin.fileno())
    try:
        begin_helpers(server, SPEC, tmp_path, [], turns=1)
        wait_until(lambda: server.exit_code() == 0)
    finally:
        os.close(held)
        server.end()


def test_what_was_started_ahead_and_is_not_used_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    compile_helper.import_ahead(tiny_spec("runtime.compile=on", "training.warmup=true"), tmp_path)
    (server,) = compile_helper._begun
    assert server.exit_code() is None
    compile_helper.end_unneeded()
    assert server.exit_code() == -signal.SIGKILL and not compile_helper._begun


def test_what_starts_it_imports_no_torch():
    code = "import sys, nanogpt.training.compile_helper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
