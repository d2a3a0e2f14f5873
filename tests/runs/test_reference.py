"""Reference curves: what ships, the band, when they are off, and what a run on FineWeb's shards says on the way."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch
from made_runs import RECORD_67
from tiny_runs import make_data, tiny_spec, train, write_recipe

from nanogpt.data import official
from nanogpt.data.manifest import REPOSITORY, file_sha256
from nanogpt.data.shards import train_name, val_name, write_tokens
from nanogpt.recipe import load_recipe
from nanogpt.runs import reference as module
from nanogpt.runs.metrics import read_run
from nanogpt.runs.reference import ReferenceWatch, compare_loss, spread_at, why_off
from nanogpt.spec import ReferenceCurve, ReferenceSpec


@pytest.fixture(scope="module", autouse=True)
def nothing_pinned():
    """The shards of these tests are not those whose sha256 the package knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "SHA256", {})
        yield


@pytest.fixture
def shards(tmp_path):
    """Two small shards that a manifest of the hub's data set vouches for."""
    directory = tmp_path / "fineweb"
    directory.mkdir()
    for name in (train_name(1), val_name()):
        write_tokens(directory / name, [50256] + [1] * 99)
    write_manifest(directory)
    return directory


def write_manifest(directory, repository=REPOSITORY):
    entries = {
        path.name: {
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
            "tokens": 100,
            "mtime_ns": path.stat().st_mtime_ns,
            "revision": "abc",
        }
        for path in sorted(directory.glob("*.bin"))
    }
    (directory / "manifest.json").write_text(json.dumps({"repository": repository, "shards": entries}))


def test_what_ships():
    found = load_recipe("speedrun").reference
    assert [curve.name for curve in found.curves] == ["record 67", "record 63"]
    assert found.curves[0].points == [*RECORD_67, (1555, 3.2776)]
    assert found.curves[1].points[2] == (500, 4.242) and found.curves[1].points[-1] == (1600, 3.277)
    assert found.spread[-1] == (1555, 0.0008)
    assert load_recipe("4xh200").reference == found
    assert load_recipe("demo").reference is load_recipe("gpt2").reference is None
    # The curve that runs are held against is of the recipe's own schedule.
    assert found.curves[0].points[-1][0] == load_recipe("speedrun").training.total_steps


@pytest.mark.parametrize(
    ("step", "loss", "inside", "warning"),
    [
        (500, 4.2279, True, None),
        (500, 4.284, False, "warning: 0.06 above record 67 at step 500, outside the band of 0.025: stop and check"),
        (500, 4.164, False, "warning: 0.06 below record 67 at step 500, outside the band of 0.025: stop and check"),
        (0, 10.8258, True, None),
        (250, 4.602, True, None),
        (250, 4.604, False, "warning: 0.036 above record 67 at step 250, outside the band of 0.035"),
        (1000, 3.587, True, None),
        (1500, 3.2985, True, None),
        (1500, 3.3, False, "warning: 0.006 above record 67 at step 1500, outside the band of 0.005"),
        (1555, 3.2799, True, None),
        (1555, 3.2841, False, "warning: 0.0065 above record 67 at step 1555, outside the band of 0.004"),
    ],
)
def test_the_band(step, loss, inside, warning):
    found = compare_loss(load_recipe("speedrun").reference, step, loss)
    assert found.inside is inside
    first, *rest = found.lines()
    assert first == (
        f"reference:{found.reference_loss:.4f} (record 67) difference:{loss - found.reference_loss:+.4f}"
        f" band:+-{found.band:.4f}"
    )
    assert len(rest) == (warning is not None)
    assert not warning or rest[0].startswith(warning)


def test_published_runs_of_one_recipe_are_inside_of_one_anothers_band():
    found = load_recipe("speedrun").reference
    for step, losses in ((250, (4.5899, 4.5955, 4.5817)), (500, (4.2373, 4.2463, 4.2442))):
        assert spread_at(found, step) == pytest.approx(statistics.stdev(losses), rel=0.1)
        for one, other in itertools.permutations(losses, 2):
            curve = ReferenceCurve(name="one", points=[(step, one)])
            assert compare_loss(found.model_copy(update={"curves": [curve]}), step, other).inside
    assert compare_loss(found, 1555, 3.2799).inside and compare_loss(found, 1555, 3.2763).inside  # 20 runs' range


def test_steps_that_the_curve_does_not_have():
    assert compare_loss(load_recipe("speedrun").reference, 125, 5.0) is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), None),
        (("training.seed=5", "runtime.attention=varlen", "evaluation.every=125", "training.warmup=false"), None),
        (("hardware={gpu: h200, gpus_per_node: 2}",), None),
        (("model.softcap.cap=24",), "the run differs from speedrun in model.softcap.cap"),
        (("training.stages.0.lr_factor=1.1",), "the run differs from speedrun in training.stages.0.lr_factor"),
        (("evaluation.tokens=2097152",), "the run differs from speedrun in evaluation.tokens"),
        (("reference=null",), "the recipe has none"),
    ],
)
def test_off_for_changed_recipes(shards, overrides, reason):
    assert why_off(load_recipe("speedrun", overrides), shards) == reason


