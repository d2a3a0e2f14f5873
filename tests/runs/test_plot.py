"""The loss plot: files that other programs can read, with the lines and labels that were asked for."""

import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from nanogpt.errors import InputError, RunError
from nanogpt.runs.metrics import run_metrics
from nanogpt.runs.plot import Reference, plot_loss


def run(shift=0.0, ms=20.0):
    records = []
    for step in range(41):
        loss = 4 + shift + 6.8 * math.exp(-step / 8)
        place = {"step": step, "train_time_ms": ms * step}
        if step % 10 == 0:
            records.append({"kind": "evaluation", "val_loss": loss, **place})
        if step:
            records.append({"kind": "step", "train_loss": None if step == 7 else 1.75 * loss, **place})
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
    for text in ("step", "training time (seconds)", "loss (nats a token)", "validation", "unigram", "6.5"):
        assert text in texts
    assert "demo_$x$: validation loss 4.0458 after 40 steps" in texts
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.SVG").read_bytes()


def test_several_runs_are_named_and_coloured_apart(tmp_path):
    names = [f"run-{number}" for number in range(9)]
    plot_loss({name: run(shift=0.1 * i, ms=20_000) for i, name in enumerate(names)}, tmp_path / "all.svg")
    texts = svg_text(tmp_path / "all.svg")
    assert set(names) <= set(texts)
    assert "training time (minutes)" in texts
    for colour in ("#0072b2", "#d55e00", "#009e73", "#cc79a7"):
        assert colour in (tmp_path / "all.svg").read_text()


@pytest.mark.parametrize("kind", ["evaluation", "step"])
def test_a_run_that_has_just_begun(tmp_path, kind):
    key = "val_loss" if kind == "evaluation" else "train_loss"
    record = {"kind": kind, "step": 0, key: 10.8, "train_time_ms": 0.0}
    plot_loss({"young": run_metrics([record])}, tmp_path / "young.png")
    assert (tmp_path / "young.png").stat().st_size > 1000


def test_errors_name_the_file_and_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"loss\.jpg: a plot is written as \.png or \.svg, found suffix '\.jpg'"):
        plot_loss({"demo": run()}, tmp_path / "loss.jpg")
    with pytest.raises(InputError, match="no loss is recorded yet in empty"):
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
