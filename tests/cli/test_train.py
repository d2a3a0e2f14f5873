"""`nanogpt train` and `nanogpt sample`."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import assert_same, losses, make_data, newest_state, python, tiny_spec, train, write_recipe

from nanogpt.data.shards import read_tokens, train_name, val_name, write_tokens
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record, this_process, write_record
from nanogpt.training.resume import resumed_spec

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINTS = "checkpoint={every: 5, keep: 3, at_end: true}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_spec(CHECKPOINTS))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of these tests leaves anything in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_spec(CHECKPOINTS), data, path)
    return path


def only_run(parent: Path) -> Path:
    (run,) = parent.iterdir()
    return run


def test_a_run_from_the_command_line(nanogpt: Any, recipe: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    outcome = nanogpt("train", recipe, "--data", data, "--out", "mine")
    assert outcome.code == 0, outcome.err
    path = only_run(Path("mine"))
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", path.name)
    assert load_recipe(path / "spec.yaml") == tiny_spec(CHECKPOINTS)
    assert losses(path) == losses(whole)

    # The result on standard output, progress on standard error.
    final = losses(path)[1][12]
    assert outcome.out.startswith("tiny: finished, 12 of 12 steps\n")
    assert re.search(rf"^ +12 +{final:.4f} ", outcome.out, re.MULTILINE)
    assert outcome.out.endswith(f"Run directory: {path}\n")
    assert outcome.err.startswith(f"Run directory: {path}\n")
    assert re.search(r"^step:12/12 val_loss:", outcome.err, re.MULTILINE)


def test_settings_of_the_command_line_are_kept_with_the_run(nanogpt: Any, recipe: Path, data: Path) -> None:
    outcome = nanogpt("train", recipe, "--data", data, "--set", "training.seed=7", "--set", "name=other", "--steps", 4)
    assert outcome.code == 0, outcome.err
    path = only_run(Path("runs"))
    assert path.name.startswith("other-")
    spec = load_recipe(path / "spec.yaml")
    assert (spec.training.seed, spec.training.total_steps) == (7, 4)
    assert list(losses(path)[0]) == [1, 2, 3, 4]


def test_where_a_run_goes_and_where_its_data_are(
    nanogpt: Any, recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--out, then output.directory, then NANOGPT_RUNS, then ./runs; --data, then data.directory, then NANOGPT_DATA."""
    monkeypatch.setenv("NANOGPT_RUNS", "from-environment")
    monkeypatch.setenv("NANOGPT_DATA", str(data))
    quick = ("--steps", 4)
    assert nanogpt("train", recipe, *quick).code == 0
    only_run(Path("from-environment"))
    assert nanogpt("train", recipe, *quick, "--set", "output.directory=from-recipe").code == 0
    only_run(Path("from-recipe"))
    assert nanogpt("train", recipe, *quick, "--set", "output.directory=unused", "--out", "from-flag").code == 0
    only_run(Path("from-flag"))
    outcome = nanogpt("train", recipe, *quick, "--set", "data.directory=missing")
    assert (outcome.code, outcome.err.partition(":")[0]) == (2, "missing")
    assert not Path("unused").exists()
    assert len(list(Path("from-environment").iterdir())) == 1  # a run that is refused leaves no directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a RECIPE"),
        (("record89-4xh200",), "nanogpt train record89 --on 4xh200"),
        (("nothing.yaml",), "nothing.yaml: no such file"),
        (("1xh100", "--set", "hardware.gpu=a1000"), "--set hardware.gpu=a1000: hardware.gpu: "),
        (("8xh100",), "the recipe needs 8 processes, found 1. Start them with `nanogpt launch RECIPE`"),
        (("demo",), "no fineweb_train_*.bin there"),
        (("--resume", "nowhere"), "nowhere: no such run directory"),
        (("demo", "--steps", "0"), "--steps"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    nanogpt: Any, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    outcome = nanogpt("train", *arguments, "--data", "empty")
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]


