"""The directory that is published: the row, the data, the evidence, and what is refused."""

from __future__ import annotations

import json
import statistics

import pytest
from made_runs import BIGRAM, SMEAR, SPARSE_BIGRAM, change_record, made_run, made_runs

from nanogpt.recipe import load_recipe


@pytest.fixture
def runs(tmp_path):
    return made_runs(tmp_path / "runs", BIGRAM[0])


def submit(nanogpt, runs, out, *arguments):
    return nanogpt("submission", *runs, "--description", "Bigrams | hashed", "--out", out, *arguments)


def test_a_record(tmp_path, nanogpt, runs):
    out = tmp_path / "new" / "record"
    done = submit(nanogpt, runs, out, "--contributors", "Ada, Grace,", "--log-url", "https://example.org/log.txt")
    assert done.code == 0, done.err
    row = "| 93.025 s | Bigrams \\| hashed | 2026-03-01 | [log](https://example.org/log.txt) | Ada, Grace |"
    assert done.out == row + "\n"
    text = (out / "submission.md").read_text()
    assert row in text.splitlines() and text.startswith("# Bigrams \\| hashed\n")
    assert "UNOFFICIAL" not in text
    assert "n = 6, mean validation loss 3.27757" in text
    assert "| run-3 | 3 | 3.2791 | 93.030 s | 4711 | 2026-03-01 12:08:33 | c0ffee000000 |" in text
    assert "- Hardware: 8 x NVIDIA H100 80GB HBM3" in text

    data = json.loads((out / "submission.json").read_text())
    assert data["official"] is True
    assert data["record_time_seconds"] == pytest.approx(statistics.mean(93 + i / 100 for i in range(6)))
    assert (data["description"], data["contributors"]) == ("Bigrams | hashed", ["Ada", "Grace"])
    assert data["log_url"] == "https://example.org/log.txt"
    assert data["significance"]["p"] == pytest.approx(0.0025, abs=5e-5)
    assert data["notes"]["runs"][0]["job"] == "4711" and data["notes"]["config_difference"] == []
    assert data["notes"]["caveats"] == data["objections"] == []

    for run in runs:
        for name in ("log.txt", "record.json", "metrics.jsonl", "spec.yaml"):
            assert (out / "runs" / run.name / name).read_bytes() == (run / name).read_bytes()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and ">run-5<" in (out / "loss.svg").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "loss.png", "loss.svg", "runs", "submission.json", "submission.md",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["record"]


def test_contributors_and_log_are_optional(tmp_path, nanogpt, runs):
    assert submit(nanogpt, runs, tmp_path / "out").out == "| 93.025 s | Bigrams \\| hashed | 2026-03-01 | - | - |\n"


def test_what_fails_is_refused_or_marked_everywhere(tmp_path, nanogpt):
    runs = made_runs(tmp_path / "runs", SPARSE_BIGRAM[0])
    change_record(runs[1], code__clean=False, code__changed_files=["trainer.py"])
    out = tmp_path / "out"
    refused = submit(nanogpt, runs, out)
    assert refused.code == 2 and not out.exists()
    assert "run-1: code: commit c0ffee000000 with changes: trainer.py" in refused.err
    assert "target" not in refused.err.partition("significance")[0]  # the rule is of the mean, run-2 is above
    assert "significance: not shown yet: p = 0.042" in refused.err

    done = submit(nanogpt, runs, out, "--unofficial")
    assert done.code == 0 and "| UNOFFICIAL: Bigrams" in done.out
    text = (out / "submission.md").read_text()
    assert text.startswith("# UNOFFICIAL: Bigrams") and "**Unofficial: not a record by the public rules.**" in text
    assert "- run-1: code: commit c0ffee000000 with changes: trainer.py" in text
    data = json.loads((out / "submission.json").read_text())
    assert data["official"] is False and data["description"].startswith("UNOFFICIAL: ")
    assert len(data["objections"]) == 2
    assert "UNOFFICIAL run-0" in (out / "loss.svg").read_text()


def test_the_mean_counts_not_each_run(tmp_path, nanogpt):
    runs = made_runs(tmp_path / "runs", SMEAR[0])  # 3.2806 is among them
    assert submit(nanogpt, runs, tmp_path / "out").code == 0
    text = (tmp_path / "out" / "submission.md").read_text()
    assert "| target, run-6 | failed | validation loss 3.28060 is above 3.28" in text
    assert "| code | passed | commit c0ffee000000, clean |" in text


def test_a_target_of_ones_own_does_not_count(tmp_path, nanogpt):
    overrides = ["evaluation.target_loss=3.4"]
    runs = [made_run(tmp_path / f"{i}", 3.30 + i / 1000, seed=i, overrides=overrides) for i in range(3)]
    assert nanogpt("significance", *runs).code == 0
    assert "the mean 3.30100 is not below 3.28" in submit(nanogpt, runs, tmp_path / "out").err


def test_one_run_is_no_record(tmp_path, nanogpt, runs):
    refused = submit(nanogpt, runs[:1], tmp_path / "out")
    assert refused.code == 2 and "one run says nothing of the spread" in refused.err
    above = made_run(tmp_path / "above", 3.2804)
    assert "above: target: validation loss 3.28040 is above 3.28" in submit(nanogpt, [above], tmp_path / "out").err
    assert submit(nanogpt, runs[:1], tmp_path / "out", "--unofficial").code == 0


def test_notes_tell_what_was_changed_and_what_is_not_known(tmp_path, nanogpt):
    runs = []
    for seed, loss in enumerate((3.2770, 3.2772, 3.2771)):
        run = made_run(tmp_path / f"run-{seed}", loss, seed=seed // 2, overrides=["model.softcap.cap=24"])
        runs.append(change_record(run, code__clean=None, code__source_sha256="7" * 64))
    done = submit(nanogpt, runs, tmp_path / "out")
    assert done.code == 0
    assert "Caveat: run-0: code is not known: commit c0ffee000000, whether clean is not known" in done.err
    text = (tmp_path / "out" / "submission.md").read_text()
    assert "  - `model.softcap.cap`: 23.0 -> 24.0" in text
    assert "- Caveat: several runs have seed 0; they differ by rounding alone" in text


def test_runs_that_differ_are_no_record_even_unofficially(tmp_path, nanogpt, runs):
    other = made_run(tmp_path / "other", 3.2771, seed=9, overrides=["model.softcap.cap=24"])
    refused = submit(nanogpt, [*runs, other], tmp_path / "out", "--unofficial")
    assert refused.code == 2 and "spec: model.softcap.cap: 23.0 in run-0" in refused.err


def test_inputs(tmp_path, nanogpt, runs):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    refused = submit(nanogpt, runs, out)
    assert refused.code == 2 and "out: is there already; name another directory with --out" in refused.err
    assert [path.name for path in out.iterdir()] == ["mine"]
    bad = submit(nanogpt, runs, tmp_path / "new", "--log-url", "log.txt")
    assert bad.code == 2 and "--log-url: found 'log.txt'" in bad.err
    empty = nanogpt("submission", *runs, "--description", "  ", "--out", tmp_path / "new")
    assert empty.code == 2 and "--description: is empty" in empty.err
    (out / "mine").unlink()
    assert submit(nanogpt, runs, out).code == 0  # an empty directory is taken
    assert load_recipe(out / "runs" / "run-2" / "spec.yaml").training.seed == 2


def test_a_place_that_takes_nothing(tmp_path, nanogpt, runs):
    (tmp_path / "file").write_text("")
    done = submit(nanogpt, runs, tmp_path / "file" / "out")
    assert done.code == 1 and "the submission cannot be written" in done.err
