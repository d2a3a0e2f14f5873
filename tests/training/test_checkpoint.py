"""Checkpoints: a resumed run is the run that was never stopped, and no crash, full disk or damage takes that away."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from forked import forked_code
from tiny_runs import (
    SPEEDRUN_STEPS,
    assert_same,
    losses,
    make_data,
    newest_state,
    tiny_spec,
    train,
    write_recipe,
)

from nanogpt.errors import InputError, RunError
from nanogpt.optim.communication import Communicator
from nanogpt.optim.pending import pending_gradient
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import read_metrics, read_run
from nanogpt.runs.record import read_record
from nanogpt.training import checkpoint
from nanogpt.training.checkpoint import FORMAT, list_checkpoints, load_newest_checkpoint, save_checkpoint
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_STEP = "checkpoint={every: 1, keep: 100, at_end: true}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small shards, which the run of 4,544 tokens goes through more than once."""
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (1700, 1300))


@pytest.fixture(scope="module", params=["speedrun", "gpt2"])
def whole(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a checkpoint after every step."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    train(tiny_spec(EVERY_STEP, model=request.param), data, path)
    return path


def stopped_after(whole: Path, step: int, path: Path) -> Path:
    """`whole` as it would be had it been killed right after the checkpoint of `step`."""
    path.mkdir()
    shutil.copy(whole / "spec.yaml", path)
    (path / "checkpoints").mkdir()
    name = checkpoint.checkpoint_name(step)
    shutil.copy(whole / "checkpoints" / name, path / "checkpoints" / name)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if f'"checkpoint", "step": {step},' in line)
    (path / "metrics.jsonl").write_text("".join(lines[: end + 1]))
    return path


def test_the_data_end_and_begin_again_within_the_run(whole: Path) -> None:
    """What the tests of resuming rely on."""
    assert newest_state(whole)["batches"]["epoch"] >= 1


def test_resuming_after_any_step_changes_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    """Even and odd steps (Adam's gradients pending), before and after the split, stage changes, the data's end."""
    steps = len(losses(whole)[0])
    for step in range(1, steps + 1):
        path = stopped_after(whole, step, tmp_path / f"{step}")
        result = train(RunDirectory.open(path).spec(), data, path, resume=True)
        assert losses(path) == losses(whole), f"resumed after step {step}"
        assert_same(newest_state(path), newest_state(whole), f"resumed after step {step}: state")
        assert result.final_val_loss == pytest.approx(losses(whole)[1][steps], rel=1e-8)
        start = read_run(path).start
        assert start["resumed_at"] == step
        assert f"resumed at step {step}" in (path / "log.txt").read_text()


