"""The directory that is published: the row, the data, the evidence, and what is refused."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shutil
import statistics
import uuid

import pytest
from made_runs import BEGAN, BIGRAM, SMEAR, SPARSE_BIGRAM, change_record, loaded, made_run, made_runs

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
    assert "| run-3 | 3 | 3.2791 | 93.030 s | 4711 | 2026-03-01 12:38:33 | c0ffee000000 |" in text
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
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and "run-5<" in (out / "loss.svg").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "leaderboard.json", "loss.png", "loss.svg", "runs", "submission.json", "submission.md",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["record"]


def test_the_four_fields_of_a_lab(tmp_path, nanogpt, runs):
    out = tmp_path / "out"
    submit(nanogpt, runs, out, "--contributors", "Ada, Grace", "--log-url", "https://example.org/log.txt")
    assert json.loads((out / "leaderboard.json").read_text()) == {
        "seconds": 93.025,
        "description": "Bigrams | hashed",
        "log_url": "https://example.org/log.txt",
        "contributors": ["Ada", "Grace"],
    }


def test_the_layout_of_the_public_repository(tmp_path, nanogpt, runs):
    """The README's own Python prints what the README says it prints."""
    out = tmp_path / "out"
    done = submit(nanogpt, runs, out, "--format", "modded-nanogpt", "--contributors", "Ada")
    assert done.code == 0, done.err
    directory = out / "records/track_1_short/2026-03-01_BigramsHashed"
    logs = sorted(path for path in directory.iterdir() if path.suffix == ".txt")
    assert len(logs) == 6 and len(list(directory.iterdir())) == 8
    assert load_recipe(directory / "spec.yaml").training.seed == 0
    assert {str(uuid.UUID(path.stem)) for path in logs} == {path.stem for path in logs}
    assert sorted(path.read_bytes() for path in logs) == sorted((run / "log.txt").read_bytes() for run in runs)
    text = (directory / "README.md").read_text()
    assert text.startswith("## Bigrams | hashed\n") and "UNOFFICIAL" not in text
    assert "Contributors: Ada" in text and "- Hardware: 8 x NVIDIA H100 80GB HBM3" in text
    assert f"| {logs[0].name} |" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    promised = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    assert printed.getvalue().splitlines() == promised
    assert promised[0] == "p=0.0025"


def test_the_public_layout_of_what_is_no_record(tmp_path, nanogpt):
    run = made_run(tmp_path / "run")
    out = tmp_path / "out"
    assert submit(nanogpt, [run], out, "--format", "modded", "--unofficial").code == 2 and not out.exists()
    assert submit(nanogpt, [run], out, "--format", "modded-nanogpt", "--unofficial").code == 0
    (readme,) = out.glob("records/track_1_short/*/README.md")
    text = readme.read_text()
    assert text.startswith("## UNOFFICIAL: Bigrams") and "- significance: not shown: one run" in text
    assert "# p=nan" in text and "# losses: (tensor(nan), tensor(3.2776))" in text


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
    assert refused.code == 2 and "one run says nothing about the spread" in refused.err
    above = made_run(tmp_path / "above", 3.2804)
    assert "above: target: validation loss 3.28040 is above 3.28" in submit(nanogpt, [above], tmp_path / "out").err
    assert submit(nanogpt, runs[:1], tmp_path / "out", "--unofficial").code == 0


def test_notes_tell_what_was_changed_and_what_is_not_known(tmp_path, nanogpt):
    runs = []
    for seed, loss in enumerate((3.2770, 3.2772, 3.2771)):
        began = BEGAN + datetime.timedelta(hours=seed)
        overrides = ["model.softcap.cap=24"]
        run = made_run(tmp_path / f"run-{seed}", loss, seed=seed // 2, overrides=overrides, began=began)
        runs.append(change_record(run, code__clean=None))
    done = submit(nanogpt, runs, tmp_path / "out")
    assert done.code == 0
    assert "Caveat: run-0: code is unknown: commit c0ffee000000, unknown whether clean" in done.err
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
    assert refused.code == 2 and "out: already exists; name another directory with --out" in refused.err
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


def test_invented_runs_are_no_record(tmp_path, nanogpt, runs):
    """What was taken for a record once: hashes of nobody's, no code in the log, steps that nobody counted."""
    for run in runs:
        data = loaded(run)[0].record.data
        shards = [file.model_copy(update={"sha256": f"{number:064x}"}) for number, file in enumerate(data.train, 1)]
        change_record(run, spec_sha256="0" * 64, data__train=shards)
        lines = [line for line in (run / "log.txt").read_text().splitlines(keepends=True) if "val_loss" in line]
        (run / "log.txt").write_text("".join(lines))
    refused = submit(nanogpt, runs, tmp_path / "out")
    assert refused.code == 2 and not (tmp_path / "out").exists()
    for run in runs:
        assert f"{run.name}: training shards: fineweb_train_000001.bin: read with sha256 000000000000" in refused.err
        assert f"{run.name}: files agree: spec.yaml has sha256 " in refused.err
    assert "the code that ran is not in it" in refused.err
    assert submit(nanogpt, runs, tmp_path / "out", "--unofficial").code == 0


def test_what_is_not_known_of_the_data_is_no_record(tmp_path, nanogpt, runs):
    data = loaded(runs[2])[0].record.data
    change_record(runs[2], data__val=[data.val[0].model_copy(update={"sha256": None})])
    refused = submit(nanogpt, runs, tmp_path / "out")
    assert "run-2: validation shards is unknown: fineweb_val_000000.bin: its sha256 is not in the" in refused.err


def test_copied_runs_are_no_record(tmp_path, nanogpt, runs):
    """Another final loss and other times, of a run that was there before."""
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    for name in ("metrics.jsonl", "log.txt"):
        (copy / name).write_text((copy / name).read_text().replace("3.2756", "3.2751").replace("93000", "93001"))
    change_record(copy, val_loss=3.2751)
    refused = submit(nanogpt, [*runs, copy], tmp_path / "out")
    assert "run-0 and copy: 6 of 7 validation losses are the same to the last digit: a run counts once" in refused.err
    assert "run-0 and copy: 1,555 of 1,555 training losses are the same" in refused.err
    assert "run-0 and copy: one process (1 on node1) wrote both" in refused.err


def test_runs_do_not_train_at_the_same_time_on_one_gpu(tmp_path, nanogpt, runs):
    soon = BEGAN + datetime.timedelta(seconds=30)
    other = made_run(tmp_path / "other", 3.2771, seed=9, began=soon)
    refused = submit(nanogpt, [*runs, other], tmp_path / "out")
    assert "run-0 and other: trained at one time, 2026-03-01 12:06:40+00:00 and 2026-03-01 12:07:10" in refused.err
    ranks = [
        rank.model_copy(update={"device_uuid": f"GPU-{8 + rank.rank}"})
        for rank in loaded(other)[0].record.hardware.ranks
    ]
    assert submit(nanogpt, [*runs, change_record(other, hardware__ranks=ranks)], tmp_path / "out").code == 0