def test_a_loss_that_is_not_finite_exits_with_1(
    nanogpt: Any, recipe: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Speedrun.training_loss

    def divided(self: Speedrun, batch: Any, inputs: Any, **embedded: Any) -> Any:
        """By zero in the third stage, which has one weight."""
        return original(self, batch, inputs, **embedded) / len(inputs.token_weights[1:])

    monkeypatch.setattr(Speedrun, "training_loss", divided)
    outcome = nanogpt("train", recipe, "--data", data)
    assert outcome.code == 1
    assert re.search(
        r"^step 8: the training loss is inf; the last finite one was \d+\.\d{4} at step 7\.", outcome.err, re.M
    )
    assert "Traceback" not in outcome.err
    path = only_run(Path("runs"))
    assert read_run(path).state == "failed"
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step-000005.pt"]


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped in its eighth step, with a checkpoint of five."""
    from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam

    original = NorMuonAdam.step

    def stop(self: Any, rates: Any) -> None:
        if rates.split:  # after step 7
            raise KeyboardInterrupt
        original(self, rates)

    path = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NorMuonAdam, "step", stop)
        train(tiny_spec(CHECKPOINTS), data, path)
    return path


@pytest.mark.parametrize("with_recipe", [False, True])
def test_resume(nanogpt: Any, stopped: Path, recipe: Path, data: Path, whole: Path, with_recipe: bool) -> None:
    arguments = [recipe] if with_recipe else []
    outcome = nanogpt("train", *arguments, "--resume", stopped, "--data", data)
    assert outcome.code == 0, outcome.err
    assert read_run(stopped).start["resumed_at"] == 5
    assert losses(stopped) == losses(whole)
    assert_same(newest_state(stopped), newest_state(whole))
    assert outcome.out.endswith(f"Run directory: {stopped}\n")
    assert not Path("runs").exists()


def test_resume_with_another_recipe_shows_the_differences(
    nanogpt: Any, stopped: Path, recipe: Path, data: Path
) -> None:
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    stage = "training.stages.1.window_blocks.long=7"
    outcome = nanogpt("train", recipe, "--resume", stopped, "--data", data, "--set", "training.seed=3", "--set", stage)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert lines[0].startswith(f"{stopped / 'spec.yaml'}: cannot continue as another run")
    assert lines[1:] == [
        "  training.seed: 0 in the run, 3 by the command line",
        "  training.stages.1.window_blocks.long: 6 in the run, 7 by the command line",
    ]

    outcome = nanogpt("train", "demo", "--resume", stopped, "--data", data)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert "  name: tiny in the run, demo by demo" in lines
    assert f"  model.width: 32 in the run, {load_recipe('demo').model.width} by demo" in lines
    assert "  model.heads" not in outcome.err  # equal in both
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


def test_a_resumed_run_may_change_how_it_is_computed_and_kept(
    nanogpt: Any, stopped: Path, data: Path, whole: Path
) -> None:
    outcome = nanogpt(
        *("train", "--resume", stopped, "--data", data),
        *("--set", "checkpoint.keep=1", "--set", "runtime.kernels=plain", "--set", "output.log_every=4"),
    )
    assert outcome.code == 0, outcome.err
    assert losses(stopped) == losses(whole)
    assert [file.name for file in (stopped / "checkpoints").iterdir()] == ["step-000012.pt"]


def test_resume_stays_in_its_directory(nanogpt: Any, stopped: Path) -> None:
    outcome = nanogpt("train", "--resume", stopped, "--out", "elsewhere")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--out" in outcome.err


def test_a_run_that_still_lives_is_not_resumed(nanogpt: Any, stopped: Path, data: Path) -> None:
    record = read_record(stopped)
    record.state = record.starts[-1].state = "running"
    record.starts[-1].process = this_process()
    write_record(stopped, record)
    outcome = nanogpt("train", "--resume", stopped, "--data", data)
    assert outcome.code == 2
    assert f"process {os.getpid()} on " in outcome.err
    assert read_record(stopped) == record

    assert record.starts[-1].process.started_ticks is not None
    record.starts[-1].process.started_ticks -= 1  # an earlier process of this number, which is gone
    write_record(stopped, record)
    outcome = nanogpt("train", "--resume", stopped, "--data", data)
    assert outcome.code == 0, outcome.err
    assert read_record(stopped).starts[0].state == "killed"


# -- python -m, sample -----------------------------------------------------------------------------------------------


def test_python_dash_m(tmp_path: Path) -> None:
    done = python("-m", "nanogpt", "validate", "demo", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("demo: valid")
    assert python("-m", "nanogpt", "train", "--resume", "nowhere", cwd=tmp_path).returncode == 2


def test_sample(nanogpt: Any, whole: Path) -> None:
    outcome = nanogpt("sample", whole, "--prompt", "A1B", "--tokens", 12, "--temperature", "1.5", "--seed", 3)
    assert outcome.code == 0
    assert re.fullmatch(r"\d+ tokens in \d+\.\d s on cpu, [\d.]+ tokens/s\n", outcome.err)
    assert re.fullmatch(r"A1B[!-_]{0,12}\n", outcome.out)
    again = nanogpt("sample", whole, "--prompt", "A1B", "--tokens", 12, "--temperature", "1.5", "--seed", 3)
    assert again.out == outcome.out
    cold = {nanogpt("sample", whole, "--prompt", "A1B", "--temperature", 0, "--seed", seed).out for seed in (1, 2)}
    assert len(cold) == 1
    assert nanogpt("sample", whole, "--prompt", "A1B", "--top-k", 1, "--seed", 9).out in cold
    several = [
        nanogpt("sample", whole, "--prompt", "A1B", "--prompt", "B2", *flags).out for flags in ((), ("--stream",))
    ]
    assert several[0] == several[1] and re.fullmatch(r"A1B[!-_]*\n\nB2[!-_]*\n", several[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--prompt", "A"), "nowhere: no such run directory"),
        (("{run}",), "--prompt"),
        (("{run}", "--prompt", "A", "--temperature", "-1"), "must be >= 1, >= 0, >= 1"),
        (("{run}", "--prompt", "Hello"), "the model a vocabulary of 64"),
    ],
)
def test_sample_refuses(nanogpt: Any, whole: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = nanogpt("sample", *(str(whole) if word == "{run}" else word for word in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_the_module_needs_no_torch_until_it_trains() -> None:
    """So that `nanogpt --help` and the shell's completion stay quick."""
    code = "import sys, nanogpt.cli.train, nanogpt.cli.sample, nanogpt.cli.evaluate; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "False\n"


def test_a_run_goes_on_on_other_hardware_and_open_recipes_take_its_own(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", tiny_spec())
    assert resumed_spec(run, on="2xcpu").world_size == 2
    (tmp_path / "open.yaml").write_text(dump_spec(tiny_spec(), exclude={"hardware": True}))
    assert resumed_spec(run, str(tmp_path / "open.yaml")) == run.spec()
    assert resumed_spec(run, str(tmp_path / "open.yaml"), on="2xcpu").world_size == 2


@pytest.mark.parametrize("where", ["train", "val"])
def test_tokens_outside_of_the_vocabulary_are_refused_before_a_run_is_made(
    nanogpt: Any, recipe: Path, data: Path, tmp_path: Path, where: str
) -> None:
    """Also those that the padded tables would have rows for."""
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    shard = shards / {"train": train_name(1), "val": val_name()}[where]
    tokens = read_tokens(shard)
    tokens[100] = 64
    write_tokens(shard, tokens)
    outcome = nanogpt("train", recipe, "--data", shards, "--out", "mine", "--set", "model.padded_vocab_size=128")
    assert outcome.code == 2
    assert outcome.err.startswith(f"{shard}: token 100 (from 0) is 64, the vocabulary is 0..63 (model.vocab_size)")
    assert not Path("mine").exists()
