"""SIGTERM and SIGUSR1 on one process: the step is finished, the state saved, and the run continues bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import forked_code, forked_nanogpt
from tiny_runs import assert_same, losses, make_data, newest_state, tiny_spec, train, write_recipe

from nanogpt.data.manifest import read_manifest
from nanogpt.data.shards import train_name
from nanogpt.errors import REQUEUE_EXIT_CODE, Interrupted, RunError
from nanogpt.runs.listing import run_row
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record
from nanogpt.training import trainer as trainer_module
from nanogpt.training.checkpoint import list_checkpoints
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

AT_END = "checkpoint.at_end=true"
PATIENCE_S = 150.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_spec(AT_END), data, path)
    return path


def signal_in_call(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int) -> None:
    """In the middle of the `call`-th call of the trainer's method `name`, 0-based, the process gets the signal."""
    original, calls = getattr(Trainer, name), []

    def spy(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, name, spy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("checkpoints", ["checkpoint={at_end: true}", "checkpoint={every: 6, at_end: true}"])
def test_a_step_is_finished_and_saved(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, checkpoints: str
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in_call(patch, "train_step", 5, number)
        with pytest.raises(Interrupted) as error:
            train(tiny_spec(checkpoints), data, path)
    assert error.value.exit_code == REQUEUE_EXIT_CODE
    assert signal.Signals(number).name in str(error.value)
    assert f"after step 6, its state is saved; continue with: nanogpt train --resume {path}" in str(error.value)
    assert [file.name for file in list_checkpoints(path / "checkpoints")] == ["step-000006.pt"]
    run, record = read_run(path), read_record(path)
    assert (run.state, run.last["step"], [c["step"] for c in run.checkpoints]) == ("interrupted", 6, [6])
    assert (record.state, record.starts[-1].state, record.steps) == ("interrupted", "interrupted", 6)

    train(tiny_spec(checkpoints), data, path, resume=True)
    assert read_run(path).start["resumed_at"] == 6
    assert losses(path) == losses(whole)
    assert_same(newest_state(path), newest_state(whole))


def test_during_warm_up_nothing_is_lost_and_nothing_saved(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in_call(patch, "train_step", 2, signal.SIGTERM)
        with pytest.raises(Interrupted, match="before its first step; there is nothing to save"):
            train(tiny_spec(AT_END, "training.warmup=true"), data, path)
    assert not list_checkpoints(path / "checkpoints")
    assert read_run(path).state == "interrupted"
    train(tiny_spec(AT_END), data, path, resume=True)
    assert losses(path) == losses(whole)


def test_what_breaks_in_warm_up_after_a_signal_is_the_signals_doing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the compiler's workers, which a batch system has signalled as well."""

    def broken(self: Trainer, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise BrokenPipeError("a worker has died")

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(Interrupted):
        train(tiny_spec("training.warmup=true"), data, tmp_path / "run")


def test_a_signal_in_the_last_step_comes_too_late(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in_call(monkeypatch, "train_step", 11, signal.SIGUSR1)
    train(tiny_spec(AT_END), data, tmp_path / "run")
    assert read_run(tmp_path / "run").state == "finished"
    assert losses(tmp_path / "run") == losses(whole)


def test_an_interruption_that_cannot_be_saved_is_a_failure(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RunError("disk full")

    monkeypatch.setattr(trainer_module, "save_checkpoint", full)
    signal_in_call(monkeypatch, "train_step", 3, signal.SIGTERM)
    with pytest.raises(RunError, match="disk full"):
        train(tiny_spec("checkpoint.on_failure=continue"), data, tmp_path / "run")
    assert read_run(tmp_path / "run").state == "failed"


@pytest.mark.parametrize(("after", "code"), [(3, REQUEUE_EXIT_CODE), (None, 130)])
def test_ctrl_c_once_and_twice(data: Path, tmp_path: Path, after: int | None, code: int) -> None:
    """In step 4; the second one, where there is one, right after the first."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    script = SIGNALLED.replace(
        "(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1)", f"[signal.SIGINT] * {1 if after else 2}"
    )
    done = forked_code(script, "train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (
        "Ctrl-C: finishing the step, then writing a checkpoint; press it again to end the run at once\n" in done.stderr
    )
    (path,) = (tmp_path / "runs").iterdir()
    row, files = run_row(path), [file.name for file in list_checkpoints(path / "checkpoints")]
    assert row.state == "interrupted"
    if after:
        assert "Ctrl-C: the run stopped after step 4, its state is saved; continue with: nanogpt train" in done.stderr
        assert files == ["step-000004.pt"]
        assert "Ctrl-C: the run stopped after step 4" in (row.reason or "")
    else:
        assert "Second Ctrl-C: ending at once, without a checkpoint of this step\n" in done.stderr
        assert files == []
        assert "after step 3: second Ctrl-C: ended at once" in (row.reason or "")


# A shard that never answers, as on a mount whose server is gone.
HANGING = """
    import sys, threading
    from nanogpt import background
    from nanogpt.cli.main import main
    from nanogpt.data import documents_index
    from nanogpt.training import agreement
    background.GRACE_S = 0.5
    def never(path):
        print("waiting", flush=True)
        threading.Event().wait()
    if {starting}:
        agreement.read_count = never
    documents_index.open_regular = never
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("starting", [False, True])
def test_a_file_that_does_not_answer_keeps_no_signal_from_ending_the_run(tmp_path: Path, starting: bool) -> None:
    shards = make_data(tmp_path / "data", (1700, 1300))
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    script = textwrap.dedent(HANGING.replace("{starting}", str(starting)))
    process = subprocess.Popen(
        [sys.executable, "-c", script, "train", recipe, "--data", shards, "--out", tmp_path / "runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in told
    if starting:
        assert process.returncode == REQUEUE_EXIT_CODE, told
        assert "SIGTERM: the run stopped before its first step, while it waited for a file of " in told
        assert not (tmp_path / "runs").exists()
    else:
        assert process.returncode == 1, told
        assert re.search(rf"SIGTERM: step 1 waits for tokens of {shards}, which does not answer", told)
        (path,) = (tmp_path / "runs").iterdir()
        assert read_run(path).state == "failed"


def test_what_is_no_file_is_refused_at_once(data: Path, tmp_path: Path, nanogpt: Callable[..., Any]) -> None:
    """Nobody ever writes into these pipes: reading one would never end."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    shards = make_data(tmp_path / "data", (1700, 1300))
    name = train_name(2)
    for make, kind in ((os.mkfifo, "a pipe"), (make_socket, "a socket"), (os.mkdir, "a directory")):
        (shards / name).unlink()
        make(shards / name)
        outcome = nanogpt("train", recipe, "--data", shards, "--out", tmp_path / "runs")
        assert outcome.code == 2
        assert f"{shards / name}: cannot be read: is {kind}, expected a file" in outcome.err
        shutil.move(shards / name, tmp_path / kind)
        (shards / name).touch()
    pipe = tmp_path / "a pipe"
    outcome = nanogpt("train", pipe, "--data", data)
    assert outcome.code == 2
    assert f"{pipe}: cannot be read: is a pipe, expected a file" in outcome.err

    train(tiny_spec(), data, tmp_path / "run")
    for file in ("metrics.jsonl", "record.json"):
        (tmp_path / "run" / file).unlink()
        os.mkfifo(tmp_path / "run" / file)
    row = run_row(tmp_path / "run")
    assert "metrics.jsonl: metrics cannot be read: is a pipe" in (row.problem or "")
    assert "record.json: cannot be read: is a pipe" in (row.problem or "")
    os.mkfifo(data / "manifest.json")
    try:
        assert read_manifest(data) == {}
    finally:
        (data / "manifest.json").unlink()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path.parent.parent / "s"))  # its name has to be short
    (path.parent.parent / "s").rename(path)


SIGNALLED = """
    import os, signal, sys
    from nanogpt.cli.main import main
    from nanogpt.training.trainer import Trainer
    original = Trainer.train_step
    def step(self, settings):
        if settings.step == 3:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return original(self, settings)
    Trainer.train_step = step
    main(sys.argv[1:])
"""


def test_the_command_exits_with_the_code_that_asks_for_a_requeue(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    done = forked_code(SIGNALLED, "train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert done.returncode == REQUEUE_EXIT_CODE, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert (
        f"the run stopped after step 4, its state is saved; continue with: nanogpt train --resume {path}" in done.stderr
    )
    assert "Traceback" not in done.stderr
    resumed = forked_nanogpt("train", "--resume", path, "--data", data)
    assert resumed.returncode == 0, resumed.stderr
