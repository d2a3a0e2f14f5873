"""The public rules on made runs: one that is in order, and one for each way to break a rule."""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
from made_runs import BEGAN, change_record, loaded, made_run

from nanogpt.data import official
from nanogpt.data.manifest import REPOSITORY
from nanogpt.runs.check import check_run, failed
from nanogpt.runs.loaded import load_runs
from nanogpt.runs.provenance import source_sha256
from nanogpt.runs.record import DataFile, SettingChange


def of(path, rule):
    (found,) = [check for check in check_run(loaded(path)[0]) if check.rule == rule]
    return found


def test_a_run_in_order(tmp_path, nanogpt):
    run = made_run(tmp_path / "run")
    checks = check_run(loaded(run)[0])
    assert {check.rule: check.state for check in checks} == dict.fromkeys(
        (
            "finished",
            "target",
            "recipe",
            "validation tokens",
            "validation shards",
            "training shards",
            "compiler flags",
            "timing",
            "hardware",
            "no interruption",
            "code",
            "files agree",
        ),
        "passed",
    )
    done = nanogpt("check", run)
    assert done.code == 0
    assert "validation loss 3.27760 is at most 3.28" in done.out
    assert "claimed 1 x 8 h100, found 8 processes on node1: NVIDIA H100 80GB HBM3" in done.out
    data = json.loads(nanogpt("check", run, "--json").out)
    assert (data["run"], data["failed"]) == ("run", 0)
    assert data["checks"][7]["evidence"].startswith("93.000 s in record, metrics and log; warm-up on; no late graph")


SETTING = {"inductor.coordinate_descent_tuning": SettingChange(default="False", found="True")}
OWN_SETTING = {"dynamo.recompile_limit": SettingChange(default="8", found="64")}


@pytest.mark.parametrize(
    ("rule", "changes", "state", "evidence"),
    [
        ("validation tokens", {"data__val_tokens": 1_048_576}, "failed", "1,048,576 validation tokens according to"),
        ("validation tokens", {"data": None}, "unknown", "does not say"),
        ("validation shards", {"data__val": []}, "unknown", "which shards"),
        ("compiler flags", {"compilation__settings": SETTING}, "failed", "inductor.coordinate_descent_tuning = True"),
        ("compiler flags", {"compilation__settings": OWN_SETTING}, "passed", "at their defaults"),
        (
            "compiler flags",
            {"compilation__environment": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}},
            "failed",
            "TORCHINDUCTOR_MAX_AUTOTUNE=1",
        ),
        ("compiler flags", {"compilation__environment": {"TORCHINDUCTOR_CACHE_DIR": "/tmp"}}, "passed", "defaults"),
        ("compiler flags", {"compilation": None}, "unknown", "how the run was compiled"),
        ("timing", {"compilation__late_graphs": 2}, "failed", "2 graphs were compiled after the clock started"),
        (
            "timing",
            {"record_seconds": 92.0, "train_seconds": 92.0},
            "failed",
            "93.000 s in log.txt, 92.000 s in record.json",
        ),
        (
            "timing",
            {"ended": BEGAN + datetime.timedelta(seconds=430)},
            "failed",
            "93.000 s of training within 30.000 s by the time of day",
        ),
        ("timing", {"code__clean": None}, "unknown", "read its clock"),
        ("code", {"code__clean": False, "code__changed_files": ["a.py"]}, "failed", "with changes: a.py"),
        ("code", {"code__clean": None}, "unknown", "unknown whether clean"),
        ("code", {"code__clean": None, "code__commit": None}, "unknown", "unknown commit"),
        ("hardware", {"hardware__ranks": []}, "unknown", "which devices"),
    ],
)
def test_broken_rules(tmp_path, rule, changes, state, evidence):
    run = change_record(made_run(tmp_path / "run"), **changes)
    found = of(run, rule)
    assert (found.state, evidence in found.evidence) == (state, True), found
    others = {check.rule for check in failed(check_run(loaded(run)[0]))} - {rule}
    assert not others


