"""record.json: what it says of runs that finish, fail, are interrupted and continue, and who is believed to live."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_data, python, tiny_spec, train, write_recipe

from nanogpt.data import official
from nanogpt.data.manifest import Entry, update_manifest
from nanogpt.data.shards import read_tokens, write_tokens
from nanogpt.errors import InputError, RunError
from nanogpt.recipe import load_recipe
from nanogpt.runs.data_files import OffClockHashes, describe_shards, refusal
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.listing import run_row
from nanogpt.runs.metrics import read_run
from nanogpt.runs.provenance import code_state, container_of, package_directory, slurm_job, source_sha256
from nanogpt.runs.record import (
    Container,
    DataFile,
    Process,
    Record,
    live_state,
    process_lives,
    read_record,
    this_process,
    utc_now,
    write_record,
)
from nanogpt.training import recorder as recorder_module
from nanogpt.training.clock import Clock
from nanogpt.training.recorder import RunRecorder, compiler_settings, create_run, first_record

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = tiny_spec("evaluation.every=4", "checkpoint={every: 5, at_end: true}", "training.seed=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", train_tokens=(2_000, 20_000, 20_000))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(SPEC, data, path)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what it says -----------------------------------------------------------------------------------------------


def test_a_finished_run(finished: Path, data: Path) -> None:
    record, metrics = read_record(finished), read_run(finished)
    assert (record.schema_version, record.name, record.state, record.reason) == (1, "tiny", "finished", None)
    assert (record.steps, record.total_steps, record.tokens, record.total_tokens) == (12, 12, 4544, 4544)
    assert (record.val_loss, record.val_loss_step) == (metrics.evaluations[-1]["val_loss"], 12)
    assert metrics.end
    assert record.record_seconds == record.train_seconds == pytest.approx(metrics.end["train_time_ms"] / 1000, abs=1e-6)
    assert (record.seed, record.interruptions, len(record.starts)) == (3, 0, 1)
    assert record.peak_memory_bytes is None
    assert record.peak_resident_bytes and record.peak_resident_bytes > 50e6

    (start,) = record.starts
    assert record.clock_started and record.ended
    assert record.created == start.time < record.clock_started <= record.ended <= record.updated
    assert (start.state, start.ended, start.resumed_at) == ("finished", record.ended, None)
    assert start.process == this_process()

    assert record.hardware.claimed.model_dump() == {"gpu": "cpu", "gpus_per_node": 1, "nodes": 1}
    assert (record.hardware.world_size, record.hardware.devices) == (1, ["cpu"])
    assert record.hardware.hosts == [os.uname().nodename]
    assert record.versions["torch"] == torch.__version__
    assert record.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.computation
    assert (record.computation.attention, record.computation.dtype) == ("plain", "fp32")
    assert record.compilation
    assert (record.compilation.compiled, record.compilation.late_graphs) == (False, 0)
    assert record.spec_sha256 == sha256((finished / "spec.yaml").read_bytes())


def test_the_data_of_a_run_are_hashed_and_only_what_was_read_is_named(finished: Path, data: Path) -> None:
    found = read_record(finished).data
    assert found
    assert found.directory == str(data.resolve())
    # 4,544 tokens, of documents cut at 48: the first shard has 2,000, so a second was opened and the third was not.
    assert [file.name for file in found.train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    for file in (*found.train, *found.val):
        content = (data / file.name).read_bytes()
        how = "read" if file in found.train else "file"
        assert (file.bytes, file.sha256, file.sha256_from) == (len(content), sha256(content), how)
        assert (file.expected_sha256, file.contradiction) == (None, None)
    stream = read_tokens(data / "fineweb_val_000000.bin")[: 256 + 1].astype("<u2").tobytes()
    assert (found.val_tokens, found.val_stream_sha256) == (256, sha256(stream))


def test_the_difference_from_the_base_recipe(finished: Path) -> None:
    record = read_record(finished)
    assert record.base_recipe == "speedrun"
    differences = {one.key: (one.base, one.run) for one in record.spec_differences}
    assert differences["training.seed"] == (0, 3)
    assert differences["training.stages.1.batch_tokens"] == (262144, 320)
    assert differences["runtime.dtype"] == ("bf16", "fp32")
    assert not any(key.startswith("optimizer.adam") for key in differences)
    base = load_recipe("8xh100")
    assert {one.key for one in first_record(base).spec_differences} == {"name"}
    assert first_record(load_recipe("gpt2")).spec_differences == []


def test_a_run_that_cannot_be_built_says_why(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec("evaluation.tokens=1024")  # the stream has 600
    with pytest.raises(InputError):
        train(spec, data, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert (record.state, record.steps, record.clock_started, record.val_loss) == ("failed", 0, None, None)
    assert record.reason and record.reason.startswith("InputError: ")
    assert record.record_seconds is None
    assert "nanogpt/training/trainer.py: " in (tmp_path / "run" / "log.txt").read_text()


def test_runs_that_fail_and_are_interrupted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanogpt.training.trainer import Trainer

    whole = Trainer.train_step
    for state, error in (("failed", RunError("the loss went away")), ("interrupted", KeyboardInterrupt())):

        def step(self: Trainer, settings: Any, error: BaseException = error) -> torch.Tensor:
            if settings.step == 6:
                raise error
            return whole(self, settings)

        monkeypatch.setattr(Trainer, "train_step", step)
        with pytest.raises(type(error)):
            train(SPEC, data, tmp_path / state)
        record = read_record(tmp_path / state)
        assert (record.state, record.steps, record.val_loss_step) == (state, 5, 4)  # as of the last checkpoint
        assert record.reason == f"{type(error).__name__} after step 6: {error}"
        assert (record.starts[0].state, record.record_seconds) == (state, None)
        assert record.ended


def test_every_start_of_a_run_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is interrupted at step 7, requeued, killed before it starts to train, and requeued again."""
    from nanogpt.training.trainer import Trainer

    def stop(self: Trainer, settings: Any) -> torch.Tensor:
        if settings.step == 7:
            raise KeyboardInterrupt
        return whole(self, settings)

    whole = Trainer.train_step
    path = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(SPEC, data, path)
    monkeypatch.setattr(Trainer, "train_step", whole)
    first = read_record(path)

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunRecorder(SPEC, RunDirectory.open(path), resume=True) as recorder:
        recorder._record = None  # as a kill leaves it
    record = read_record(path)
    assert (record.state, len(record.starts), record.steps) == ("running", 2, first.steps)
    gone = record.model_copy(deep=True)
    gone.starts[-1].process.started_ticks = 1
    write_record(path, gone)
    assert run_row(path).state == "killed"  # the end in the metrics is of the start before

    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    train(SPEC, data, path, resume=True)
    record = read_record(path)
    assert (record.state, record.steps, record.interruptions) == ("finished", 12, 2)
    assert [start.state for start in record.starts] == ["interrupted", "killed", "finished"]
    assert [start.resumed_at for start in record.starts] == [None, None, 5]
    assert [start.slurm and start.slurm.restart_count for start in record.starts] == [0, 1, 2]
    assert record.slurm and record.slurm.job_id == "4711"
    assert (record.created, record.clock_started) == (first.created, first.clock_started)
    assert record.starts[0] == first.starts[0]
    assert all(start.ended for start in record.starts)
    # Its code is in the log once.
    assert (path / "log.txt").read_text().count("\nnanogpt/spec.py: ") == 1


