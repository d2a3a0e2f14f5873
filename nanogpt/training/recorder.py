"""Keeps a run's record.json, and opens its log with the code that runs.

Rank 0 writes, and only while the run's clock is stopped: at the start, when the model is built, before the first
step, at evaluations and checkpoints, and at the end.
"""

from __future__ import annotations

import hashlib
import os
import resource
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanogpt.console import say
from nanogpt.errors import InputError, Interrupted, RunError
from nanogpt.hardware import shape
from nanogpt.launch.world import World, started_as
from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.runs.claim import RunClaim
from nanogpt.runs.consistency import SPEC_HEAD
from nanogpt.runs.data_files import STAGED_FROM, OffClockHashes, describe_shards, refusal
from nanogpt.runs.directory import FLOAT_DIGITS, RECORD_NAME, RunDirectory
from nanogpt.runs.known_variables import compiler_variables, known_variables
from nanogpt.runs.provenance import (
    RULE,
    code_state,
    container_of,
    driver_version,
    package_versions,
    slurm_job,
    source_text,
    training_sources,
)
from nanogpt.runs.record import (
    Claim,
    Compilation,
    Computation,
    Data,
    Hardware,
    Rank,
    Record,
    SettingChange,
    SpecDifference,
    Start,
    StartUpPhase,
    State,
    last_written,
    read_record,
    record_text,
    this_process,
    utc_now,
    write_record,
)
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import spec_differences
from nanogpt.training.ownership import named_run

if TYPE_CHECKING:
    from nanogpt.models.language_model import Implementations

HASHING_S = 120.0  # for data that is not yet hashed at the end of the run


def first_record(spec: RunSpec) -> Record:
    """What is known about a run before anything is built: this process, its code, its job."""
    container = container_of(os.environ)
    code, slurm, now = code_state(container), slurm_job(os.environ), utc_now()
    hardware = spec.hardware
    # Shipped recipes without a base are named after their models, and leave hardware open.
    base = load_recipe(spec.model.kind, on=shape(hardware))
    world_size = started_as()[1]
    return Record(
        name=spec.name,
        run_id=secrets.token_hex(8),
        created=now,
        updated=now,
        starts=[
            Start(
                time=now,
                process=this_process(),
                slurm=slurm,
                world_size=world_size,
                commit=code.commit,
                source_sha256=code.source_sha256,
            )
        ],
        total_steps=spec.training.total_steps,
        total_tokens=spec.training.total_tokens,
        target_loss=spec.evaluation.target_loss,
        spec_sha256=hashlib.sha256(dump_spec(spec).encode()).hexdigest(),
        base_recipe=spec.model.kind,
        spec_differences=[
            SpecDifference(key=key, base=theirs, run=ours) for key, theirs, ours in spec_differences(base, spec)
        ],
        seed=spec.training.seed,
        hardware=Hardware(
            claimed=Claim(gpu=hardware.gpu, gpus_per_node=hardware.gpus_per_node, nodes=hardware.nodes),
            world_size=world_size,
        ),
        code=code,
        versions={**package_versions(), **_torch_versions(), "driver": driver_version()},
        environment=known_variables(os.environ),
        container=container,
    )


def create_run(parent: Path, spec: RunSpec) -> RunDirectory:
    """Create the run's directory in `parent`, with its record from the start. Raises as `RunDirectory.create`."""
    return RunDirectory.create(parent, spec, record=record_text(first_record(spec)))