def test_this_packages_own_code_is_known_without_a_commit(tmp_path):
    run = change_record(made_run(tmp_path / "run"), code__clean=None, code__source_sha256=source_sha256())
    assert of(run, "timing").evidence.endswith("(code of this package)")
    assert of(run, "code").evidence.endswith("that of this package")


@pytest.mark.parametrize(
    ("device", "state"), [("NVIDIA H100 PCIe", "passed"), ("NVIDIA GH100", "failed"), ("NVIDIA H200", "failed")]
)
def test_devices(tmp_path, device, state):
    run = made_run(tmp_path / "run")
    ranks = [rank.model_copy(update={"device": device}) for rank in loaded(run)[0].record.hardware.ranks]
    assert of(change_record(run, hardware__ranks=ranks), "hardware").state == state


def test_a_clock_that_has_no_end(tmp_path):
    run = change_record(made_run(tmp_path / "run"), record_seconds=None)
    assert (of(run, "timing").state, of(run, "files agree").state) == ("unknown", "failed")


def test_another_world_size(tmp_path):
    run = change_record(made_run(tmp_path / "run"), hardware__world_size=4)
    assert of(run, "hardware").evidence.startswith("claimed 1 x 8 h100, found 8 processes")
    assert of(run, "files agree").evidence == "world size: 4 by record.json, 8 by spec.yaml"


def test_one_device_for_two_ranks(tmp_path):
    run = made_run(tmp_path / "run")
    ranks = [rank.model_copy(update={"device_uuid": "GPU-0"}) for rank in loaded(run)[0].record.hardware.ranks]
    assert "one device twice" in of(change_record(run, hardware__ranks=ranks), "hardware").evidence


def test_a_resumed_time_is_no_record(tmp_path, nanogpt):
    run = made_run(tmp_path / "run")
    start = loaded(run)[0].record.starts[0]
    change_record(run, starts=[start, start.model_copy(update={"resumed_at": 800})])
    found = of(run, "no interruption")
    assert (found.state, found.evidence) == ("failed", "started 2 times, resumed at step 800")
    assert nanogpt("check", run).code == 1


def test_target_and_end(tmp_path, nanogpt):
    worse = made_run(tmp_path / "worse", 3.2801)
    assert of(worse, "target").state == "failed"
    assert nanogpt("check", worse).code == 1
    short = made_run(tmp_path / "short", state="interrupted")
    assert of(short, "finished").evidence == "interrupted at step 1555 of 1555"
    # A target of one's own does not count.
    own = made_run(tmp_path / "own", 3.2801, overrides=["evaluation.target_loss=3.3"])
    assert of(own, "target").state == "failed"


def changed(files, **changes):
    """The first of the files changed, the others as they are."""
    return [files[0].model_copy(update=changes), *files[1:]]


@pytest.mark.parametrize(
    ("changes", "state", "evidence"),
    [
        ({"sha256": "f" * 64}, "failed", "read with sha256 ffffffffffff, the data set's is "),
        ({"sha256": "f" * 64, "expected_sha256": None, "expected_from": None}, "failed", "the data set's is "),
        ({"also_read": ["e" * 64]}, "failed", ", and with eeeeeeeeeeee"),
        ({"bytes": 1_001_024}, "failed", "1,001,024 bytes in the record, the data set's has 200,001,024"),
        ({"sha256_from": "text.json"}, "failed", f"own text, not {REPOSITORY}: "),
        ({"expected_from": "text.json"}, "failed", f"own text, not {REPOSITORY}: "),
        ({"sha256": None}, "unknown", "its sha256 is not in the record"),
        ({"sha256_from": "manifest.json"}, "unknown", "what was read was not hashed"),
        (
            {"expected_sha256": None, "expected_from": None, "sha256_from": "file"},
            "passed",
            "as this package pins them",
        ),
    ],
)
def test_shards(tmp_path, changes, state, evidence):
    run = made_run(tmp_path / "run")
    data = loaded(run)[0].record.data
    change_record(run, data__val=changed(data.val, **changes), data__train=changed(data.train, **changes))
    for rule in ("validation shards", "training shards"):
        found = of(run, rule)
        assert (found.state, evidence in found.evidence) == (state, True), found


