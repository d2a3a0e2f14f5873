"""SIGTERM and SIGUSR1 on one process: the step is finished, the state saved, and the run goes on bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import assert_same, losses, make_data, newest_state, python, tiny_spec, train, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE, Interrupted, RunError
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record
from nanogpt.training import trainer as trainer_module
from nanogpt.training.checkpoint import list_checkpoints
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

AT_END = "checkpoint.at_end=true"


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
    assert f"after step 6, its state is saved; go on with: nanogpt train --resume {path}" in str(error.value)
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
        with pytest.raises(Interrupted, match="before its first step; start it again"):
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
    code = "\n".join(line[4:] for line in SIGNALLED.splitlines())
    done = python("-c", code, "train", str(recipe), "--data", str(data), "--out", str(tmp_path / "runs"))
    assert done.returncode == REQUEUE_EXIT_CODE, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert f"the run stopped after step 4, its state is saved; go on with: nanogpt train --resume {path}" in done.stderr
    assert "Traceback" not in done.stderr
    resumed = python("-m", "nanogpt", "train", "--resume", str(path), "--data", str(data))
    assert resumed.returncode == 0, resumed.stderr
