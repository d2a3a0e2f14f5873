"""Runs as their directories hold them, made from published figures: no training, the files of one."""

from __future__ import annotations

import datetime
import functools
import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from nanogpt.data import official
from nanogpt.data.shards import train_name, val_name
from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.runs.consistency import SPEC_HEAD
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.loaded import LoadedRun, load_runs
from nanogpt.runs.provenance import RULE
from nanogpt.runs.record import (
    Claim,
    Code,
    Compilation,
    Computation,
    Data,
    DataFile,
    Hardware,
    Process,
    Rank,
    Record,
    Slurm,
    Start,
    write_record,
)
from nanogpt.spec import RunSpec

COMMIT = "c0ffee" + "0" * 34
BEGAN = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
# Validation losses on the way, from the public logs.
RECORD_67 = ((0, 10.831), (250, 4.568), (500, 4.224), (750, 3.877), (1000, 3.573), (1250, 3.398), (1500, 3.294))
# Final losses that record holders have published, and the p-values that they published with them.
BIGRAM = ((3.2756, 3.2786, 3.2773, 3.2791, 3.2778, 3.277), 0.0025)
SPARSE_BIGRAM = ((3.2789, 3.2772, 3.2804, 3.277, 3.2792), 0.0423)
YARN = ((3.2786, 3.2798, 3.2762, 3.2781, 3.2778, 3.2801, 3.2774, 3.2772, 3.2777, 3.2789), 0.0005)
SMEAR = ((3.2779, 3.2779, 3.2789, 3.2778, 3.2789, 3.2785, 3.2806), 0.0053)


def made_run(
    path: Path,
    final_loss: float = 3.2776,
    *,
    seconds: float = 93.0,
    seed: int = 0,
    recipe: str = "8xh100",
    overrides: Sequence[str] = (),
    curve: Sequence[tuple[int, float]] = RECORD_67,
    trained: Callable[[int], float] = lambda step: 4.0 + 1 / step,
    state: str = "finished",
    with_record: bool = True,
    began: datetime.datetime | None = None,
) -> Path:
    """A finished run of the speedrun on 8 GPUs in the directory `path`, which every rule finds in order.

    Each is ten minutes later than the one of the seed before, and has losses of its own behind the fourth digit.
    """
    spec, written = loaded_and_written(recipe, (f"training.seed={seed}", *overrides))
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(written)
    total = spec.training.total_steps
    run = RunDirectory.open(path)
    began = began or BEGAN + datetime.timedelta(minutes=10 * seed)
    started = began + datetime.timedelta(seconds=400)
    own = 1e-7 * (zlib.crc32(path.name.encode()) % 400)
    source = "pass\n"
    run.log(
        f"{RULE}\nnanogpt/training/trainer.py: 1 lines, sha256 {hashlib.sha256(source.encode()).hexdigest()}\n{RULE}"
    )
    run.log(f"{source}{RULE}\n{SPEC_HEAD}\n{RULE}\n{written}{RULE}")
    run.log(f"source sha256 {'5' * 64}\n{began.isoformat()} on node1, world size {spec.world_size}")
    device = "NVIDIA H100 80GB HBM3" if spec.hardware.gpu == "h100" else "cpu"
    start = {"total_steps": total, "world_size": spec.world_size, "device": device, "resumed_at": None}
    run.metric({"kind": "start", "time": started.isoformat(), "name": spec.name, **start})
    losses, tokens = {**{step: loss + own for step, loss in curve}, total: final_loss}, 0
    stages = [(number, stage) for number, stage in enumerate(spec.training.all_stages) for _ in range(stage.steps)]
    for step in range(total + 1):
        ms = 1000 * seconds * step / total
        average = ms / max(step, 1)
        place = {"step": step, "train_time_ms": ms, "step_avg_ms": average}
        if step:
            number, stage = stages[step - 1]
            tokens += stage.batch_tokens
            run.metric({"kind": "step", "stage": number, "train_loss": trained(step) + own, "tokens": tokens, **place})
            if step % spec.output.log_every == 0:
                run.log(f"step:{step}/{total} train_time:{ms:.0f}ms step_avg:{average:.2f}ms")
        if (loss := losses.get(step)) is not None:
            run.log(f"step:{step}/{total} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{average:.2f}ms")
            run.metric({"kind": "evaluation", "val_loss": loss, "tokens": tokens, **place})
    run.metric({"kind": "end", "state": state, "reason": None, "train_time_ms": 1000 * seconds})
    run.close()
    if with_record:
        write_record(path, made_record(path, spec, final_loss, seconds, device, state, began))
    return path