def test_off_for_shortened_schedules(shards):
    reason = why_off(load_recipe("speedrun", steps=155), shards)
    assert reason.startswith("the run differs from speedrun in ") and "training.stages.0.steps" in reason
    assert reason.endswith(" more")


def test_off_for_other_data(shards):
    spec = load_recipe("speedrun")
    extra = shards / train_name(2)
    write_tokens(extra, [50256, 1])
    assert why_off(spec, shards) == f"{extra}: not in the manifest of downloaded shards"
    extra.unlink()
    write_tokens(shards / val_name(), [50256, 1])
    assert "bytes, the hub's file has" in why_off(spec, shards)
    write_manifest(shards, "someone/else")
    assert why_off(spec, shards).endswith(f"shards of someone/else, not of {REPOSITORY}")
    (shards / "manifest.json").write_text("[1")
    assert why_off(spec, shards).endswith("no manifest of downloaded shards")


def test_off_for_shards_that_a_mirror_has_changed(shards, monkeypatch):
    monkeypatch.setattr(official, "SHA256", {val_name(): "a" * 64})
    assert why_off(load_recipe("speedrun"), shards).endswith(", which is not the data set's")


def test_a_watch_says_why_it_is_off(shards):
    assert ReferenceWatch(load_recipe("speedrun"), shards).note == "reference: record 67"
    assert ReferenceWatch(load_recipe("demo"), shards).note is None
    off = ReferenceWatch(load_recipe("speedrun", ["model.layers=11", "training.max_document_tokens=1024"]), shards)
    assert off.note == "reference off: the run differs from speedrun in training.max_document_tokens"
    assert off.compare(500, 9.0) is None
    assert ReferenceWatch(load_recipe("speedrun"), shards).compare(500, float("nan")) is None


@pytest.fixture
def tiny_reference(tmp_path, monkeypatch):
    """A tiny recipe that ships with a curve: that of its own first run, but for step 5, which lies 0.5 below."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    spec = tiny_spec("evaluation.every=5")
    data = make_data(tmp_path / "data")
    write_manifest(data)
    train(spec, data, tmp_path / "first")
    losses = {entry["step"]: entry["val_loss"] for entry in read_run(tmp_path / "first").evaluations}
    losses[5] -= 0.5
    curve = ReferenceCurve(name="the first", points=sorted(losses.items()))
    reference = ReferenceSpec(recipe="tiny", curves=[curve], spread=[(0, 0.04), (12, 0.01)])
    spec = spec.model_copy(update={"reference": reference})
    write_recipe(folder / "tiny.yaml", spec)
    monkeypatch.setattr(module, "shipped_recipes", lambda: folder)
    return spec, data


def test_a_run_that_leaves_the_band_warns_in_log_metrics_and_terminal(tmp_path, tiny_reference, capsys, one_thread):
    spec, data = tiny_reference
    capsys.readouterr()
    train(spec.model_copy(update={"name": "second"}), data, tmp_path / "second")
    log = (tmp_path / "second" / "log.txt").read_text()
    warning = "warning: 0.5 above the first at step 5, outside the band of 0.14: stop and check"
    shown = capsys.readouterr().err
    for text in (log, shown):
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("step:5/12 val_loss:"))
        assert lines[at + 1].startswith("reference:") and "(the first) difference:+0.5000" in lines[at + 1]
        assert lines[at + 2] == warning
        assert sum("(the first) difference:" in line for line in lines) == 4
        assert sum(line.startswith("warning:") for line in lines) == 1
    assert "reference: the first" in log.splitlines()
    run = read_run(tmp_path / "second")
    assert [entry["reference_loss"] for entry in run.evaluations] == pytest.approx(
        [loss for _, loss in spec.reference.curves[0].points]
    )
    assert run.evaluations[-1]["reference_band"] == pytest.approx(0.05)


def test_a_changed_run_is_not_held_against_it(tmp_path, tiny_reference, one_thread):
    spec, data = tiny_reference
    changed = load_recipe(write_recipe(tmp_path / "changed.yaml", spec), ["optimizer.adam.lr=0.009"])
    train(changed, data, tmp_path / "changed")
    log = (tmp_path / "changed" / "log.txt").read_text()
    assert "reference off: the run differs from tiny in optimizer.adam.lr" in log
    assert not [line for line in log.splitlines() if line.startswith("warning:") or "(the first) difference:" in line]
    assert all("reference_loss" not in entry for entry in read_run(tmp_path / "changed").evaluations)
    assert torch.get_num_threads() == 1