def test_shards_that_are_not_each_its_own(tmp_path):
    run = made_run(tmp_path / "run")
    train, val = loaded(run)[0].record.data.train, loaded(run)[0].record.data.val
    change_record(run, data__train=train[1:])
    assert "in another order than the data set's: fineweb_train_000002.bin" in of(run, "training shards").evidence
    change_record(run, data__train=train[:4])
    assert "400,000,000 tokens in 4 shards, but the run took 412,876,800" in of(run, "training shards").evidence
    change_record(run, data__train=[*train[:4], train[3]])
    assert "the same name more than once: fineweb_train_000004.bin" in of(run, "training shards").evidence
    # Shards that are not pinned, as their first download had them.
    first = {"expected_from": "manifest.json", "announced_by": official.HUB, "sha256_from": "read"}
    first["bytes"] = official.SHARD_BYTES
    for sha256, evidence in ((train[0].sha256, "the same sha256 more"), (val[0].sha256, "is a validation shard")):
        later = DataFile(name="fineweb_train_000019.bin", sha256=sha256, expected_sha256=sha256, **first)
        names = [file.name for file in train] + [f"fineweb_train_{number:06d}.bin" for number in range(6, 19)]
        pinned = [changed(train, name=name, sha256=official.SHA256[name], expected_sha256=None)[0] for name in names]
        change_record(run, data__train=[*pinned, later])
        assert evidence in of(run, "training shards").evidence


def test_shards_that_are_not_pinned(tmp_path):
    run, directory = made_run(tmp_path / "run"), tmp_path / "shards"
    train = loaded(run)[0].record.data.train
    names = [f"fineweb_train_{number:06d}.bin" for number in range(1, 20)]
    files = [changed(train, name=name, sha256=official.SHA256.get(name, "a" * 64))[0] for name in names]
    for file in files:
        file.expected_from = file.expected_sha256 = None
    directory.mkdir()
    change_record(run, data__directory=str(directory), data__train=files)
    assert "aaaaaaaaaaaa, which no manifest" in of(run, "training shards").evidence
    entry = {"sha256": "a" * 64, "bytes": 200_001_024, "tokens": 1, "mtime_ns": 1, "revision": "abc123"}
    manifest = {"repository": REPOSITORY, "shards": {names[-1]: entry}}
    for endpoint, whose in ((None, "an unknown address"), ("http://mirror:1", "http://mirror:1")):
        entry["endpoint"] = endpoint
        (directory / "manifest.json").write_text(json.dumps(manifest))
        found = of(run, "training shards")
        assert found.state == "unknown"
        assert f"{names[-1]}: sha256 aaaaaaaaaaaa, announced by {whose} alone" in found.evidence
    entry["endpoint"] = official.HUB
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert of(run, "training shards").evidence.startswith(
        f"19 of {REPOSITORY}, 18 as this package pins them and 1 as the hub announced them at the first download"
        " (not pinned): "
    )
    entry["sha256"] = "b" * 64
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert "read with sha256 aaaaaaaaaaaa, the manifest now has bbbbbbbbbbbb" in of(run, "training shards").evidence
    (directory / "manifest.json").write_text(json.dumps({**manifest, "repository": "someone/else"}))
    assert of(run, "training shards").state == "failed"


def test_a_changed_recipe_is_allowed_and_shown(tmp_path):
    run = made_run(tmp_path / "run", overrides=["training.lr_schedule.end_factor=0.15", "hardware.gpus_per_node=4"])
    found = of(run, "recipe")
    assert found.state == "passed"
    assert found.evidence == "departs from the shipped speedrun (allowed): training.lr_schedule.end_factor: 0.1 -> 0.15"
    assert "warmup is off" in of(made_run(tmp_path / "cold", overrides=["training.warmup=false"]), "timing").evidence