@functools.cache
def loaded_and_written(recipe: str, overrides: tuple[str, ...]) -> tuple[RunSpec, str]:
    spec = load_recipe(recipe, overrides)
    return spec, dump_spec(spec)


def made_record(
    path: Path, spec: RunSpec, final_loss: float, seconds: float, device: str, state: str, began: datetime.datetime
) -> Record:
    started = began + datetime.timedelta(seconds=400)
    ended = started + datetime.timedelta(seconds=seconds + 20)
    process = Process(pid=1, host="node1", boot_id="one", started_ticks=int(began.timestamp()))
    total = spec.training.total_steps
    *files, val = (
        DataFile(
            name=name,
            bytes=official.SHARD_BYTES,
            sha256=official.SHA256[name],
            sha256_from="file" if name == val_name() else "read",
            expected_sha256=official.SHA256[name],
            expected_from="pinned",
        )
        for name in (*map(train_name, range(1, 6)), val_name())
    )
    return Record(
        name=spec.name,
        state=state,  # type: ignore[arg-type]
        created=began,
        clock_started=started,
        updated=ended,
        ended=ended,
        starts=[
            Start(
                time=began,
                process=process,
                slurm=Slurm(job_id="4711"),
                clock_started=started,
                world_size=spec.world_size,
                source_sha256="5" * 64,
                ended=ended,
                state=state,  # type: ignore[arg-type]
            )
        ],
        steps=total,
        total_steps=total,
        tokens=spec.training.total_tokens,
        total_tokens=spec.training.total_tokens,
        val_loss=final_loss,
        val_loss_step=total,
        target_loss=spec.evaluation.target_loss,
        train_seconds=seconds,
        record_seconds=seconds,
        base_recipe="speedrun",
        spec_sha256=hashlib.sha256((path / "spec.yaml").read_bytes()).hexdigest(),
        seed=spec.training.seed,
        hardware=Hardware(
            claimed=Claim(**spec.hardware.model_dump()),
            world_size=spec.world_size,
            ranks=[
                Rank(rank=i, local_rank=i, host="node1", device=device, device_uuid=f"GPU-{i}")
                for i in range(spec.world_size)
            ],
        ),
        code=Code(package_version="0.1.0", source_sha256="5" * 64, commit=COMMIT, clean=True),
        versions={"torch": "2.11.0", "triton": "3.6.0"},
        computation=Computation(
            attention="fa4", head_precision="fp8", kernels="auto", dtype="bf16", deterministic=False
        ),
        compilation=Compilation(compiled=True, graphs_before_clock=14, late_graphs=0),
        data=Data(
            directory=str(path / "gone"),
            train=files,
            val=[val],
            passes=1,
            val_tokens=spec.evaluation.tokens,
            val_stream_sha256="e" * 64,
        ),
    )


def change_record(path: Path, **changes: object) -> Path:
    """Set fields of the run's record, `code__clean=False` one of a part."""
    (run,) = load_runs([path], need_records=True)
    assert run.record is not None
    record = run.record.model_copy(deep=True)
    for key, value in changes.items():
        *parts, name = key.split("__")
        target = record
        for part in parts:
            target = getattr(target, part)
        setattr(target, name, value)
    write_record(path, record)
    return path


def loaded(*paths: Path) -> list[LoadedRun]:
    return load_runs(paths, need_records=True)


def made_runs(parent: Path, losses: Sequence[float]) -> list[Path]:
    """One run a loss, with seeds of their own."""
    return [
        made_run(parent / f"run-{seed}", loss, seed=seed, seconds=93.0 + 0.01 * seed)
        for seed, loss in enumerate(losses)
    ]
