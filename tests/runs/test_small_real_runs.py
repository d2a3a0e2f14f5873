"""Comparing, testing, checking and submitting runs that were really trained: three seeds of a tiny speedrun."""

from __future__ import annotations

import json
import statistics

import mpmath
import pytest
from tiny_runs import make_data, tiny_spec, train

from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import read_record


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    parent = tmp_path_factory.mktemp("real")
    data = make_data(parent / "data")
    paths = []
    for seed in (0, 1, 2):
        spec = tiny_spec(f"training.seed={seed}", "evaluation.target_loss=4.0", "training.warmup=true")
        train(spec, data, parent / f"run-{seed}")
        paths.append(parent / f"run-{seed}")
    return paths


@pytest.fixture(scope="module")
def other(runs):
    spec = tiny_spec("training.stages.0.lr_factor=2", "training.warmup=false")
    train(spec, runs[0].parent / "data", runs[0].parent / "other")
    return runs[0].parent / "other"


def test_compare(runs, other, nanogpt):
    found = json.loads(nanogpt("compare", *runs, other, "--json").out)
    for run, path in zip(found["runs"], (*runs, other), strict=True):
        with RunDirectory.open(path) as directory:
            assert f"val_loss:{run['val_loss']:.4f}" in directory.log_path.read_text()
        assert run["state"] == "finished"
        assert [stage["steps"] for stage in run["stages"]] == [4, 3, 3, 2]
        assert run["train_seconds"] == pytest.approx(read_record(path).record_seconds, abs=1e-3)
    assert len({run["val_loss"] for run in found["runs"]}) == 4
    assert {one["key"]: one["values"] for one in found["differences"]} == {
        "training.stages.0.lr_factor": [1.0, 1.0, 1.0, 2.0],
        "training.warmup": [True, True, True, False],
        "evaluation.target_loss": [4.0, 4.0, 4.0, None],
        "training.seed": [0, 1, 2, 0],
    }


def test_significance(runs, other, nanogpt):
    data = json.loads(nanogpt("significance", *runs, "--json").out)
    losses = [run["val_loss"] for run in data["runs"]]
    mean, sd = statistics.fmean(losses), statistics.stdev(losses)
    assert (data["target"], data["mean"], data["sd"]) == pytest.approx((4.0, mean, sd))
    # With two degrees of freedom the t distribution has a closed form.
    t = mpmath.mpf(mean - 4.0) / (sd / mpmath.sqrt(3))
    assert data["p"] == pytest.approx(float((1 + t / mpmath.sqrt(2 + t * t)) / 2), rel=1e-6)
    refused = nanogpt("significance", *runs, other)
    assert refused.code == 2 and "training.stages.0.lr_factor" in refused.err


def test_check(runs, nanogpt):
    done = nanogpt("check", runs[0], "--json")
    assert done.code == 1
    checks = {check["rule"]: check for check in json.loads(done.out)["checks"]}
    for rule in ("finished", "compiler flags", "hardware", "no interruption"):
        assert checks[rule]["state"] == "passed", checks[rule]
    assert checks["timing"]["state"] == "passed", checks["timing"]
    assert checks["validation tokens"]["evidence"] == (
        "256 validation tokens according to the record, the official number is 10,485,760"
    )
    assert checks["target"]["state"] == "failed"
    assert checks["files agree"] == {
        "rule": "files agree",
        "state": "passed",
        "evidence": "record, metrics, log and spec agree on 12 steps and 4 evaluations",
    }
    # Shards of nobody's: hashed, and no manifest vouches for them.
    assert checks["validation shards"]["state"] in ("failed", "unknown")
    assert checks["recipe"]["evidence"].startswith("departs from the shipped speedrun (allowed): ")


def test_submission(runs, tmp_path, nanogpt):
    arguments = ["submission", *runs, "--description", "tiny", "--out", tmp_path / "out"]
    assert nanogpt(*arguments).code == 2
    done = nanogpt(*arguments, "--unofficial")
    assert done.code == 0, done.err
    seconds = statistics.fmean(read_record(run).record_seconds for run in runs)
    assert done.out.startswith(f"| {seconds:.3f} s | UNOFFICIAL: tiny | ")
    data = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert "1 x cpu" in data["notes"]["hardware"]
    assert any("own" in line or "validation" in line for line in data["objections"])
