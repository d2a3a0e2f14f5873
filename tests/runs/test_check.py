"""The public rules on made runs: one that is in order, and one for each way to break a rule."""

from __future__ import annotations

import datetime
import json

import pytest
from made_runs import BEGAN, change_record, loaded, made_run

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
        ("validation tokens", {"data__val_tokens": 1_048_576}, "failed", "1,048,576 validation tokens by the record"),
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
        ("timing", {"compilation__late_graphs": 2}, "failed", "2 graphs were compiled after the clock had started"),
        ("timing", {"record_seconds": 92.0}, "failed", "93.000 s by log.txt, 92.000 s by record.json"),
        ("timing", {"record_seconds": None}, "unknown", "how the clock ended"),
        (
            "timing",
            {"ended": BEGAN + datetime.timedelta(seconds=430)},
            "failed",
            "93.000 s of training within 30.000 s by the time of day",
        ),
        ("timing", {"code__clean": None}, "unknown", "read its clock"),
        ("code", {"code__clean": False, "code__changed_files": ["a.py"]}, "failed", "with changes: a.py"),
        ("code", {"code__clean": None}, "unknown", "whether clean is not known"),
        ("code", {"code__clean": None, "code__commit": None}, "unknown", "no commit known"),
        ("hardware", {"hardware__world_size": 4}, "failed", "claimed 1 x 8 h100"),
        ("hardware", {"hardware__ranks": []}, "unknown", "on which devices"),
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


def test_one_device_for_two_ranks(tmp_path):
    run = made_run(tmp_path / "run")
    ranks = [rank.model_copy(update={"device_uuid": "GPU-0"}) for rank in loaded(run)[0].record.hardware.ranks]
    assert "a device twice" in of(change_record(run, hardware__ranks=ranks), "hardware").evidence


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


def test_own_text_and_unverified_shards(tmp_path):
    run = made_run(tmp_path / "run")
    data = loaded(run)[0].record.data
    own = [file.model_copy(update={"sha256_from": "text.json"}) for file in data.val]
    change_record(run, data__val=own)
    assert of(run, "validation shards").evidence.startswith(f"own text, not {REPOSITORY}: fineweb_val_000000.bin")
    hashed = [file.model_copy(update={"sha256_from": "file"}) for file in data.val]
    change_record(run, data__val=hashed)
    assert (of(run, "validation shards").state, of(run, "training shards").state) == ("failed", "passed")
    change_record(run, data__val=[DataFile(name="fineweb_val_000000.bin", bytes=1)])
    assert of(run, "validation shards").state == "unknown"
    change_record(run, data__val=data.val, data__train=data.train[1:])
    assert "in another order than the data set's: fineweb_train_000002.bin" in of(run, "training shards").evidence


def test_the_manifest_beside_the_shards(tmp_path):
    run = made_run(tmp_path / "run")
    record = loaded(run)[0].record
    shards = {
        file.name: {"sha256": file.sha256, "bytes": file.bytes, "tokens": 1, "mtime_ns": 1, "revision": "abc123"}
        for file in (*record.data.train, *record.data.val)
    }
    directory = tmp_path / "shards"
    directory.mkdir()
    change_record(run, data__directory=str(directory))
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({"repository": REPOSITORY, "shards": shards}))
    assert of(run, "validation shards").evidence == (
        f"1 shard as {REPOSITORY} at abc123 has it: fineweb_val_000000.bin ffffffffffff"
    )
    shards["fineweb_val_000000.bin"]["sha256"] = "a" * 64
    manifest.write_text(json.dumps({"repository": REPOSITORY, "shards": shards}))
    assert of(run, "validation shards").evidence == (
        "fineweb_val_000000.bin: read with sha256 ffffffffffff, the hub's is aaaaaaaaaaaa"
    )
    assert of(run, "training shards").state == "passed"
    manifest.write_text(json.dumps({"repository": "someone/else", "shards": shards}))
    assert "shards of someone/else" in of(run, "training shards").evidence


def test_a_changed_recipe_is_allowed_and_shown(tmp_path):
    run = made_run(tmp_path / "run", overrides=["training.lr_schedule.end_factor=0.15", "hardware.gpus_per_node=4"])
    found = of(run, "recipe")
    assert found.state == "passed"
    assert found.evidence == "changed recipe (allowed): training.lr_schedule.end_factor: 0.1 -> 0.15"
    assert "warmup is off" in of(made_run(tmp_path / "cold", overrides=["training.warmup=false"]), "timing").evidence


def test_an_edited_log_or_clock_is_seen(tmp_path):
    run = made_run(tmp_path / "run")
    log = run / "log.txt"
    log.write_text(log.read_text().replace("val_loss:3.2776", "val_loss:3.2576"))
    assert "validation loss 3.2576 by log.txt, 3.2776 by metrics.jsonl" in of(run, "timing").evidence
    back = made_run(tmp_path / "back")
    lines = (back / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[100] = lines[100].replace('"train_time_ms": ', '"train_time_ms": 9')
    (back / "metrics.jsonl").write_text("".join(lines))
    assert "runs backwards" in of(back, "timing").evidence


def test_a_run_without_a_record(tmp_path, nanogpt):
    run = made_run(tmp_path / "run", with_record=False)
    states = {check.rule: check.state for check in check_run(load_runs([run])[0])}
    assert states["finished"] == states["target"] == states["recipe"] == "passed"
    assert [state for state in states.values() if state != "passed"] == ["unknown"] * 8
    assert nanogpt("check", run).code == 0
