"""record.json: what a run was, where, on what, and how it ended, so that a stranger can trust its result.

- It exists from the first moment (a run's directory appears with it inside) and is replaced as a whole at the
  start of training, at evaluations, at checkpoints and at the end: never within the measured time.
- A killed run cannot say so: its record still reads `running`. `live_state` looks for its process, by host,
  boot, process id and start time, and calls the run `killed` if it is gone.
- Every start of the run, and so each interruption and requeue, has an entry in `starts`.

Rank 0 writes (`nanogpt.training.recorder`), any number may read. No torch is needed here. Times of day are UTC; losses
are in nats per token; steps and tokens count from the run's start.
"""

from __future__ import annotations

import datetime
import os
import socket
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from nanogpt.errors import InputError
from nanogpt.files import read_regular
from nanogpt.runs.directory import LOG_NAME, METRICS_NAME, RECORD_NAME, RunDirectory, write_whole

SCHEMA_VERSION = 1
STALE_AFTER = datetime.timedelta(
    minutes=30
)  # a run elsewhere that has written nothing for this long: compiling is silent

State = Literal["running", "finished", "failed", "interrupted"]
LiveState = Literal["running", "finished", "failed", "interrupted", "killed", "stale"]


class Part(BaseModel):
    """Base of the record's parts: fields added by later versions are ignored, not refused."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_unicode(cls, value: Any) -> Any:
        """Text from the system that may not be UTF-8 (paths, variables, host names), with escapes."""
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        if isinstance(value, list):
            return [cls._as_unicode(item) for item in value]
        if isinstance(value, dict):
            return {cls._as_unicode(key): cls._as_unicode(item) for key, item in value.items()}
        return value


class Process(Part):
    """The process of rank 0, so that a reader can tell whether it is alive."""

    pid: int
    host: str
    boot_id: str | None = Field(default=None, description="of the running kernel: a different one means a reboot")
    pid_namespace: str | None = Field(default=None, description="`pid` is meaningful in this namespace only")
    started_ticks: int | None = Field(default=None, description="start in clock ticks since boot, as pids are reused")


class Slurm(Part):
    """The Slurm job, from SLURM_* as the run started."""

    job_id: str
    array_job_id: str | None = None
    array_task_id: str | None = None
    job_name: str | None = None
    cluster: str | None = None
    partition: str | None = None
    node_list: str | None = None
    restart_count: int = Field(default=0, description="requeues of the job so far")


class Code(Part):
    """The code that ran."""

    package_version: str
    source_sha256: str = Field(description="over the paths and contents of the package's .py files; always present")
    commit: str | None = Field(default=None, description="of the checkout, or the container's label; None: neither")
    clean: bool | None = Field(default=None, description="no file differs from `commit`; None: unknown")
    changed_files: list[str] = Field(default_factory=list, description="of the checkout, if it is not clean")


class Container(Part):
    """The Apptainer image of the run."""

    image: str
    sha256: str | None = Field(default=None, description="NANOGPT_SIF_SHA256, else the image's, hashed off the clock")
    labels: dict[str, str] = {}
    base: str | None = Field(
        default=None, description="what its definition starts from, such as docker debian:trixie-slim"
    )


class Rank(Part):
    """One process of the run, and its device."""

    rank: int
    local_rank: int
    host: str
    device: str = Field(description="the GPU's CUDA name, or cpu")
    device_uuid: str | None = None
    memory_bytes: int | None = None
    compute_capability: str | None = Field(default=None, description="9.0 for an H100 or H200")


class Claim(Part):
    """The hardware that the recipe names."""

    gpu: str
    gpus_per_node: int
    nodes: int


class Hardware(Part):
    """What the recipe claims and what was found. `ranks` is empty until the processes have met."""

    claimed: Claim
    world_size: int
    ranks: list[Rank] = []

    @property
    def hosts(self) -> list[str]:
        """Host names, each once, in rank order."""
        return list(dict.fromkeys(rank.host for rank in self.ranks))

    @property
    def devices(self) -> list[str]:
        """Device names of all ranks, in order."""
        return [rank.device for rank in self.ranks]


class Computation(Part):
    """Which of several equal implementations computed the run."""

    attention: str = Field(description="backend: fa4, fa3, fa2, varlen or plain")
    head_precision: str | None = Field(default=None, description="fp8 or bf16; None: the model has only one head")
    mlp_precision: str | None = Field(default=None, description="fp8 or bf16; None: the model has only one MLP")
    projection_precision: str | None = Field(
        default=None, description="of queries, keys and values: fp8 or bf16; None: the model has only one"
    )
    kernels: str = Field(description="auto (Triton kernels where the device has them) or plain")
    dtype: str
    deterministic: bool
    reasons: list[str] = Field(default_factory=list, description="the log's lines on these choices")


class SettingChange(Part):
    """A compiler setting that is not at its default."""

    default: str
    found: str


class Compilation(Part):
    """torch.compile: whether, when, and with which non-default settings."""

    compiled: bool
    graphs_before_clock: int | None = None
    late_graphs: int | None = Field(default=None, description="compiled after the clock started, in the whole run")
    cache: list[str] = Field(default_factory=list, description="the log's lines on the compile cache")
    settings: dict[str, SettingChange] = Field(
        default_factory=dict,
        description="settings off their default: `inductor.x` of torch._inductor.config, `dynamo.x` of"
        " torch._dynamo.config. The run itself sets dynamo.recompile_limit",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="TORCHINDUCTOR_*, TORCHDYNAMO_*, TORCH_COMPILE* and TRITON_* variables; values that are no"
        " numbers or switches only of known ones",
    )


class DataFile(Part):
    """One token shard."""

    name: str
    bytes: int
    sha256: str | None = Field(default=None, description="None: not known (yet); hashing waits while the clock runs")
    sha256_from: Literal["read", "file", "manifest.json", "text.json"] | None = Field(
        default=None,
        description="what was hashed: the bytes as the run read them, or the file before training or after it; in older"
        " records a manifest's word for a file of unchanged size and time",
    )
    expected_sha256: str | None = Field(default=None, description="None: no source says what the file should be")
    expected_from: Literal["pinned", "manifest.json", "text.json"] | None = Field(
        default=None,
        description="its source: this package, prep-fineweb's manifest (trusted on first use), or prep-text's",
    )
    announced_by: str | None = Field(
        default=None, description="for prep-fineweb's manifest: the hub or mirror that announced it; None: unknown"
    )
    also_read: list[str] = Field(
        default_factory=list, description="other sha256 under this name: on another node, or in a later pass"
    )

    @property
    def contradiction(self) -> str | None:
        """How what was read differs from what it should be."""
        if self.also_read:
            return f"{self.name}: read with sha256 {str(self.sha256)[:12]}, and with {self.also_read[0][:12]}"
        if None in (self.sha256, self.expected_sha256) or self.sha256 == self.expected_sha256:
            return None
        whose = {"pinned": "the data set's is"}.get(str(self.expected_from), f"{self.expected_from} has")
        return f"{self.name}: read with sha256 {str(self.sha256)[:12]}, {whose} {str(self.expected_sha256)[:12]}"


class Data(Part):
    """What was read. `train` has every existing shard, and once the run is over those that it read."""

    directory: str
    train: list[DataFile] = []
    val: list[DataFile] = []
    passes: int | None = Field(
        default=None, description="over the training shards, including the last one begun; None: not yet over"
    )
    val_tokens: int = Field(description="targets of an evaluation")
    val_stream_sha256: str | None = Field(
        default=None,
        description="of the validation stream's first val_tokens + 1 tokens as little-endian uint16, as all ranks read"
        " them; None: not yet",
    )


class SpecDifference(Part):
    """A key of the resolved spec whose value differs from the base recipe's."""

    key: str = Field(description="path with dots")
    base: Any = None
    run: Any = None