def test_the_states_cover_what_is_hard_to_resume(whole: Path) -> None:
    if "gpt2" in str(whole):
        pytest.skip("of the speedrun's optimizer")
    files = list_checkpoints(whole / "checkpoints")
    assert len(files) == SPEEDRUN_STEPS
    states = [torch.load(file, weights_only=True) for file in files]
    pending = [bool(state["optimizer"]["pending_gradients"]) for state in states]
    assert pending == [True, False] * (SPEEDRUN_STEPS // 2)
    assert [state["optimizer"]["tied"] for state in states] == [True] * 7 + [False] * 5
    assert len({state["model"]["rotary._extra_state"]["attention_scale"] for state in states}) == 4


def test_time_and_tokens_go_on(whole: Path, data: Path, tmp_path: Path) -> None:
    path = stopped_after(whole, 5, tmp_path / "run")
    train(RunDirectory.open(path).spec(), data, path, resume=True)
    before, after = read_run(whole), read_run(path)
    assert [r["tokens"] for r in after.steps] == [r["tokens"] for r in before.steps]
    times = [r["train_time_ms"] for r in after.steps]
    assert times == sorted(times)
    assert times[:5] == [r["train_time_ms"] for r in before.steps[:5]]
    assert after.starts == 2
    assert after.state == "finished"


def test_a_warm_up_before_the_resume_leaves_no_trace_either(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(EVERY_STEP, "training.warmup=true")
    train(spec, data, tmp_path / "whole")
    path = stopped_after(tmp_path / "whole", 9, tmp_path / "run")
    train(spec, data, path, resume=True)
    assert losses(path) == losses(tmp_path / "whole")
    assert_same(newest_state(path), newest_state(tmp_path / "whole"))


def test_resume_without_a_checkpoint_starts_from_the_start(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    spec = tiny_spec()
    train(spec, data, path)
    first = losses(path)
    train(spec, data, path, resume=True)
    assert losses(path) == first
    assert read_run(path).start["resumed_at"] is None


# -- stopped by a crash ----------------------------------------------------------------------------------------------


def test_an_exception_and_a_resume(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_spec("checkpoint={every: 3, at_end: true}"), data, tmp_path / "whole")
    original = Trainer.train_step

    def fail(self: Trainer, settings: Any) -> torch.Tensor:
        if settings.step == 8:
            raise RuntimeError("a cosmic ray")
        return original(self, settings)

    path = tmp_path / "run"
    spec = tiny_spec("checkpoint={every: 3, at_end: true}")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(RuntimeError, match="a cosmic ray"):
            train(spec, data, path)
    run = read_run(path)
    assert run.state == "failed"
    assert run.end is not None
    assert run.end["reason"] == "RuntimeError after step 8: a cosmic ray"
    train(spec, data, path, resume=True)
    assert losses(path) == losses(tmp_path / "whole")
    assert_same(newest_state(path), newest_state(tmp_path / "whole"))


KILLED = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from nanogpt.cli.main import main
    from nanogpt.training import checkpoint
    from nanogpt.training.trainer import Trainer

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if "{where}" == "in a step":
        original = Trainer.train_step
        Trainer.train_step = lambda self, s: kill() if s.step == 7 else original(self, s)
    else:  # everything is written, but the file does not have its name yet
        save = checkpoint.save_checkpoint
        def spy(directory, step, state, *, keep):
            if step == 8:
                checkpoint.os.fsync = kill
            return save(directory, step, state, keep=keep)
        from nanogpt.training import trainer
        trainer.save_checkpoint = spy
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", ["in a step", "in a checkpoint"])
def test_a_killed_process_and_a_resume(nanogpt: Any, data: Path, tmp_path: Path, where: str) -> None:
    spec = tiny_spec("checkpoint={every: 4, keep: 5, at_end: true}")
    recipe = write_recipe(tmp_path / "tiny.yaml", spec)
    train(spec, data, tmp_path / "whole")
    script = KILLED.replace("{where}", where)
    done = forked_code(script, "train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert done.returncode == -signal.SIGKILL, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    names = sorted(file.name for file in (path / "checkpoints").iterdir())
    assert names[-1] == "step-000004.pt"
    assert len(names) == (1 if where == "in a step" else 2)
    assert read_run(path).state == "unfinished"

    outcome = nanogpt("train", "--resume", path, "--data", data)
    assert outcome.code == 0, outcome.err
    assert losses(path) == losses(tmp_path / "whole")
    assert_same(newest_state(path), newest_state(tmp_path / "whole"))
    # What the killed process left behind is cleared away.
    assert [file.name for file in list_checkpoints(path / "checkpoints")] == sorted(
        file.name for file in (path / "checkpoints").iterdir()
    )


# -- damaged checkpoints ---------------------------------------------------------------------------------------------

SMALL = {"model": {"weight": torch.arange(5000.0)}, "batches": {"epoch": 0}}


def flip_a_bit(file: Path) -> None:
    """In the middle of a tensor, where torch does not look."""
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor([2500.0]).numpy().tobytes())] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def text(file: Path) -> None:
    file.write_text("no checkpoint, no pickle\n")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, zeros, text])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, step, SMALL, keep=5)
    newest = tmp_path / "step-000006.pt"
    damage(newest)
    state = load_newest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert_same(state["model"], SMALL["model"])
    assert capsys.readouterr().err.startswith(f"{newest}: not a readable checkpoint")
    damage(tmp_path / "step-000003.pt")
    with pytest.raises(InputError, match="none of its 2 checkpoints can be read"):
        load_newest_checkpoint(tmp_path)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped_after(whole, 6, tmp_path / "run")
    shutil.copy(whole / "checkpoints" / "step-000005.pt", path / "checkpoints")
    cut(path / "checkpoints" / "step-000006.pt")
    train(RunDirectory.open(path).spec(), data, path, resume=True)
    assert "step-000006.pt: not a readable checkpoint" in capsys.readouterr().err
    assert read_run(path).start["resumed_at"] == 5
    assert losses(path) == losses(whole)
    assert_same(newest_state(path), newest_state(whole))