def test_an_edited_log_or_clock_is_seen(tmp_path):
    run = made_run(tmp_path / "run")
    log = run / "log.txt"
    log.write_text(log.read_text().replace("val_loss:3.2776", "val_loss:3.2576"))
    assert "validation loss 3.2576 in log.txt, 3.2776 in metrics.jsonl" in of(run, "timing").evidence
    back = made_run(tmp_path / "back")
    lines = (back / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[100] = lines[100].replace('"train_time_ms": ', '"train_time_ms": 9')
    (back / "metrics.jsonl").write_text("".join(lines))
    assert "runs backwards" in of(back, "timing").evidence


def test_a_run_without_a_record(tmp_path, nanogpt):
    run = made_run(tmp_path / "run", with_record=False)
    states = {check.rule: check.state for check in check_run(load_runs([run])[0])}
    assert states["finished"] == states["target"] == states["recipe"] == "passed"
    assert [state for state in states.values() if state != "passed"] == ["unknown"] * 9
    assert nanogpt("check", run).code == 0


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


SPEC, METRICS, LOG = "spec.yaml", "metrics.jsonl", "log.txt"
# (file, text, what is put in its place), or changes of the record.
EDITS = {
    "spec.yaml has sha256": (SPEC, "name: speedrun", "name:  speedrun"),
    "seed: 3 by record.json, 0 by spec.yaml": {"seed": 3},
    "tokens: 7, of a finished run 412876800": {"tokens": 7},
    "end of the run: averaged by record.json, nothing by spec.yaml": {"end_of_run": ["averaged"]},
    "final validation loss: 3.2776 by metrics.jsonl, 3.2 by record.json": {"val_loss": 3.2},
    "its times are not in their order": {"created": BEGAN + datetime.timedelta(hours=1)},
    "1,554 steps, the run has 1,555; the first that is missing is of step 700": (METRICS, '"step": 700,', None),
    "7 evaluations, the run has 8": (METRICS, '"val_loss": 4.56', None),
    "steps of other stages": (METRICS, '"stage": 1', '"stage": 2'),
    "tokens at step 1": (METRICS, '"tokens": 131072,', '"tokens": 262144,'),
    "step_avg_ms is not the time by the steps": (METRICS, '"step_avg_ms": 59', '"step_avg_ms": 49'),
    "metrics.jsonl begins at 2026-02-01": (METRICS, '"time": "2026-03', '"time": "2026-02'),
    "metrics.jsonl: name: other": (METRICS, '"name": "', '"name": "other'),
    "the code that ran is not in it": (LOG, "trainer.py", "runner.py"),
    "trainer.py is not what its sha256 says": (LOG, "pass\n", "fail\n"),
    "its spec is not that of spec.yaml": (LOG, "seed: 0", "seed: 1"),
    "source sha256 666666666666": (LOG, f"source sha256 {'5' * 64}", f"source sha256 {'6' * 64}"),
    "1 starts, at other times or places": (LOG, " on node1, world", " on node2, world"),
    "its validations are not those": (LOG, "val_loss:3.877", "val_loss:3.777"),
    "the times of its steps are not those": (LOG, "step:60/1555 train_time:3588", "step:60/1555 train_time:3548"),
    "no log.txt that can be read": (LOG, "", None),
}


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("made") / "run")


@pytest.mark.parametrize("evidence", EDITS)
def test_files_that_contradict_each_other(in_order, tmp_path, evidence):
    run = shutil.copytree(in_order, tmp_path / "run")
    assert of(run, "files agree").state == "passed"
    change = EDITS[evidence]
    if isinstance(change, dict):
        change_record(run, **change)
    else:
        name, old, new = change
        if new is not None:
            edit(run / name, old, new, 100)
        elif old:
            lines = (run / name).read_text().splitlines(keepends=True)
            (run / name).write_text("".join(line for line in lines if old not in line))
        else:
            (run / name).unlink()
    found = of(run, "files agree")
    assert (found.state, evidence in found.evidence) == ("failed", True), found


def test_the_code_of_this_package_is_compared_line_by_line(in_order, tmp_path):
    run = shutil.copytree(in_order, tmp_path / "run")
    edit(run / "log.txt", f"source sha256 {'5' * 64}", f"source sha256 {source_sha256()}")
    record = loaded(run)[0].record
    starts = [record.starts[0].model_copy(update={"source_sha256": source_sha256()})]
    change_record(run, code__source_sha256=source_sha256(), starts=starts)
    assert of(run, "files agree").evidence == "log.txt: its code is not that of the source that record.json names"
