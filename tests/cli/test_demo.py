"""`nanogpt demo`, whole, with a model small enough for a test: the data, tokens and commands are the real ones."""

import contextlib
import io
import math
import re
import shlex
from pathlib import Path

import pytest
import tiny_runs
import torch

from nanogpt.cli import demo as demo_module
from nanogpt.cli.demo import PROMPT, data_state, next_steps, prepare_data, run_demo
from nanogpt.data.shards import train_name, val_name, write_tokens
from nanogpt.errors import InputError, RunError
from nanogpt.recipe import load_recipe
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.unigram import unigram_cross_entropy

OF_THE_LANGUAGE = ("model.vocab", "model.padded", "data=", "checkpoint=")
# Four stages of a step each: the vocabulary is GPT-2's, so every step and micro-step has its price.
TINY = [
    *(setting for setting in tiny_runs.SPEEDRUN if not setting.startswith(OF_THE_LANGUAGE)),
    "training.slots=1",
    "evaluation={every: 5, tokens: 512, micro_batch_tokens: 512, target_loss: null}",
    *(f"training.stages.{stage}.steps=1" for stage in range(3)),
    "training.extension.steps=1",
    "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 2, cooldown_steps: 1}",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    """For tiny tensors the threads' hand-shakes cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    return str(tiny_runs.write_recipe(path, load_recipe("demo", TINY)))


@pytest.fixture(scope="module")
def shown(recipe, tmp_path_factory):
    """A shortened demo: directory, the run's directory, standard output, standard error."""
    directory = tmp_path_factory.mktemp("demo")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run = run_demo(directory, recipe=recipe, steps=4)
    return directory, run, out.getvalue(), err.getvalue()


def test_it_shows_tables_losses_sample_and_what_comes_next(shown):
    directory, run, out, err = shown
    assert "Tokenizing the embedded prose into" in err
    assert "tiny: finished, 4 of 4 steps" in out
    assert "ln(50257) = 10.8249" in out
    rows = {match[1]: float(match[2]) for match in re.finditer(r"^ ?(\w+ \w+) +(\d+\.\d{4}) ", out, re.MULTILINE)}
    assert rows["before training"] == pytest.approx(math.log(50304), abs=0.05)
    train, val = (sorted((directory / "data").glob(f"fineweb_{part}_*.bin")) for part in ("train", "val"))
    assert rows["unigram model"] == pytest.approx(unigram_cross_entropy(train, val, 512, 50257), abs=1e-4)
    assert rows["after training"] < rows["before training"]
    above = rows["after training"] - rows["unigram model"]
    assert float(re.search(r"(\d+\.\d+) above unigram", out)[1]) == pytest.approx(above, abs=2e-4)
    assert f"What it writes after {PROMPT!r}:\n\n  {PROMPT}" in out
    assert "Shortened to 4 steps: the loss is shown, but not judged" in out
    assert f"Loss plot: {run / 'loss.png'}" in out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run.parent == directory
    assert RunDirectory.open(run).spec().training.total_steps == 4


def test_what_it_says_to_type_works(shown, nanogpt):
    _, run, out, _ = shown
    lines = [line.strip() for line in out.partition("Next:")[2].splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("nanogpt ")]
    assert {command[1] for command in commands} >= {"sample", "show"}
    for command in commands:
        if command[1] in ("train", "launch"):
            command[1] = "validate"
        assert nanogpt(*command[1:]).code == 0, command
    assert nanogpt("plot", run, "--out", run / "again.svg").out == f"{run / 'again.svg'}\n"
    assert nanogpt("plot", run).out == f"{run / 'loss.png'}\n"


def test_another_model(shown, nanogpt, tmp_path):
    """The small record 92, shortened, validated on fewer tokens."""
    directory, recipe = shown[0], tmp_path / "small.yaml"
    recipe.write_text("base: demo-record92.yaml\nevaluation: {every: null, tokens: 512, micro_batch_tokens: 256}\n")
    outcome = nanogpt("demo", "--recipe", recipe, "--dir", directory, "--steps", "4")
    assert outcome.code == 0, outcome.err
    assert "demo-record92: finished, 4 of 4 steps" in outcome.out
    [run] = directory.glob("demo-record92-*")
    assert f"nanogpt show {run / 'spec.yaml'}" in outcome.out


def test_a_whole_run_that_learned_too_little_fails(shown, recipe, capsys):
    directory = shown[0]
    before = {path: path.stat().st_mtime_ns for path in (directory / "data").iterdir()}
    with pytest.raises(RunError, match=r"The demo failed: a validation loss of .* at least 0\.3 is expected.*log\.txt"):
        run_demo(directory, recipe=recipe)
    captured = capsys.readouterr()
    assert "is in" in captured.err and "already" in captured.err
    assert {path: path.stat().st_mtime_ns for path in (directory / "data").iterdir()} == before
    assert "What it writes" in captured.out
    assert "Next:" not in captured.out


def test_a_whole_run_that_learned_enough_passes(shown, recipe, capsys, monkeypatch):
    monkeypatch.setattr(demo_module, "NEEDED_MARGIN", -20.0)
    run = run_demo(shown[0], recipe=recipe)
    out = capsys.readouterr().out
    assert "All of it took" in out
    assert f"nanogpt sample {run}" in out
    assert "judged" not in out


def test_steps_below_the_number_of_stages_are_refused_at_once(nanogpt, tmp_path):
    outcome = nanogpt("demo", "--dir", tmp_path / "new", "--steps", "1")
    assert outcome.code == 2
    assert "--steps 1" in outcome.err
    assert not (tmp_path / "new").exists()


def test_shards_of_others_are_left_alone(nanogpt, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in (train_name(1), val_name()):
        write_tokens(data / name, [50256, 1, 2])
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    outcome = nanogpt("demo", "--dir", tmp_path)
    assert outcome.code == 2
    assert f"{data}: is a file, or holds shards that the demo did not make; name another directory" in outcome.err
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(InputError, match="name another directory"):
        prepare_data(tmp_path / "data", 513)


@pytest.mark.parametrize("damage", ["flip", "remove", "other split"])
def test_damaged_shards_are_made_again(tmp_path, damage):
    prepare_data(tmp_path, 513)
    shard = tmp_path / train_name(1)
    data = shard.read_bytes()
    assert data_state(tmp_path, 513) == "ready"
    wanted = 513
    if damage == "flip":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        shard.unlink()
    else:
        wanted = 5000
    assert data_state(tmp_path, wanted) == "stale"
    prepare_data(tmp_path, wanted)
    assert data_state(tmp_path, wanted) == "ready"
    assert (shard.read_bytes() == data) == (damage != "other split")


@pytest.mark.parametrize(
    ("gpus", "command"),
    [
        (["NVIDIA H100 80GB HBM3"], "nanogpt train speedrun --on 1xh100"),
        (["NVIDIA H200"] * 4, "nanogpt launch speedrun --on 4xh200"),
        (["NVIDIA Something New"], "nanogpt train speedrun --set hardware.gpu=l40s --set hardware.gpus_per_node=1"),
    ],
)
def test_the_next_step_fits_the_gpus(gpus, command):
    lines = next_steps(Path("runs/x"), gpus).splitlines()
    assert lines[-1].strip() == command
    assert "  prep-fineweb" in lines


def test_only_what_is_here_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "slurm" not in next_steps(Path("runs/x"), [])
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "run.sh").write_text("")
    assert "slurm/run.sh --dry-run speedrun --on 1xh100" in next_steps(Path("runs/x"), [])
    monkeypatch.setenv("PATH", "/nowhere")
    assert re.search(r"^  \. \S*/bin/activate$", next_steps(Path("runs/x"), []), re.MULTILINE)
