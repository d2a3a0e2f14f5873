"""`nanogpt experiment run` on a CPU: queues, logs, results, the limit, continuing, what is compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import RECORD_67, change_record, made_run
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.errors import InputError
from nanogpt.experiment import queues
from nanogpt.experiment.comparison import differences, judged, report, same_bits, scatter
from nanogpt.experiment.measurements import Name, measurements
from nanogpt.experiment.queues import Outcome, Place, Queue, kill_tree, make_queues
from nanogpt.runs.metrics import read_run

RECIPES = {"": "speedrun", "record89-": "record89", "record89-fp8-": "record89-fp8-backward"}


def known(steps: int = 300, **options: object) -> dict:
    """Of an H100."""
    return measurements(RECIPES, steps=steps, fill=lambda stated: ({"gpu": "h100"}, "here"), **options)


def arguments(command: list[str]) -> list[str]:
    assert command[:2] == [sys.executable, "-m"]
    return command[2:]


@pytest.fixture
def slow_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements take ten minutes and do nothing."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(queues, "sys", SimpleNamespace(executable=str(slow)))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The beginning of a call that trains the tiny run, in so many steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, data = write_recipe(tmp_path / "tiny.yaml", tiny_spec()), make_data(tmp_path / "data")

    def call(steps: int = 6) -> list[str]:
        return ["experiment", "run", str(tmp_path / "out"), str(recipe), "--data", str(data), "--steps", str(steps)]

    return call


def until(condition: Callable[[], object], patience: float = 120) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_an_idea_is_compared_seed_by_seed_and_the_same_call_goes_on(
    tiny: Callable[..., list[str]], tmp_path: Path, nanogpt: Callable
):
    out = tmp_path / "out"
    idea = ["--idea", "low", "optimizer.normuon.lr=0.001", "optimizer.normuon.weight_decay=0.0"]
    idea += ["--validate", f"prose={make_data(tmp_path / 'prose', train_tokens=(), val_tokens=300)}"]
    first = nanogpt(*tiny(), *idea, "--gpus", "0", "fast:1", "low:1", "--gpus", "1", "profile")
    assert first.code == 1  # which a profile on a CPU is refused with
    report = (out / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "profile" in line]
    assert rows[0][:2] == ["profile", "1"] and rows[0][3].startswith("exit code 2: bench profile:")
    assert "| step | low - fast | mean | standard error |" in report and "| prose loss at the end | 1 | " in report
    assert "low - fast" in first.out
    [run] = (out / "runs/low-1").iterdir()
    spec = (run / "spec.yaml").read_text()
    assert "lr: 0.001" in spec and "seed: 1" in spec
    written = (out / "low-1.json").read_bytes()

    second = nanogpt(*tiny(), *idea, "--gpus", "0", "low:1", "fast:1@3")
    assert second.code == 0 and second.out.count("done before") == 2
    assert "| step | low - fast | mean | standard error |" in (out / "report.md").read_text()
    assert (out / "low-1.json").read_bytes() == written and len(list((out / "runs/low-1").iterdir())) == 1

    other = nanogpt(*tiny(steps=5), *idea, "--gpus", "0", "low:1")
    assert other.code == 2 and "low-1 was measured with another recipe" in other.err
    (out / "low-1.json").write_text("{")
    assert "low-1.json: not the outcome of a measurement" in nanogpt(*tiny(), *idea, "--gpus", "0", "low:1").err


@pytest.mark.slow
def test_several_gpus_together_are_ranks_of_one_run(tiny: Callable[..., list[str]], tmp_path: Path, nanogpt: Callable):
    assert nanogpt(*tiny(), "--gpus", "0,1", "fast").code == 0
    [run] = (tmp_path / "out/runs/fast").iterdir()
    assert read_run(run).state == "finished" and read_run(run).start["world_size"] == 2


@pytest.mark.usefixtures("slow_python")
def test_what_runs_at_the_limit_is_ended_and_nothing_begins_after_it(tmp_path: Path):
    queue = Queue("0", [Name("fast"), Name("again")], known(), Place(tmp_path, None))
    thread = threading.Thread(target=queue.run, daemon=True)
    thread.start()
    until(lambda: queue.process is not None)
    queue.end()
    thread.join(timeout=60)
    assert [(outcome.name, outcome.text) for outcome in queue.outcomes] == [("fast", "ended at the limit")]
    assert json.loads((tmp_path / "fast.json").read_text())["code"] is None
    assert queues.finished(queue.place, Name("fast"), "any") is None  # a later call measures it


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that has one in a session of its own, as a launcher has ranks; and the file with that one's id."""
    pid = tmp_path / "pid"
    script = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    yield process, pid
    kill_tree(process.pid)
    process.wait()