class RunRecorder:
    """The record of one run, from start to end; a context manager, whose exit says how the run ended.

    Without a run directory, and on ranks other than 0, it does nothing.

    Args:
        spec: the run.
        run: its directory; `create` has already written its first record.
        resume: the run continues: the old record's history is kept.
    """

    def __init__(self, spec: RunSpec, run: RunDirectory | None, *, resume: bool = False):
        self.spec = spec
        self.run = run if started_as()[0] == 0 else None
        self.resume = resume
        self._record: Record | None = None
        self._claim = ExitStack()
        self._hashes: OffClockHashes | None = None
        self._data_directory = Path()
        self._nvidia_smi: subprocess.Popen[str] | None = None
        self._compiler_environment = compiler_variables(os.environ)  # before torch adds its own

    def __enter__(self) -> RunRecorder:
        if self.run:
            with ExitStack() as stack:
                stack.enter_context(RunClaim(self.run.path))
                self._record, earlier = self._begin(self.run)
                self._write()
                self._open_log(self.run, earlier)
                self._claim = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Runs after the trainer, which has said how the run ended unless it could not be built."""
        with self._claim:
            self._leave(kind, error)

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        record = self._record
        if record is not None and record.state == "running":
            state = end_state(kind)
            try:
                self.end(
                    state, None if error is None else f"{type(error).__name__}: {error}", 1000 * record.train_seconds
                )
            except RunError:
                if error is None:
                    raise
        if self._nvidia_smi:
            self._nvidia_smi.kill()
            self._nvidia_smi.communicate()
        if self._hashes:
            if kind is None:
                self._hashes.finish(1.0)
                if self._hashes.busy:
                    say(f"Hashing the data for {RECORD_NAME}, for at most {HASHING_S:.0f} s")
                    self._hashes.finish(HASHING_S)
            self._hashes.stop()
            self._take_hashes()
            if kind is None:
                self._write()
                self._warn_of_data()
        if self.run:
            self.run.close()

    def _begin(self, run: RunDirectory) -> tuple[Record, Record | None]:
        """The record to write from now on, and that of the run's earlier starts, if any."""
        try:
            old = read_record(run.path)
        except InputError:  # missing or damaged
            new = first_record(self.spec)
            new.run_id = (self.resume and named_run(run.checkpoint_directory)) or new.run_id
            return new, None
        if not self.resume:
            fresh = old.state == "running" and old.starts[-1].process == this_process()
            return (old if fresh else first_record(self.spec)), None
        new = first_record(self.spec)
        new.name, new.created, new.clock_started = old.name, old.created, old.clock_started
        new.spec_sha256 = old.spec_sha256
        new.run_id = old.run_id or named_run(run.checkpoint_directory) or new.run_id
        last = old.starts[-1]
        if last.state == "running":
            last.state, last.ended = "killed", last_written(run.path, old)
        new.starts = [*old.starts, *new.starts]
        for key in ("steps", "tokens", "val_loss", "val_loss_step", "train_seconds"):  # until training starts
            setattr(new, key, getattr(old, key))
        return new, old

    # --- called by the trainer ---

    def reads(self, train_files: Sequence[Path], val_files: Sequence[Path]) -> None:
        """Record the existing shards. Validation shards are hashed now, others that are still unknown at the end."""
        record = self._record
        if record is None:
            return
        self._data_directory = train_files[0].parent
        tokens = self.spec.evaluation.tokens
        try:
            record.data = Data(
                directory=os.environ.get(STAGED_FROM) or str(self._data_directory.resolve()),
                train=describe_shards(train_files),
                val=describe_shards(val_files),
                val_tokens=tokens,
            )
        except OSError:
            return  # the trainer is about to hit it too
        self._hashes = OffClockHashes([*val_files, *self._image()], val_files, tokens)
        self._hashes.start()
        self._write()

    def validates(self, stream_sha256: Sequence[str]) -> str | None:
        """Record the sha256 of the validation stream that each rank read; returns why to refuse the run, if so."""
        record, hashes = self._record, self._hashes
        if record is None or record.data is None or hashes is None:
            return None
        hashes.wait_for_validation()
        self._take_hashes()
        record.data.val_stream_sha256 = stream_sha256[0]
        return refusal(self._data_directory, record.data.val, hashes.val_stream_sha256, stream_sha256)

    def built(
        self, ranks: Sequence[Rank], implementations: Implementations, reasons: Sequence[str], *, compiled: bool
    ) -> None:
        """Record that the processes have met and the model is built."""
        record, runtime = self._record, self.spec.runtime
        if record is None or self.run is None:
            return
        record.hardware.ranks = list(ranks)
        record.computation = Computation(
            attention=implementations.attention,
            head_precision=implementations.head_precision if self.spec.model.fp8_head else None,
            mlp_precision=implementations.mlp_precision if self.spec.model.fp8_mlp else None,
            projection_precision=implementations.projection_precision if self.spec.model.fp8_projection else None,
            kernels="plain" if implementations.plain_kernels else runtime.kernels,
            dtype=runtime.dtype,
            deterministic=runtime.deterministic,
            reasons=list(reasons),
        )
        record.compilation = Compilation(compiled=compiled, environment=self._compiler_environment)
        self._ask_compiler()
        self._write()
        if self._nvidia_smi:
            try:
                self.run.log(f"{self._nvidia_smi.communicate(timeout=20)[0]}{RULE}")
            except subprocess.TimeoutExpired:
                self._nvidia_smi.kill()
                self._nvidia_smi.communicate()
            self._nvidia_smi = None

    def clock_starts(self, step: int, tokens: int, elapsed_ms: float, *, resumed: bool, graphs: int) -> None:
        """Record where training continues: `step` steps are done, `graphs` compiled."""
        record = self._record
        if record is None:
            return
        if self._hashes:
            self._hashes.pause()
            self._take_hashes()
        start = record.starts[-1]
        start.clock_started = utc_now()
        start.resumed_at = step if resumed else None
        record.clock_started = record.clock_started if resumed else start.clock_started
        if not resumed or (record.val_loss_step or 0) > step:  # what came after the checkpoint is dropped
            record.val_loss = record.val_loss_step = None
        if record.compilation:
            record.compilation.graphs_before_clock = graphs
        self._ask_compiler()
        self.progress(step, tokens, elapsed_ms)

    def start_up(self, phases: Sequence[StartUpPhase], cache_lines: Sequence[str]) -> None:
        """Record how the time before the clock was spent, and the compile cache; `clock_starts` writes it."""
        if self._record:
            self._record.starts[-1].start_up = list(phases)
            if self._record.compilation:
                self._record.compilation.cache = list(cache_lines)

    def evaluation(self, val_loss: float, step: int, tokens: int, elapsed_ms: float) -> None:
        """Record the validation loss after `step` steps; the clock is stopped."""
        if self._record:
            self._record.val_loss = float(f"{val_loss:.{FLOAT_DIGITS}g}")  # as in metrics.jsonl
            self._record.val_loss_step = step
            self.progress(step, tokens, elapsed_ms)

    def progress(self, step: int, tokens: int, elapsed_ms: float) -> None:
        """Record that `step` steps on `tokens` tokens are done; the clock is stopped."""
        if self._record:
            self._record.steps, self._record.tokens = step, tokens
            self._record.train_seconds = round(elapsed_ms / 1000, 6)
            self._write()

    def trained(
        self,
        *,
        late_graphs: int,
        shards_read: int,
        passes: int,
        memory: Sequence[tuple[int, int]],
        read_sha256: Sequence[Mapping[str, Sequence[str]]] = (),
    ) -> None:
        """Record that all steps and the last validation are done.

        Args:
            late_graphs: compiled since the clock started.
            shards_read: training shards that were read from, counted from the first.
            passes: over the training shards, including the last one begun.
            memory: most bytes allocated and reserved on each rank's GPU; zeros on CPUs.
            read_sha256: by rank, the sha256 of training shards as they were read.
        """
        record = self._record
        if record is None or self.run is None:
            return
        if record.compilation:
            record.compilation.late_graphs = late_graphs
        self._ask_compiler()
        if record.data:
            record.data.train = record.data.train[:shards_read]
            record.data.passes = passes
            for shard in record.data.train:
                read = list(dict.fromkeys(digest for of_rank in read_sha256 for digest in of_rank.get(shard.name, ())))
                if read:
                    shard.sha256, *shard.also_read = read
                    shard.sha256_from = "read"
            self._hash_the_rest(record.data)
        record.peak_resident_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        allocated, reserved = (max(values) for values in zip(*memory, strict=True))
        if allocated:
            record.peak_memory_bytes, record.peak_reserved_bytes = allocated, reserved
            self.run.log(f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB")
        else:
            self.run.log(f"peak memory resident: {record.peak_resident_bytes >> 20} MiB")

    def end_of_run(self, lines: Sequence[str]) -> None:
        """Record what was done after the last step. The clock is running: it is written later."""
        if self._record is not None:
            self._record.end_of_run = list(lines)

    def end(self, state: State, reason: str | None, elapsed_ms: float) -> None:
        """Record the end of the run."""
        record = self._record
        if record is None:
            return
        record.state, record.reason, record.ended = state, reason, utc_now()
        record.train_seconds = round(elapsed_ms / 1000, 6)
        if state == "finished":
            record.record_seconds = record.train_seconds
        start = record.starts[-1]
        start.state, start.reason, start.ended = state, reason, record.ended
        self._take_hashes()
        self._write()

    # --- parts ---

    def _write(self) -> None:
        if self.run and self._record:
            self._record.updated = utc_now()
            try:
                write_record(self.run.path, self._record)
            except OSError as error:
                raise RunError(
                    f"{self.run.path / RECORD_NAME}: cannot be written: {error.strerror}. Free space or repair the file"
                    " system, then resume the run from its last checkpoint"
                ) from error

    def _open_log(self, run: RunDirectory, earlier: Record | None) -> None:
        assert self._record is not None
        code, start = self._record.code, self._record.starts[-1]
        if earlier is None or earlier.code.source_sha256 != code.source_sha256:
            run.log(source_text(training_sources()))
            spec = dump_spec(self.spec)
            run.log(f"{RULE}\n{SPEC_HEAD}\n{RULE}\n{spec}{RULE}")
            base = self._record.base_recipe
            for difference in self._record.spec_differences:
                run.log(f"{difference.key}: {_short(difference.run)} ({base}: {_short(difference.base)})")
        tree = {None: "", True: ", clean", False: ", with changes"}[code.clean]
        run.log(f"{RULE}\nnanogpt {code.package_version}, commit {code.commit or 'unknown'}{tree}")
        run.log(f"source sha256 {code.source_sha256}")
        run.log(", ".join(f"{name} {version}" for name, version in self._record.versions.items() if version))
        run.log(f"{start.time.isoformat()} on {start.process.host}, world size {start.world_size}")
        if start.slurm:
            run.log(f"Slurm job {start.slurm.job_id}, restarts {start.slurm.restart_count}")
        if self._record.container:
            run.log(f"container {self._record.container.image}")
        run.log(RULE)
        if self.spec.hardware.gpu != "cpu" and (command := shutil.which("nvidia-smi")):
            self._nvidia_smi = subprocess.Popen(
                [command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )

    def _image(self) -> list[Path]:
        """The container's image, if its hash is unknown and its file is visible from inside."""
        container = self._record.container if self._record else None
        if container is None or container.sha256 is not None or not Path(container.image).is_file():
            return []
        return [Path(container.image)]

    def _hash_the_rest(self, data: Data) -> None:
        """The training shards that this start did not read completely, such as those read before it was resumed."""
        rest = [self._data_directory / shard.name for shard in data.train if shard.sha256 is None]
        if rest and self._hashes:
            self._hashes.add(rest)

    def _warn_of_data(self) -> None:
        data = self._record.data if self._record else None
        for shard in (*data.train, *data.val) if data else ():
            if (problem := shard.contradiction) is not None:
                say(f"warning: {self._data_directory / problem}: this run cannot give a result")

    def _take_hashes(self) -> None:
        record, hashes = self._record, self._hashes
        if record is None or hashes is None:
            return
        if record.data:
            for shard in (*record.data.train, *record.data.val):
                digest = hashes.sha256.get(self._data_directory / shard.name)
                if digest is not None and shard.sha256 is None:
                    shard.sha256, shard.sha256_from = digest, "file"
        if record.container and (digest := hashes.sha256.get(Path(record.container.image))):
            record.container.sha256 = digest

    def _ask_compiler(self) -> None:
        compilation = self._record.compilation if self._record else None
        if compilation is None:
            return
        if compilation.compiled:
            compilation.settings.update(compiler_settings())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def compiler_settings() -> dict[str, SettingChange]:
    """The present non-default settings of inductor and dynamo, by `inductor.name` and `dynamo.name`."""
    import torch._dynamo.config
    import torch._inductor.config

    changed = {}
    for prefix, module in (("inductor", torch._inductor.config), ("dynamo", torch._dynamo.config)):
        config: Any = module
        for name, entry in config._config.items():
            if config._is_default(name):
                continue
            default, found = repr(entry.default), repr(getattr(config, name, None))
            if default != found:
                changed[f"{prefix}.{name}"] = SettingChange(default=default, found=found)
    return changed


def end_state(error: type[BaseException] | None) -> State:
    """How `error` ended a run: finished (None), failed, or interrupted (by a signal)."""
    if error is None:
        return "finished"
    return "failed" if issubclass(error, Exception) and not issubclass(error, Interrupted) else "interrupted"


def describe_rank(world: World) -> Rank:
    """This process and its device."""
    import socket

    rank = Rank(rank=world.rank, local_rank=world.local_rank, host=socket.gethostname(), device="cpu")
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        rank.device = properties.name
        rank.device_uuid = str(getattr(properties, "uuid", None) or "") or None
        rank.memory_bytes = properties.total_memory
        rank.compute_capability = f"{properties.major}.{properties.minor}"
    return rank


def _torch_versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    nccl = None
    if torch.version.cuda and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": nccl,
    }