class StartUpPhase(Part):
    """A phase before the first timed step, and what rank 0 compiled in it."""

    name: str
    seconds: float
    graphs: int = Field(default=0, description="traced in the phase, or taken whole from the cache")
    from_cache: int = Field(default=0, description="of them taken from the compile cache")
    bypassed: int = Field(default=0, description="of them never kept by torch's cache")
    parts_compiled: int = Field(default=0, description="forward and backward passes compiled again")
    kernels_compiled: int = Field(default=0, description="Triton kernels compiled by rank 0's process itself")
    kernels_tuned: int = Field(default=0, description="kernels whose variants were timed on the GPU")


class Start(Part):
    """One start of the run: the first, and another for each resume."""

    time: AwareDatetime
    process: Process
    slurm: Slurm | None = None
    resumed_at: int | None = Field(default=None, description="step of the checkpoint; None: from the beginning")
    clock_started: AwareDatetime | None = Field(default=None, description="when training began; None: not yet")
    world_size: int
    commit: str | None = None
    source_sha256: str
    ended: AwareDatetime | None = None
    state: State | Literal["killed"] = Field(
        default="running", description="killed: found dead by the next start; running until then"
    )
    reason: str | None = None
    start_up: list[StartUpPhase] = Field(default_factory=list, description="up to `clock_started`, in order")