def test_another_format_is_named(tmp_path: Path) -> None:
    torch.save({"format": FORMAT + 1, "step": 3}, tmp_path / "step-000003.pt")
    with pytest.raises(InputError, match=rf"checkpoint format {FORMAT + 1}, this version reads format {FORMAT}"):
        load_newest_checkpoint(tmp_path)


def test_a_pipe_in_a_checkpoints_place_keeps_nobody_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, 3, SMALL, keep=5)
    os.mkfifo(tmp_path / "step-000006.pt")
    state = load_newest_checkpoint(tmp_path)
    assert state is not None and state["step"] == 3
    assert "is a pipe, expected a file" in capsys.readouterr().err


# -- whose it is -----------------------------------------------------------------------------------------------------


def rewritten(file: Path, change: Any) -> None:
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def test_a_checkpoint_of_another_seed_is_refused(nanogpt: Any, data: Path, tmp_path: Path) -> None:
    settings = "checkpoint={every: 5, keep: 9, at_end: false}"
    for seed in (0, 1):
        train(tiny_spec(settings, f"training.seed={seed}"), data, tmp_path / f"run{seed}")
    foreign, own = (tmp_path / f"run{seed}" / "checkpoints" / "step-000010.pt" for seed in (1, 0))
    shutil.copy(foreign, own)
    before = (tmp_path / "run0" / "metrics.jsonl").read_bytes()
    outcome = nanogpt("train", "--resume", tmp_path / "run0", "--data", data)
    assert outcome.code == 2
    assert f"{own}: is a checkpoint of the run run1 (id " in outcome.err
    assert (tmp_path / "run0" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "run0" / "record.json").unlink()  # the recipe still tells
    outcome = nanogpt("train", "--resume", tmp_path / "run0", "--data", data)
    assert outcome.code == 2
    assert f"{own}: is a checkpoint of another recipe." in outcome.err
    assert "training.seed: 1 in the checkpoint, 0 in the run" in outcome.err
    own.unlink()  # the way out
    assert nanogpt("train", "--resume", tmp_path / "run0", "--data", data).code == 0
    # A run whose record was lost continues under the id that its checkpoints name.
    named = torch.load(own.with_name("step-000005.pt"), weights_only=True)["run"]["id"]
    assert read_record(tmp_path / "run0").run_id == named


def test_a_checkpoint_of_another_step_than_its_name_says_is_refused(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path, 3, SMALL, keep=5)
    file.rename(tmp_path / "step-000006.pt")
    with pytest.raises(InputError, match=r"step-000006.pt: is the checkpoint after step 3, .* step-000003.pt"):
        load_newest_checkpoint(tmp_path)


def test_a_checkpoint_of_an_older_version_is_taken_with_a_line(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names no run, and has the mean of all ranks' pending gradients, by name."""
    path = stopped_after(whole, 5, tmp_path / "run")

    def age(state: dict[str, Any]) -> None:
        del state["run"], state["extra_state_by_rank"]
        state["format"] = 1
        if "pending_gradients" in state["optimizer"]:
            (kept,) = state["optimizer"]["pending_gradients"]
            state["optimizer"].pop("touched")
            one_rank = [kept]
            state["optimizer"]["pending_gradients"] = {
                label: pending_gradient(one_rank, label, Communicator()) for label in kept
            }
            assert "lm_head" in kept

    rewritten(path / "checkpoints" / "step-000005.pt", age)
    train(RunDirectory.open(path).spec(), data, path, resume=True)
    assert "step-000005.pt: names no run, as an older version wrote it" in capsys.readouterr().err
    assert losses(path) == losses(whole)
    assert_same(newest_state(path), newest_state(whole))


def test_each_rank_has_its_own_scales_back() -> None:
    state = {"model": {"w": 1, "mlp._extra_state": "of 0"}}
    state["extra_state_by_rank"] = [{"mlp._extra_state": "of 0"}, {"mlp._extra_state": "of 1"}]  # type: ignore[assignment]
    assert checkpoint.model_state_of_rank(state, 1, 2) == {"w": 1, "mlp._extra_state": "of 1"}
    assert checkpoint.model_state_of_rank(state, 3, 4) == state["model"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    assert load_newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-3.pt").touch()
    (tmp_path / ".step-000003.pt.77.partial").touch()
    assert load_newest_checkpoint(tmp_path) is None


# -- disks that are full ---------------------------------------------------------------------------------------------


class FullDisk:
    """A binary file that takes so many bytes and no more."""

    def __init__(self, file: IO[bytes], room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 12_000])
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    before = save_checkpoint(tmp_path, 3, SMALL, keep=1)
    content = before.read_bytes()
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(original(path, mode), room))
    message = r"step-000006.pt: the checkpoint could not be written: No space left on device. Earlier checkpoints are"
    with pytest.raises(RunError, match=message):
        save_checkpoint(tmp_path, 6, SMALL, keep=1)
    assert [file.name for file in tmp_path.iterdir()] == [before.name]
    assert before.read_bytes() == content


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="could not be written"):
        save_checkpoint(tmp_path / "checkpoints", 3, SMALL, keep=1)


