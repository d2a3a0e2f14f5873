"""The loss plot: files that other programs can read, with the lines and labels that were asked for."""

import itertools
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from made_runs import change_record, made_run

from nanogpt.errors import InputError, RunError
from nanogpt.runs.curves import between, last_tenth, smoothed_training, stage_starts
from nanogpt.runs.loaded import load_runs, plot_runs
from nanogpt.runs.metrics import run_metrics
from nanogpt.runs.plot import Reference, log_ticks, plot_loss, spread


def run(shift=0.0, ms=20.0):
    records = []
    for step in range(41):
        loss = 4 + shift + 6.8 * math.exp(-step / 8)
        place = {"step": step, "train_time_ms": ms * step}
        if step % 10 == 0:
            records.append({"kind": "evaluation", "val_loss": loss, **place})
        if step:
            stage = int(step > 20)
            weight = 1.0 if stage else 1.75
            records.append(
                {"kind": "step", "stage": stage, "train_loss": None if step == 7 else weight * loss, **place}
            )
    return run_metrics(records)


def test_png(tmp_path):
    path = tmp_path / "new" / "loss.png"
    plot_loss({"demo": run()}, path, [Reference(6.5, "unigram")])
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width > height > 500
    assert [child.name for child in path.parent.iterdir()] == ["loss.png"]


def svg_text(path):
    root = ElementTree.parse(path).getroot()
    return [re.sub(r"\s+", " ", "".join(node.itertext())) for node in root.iter() if node.tag.endswith("}text")]


def test_svg_says_what_it_shows_and_is_the_same_each_time(tmp_path):
    plot_loss({"demo_$x$": run()}, tmp_path / "one.svg", [Reference(6.5, "unigram")])
    plot_loss({"demo_$x$": run()}, tmp_path / "two.SVG", [Reference(6.5, "unigram")])
    texts = svg_text(tmp_path / "one.svg")
    for text in ("step", "training time (seconds)", "validation loss (nats per token)", "unigram 6.5", "4.0458"):
        assert text in texts
    assert {"training loss, smoothed", "(multi-token weights)"} & set(texts)
    assert {"stage 1", "2"} <= set(texts)
    assert "demo_$x$: validation loss 4.0458 after 40 steps" in texts
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.SVG").read_bytes()


def test_several_runs_are_named_and_coloured_apart(tmp_path):
    names = [f"run-{number}" for number in range(9)]
    plot_loss({name: run(shift=0.1 * i, ms=20_000) for i, name in enumerate(names)}, tmp_path / "all.svg")
    texts = svg_text(tmp_path / "all.svg")
    losses = [f"{4 + 0.1 * i + 6.8 * math.exp(-5):.4f}" for i in range(9)]
    assert {f"{loss} {name}" for loss, name in zip(losses, names, strict=True)} <= set(texts)
    assert "validation loss minus" in texts
    assert "training time (minutes)" in texts
    for colour in ("#0072b2", "#d55e00", "#009e73", "#cc79a7"):
        assert colour in (tmp_path / "all.svg").read_text()


def test_training_is_smoothed_within_a_stage():
    first, second = smoothed_training(run(), "step")
    assert (first[0][0], first[-1][0], second[0][0], second[-1][0]) == (1, 20, 21, 40)
    assert 7.0 not in [x for x, _ in first]  # its loss was not finite
    long = run_metrics(
        {"kind": "step", "step": step, "stage": 0, "train_loss": 3.0 + step % 2} for step in range(1, 1001)
    )
    (curve,) = smoothed_training(long, "step")
    assert all(abs(loss - 3.5) < 0.05 for _, loss in curve)
    assert stage_starts(run()) == [(1, 0, 0.0), (2, 20, 400.0)]


def test_the_last_tenth():
    alone = last_tenth([run()])
    assert (alone.unit, alone.first, alone.last, alone.from_first_run) == ("step", 36, 40, False)
    same = last_tenth([run(), run(shift=0.5)])
    assert same.from_first_run and [y for _, y in same.curves[1]] == [pytest.approx(0.5)] * 5
    short = run_metrics({"kind": "evaluation", "step": step, "val_loss": 5.0} for step in (0, 10, 20))
    other = last_tenth([run(), short, run_metrics([])])
    assert (other.unit, other.first, other.last) == ("per cent of the run's steps", 90, 100)
    assert [curve[-1][0] if curve else None for curve in other.curves] == [100, 100, None]
    assert between([(0, 4.0), (10, 2.0), (20, 1.0)], 5, 15) == [2.0, 3.0, 1.5]
    assert last_tenth([run_metrics([{"kind": "evaluation", "step": 5, "val_loss": 5.0}])]) is None


@pytest.mark.parametrize(("low", "high"), [(3.1, 11.5), (0.65, 11.0), (4.8, 20.0), (3.27, 7.0), (0.001, 900.0)])
def test_ticks_of_a_logarithmic_axis_do_not_overlap(low, high):
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high
    assert min(math.log(b / a) for a, b in itertools.pairwise(ticks)) >= math.log(high / low) / 9


def test_labels_are_spread_as_far_as_they_must_be():
    assert spread([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert spread([0.0, 0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1, 0.2])
    assert spread([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    crowded = spread([0.5] * 30, 0.1)  # more than there is room for
    assert min(b - a for a, b in itertools.pairwise(crowded)) == pytest.approx(0.1)


def test_a_target_means_fineweb(tmp_path):
    path = made_run(tmp_path / "run")
    plot_runs(load_runs([path]), tmp_path / "fineweb.svg")
    assert "target 3.28" in svg_text(tmp_path / "fineweb.svg")
    (loaded,) = load_runs([path])
    other = [file.model_copy(update={"sha256": "0" * 64}) for file in loaded.record.data.val]
    plot_runs(load_runs([change_record(path, data__val=other)]), tmp_path / "other.svg")
    assert not any("target" in text for text in svg_text(tmp_path / "other.svg"))


@pytest.mark.parametrize("kind", ["evaluation", "step"])
def test_a_run_that_has_just_begun(tmp_path, kind):
    key = "val_loss" if kind == "evaluation" else "train_loss"
    record = {"kind": kind, "step": 0, key: 10.8, "train_time_ms": 0.0}
    plot_loss({"young": run_metrics([record])}, tmp_path / "young.png")
    assert (tmp_path / "young.png").stat().st_size > 1000


def test_errors_name_the_file_and_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"loss\.jpg: plots are written as \.png or \.svg, found suffix '\.jpg'"):
        plot_loss({"demo": run()}, tmp_path / "loss.jpg")
    with pytest.raises(InputError, match="no loss has been recorded yet in empty"):
        plot_loss({"empty": run_metrics([])}, tmp_path / "loss.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"loss\.png: the plot cannot be written: .*--out"):
        plot_loss({"demo": run()}, tmp_path / "file" / "loss.png")
    assert not list(tmp_path.glob("*.partial"))


def test_matplotlib_is_imported_only_to_draw():
    program = "import sys, nanogpt.runs.plot; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == (
        "False\n"
    )
