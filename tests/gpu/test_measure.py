"""The measuring script itself, without a GPU: queues, logs, the limit, the comparison of runs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import end_of_run
import measure
import pytest
from made_runs import RECORD_67, made_run


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, measure.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def slow_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements take ten minutes and do nothing."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(measure, "sys", SimpleNamespace(executable=str(slow)))


def test_queues_go_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Recipes for a GPU that is not there end with 2 at once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = script(tmp_path, "--data", tmp_path, "--on", "7", "step", "profile", "--on", "8", "kernels")
    assert done.returncode == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [(name, gpu, how) for name, gpu, _, how in rows] == [
        ("step", "7", "exit code 2"),
        ("profile", "7", "exit code 2"),
        ("kernels", "8", "exit code 2"),
    ]
    assert all((tmp_path / f"{name}.txt").read_text().strip() for name in ("step", "profile", "kernels"))


def test_whole_runs_of_models_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made_run(tmp_path / "runs/whole-1/a-run", curve=RECORD_67)
    lower = [(step, loss - 0.002) for step, loss in RECORD_67[:2]]
    made_run(tmp_path / "runs/record89-whole-1/a-run", 3.2756, curve=lower)
    told = script(tmp_path, "--data", tmp_path, "--on", "0", "kernels").stdout
    assert "| 250 | -0.0020 | -0.0020 |" in told and "record89-whole - whole" in told


@pytest.mark.usefixtures("slow_python")
def test_what_runs_at_the_limit_is_ended_and_nothing_begins_after_it(tmp_path: Path):
    queue = measure.Queue("0", ["first", "second"], tmp_path, tmp_path, dict.fromkeys(("first", "second"), ("runs",)))
    thread = threading.Thread(target=queue.run)
    thread.start()
    while queue.process is None:
        time.sleep(0.01)
    queue.end()
    thread.join(timeout=30)
    assert [(name, code) for name, _, _, code in queue.rows] == [("first", None)]


def test_in_the_end_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    higher = [(step, loss + 0.0015) for step, loss in RECORD_67[:3]]
    made_run(tmp_path / "runs/fast/a-run", curve=RECORD_67)
    made_run(tmp_path / "runs/plain/a-run", 3.2766, curve=higher)
    lines = script(tmp_path, "--data", tmp_path, "--on", "0", "kernels").stdout.splitlines()
    losses = {line.split()[3]: line.split()[4:] for line in lines if line.strip().startswith("loss at step")}
    assert losses["0"] == ["10.8310", "10.8325", "(+0.0015)"]
    assert losses["250"] == ["4.5680", "4.5695", "(+0.0015)"]
    assert losses["750"][0] == "3.8770" and len(losses["750"]) < 3  # which plain has not come to
    [final] = [line.split()[2:] for line in lines if line.strip().startswith("final loss")]  # no runs of record 89
    assert final == ["3.2776", "3.2766", "(-0.0010)"]


def test_pairs_of_seeds_have_a_mean_and_its_error(tmp_path: Path):
    for seed, more in ((1, 0.001), (2, 0.003)):
        made_run(tmp_path / f"runs/fast-{seed}/a-run", curve=RECORD_67)
        higher = [(step, loss + more) for step, loss in RECORD_67[:2]]
        made_run(tmp_path / f"runs/plain-{seed}/a-run", 3.2776 + more, curve=higher)
    made_run(tmp_path / "runs/plain-3/a-run", curve=RECORD_67)  # whose fast one has not come
    made_run(tmp_path / "runs/plain-wide/a-run", curve=RECORD_67)  # something else, no seed
    made_run(tmp_path / "runs/fast-wide/a-run", curve=RECORD_67)
    lines = measure.differences(tmp_path, "fast", "plain")
    assert lines[2:] == [
        "| 0 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
        "| 250 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
        "| 1555 | -0.0010, -0.0030 | -0.0020 | 0.0010 |",
    ]
    assert measure.differences(tmp_path, "record89-fast", "record89-plain") == []


def test_the_same_bits_or_not(tmp_path: Path):
    made_run(tmp_path / "runs/deterministic/a-run", curve=RECORD_67)
    assert measure.same_bits(tmp_path, "") == []
    made_run(tmp_path / "runs/deterministic-again/a-run", curve=RECORD_67)
    assert measure.same_bits(tmp_path, "") == ["deterministic, twice: losses equal bit by bit"]
    made_run(tmp_path / "runs/deterministic-again/b-run", curve=[*RECORD_67[:-1], (RECORD_67[-1][0], 3.27760001)])
    assert measure.same_bits(tmp_path, "") == ["deterministic, twice: losses DIFFER"]


def test_a_seed_is_part_of_the_command(tmp_path: Path):
    queue = measure.Queue("0", [], tmp_path, tmp_path / "data", measure.measurements("h100", 300))
    assert queue._arguments(measure.Name.parse("fast:2"))[-5:] == [
        str(tmp_path / "data"), "--out", str(tmp_path / "runs/fast-2"), "--set", "training.seed=2"
    ]  # fmt: skip
    assert queue._arguments(measure.Name.parse("fast:2"))[:3] == ["-m", "nanogpt", "train"]
    assert "training.seed=2" in queue._arguments(measure.Name.parse("step:2")) and "--out" not in queue._arguments(
        measure.Name.parse("step:2")
    )


def test_several_gpus_are_one_run_of_their_recipe(tmp_path: Path):
    commands = measure.measurements("h100", 300, count=measure.count_of("0,1,2,3"))
    queue = measure.Queue("0,1,2,3", [], tmp_path, tmp_path / "data", commands)
    launch = ["--standalone", "--nproc-per-node", "4"]
    ranks = ["-m", "torch.distributed.run", *launch]
    speedrun = ["speedrun", "--on", "4xh100"]

    def arguments(name: str) -> list[str]:
        return queue._arguments(measure.Name.parse(name))

    assert arguments("record89-whole:1")[:7] == ["-m", "nanogpt", "launch", *launch, "record89"]
    assert arguments("whole")[-4:] == ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs/whole")]
    assert arguments("full")[:9] == [*ranks, end_of_run.__file__, *speedrun]
    assert arguments("profile") == [
        *ranks, "-m", "nanogpt", "bench", "profile", *speedrun, "--rows", "60",
        "--traces", str(tmp_path / "traces/profile")
    ]  # fmt: skip
    assert arguments("communication") == [*ranks, "-m", "nanogpt", "bench", "communication", *speedrun]
    assert queue._environment()["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_full_schedule_is_run_by_the_script_of_its_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    queue = measure.Queue("0", [], tmp_path, tmp_path / "data", measure.measurements("h100", 300))
    script, recipe, *options = queue._arguments(measure.Name.parse("record89-full:1"))
    assert Path(script) == Path(end_of_run.__file__)
    assert recipe == "record89" and options[:2] == ["--on", "1xh100"] and "training.seed=1" in options
    with pytest.raises(SystemExit):  # for that average alone: everything else is understood
        end_of_run.main([recipe, *options, "--average", "0"])
    assert "--average: from 1 to the 1285 steps of the run" in capsys.readouterr().err


def test_an_idea_is_the_fast_run_and_the_benchmarks_with_its_settings():
    settings = ("optimizer.normuon.lr=0.02", "training.warmup=false")
    models = {"lower": "", "record89-lower": "record89-", "record89-fp8-backward-lower": "record89-fp8-backward-"}
    commands = measure.measurements("h200", 300, dict.fromkeys(models, settings))
    ends = ("--set", settings[0], "--set", settings[1])
    for name, model in models.items():
        assert commands[name] == commands[f"{model}fast"] + ends
        assert commands[f"{name}-step"] == commands[f"{model}step"] + ends
        assert commands[f"{name}-profile"] == commands[f"{model}profile"] + ends
        assert commands[name][1:4] == (model.removesuffix("-") or "speedrun", "--on", "1xh200")


@pytest.mark.usefixtures("slow_python")
def test_a_run_ends_with_an_evaluation_at_or_after_its_step(tmp_path: Path):
    run = made_run(tmp_path / "runs/fast-1/a-run", curve=RECORD_67[:2])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    begun = [line for line in lines if json.loads(line).get("step", 0) <= 250]
    (run / "metrics.jsonl").write_text("".join(begun))
    queue = measure.Queue("0", ["fast:1@260"], tmp_path, tmp_path, measure.measurements("h100", 300))
    thread = threading.Thread(target=queue.run, daemon=True)
    thread.start()
    time.sleep(1.5)
    assert thread.is_alive()
    (run / "metrics.jsonl").write_text("".join(lines))
    thread.join(timeout=30)
    assert [(name, code) for name, _, _, code in queue.rows] == [("fast:1@260", 0)]
    assert queue._arguments(measure.Name.parse("fast:1@260"))[-1] == "training.seed=1"


def test_an_idea_with_a_name_that_is_taken_is_refused(tmp_path: Path):
    done = script(tmp_path, "--data", tmp_path, "--idea", "again", "training.seed=3", "--on", "0", "again")
    assert done.returncode == 2 and "again is a measurement already" in done.stderr


def test_an_unknown_name_is_refused(tmp_path: Path):
    done = script(tmp_path, "--data", tmp_path, "--on", "0", "fats")
    assert done.returncode == 2 and "no measurement fats; there are fast, again, plain" in done.stderr
