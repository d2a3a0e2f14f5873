"""Runs side by side: figures, differences key by key, and the plot, on made runs and on real small ones."""

from __future__ import annotations

import json

import pytest
from made_runs import COMMIT, change_record, made_run

from nanogpt.runs.loaded import differences, load_runs


def test_the_table(tmp_path, nanogpt):
    first = made_run(tmp_path / "first", 3.2776)
    second = made_run(
        tmp_path / "second", 3.2791, seconds=92.5, seed=1, overrides=["optimizer.normuon.lr=0.025", "name=fast"]
    )
    change_record(second, code__source_sha256="6" * 64, code__clean=False, code__changed_files=["x.py"])
    done = nanogpt("compare", first, second)
    assert done.code == 0
    rows = {line[:18].strip(): line.split() for line in done.out.splitlines()}
    assert "93.00 92.50 (-0.50)" in " ".join(rows["training time (s)"])
    assert "3.2776 3.2791 (+0.0015)" in " ".join(rows["final loss"])
    assert "59.8 59.5 (-0.32)" in " ".join(rows["ms/step, stage 4"])
    assert "4.2240 4.2240 (+0.0000)" in " ".join(rows["loss at step 500"])
    assert f"{COMMIT[:12]} {COMMIT[:12]} with changes" in " ".join(rows["commit"])
    text = " ".join(done.out.split())
    assert text.startswith("A = first B = second A B state finished finished")
    assert "spec optimizer.normuon.lr 0.023 0.025" in text
    assert "spec training.seed 0 1" in text
    assert "code source_sha256 555555555555 666666666666" in text
    assert "fast" not in text


def test_json(tmp_path, nanogpt):
    first = made_run(tmp_path / "first")
    second = made_run(tmp_path / "second", 3.2791, seconds=80, overrides=["training.extension.steps=30"])
    third = made_run(tmp_path / "third", with_record=False)
    data = json.loads(nanogpt("compare", first, second, third, "--json").out)
    assert [run["run"] for run in data["runs"]] == ["first", "second", "third"]
    one = data["runs"][0]
    assert [run["label"] for run in data["runs"]] == ["A", "B", "C"]
    assert (one["state"], one["val_loss"], one["train_seconds"]) == ("finished", 3.2776, 93.0)
    assert one["ms_per_step"] == pytest.approx(93_000 / 1555)
    assert [stage["steps"] for stage in one["stages"]] == [505, 505, 505, 40]
    assert one["code"] == {"commit": COMMIT, "clean": True, "source_sha256": "5" * 64}
    assert data["runs"][2]["code"] == {"commit": None, "clean": None, "source_sha256": None}
    spec = [found for found in data["differences"] if found["part"] == "spec"]
    assert spec == [{"part": "spec", "key": "training.extension.steps", "values": [40, 30, 40]}]
    assert {"part": "hardware", "key": "world_size", "values": [8, 8, None]} in data["differences"]


def test_equal_runs_and_too_few(tmp_path, nanogpt):
    run = made_run(tmp_path / "run")
    assert "No difference in spec, code, hardware or data." in nanogpt("compare", run, made_run(tmp_path / "b")).out
    refused = nanogpt("compare", run, run)
    assert (refused.code, refused.err) == (2, "compare: needs at least 2 different runs, found 1\n")
    (run / "record.json").write_text("{")
    shown = nanogpt("compare", run, tmp_path / "b")
    assert shown.code == 0 and "continuing without the record" in shown.err


def test_lists_of_other_lengths_are_one_difference(tmp_path):
    runs = load_runs(
        [
            made_run(tmp_path / "a"),
            made_run(tmp_path / "b", overrides=["model.long_window_layers=[3]"]),
            made_run(tmp_path / "c", overrides=["model.long_window_layers=[3, 8]"]),
        ]
    )
    found = [(one.key, one.values) for one in differences(runs) if one.part == "spec"]
    assert found == [("model.long_window_layers", ([3, 10], [3], [3, 8]))]


def test_the_plot_has_the_reference_where_the_runs_had_it(tmp_path, nanogpt):
    runs = [made_run(tmp_path / name) for name in ("a", "b")]
    done = nanogpt("compare", *runs, "--out", tmp_path / "loss.svg", "--out", tmp_path / "loss.png")
    assert done.code == 0
    svg = (tmp_path / "loss.svg").read_text()
    assert ">a<" in svg and ">b<" in svg and "training time (minutes)" not in svg
    assert "record 67" not in svg
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_loss": 4.224', '"reference_loss": 4.224, "val_loss": 4.23'))
    assert nanogpt("plot", runs[0], "--out", tmp_path / "one.svg").code == 0
    svg = (tmp_path / "one.svg").read_text()
    assert "record 67" in svg and "record 63" in svg