def test_a_damaged_record_does_not_stop_a_run_from_going_on(data: Path, tmp_path: Path) -> None:
    train(SPEC, data, tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text("{")
    train(SPEC, data, tmp_path / "run", resume=True)
    assert read_record(tmp_path / "run").state == "finished"


def test_ranks_other_than_0_and_runs_without_a_directory_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path, SPEC)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    for where in (run, None):
        with RunRecorder(SPEC, where) as recorder:
            recorder.clock_starts(0, 0, 0.0, resumed=False, graphs=0)
            recorder.evaluation(4.0, 0, 0, 0.0)
            recorder.trained(late_graphs=0, shards_read=1, passes=1, memory=[(0, 0)])
            recorder.end("finished", None, 0.0)
    assert [file.name for file in run.path.iterdir()] == ["spec.yaml"]


def test_a_run_has_a_record_from_its_first_moment(tmp_path: Path) -> None:
    run = create_run(tmp_path, SPEC)
    record = read_record(run.path)
    assert (record.state, record.steps, record.total_steps, record.data) == ("running", 0, 12, None)
    assert live_state(record, run.path) == "running"
    assert record.code == code_state()
    # The recorder of the same process continues with it.
    with RunRecorder(SPEC, run):
        assert read_record(run.path).starts == record.starts