class Record(Part):
    """A run. What comes from the environment (code, versions, hardware, ...) is from the last start."""

    schema_version: int = SCHEMA_VERSION
    name: str
    run_id: str | None = Field(default=None, description="random, from the first start; checkpoints name it")
    state: State = Field(default="running", description="according to the run itself: see `live_state`")
    reason: str | None = Field(default=None, description="why it failed or was interrupted")

    created: AwareDatetime = Field(description="the first start")
    clock_started: AwareDatetime | None = Field(default=None, description="when the first step began, the first time")
    updated: AwareDatetime
    ended: AwareDatetime | None = None
    starts: list[Start]

    steps: int = Field(default=0, description="done, as of `updated`; metrics.jsonl has the rest")
    total_steps: int
    tokens: int = Field(default=0, description="trained on, as of `updated`")
    total_tokens: int
    val_loss: float | None = Field(default=None, description="of the last evaluation; None: none yet, or not finite")
    val_loss_step: int | None = None
    target_loss: float | None = None
    train_seconds: float = Field(default=0.0, description="the clock, training steps alone, as of `updated`")
    record_seconds: float | None = Field(default=None, description="the clock at the end of a finished run")
    peak_memory_bytes: int | None = Field(default=None, description="allocated on a GPU, maximum over ranks")
    peak_reserved_bytes: int | None = Field(default=None, description="reserved on a GPU, maximum over ranks")
    peak_resident_bytes: int | None = Field(default=None, description="of rank 0 in the host's memory")

    spec_sha256: str = Field(description="of spec.yaml, as written at the start")
    base_recipe: str = Field(description="shipped recipe of the model's kind")
    spec_differences: list[SpecDifference] = Field(default_factory=list, description="from the base recipe")
    seed: int

    hardware: Hardware
    code: Code
    versions: dict[str, str | None] = Field(
        default_factory=dict,
        description="python, platform, torch, cuda, cudnn, nccl, driver, triton, flash-attn*, numpy; None: absent",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="the variables listed in nanogpt/runs/known_variables.py"
    )
    container: Container | None = None
    computation: Computation | None = Field(default=None, description="None: the model is not yet built")
    end_of_run: list[str] = Field(
        default_factory=list, description="what was done after the last step and before the last validation, in order"
    )
    compilation: Compilation | None = None
    data: Data | None = None

    @property
    def slurm(self) -> Slurm | None:
        """The job of the last start."""
        return self.starts[-1].slurm

    @property
    def interruptions(self) -> int:
        """How often the run was restarted."""
        return len(self.starts) - 1

    @property
    def ms_per_step(self) -> float | None:
        """Milliseconds of the clock per step, over the run so far."""
        return 1000 * self.train_seconds / self.steps if self.steps else None


def utc_now() -> datetime.datetime:
    """The time of day, in whole milliseconds."""
    now = datetime.datetime.now(datetime.UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def read_record(run_path: Path | str) -> Record:
    """The record of the run in the directory `run_path`.

    Raises:
        InputError: no run, no record (an older run), a damaged one, or one of a later version of this package.
    """
    path = RunDirectory.open(run_path).path / RECORD_NAME
    try:
        text = read_regular(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such record; the run is older than records, or its directory is a partial copy"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{path}: not a record of a run: {where}: {first['msg']}; is it damaged?") from None
    if record.schema_version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: has schema_version {record.schema_version}, this version of the package reads {SCHEMA_VERSION};"
            " use a later version"
        )
    if not record.starts:
        raise InputError(f"{path}: not a record of a run: starts: is empty; is it damaged?")
    return record


def write_record(run_path: Path, record: Record) -> None:
    """Replace the run's record.json atomically. Raises OSError if it cannot be written."""
    write_whole(run_path / RECORD_NAME, record_text(record))


def record_text(record: Record) -> str:
    """The record as JSON, readable by people too."""
    return record.model_dump_json(indent=1) + "\n"


# --- is it alive? -----------------------------------------------------------------------------------------------


def this_process() -> Process:
    """How a later reader can find this process."""
    return Process(
        pid=os.getpid(),
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        started_ticks=_started_ticks(os.getpid()),
    )


def process_lives(process: Process) -> bool | None:
    """Whether it is running; None if that is not visible from here: another host or process namespace."""
    if process.boot_id is None or process.boot_id != _boot_id():
        return False if process.host == socket.gethostname() and process.boot_id is not None else None
    if process.pid_namespace != _pid_namespace():
        return None
    return process.started_ticks is not None and _started_ticks(process.pid) == process.started_ticks


def live_state(
    record: Record,
    run_path: Path,
    *,
    now: datetime.datetime | None = None,
    stale_after: datetime.timedelta = STALE_AFTER,
) -> LiveState:
    """The run's state as seen from here, at `now`.

    `killed`: it says running, but its process is gone. `stale`: its process is not visible from here, and nothing has
    been written to the run's directory for `stale_after`.
    """
    if record.state != "running":
        return record.state
    lives = process_lives(record.starts[-1].process)
    if lives is not None:
        return "running" if lives else "killed"
    return "stale" if (now or utc_now()) - last_written(run_path, record) > stale_after else "running"


def last_written(run_path: Path, record: Record) -> datetime.datetime:
    """When the run last wrote its record, log or metrics."""
    times = [record.updated]
    for name in (LOG_NAME, METRICS_NAME):
        try:
            times.append(datetime.datetime.fromtimestamp((run_path / name).stat().st_mtime, datetime.UTC))
        except OSError:
            continue
    return max(times)


def _boot_id() -> str | None:
    return _first_line(Path("/proc/sys/kernel/random/boot_id"))


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _started_ticks(pid: int) -> int | None:
    """Field 22 of the process's stat; None if there is no such process, or it is a zombie."""
    line = _first_line(Path(f"/proc/{pid}/stat"))
    if line is None:
        return None
    state, *fields = line.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in "ZX" else int(fields[18])


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return None
