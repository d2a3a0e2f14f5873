"""The t-test of several runs: against published p-values, and against the t distribution computed without SciPy."""

from __future__ import annotations

import json
import math
import shutil
import statistics

import mpmath
import pytest
from made_runs import BIGRAM, SMEAR, SPARSE_BIGRAM, YARN, change_record, loaded, made_run, made_runs

from nanogpt.errors import InputError
from nanogpt.runs.significance import runs_significance, significance


def p_value(losses, target):
    """The t density, (1 + x^2/v)^-(v+1)/2 up to its constant, integrated from minus infinity to t."""
    n = len(losses)
    mean, sd = mpmath.mpf(statistics.fmean(losses)), mpmath.mpf(statistics.stdev(losses))
    t, v = (mean - target) / (sd / mpmath.sqrt(n)), n - 1
    constant = mpmath.gamma((v + 1) / mpmath.mpf(2)) / (mpmath.sqrt(v * mpmath.pi) * mpmath.gamma(v / mpmath.mpf(2)))
    return float(mpmath.quad(lambda x: constant * (1 + x * x / v) ** (-(v + 1) / mpmath.mpf(2)), [-mpmath.inf, t]))


@pytest.mark.parametrize("published", [BIGRAM, SPARSE_BIGRAM, YARN, SMEAR])
@pytest.mark.parametrize("target", [3.28, 3.279])
def test_published_losses(published, target):
    losses, published_p = published
    found = significance(losses, target=target)
    assert found.p == pytest.approx(p_value(losses, target), rel=1e-9)
    if target == 3.28:
        assert round(found.p, 4) == published_p
        assert found.significant == (published_p < 0.01)
    assert found.mean == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert found.sd == pytest.approx(
        math.sqrt(sum((loss - found.mean) ** 2 for loss in losses) / (len(losses) - 1)), rel=1e-12
    )


def repeated(mean, sd, n):
    """n values of exactly this mean and sample standard deviation."""
    half = [(-1) ** i for i in range(n - n % 2)] + [0] * (n % 2)
    scale = sd / statistics.stdev(half)
    return [mean + scale * value for value in half]


def test_more_runs_are_the_fewest_that_are_enough():
    found = significance(SPARSE_BIGRAM[0])
    assert not found.significant
    total = found.n + found.more_runs
    assert p_value(repeated(found.mean, found.sd, total), 3.28) < 0.01
    assert p_value(repeated(found.mean, found.sd, total - 1), 3.28) > 0.01
    assert found.verdict() == (
        f"not shown yet: p = 0.042, p must be < 0.01: about {found.more_runs} more runs at this mean and spread"
    )


def test_no_number_of_runs_helps_a_mean_that_is_not_below():
    found = significance([3.281, 3.282, 3.2805])
    assert found.p > 0.5 and found.more_runs is None
    assert "more such runs do not help" in found.verdict()
    barely = significance([3.27999, 3.28000999, 3.27, 3.29])
    assert barely.more_runs is None and "more than 10,000 runs" in barely.verdict()


def test_one_run_and_equal_runs():
    one = significance([3.27])
    assert (one.p, one.sd, one.significant) == (None, None, False)
    assert "one run says nothing about the spread" in one.verdict()
    assert significance([3.27, 3.27]).significant
    assert not significance([3.28, 3.28]).significant
    assert significance([3.29, 3.29]).p == 1.0


def test_alpha():
    assert significance(SPARSE_BIGRAM[0], alpha=0.05).significant
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="--alpha: found"):
            significance([3.2, 3.3], alpha=alpha)
    with pytest.raises(InputError, match="finite loss"):
        significance([3.2, math.nan])


def test_the_command(tmp_path, nanogpt):
    runs = made_runs(tmp_path, BIGRAM[0])
    done = nanogpt("significance", *runs)
    assert done.code == 0
    assert "n = 6, mean 3.27757, standard deviation 0.00124; target 3.28, t = " in done.out
    assert "p = 0.0025" in done.out and "significant: the mean is below 3.28" in done.out
    data = json.loads(nanogpt("significance", *runs, "--json", "--target", "3.278", "--alpha", "0.02").out)
    assert data["p"] == pytest.approx(p_value(BIGRAM[0], 3.278), rel=1e-6)
    assert (data["n"], data["target"], data["alpha"], data["significant"]) == (6, 3.278, 0.02, False)
    assert data["runs"][3] == {"run": "run-3", "seed": 3, "val_loss": 3.2791, "train_seconds": 93.03}
    assert nanogpt("significance", *runs, "--target", "3.278").code == 1


def test_repeated_seeds_are_noted(tmp_path, nanogpt):
    runs = [made_run(tmp_path / f"run-{i}", 3.277 + i / 1000, seed=7) for i in range(2)]
    assert "several runs have seed 7" in nanogpt("significance", *runs).err


def test_a_run_counts_once(tmp_path):
    run = made_run(tmp_path / "run")
    assert [one.label for one in loaded(run, tmp_path / "." / "run")] == ["run"]
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(InputError, match=r"copy: a copy of .*run, loss for loss"):
        runs_significance(loaded(run, copy))


def test_runs_that_differ_are_refused(tmp_path):
    run = made_run(tmp_path / "run", 3.2771)
    with pytest.raises(InputError, match=r"spec: training\.stages\.1\.steps: 505 in run, 500 in other") as refusal:
        runs_significance(
            loaded(run, made_run(tmp_path / "other", 3.277, seed=1, overrides=["training.stages.1.steps=500"]))
        )
    assert "seed" not in str(refusal.value)

    for name, changes, message in (
        ("code", {"code__source_sha256": "6" * 64}, "code: source_sha256: 555555555555 in run, 666666666666 in code"),
        ("torch", {"versions": {"torch": "2.12.0", "triton": "3.6.0"}}, "code: torch: 2.11.0 in run, 2.12.0 in torch"),
        ("path", {"computation__attention": "fa3"}, "code: attention: fa4 in run, fa3 in path"),
    ):
        other = change_record(made_run(tmp_path / name, 3.277, seed=1), **changes)
        with pytest.raises(InputError, match=message):
            runs_significance(loaded(run, other))

    other = made_run(tmp_path / "gpus", 3.277, seed=1)
    ranks = loaded(other)[0].record.hardware.ranks
    change_record(other, hardware__ranks=[r.model_copy(update={"device": "NVIDIA H200"}) for r in ranks])
    with pytest.raises(
        InputError, match="hardware: devices: 8 x NVIDIA H100 80GB HBM3 in run, 8 x NVIDIA H200 in gpus"
    ):
        runs_significance(loaded(run, other))


def test_what_does_not_matter_may_differ(tmp_path):
    run = made_run(tmp_path / "run", 3.2771)
    overrides = ["name=again", "output.log_every=10", "data.directory=/elsewhere", "description=second"]
    assert runs_significance(loaded(run, made_run(tmp_path / "b", 3.277, seed=4, overrides=overrides))).n == 2


def test_unfinished_runs_are_refused(tmp_path, nanogpt):
    runs = made_runs(tmp_path, (3.277, 3.278))
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    change_record(runs[1], state="failed")
    refused = nanogpt("significance", *runs)
    assert refused.code == 2
    assert "run-1: failed at step 1555 of 1555" in refused.err
    without = made_run(tmp_path / "old", with_record=False)
    assert "old/record.json: no such record" in nanogpt("significance", runs[0], without).err