def test_nothing_is_written_or_hashed_while_the_clock_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = False
    written = []
    clock_start, clock_stop, write = Clock.start, Clock.stop, recorder_module.write_record

    def start(self: Clock) -> None:
        nonlocal running
        running = True
        clock_start(self)

    def stop(self: Clock) -> None:
        nonlocal running
        clock_stop(self)
        running = False

    def checked(path: Path, record: Record) -> None:
        written.append((running, record.steps, record.state))
        write(path, record)

    monkeypatch.setattr(Clock, "start", start)
    monkeypatch.setattr(Clock, "stop", stop)
    monkeypatch.setattr(recorder_module, "write_record", checked)
    train(SPEC, data, tmp_path / "run")
    assert not any(during for during, _, _ in written)
    steps = [step for _, step, _ in written]
    assert {4, 5, 8, 10, 12} < set(steps)  # evaluations and checkpoints
    assert steps == sorted(steps)
    assert written[0][2] == "running"
    assert written[-1][2] == "finished"


def test_a_record_that_cannot_be_written_stops_the_run(data: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path, SPEC)
    (run.path / "record.json").unlink()
    (run.path / "record.json").mkdir()
    with pytest.raises(RunError, match=r"record.json: cannot be written: .*resume"):
        train(SPEC, data, run.path)


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "record.json: no such record"),
        ("", "record.json: not a record of a run"),
        ('{"schema_version": 1}', "record.json: not a record of a run: name: "),
        ("later", "has schema_version 99, this version of the package reads 1"),
        ("no starts", "starts: is empty"),
    ],
)
def test_records_that_cannot_be_read(finished: Path, tmp_path: Path, text: str | None, message: str) -> None:
    run = RunDirectory.create(tmp_path, SPEC)
    if text in ("later", "no starts"):
        fields = json.loads((finished / "record.json").read_text())
        fields |= {"schema_version": 99, "new": 1} if text == "later" else {"starts": []}
        text = json.dumps(fields)
    if text is not None:
        (run.path / "record.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_record(run.path)


def test_a_record_survives_being_written_and_read_and_fields_of_later_versions(finished: Path) -> None:
    record = read_record(finished)
    assert Record.model_validate_json(record.model_dump_json()) == record
    fields = json.loads(record.model_dump_json())
    fields["starts"][0]["weather"] = fields["weather"] = "fine"
    assert Record.model_validate(fields) == record
    record.val_loss = math.nan
    assert json.loads(record.model_dump_json())["val_loss"] is None


# --- who lives --------------------------------------------------------------------------------------------------


def test_processes_that_live_and_that_do_not() -> None:
    here = this_process()
    assert process_lives(here) is True
    assert process_lives(here.model_copy(update={"started_ticks": 1})) is False  # its number was given again
    assert process_lives(here.model_copy(update={"boot_id": "another"})) is False  # rebooted
    assert process_lives(here.model_copy(update={"boot_id": "another", "host": "elsewhere"})) is None
    assert process_lives(here.model_copy(update={"pid_namespace": "pid:[1]"})) is None
    assert process_lives(Process(pid=here.pid, host=here.host)) is None

    script = (
        "from nanogpt.runs.record import this_process; print(this_process().model_dump_json(), flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    process = Process.model_validate_json(child.stdout.readline())
    assert (process.pid, process_lives(process)) == (child.pid, True)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_lives(process) is False  # dead, and waits for its parent
    child.communicate()
    assert process_lives(process) is False


def test_a_run_elsewhere_is_stale_when_it_has_been_silent(finished: Path, tmp_path: Path) -> None:
    record = read_record(finished)
    assert live_state(record, finished) == "finished"
    record.state = "running"
    record.starts[-1].process = Process(pid=1, host="elsewhere", boot_id="another")
    run = RunDirectory.create(tmp_path, SPEC)
    soon, late = (utc_now() + datetime.timedelta(minutes=minutes) for minutes in (29, 31))
    record.updated = utc_now()
    assert live_state(record, run.path, now=soon) == "running"
    assert live_state(record, run.path, now=late) == "stale"
    record.updated -= datetime.timedelta(hours=1)
    assert live_state(record, run.path) == "stale"
    run.metric({"kind": "step", "step": 1})  # a sign of life
    assert live_state(record, run.path) == "running"


# --- where it comes from ----------------------------------------------------------------------------------------


def test_slurm_and_container_come_from_the_environment_of_the_start(tmp_path: Path) -> None:
    assert slurm_job({}) is None
    job = slurm_job(
        {
            "SLURM_JOB_ID": "12",
            "SLURM_ARRAY_JOB_ID": "10",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_RESTART_COUNT": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
    )
    assert job
    assert (job.job_id, job.array_job_id, job.array_task_id, job.restart_count) == ("12", "10", "3", 2)
    assert (job.node_list, job.cluster) == ("n[1-2]", None)

    labels = tmp_path / "labels.json"
    labels.write_text('{"org.opencontainers.image.revision": "abc", "count": 3}')
    (tmp_path / "Singularity").write_text("Bootstrap: localimage\nFrom: ../../base-trixie\n\n%post\n    true\n")
    assert container_of({}, tmp_path) is None
    environment = {"APPTAINER_CONTAINER": "/images/n.sif", "NANOGPT_SIF_SHA256": "feed"}
    expected = {"org.opencontainers.image.revision": "abc", "count": "3"}
    assert container_of(environment, tmp_path) == Container(
        image="/images/n.sif", sha256="feed", labels=expected, base="localimage base-trixie"
    )
    found = container_of({"SINGULARITY_CONTAINER": "n.sif"}, tmp_path / "none")
    assert found == Container(image="n.sif")


def test_the_image_is_hashed_where_it_can_be_seen(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "n.sif"
    image.write_bytes(b"an image" * 1000)
    monkeypatch.setenv("APPTAINER_CONTAINER", str(image))
    train(tiny_spec(), data, tmp_path / "run")
    container = read_record(tmp_path / "run").container
    assert container
    assert (container.image, container.sha256) == (str(image), sha256(image.read_bytes()))


def test_the_hash_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "inner" / "b.py").write_text("two")
    first = source_sha256(tmp_path)
    assert first == sha256(b"a.py\x003\x00oneinner/b.py\x003\x00two")
    (tmp_path / "inner" / "b.py").write_text("too")
    (tmp_path / "notes.txt").write_text("not code")
    assert source_sha256(tmp_path) != first
    assert source_sha256() == read_source_hash_in_a_new_process()


def read_source_hash_in_a_new_process() -> str:
    done = python("-c", "from nanogpt.runs.provenance import source_sha256; print(source_sha256())")
    return done.stdout.strip()


def test_compiler_settings_off_their_default_are_found() -> None:
    import torch._dynamo.config
    import torch._inductor.config

    before = compiler_settings()
    with (
        torch._inductor.config.patch(coordinate_descent_tuning=True),
        torch._dynamo.config.patch(recompile_limit=65),
    ):
        changed = compiler_settings()
    assert changed["inductor.coordinate_descent_tuning"].model_dump() == {"default": "False", "found": "True"}
    assert changed["dynamo.recompile_limit"].found == "65"
    assert changed.keys() - before.keys() <= {"inductor.coordinate_descent_tuning", "dynamo.recompile_limit"}
    assert compiler_settings() == before


# --- data -------------------------------------------------------------------------------------------------------


def test_manifests_say_what_shards_are_to_be_and_not_what_they_are(tmp_path: Path) -> None:
    paths = [tmp_path / f"fineweb_train_{index:06d}.bin" for index in (1, 99, 2, 3)]
    for index, path in enumerate(paths):
        write_tokens(path, read_tokens_of(index))
    for path in paths[:2]:
        status, known = path.stat(), "a" * 64
        entry = Entry(known, status.st_size, 100, status.st_mtime_ns, "main", endpoint="http://mirror:1")
        update_manifest(tmp_path, {path.name: entry})
    assert [one.announced_by for one in describe_shards(paths)] == [None, "http://mirror:1", None, None]
    shards = [{"name": path.name, "tokens": 100, "sha256": f"b{path.name[-5]}"} for path in paths[2:]]
    (tmp_path / "text.json").write_text(json.dumps({"shards": shards}))

    def found() -> list[tuple[str | None, str | None]]:
        described = describe_shards(paths)
        assert {one.sha256 for one in described} == {None}
        return [(one.expected_sha256, one.expected_from) for one in described]

    of_fineweb = [(official.SHA256[paths[0].name], "pinned"), ("a" * 64, "manifest.json")]
    assert found() == [*of_fineweb, ("b2", "text.json"), ("b3", "text.json")]
    later = (tmp_path / "text.json").stat().st_mtime_ns + 1_000_000
    for path in paths[:3]:  # touched since
        os.utime(path, ns=(later, later))
    write_tokens(paths[3], read_tokens_of(5)[:50])  # another length
    old = (tmp_path / "text.json").stat().st_mtime_ns - 1_000_000
    os.utime(paths[3], ns=(old, old))
    assert found() == [*of_fineweb, (None, None), (None, None)]


@pytest.fixture
def fineweb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small shards that prep-fineweb's manifest vouches for; the first training shard and the validation are pinned."""
    directory = make_data(tmp_path / "fineweb", train_tokens=(2_000, 20_000))
    entries, pinned = {}, {}
    for path in sorted(directory.glob("*.bin")):
        status, digest = path.stat(), sha256(path.read_bytes())
        entries[path.name] = Entry(digest, status.st_size, 1, status.st_mtime_ns, "main", status.st_ctime_ns)
        if "000002" not in path.name:
            pinned[path.name] = digest
    update_manifest(directory, entries)
    monkeypatch.setattr(official, "SHA256", pinned)
    return directory


def flip(path: Path, at: int = -1) -> None:
    """Change one byte and set the time back."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_run_on_shards_as_they_are_to_be(fineweb: Path, tmp_path: Path) -> None:
    train(SPEC, fineweb, tmp_path / "run")
    data = read_record(tmp_path / "run").data
    assert data
    assert [(file.sha256_from, file.expected_from) for file in (*data.train, *data.val)] == [
        ("read", "pinned"),
        ("read", "manifest.json"),
        ("file", "pinned"),
    ]
    assert all(file.sha256 == file.expected_sha256 for file in (*data.train, *data.val))


@pytest.mark.parametrize("at", [1024, -1])  # the first token, and one that no evaluation reads
def test_a_changed_validation_shard_ends_the_run_at_its_start(fineweb: Path, tmp_path: Path, at: int) -> None:
    flip(fineweb / "fineweb_val_000000.bin", at)
    with pytest.raises(InputError, match=r"val_000000.bin: read with .*, the data set's is .*: run prep-fineweb"):
        train(SPEC, fineweb, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert (record.state, record.steps, record.clock_started) == ("failed", 0, None)
    assert record.data and record.data.val[0].contradiction


@pytest.mark.parametrize(("name", "whose"), [("000001", "the data set's is"), ("000002", "manifest.json has")])
def test_a_changed_training_shard_is_in_the_record(
    fineweb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, whose: str
) -> None:
    path = fineweb / f"fineweb_train_{name}.bin"
    flip(path, 1500)
    train(SPEC, fineweb, tmp_path / "run")
    data = read_record(tmp_path / "run").data
    assert data
    changed = {file.name: file for file in data.train}[path.name]
    assert (changed.sha256, changed.sha256_from) == (sha256(path.read_bytes()), "read")
    assert changed.contradiction and whose in changed.contradiction
    assert f"warning: {fineweb}/{changed.contradiction}" in capsys.readouterr().err
    assert [bool(file.contradiction) for file in data.train].count(True) == 1


def test_a_shard_that_is_changed_while_the_run_goes_on_is_recorded_as_it_was_read(
    fineweb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes in memory count: the file is another one when the run is over."""
    path = fineweb / "fineweb_train_000001.bin"
    before = sha256(path.read_bytes())
    whole = recorder_module.RunRecorder.evaluation

    def evaluation(self: RunRecorder, val_loss: float, step: int, *rest: Any) -> None:
        if step == 8:  # the second shard is in use, the first read whole
            flip(path)
        whole(self, val_loss, step, *rest)

    monkeypatch.setattr(recorder_module.RunRecorder, "evaluation", evaluation)
    train(SPEC, fineweb, tmp_path / "run")
    data = read_record(tmp_path / "run").data
    assert data and sha256(path.read_bytes()) != before
    assert (data.train[0].sha256, data.train[0].sha256_from, data.train[0].contradiction) == (before, "read", None)


def test_why_validation_is_refused(tmp_path: Path) -> None:
    shard = DataFile(name="val.bin", bytes=1, sha256="a" * 64, expected_sha256="a" * 64, expected_from="text.json")
    assert refusal(tmp_path, [shard], "c" * 64, ["c" * 64] * 2) is None
    other = refusal(tmp_path, [shard], "c" * 64, ["c" * 64, "c" * 64, "d" * 64])
    assert other and "the validation tokens that rank 2 read are not those in rank 0's files" in other
    shard.sha256 = "b" * 64
    changed = refusal(tmp_path, [shard], "c" * 64, ["c" * 64])
    assert changed and "text.json has aaaaaaaaaaaa. Losses on it cannot be compared: make it again" in changed
    shard.sha256, shard.also_read = "a" * 64, ["e" * 64]
    assert shard.contradiction == "val.bin: read with sha256 aaaaaaaaaaaa, and with eeeeeeeeeeee"


def read_tokens_of(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(60, size=100).astype(np.uint16)


def test_hashing_stands_still_while_it_is_paused(tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(1 << 20) * 64)
    hashes = OffClockHashes([big], [], val_tokens=-1)
    hashes.start()
    hashes.pause()
    done = dict(hashes.sha256)
    cpu = hashes_thread_ticks()
    hashes._thread.join(0.3)
    assert hashes_thread_ticks() - cpu <= 1
    assert hashes.sha256 == done == {}
    hashes.finish(30)
    assert hashes.sha256 == {big: sha256(big.read_bytes())}

    more = OffClockHashes([], [], val_tokens=-1)
    more.start()
    more.add([big])
    more.finish(30)
    assert more.sha256 == hashes.sha256

    stopped = OffClockHashes([big], [], val_tokens=-1)
    stopped.pause()
    stopped.start()
    stopped.stop()
    stopped.finish(10)
    assert not stopped.busy
    assert stopped.sha256 == {}


def hashes_thread_ticks() -> int:
    """CPU time of this process in clock ticks."""
    return round(os.times().user * 100)


# --- the log ----------------------------------------------------------------------------------------------------

MODULES = """
    import contextlib, io, sys
    from nanogpt.cli.main import main
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(sys.argv[1:])
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "nanogpt":
            print(module.__file__)
"""


def test_the_log_opens_with_the_code_that_ran(data: Path, tmp_path: Path) -> None:
    import textwrap

    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec())
    arguments = ["train", recipe, "--data", data, "--out", tmp_path / "runs"]
    done = python("-c", textwrap.dedent(MODULES), *map(str, arguments))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    log = (path / "log.txt").read_text()

    rule = "=" * 100
    assert log.startswith(f"{rule}\nnanogpt/__init__.py: ")
    root = package_directory().parent
    files = {}
    heads = re.finditer(rf"^{rule}\n(nanogpt/\S+\.py): (\d+) lines, sha256 (\w+)\n{rule}\n", log, re.MULTILINE)
    for head in heads:
        name, lines, digest = head.groups()
        text = "".join(log[head.end() :].splitlines(keepends=True)[: int(lines)])
        assert sha256(text.encode()) == digest, name
        assert text == (root / name).read_text(), name
        files[root / name] = text
    imported = {Path(line) for line in done.stdout.splitlines()}
    assert len(imported) > 30
    assert imported <= files.keys()

    _, _, rest = log.partition(f"{rule}\nspec.yaml: the resolved recipe of this run\n{rule}\n")
    assert rest.startswith((path / "spec.yaml").read_text() + rule)
    order = [
        "training.slots: 4 (speedrun: 8)",
        f"source sha256 {source_sha256()}",
        f"torch {torch.__version__}",
        "attention: plain",
        "step:0/12 val_loss:",
        "step:12/12 val_loss:",
        "peak memory resident: ",
        "run finished",
    ]
    places = [rest.index(text) for text in order]
    assert places == sorted(places)