LIMITED = """
    import resource, sys
    import torch
    torch.set_num_threads(1)
    from nanogpt.cli.main import main
    from nanogpt.training import trainer

    save = trainer.save_checkpoint
    def limited(directory, step, state, *, keep):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            return save(directory, step, state, keep=keep)
        finally:  # the log is longer than that
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    trainer.save_checkpoint = limited
    main(sys.argv[1:])
"""


def test_a_file_size_limit_in_the_middle_of_a_run(nanogpt: Any, data: Path, tmp_path: Path) -> None:
    spec = tiny_spec("checkpoint={every: 3, keep: 1, at_end: true, on_failure: stop}")
    recipe = write_recipe(tmp_path / "tiny.yaml", spec)
    done = forked_code(LIMITED, "train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert done.returncode == 1, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert re.search(r"step-000006.pt: the checkpoint could not be written: File too large. Earlier", done.stderr)
    assert "Traceback" not in done.stderr
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step-000003.pt"]
    assert read_run(path).state == "failed"

    train(spec, data, tmp_path / "whole")
    assert nanogpt("train", "--resume", path, "--data", data).code == 0
    assert losses(path) == losses(tmp_path / "whole")


def test_a_run_that_is_told_so_goes_on_without_a_checkpoint(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec("checkpoint={every: 3, keep: 1, at_end: true, on_failure: continue}")
    recipe = write_recipe(tmp_path / "tiny.yaml", spec)
    done = forked_code(LIMITED, "train", recipe, "--data", data, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    words = "step:6/12 no checkpoint: "
    for text in (done.stderr, (path / "log.txt").read_text()):
        assert text.count(words) == 1
        assert "could not be written: File too large. Earlier checkpoints are intact" in text.partition(words)[2]
    (failure,) = (r for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "checkpoint_failure")
    assert failure["step"] == 6
    assert read_run(path).state == "finished"
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step-000012.pt"]


# -- which are kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ("every: 5, keep: 2, at_end: true", [10, 12]),
        ("every: 5, keep: 1, at_end: false", [10]),
        ("every: 4, keep: 9, at_end: true", [4, 8, 12]),
        ("every: 4, keep: 9, at_end: false", [4, 8]),
        ("every: null, keep: 1, at_end: true", [12]),
        ("every: null, keep: 1, at_end: false", []),
    ],
)
def test_which_checkpoints_a_run_leaves(data: Path, tmp_path: Path, settings: str, kept: list[int]) -> None:
    path = tmp_path / "run"
    train(tiny_spec(f"checkpoint={{{settings}}}"), data, path)
    names = [file.name for file in list_checkpoints(path / "checkpoints")]
    assert names == [f"step-{step:06d}.pt" for step in kept]


def test_only_the_newest_are_kept_and_counted_by_step(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, SMALL, keep=2)
    assert [file.name for file in list_checkpoints(tmp_path)] == ["step-1000000.pt", "step-1000001.pt"]


def test_metrics_tell_of_each_checkpoint(whole: Path) -> None:
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "checkpoint"]
    steps = len(losses(whole)[0])
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(Path(record["path"]).is_file() for record in records)
    json.dumps(newest_state(whole)["batches"])  # the data position is plain data