def test_ranks_end_with_their_launcher(launcher: tuple[subprocess.Popen, Path]):
    process, pid = launcher
    until(lambda: pid.exists() and pid.read_text())
    kill_tree(process.pid)
    assert process.wait(60) == -signal.SIGKILL
    until(lambda: not _lives(int(pid.read_text())))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_what_runs(tiny: Callable[..., list[str]], tmp_path: Path):
    call = [*tiny(100_000), "--gpus", "0", "fast"]
    process = subprocess.Popen([sys.executable, "-m", "nanogpt", *call], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/runs/fast"
    until(lambda: list(metrics.glob("*/metrics.jsonl")))
    [child] = map(int, _children(process.pid))
    process.terminate()
    assert "SIGTERM: measurements were stopped" in process.communicate(timeout=120)[1]
    assert process.returncode == 75 and not _lives(child)


def _children(pid: int) -> list[str]:
    return [child for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]


@pytest.mark.usefixtures("slow_python")
def test_a_run_ends_with_an_evaluation_at_or_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = made_run(tmp_path / "runs/fast-1/a-run", curve=RECORD_67[:2])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    begun = [line for line in lines if json.loads(line).get("step", 0) <= 250]
    (run / "metrics.jsonl").write_text("".join(begun))
    looked: list[bool] = []
    evaluated = queues.evaluated
    monkeypatch.setattr(queues, "evaluated", lambda *args: looked.append(evaluated(*args)) or looked[-1])
    queue = Queue("0", [Name.parse("fast:1@260")], known(), Place(tmp_path, None))
    thread = threading.Thread(target=queue.run, daemon=True)
    thread.start()
    until(lambda: len(looked) > 1)
    assert not any(looked) and thread.is_alive()
    (run / "metrics.jsonl").write_text("".join(lines))
    thread.join(timeout=60)
    [outcome] = queue.outcomes
    assert (outcome.name, outcome.code, outcome.until) == ("fast-1", 0, 260)
    assert [outcome.covers(Name.parse(text)) for text in ("fast:1@260", "fast:1@9", "fast:1@261", "fast:1")] == [
        True, True, False, False
    ]  # fmt: skip


def outcome(name: str = "kernels") -> Outcome:
    return Outcome(name, "0", 1.0, 0, "")


def test_whole_runs_of_recipes_are_compared(tmp_path: Path):
    made_run(tmp_path / "runs/whole-1/a-run", curve=RECORD_67)
    lower = [(step, loss - 0.002) for step, loss in RECORD_67[:2]]
    made_run(tmp_path / "runs/record89-whole-1/a-run", 3.2756, curve=lower)
    lines = report(Place(tmp_path, None), list(RECIPES), [], [outcome()])
    assert "| step | record89-whole - whole | mean | standard error |" in lines
    assert "| 250 | -0.0020 | -0.0020 |  |" in lines


def test_fast_again_and_plain_are_compared(tmp_path: Path, nanogpt: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    higher = [(step, loss + 0.0015) for step, loss in RECORD_67[:3]]
    made_run(tmp_path / "runs/fast/a-run", curve=RECORD_67)
    made_run(tmp_path / "runs/plain/a-run", 3.2766, curve=higher)
    done = nanogpt("experiment", "run", tmp_path, "1xh100", "--gpus", "0", "kernels")
    losses = {line.split()[3]: line.split()[4:] for line in done.out.splitlines() if "loss at step" in line}
    assert losses["250"] == ["4.5680", "4.5695", "(+0.0015)"]
    assert losses["750"][0] == "3.8770" and len(losses["750"]) < 3  # which plain has not come to
    assert "| 250 | +0.0015 | +0.0015 |  |" in (tmp_path / "report.md").read_text()


def test_pairs_of_seeds_have_a_mean_and_its_error(tmp_path: Path):
    for seed, more in ((1, 0.001), (2, 0.003)):
        made_run(tmp_path / f"runs/fast-{seed}/a-run", curve=RECORD_67)
        higher = [(step, loss + more) for step, loss in RECORD_67[:2]]
        made_run(tmp_path / f"runs/plain-{seed}/a-run", 3.2776 + more, curve=higher)
    made_run(tmp_path / "runs/plain-3/a-run", curve=RECORD_67)  # whose fast one has not come
    made_run(tmp_path / "runs/plain-wide/a-run", curve=RECORD_67)  # something else, no seed
    made_run(tmp_path / "runs/fast-wide/a-run", curve=RECORD_67)
    made_run(tmp_path / "runs/fast-4/a-run", curve=RECORD_67)  # of another length
    made_run(tmp_path / "runs/plain-4/a-run", curve=RECORD_67, overrides=["training.extension.steps=60"])
    (tmp_path / "runs/fast-5/a-run").mkdir(parents=True)  # cut off before it wrote anything
    made_run(tmp_path / "runs/plain-5/a-run", curve=RECORD_67)
    place = Place(tmp_path, None)
    assert differences(place, "fast", "plain")[2:] == [
        "| 0 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
        "| 250 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
        "| 1555 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
    ]
    assert differences(place, "record89-fast", "record89-plain") == []


def noisy(step: int) -> float:
    """A training loss whose steps differ by more than anything that is to be seen."""
    return 3 + 0.1 * ((step * 7919) % 13)


def test_training_losses_of_the_next_token_are_paired_by_step_and_say_how_many_seeds_it_takes(tmp_path: Path):
    def lower(step: int, by: float) -> float:
        multi_token = 1.0 if step <= 1010 else 0.0  # steps whose loss is of more than the next token: no measure
        return noisy(step) + multi_token - by + 1e-4 * (-1) ** (step // 10)

    for seed, by in ((1, 0.0010), (2, 0.0016), (3, -0.0001)):
        made_run(tmp_path / f"runs/fast-{seed}/a-run", 3.2776 + 0.0011 * seed, trained=noisy)
        made_run(tmp_path / f"runs/low-{seed}/a-run", 3.2770, trained=partial(lower, by=by))
    place = Place(tmp_path, None)
    for name in ("fast-3", "low-3"):
        change_record(tmp_path / f"runs/{name}/a-run", data__passes=2)
    for name, loss in (("fast-1", 3.5), ("fast-2", 3.6), ("low-1", 3.4)):
        ends = [["the last weights", {"prose": loss}], ["4 steps before", {"prose": 1.0}]]
        (tmp_path / f"runs/{name}/a-run/ends.json").write_text(json.dumps(ends))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in judged(place, "low", "fast")[2:]]
    training = "training loss of the next token, steps 1011 to 1555"
    assert rows == [
        [training, "2", "-0.00130", "0.00030", "1", "0.00001"],
        ["validation loss at the end", "3", "-0.00280", "0.00064", "5", ""],
        ["prose loss at the end", "1", "-0.10000", "", "", ""],
        [f"{training}, tokens maybe seen before", "1", "+0.00010", "", "", "0.00001"],
    ]
    trained_on = [noisy(step) for step in range(1011, 1556)]
    mean = sum(trained_on) / len(trained_on)
    shown = scatter(place, ["fast", "low", "plain"])[2:]
    [of_low] = [line.split(" | ")[3:] for line in shown if line.startswith("| low | training loss of the next token")]
    assert of_low == [f"{mean - 0.00083:.4f}", "0.0009", "0.0017 |"]
    assert [line for line in shown if not line.startswith("| low | training")] == [
        "| fast | validation | 3 | 3.2798 | 0.0011 | 0.0022 |",
        "| fast | prose | 2 | 3.5500 | 0.0707 | 0.1000 |",
        f"| fast | training loss of the next token | 3 | {mean:.4f} | 0.0000 | 0.0000 |",
        "| low | validation | 3 | 3.2770 | 0.0000 | 0.0000 |",
    ]


def test_runs_on_other_tokens_are_no_measure_of_training(tmp_path: Path):
    made_run(tmp_path / "runs/fast-1/a-run", trained=noisy)
    batches = ["training.extension.batch_tokens=262144", "training.stages.2.batch_tokens=262144"]
    made_run(tmp_path / "runs/small-1/a-run", trained=noisy, overrides=batches)
    assert not any("training" in line for line in judged(Place(tmp_path, None), "small", "fast")[2:])


def test_the_same_bits_or_not(tmp_path: Path):
    place = Place(tmp_path, None)
    made_run(tmp_path / "runs/deterministic/a-run", curve=RECORD_67)
    assert same_bits(place, "") == []
    made_run(tmp_path / "runs/deterministic-again/a-run", curve=RECORD_67)
    assert same_bits(place, "")[1:] == ["deterministic, twice: losses equal bit by bit"]
    made_run(tmp_path / "runs/deterministic-again/b-run", curve=[*RECORD_67[:-1], (RECORD_67[-1][0], 3.27760001)])
    assert same_bits(place, "")[1:] == ["deterministic, twice: losses DIFFER"]


def test_seed_data_and_directory_are_part_of_the_command(tmp_path: Path):
    queue = Queue("0", [], known(), Place(tmp_path, tmp_path / "data"))
    fast = arguments(queue.command(Name.parse("fast:2")))
    assert fast[:3] == ["nanogpt", "train", "speedrun"] and fast[-1] == "training.seed=2"
    at = fast.index("--out")
    assert fast[at : at + 4] == ["--out", str(tmp_path / "runs/fast-2"), "--data", str(tmp_path / "data")]
    step = arguments(queue.command(Name.parse("step:2")))
    assert "training.seed=2" in step and "--out" not in step and "--data" not in step
    assert arguments(queue.command(Name("kernels"))) == ["nanogpt", "bench", "kernels"]


def test_several_gpus_are_one_run(tmp_path: Path):
    queue = Queue("0,1,2,3", [], known(end_options=("--before", "2")), Place(tmp_path, None))
    launch = ["nanogpt", "launch", "--nproc-per-node", "4"]

    def command(name: str) -> list[str]:
        return arguments(queue.command(Name.parse(name)))

    assert command("record89-whole:1")[:5] == [*launch, "record89"]
    assert "hardware.gpus_per_node=4" in command("record89-whole:1")
    assert command("full")[:6] == [*launch, "--experiment", "ends"] and command("full")[-2:] == ["--before", "2"]
    profile = command("profile")
    assert profile[:7] == [*launch, "--bench", "profile", "speedrun"] and str(tmp_path / "traces/profile") in profile
    assert queue._environment()["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_an_idea_is_the_fast_run_and_the_benchmarks_with_its_settings():
    settings = ("optimizer.normuon.lr=0.02", "training.warmup=false")
    models = {"lower": "", "record89-lower": "record89-", "record89-fp8-lower": "record89-fp8-"}
    found = known(ideas=dict.fromkeys(models, settings), settings=("data.epochs=null",))
    for name, prefix in models.items():
        for end, like in (("", "fast"), ("-step", "step"), ("-profile", "profile")):
            idea, base = found[f"{name}{end}"], found[f"{prefix}{like}"]
            assert base.settings == ("data.epochs=null", "hardware.gpu=h100")
            assert idea.settings == (*base.settings, *settings)
            assert (idea.command, idea.recipe, idea.options) == (base.command, RECIPES[prefix], base.options)


def test_the_gpu_of_a_recipe_that_leaves_it_open_is_filled_in():
    found = measurements({"": "record89"}, steps=300, fill=lambda stated: ({"gpu": "h200"}, "here"))
    assert found["whole"].on(2, None).settings == (
        "hardware.gpus_per_node=2", "hardware.nodes=1", "hardware.gpu=h200"
    )  # fmt: skip


def test_an_idea_with_a_name_that_is_taken_is_refused():
    with pytest.raises(InputError, match="again is a measurement already"):
        known(ideas={"again": ("training.seed=3",)})


@pytest.mark.parametrize(
    ("asked_for", "problem"),
    [
        ([("0", ["fats"])], "no measurement fats; there are kernels, fast, again, plain"),
        ([("0", ["fast:one"])], "fast:one: expected NAME, NAME:SEED"),
        ([("0", [])], "--gpus 0: expected GPUs and measurements"),
        ([("0,", ["fast"])], "--gpus 0, fast: expected GPUs"),
        ([("0", ["fast:1"]), ("1", ["fast:1@20"])], "fast-1 is named twice"),
        ([("0,1", ["fast"]), ("1", ["again"])], "GPU 1 is named twice"),
        ([("0,1,2", ["fast"])], "world size of 3"),
    ],
)
def test_what_cannot_begin_is_refused_before_anything_does(tmp_path: Path, asked_for: list, problem: str):
    with pytest.raises(InputError) as error:
        make_queues(asked_for, known(), Place(tmp_path / "out", None))
    assert problem in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--gpus", "0"], "--gpus 0: expected GPU NAME..."),
        (["--gpus", "0", "a", "--idea", "a"], "--idea a: expected NAME KEY=VALUE..."),
        (["--gpus", "0", "a", "--idea", "a", "model.widht=3"], "widht"),
        (["--gpus", "0", "x-fast", "--also", "x"], "--also x: expected PREFIX=RECIPE"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, nanogpt: Callable, more: list[str], problem: str):
    done = nanogpt("experiment", "run", tmp_path / "out", "1xh100", *more)
    assert done.code == 2 and problem in done.err and not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path, nanogpt: Callable):
    (tmp_path / "out").write_text("")
    done = nanogpt("experiment", "run", tmp_path / "out/here", "1xh100", "--gpus", "0", "kernels")
    assert done.code == 1 and "cannot be written" in done.err
