"""RunSpec: everything that decides a run, typed and bounded.

A recipe (YAML, see `nanogpt.recipe`) becomes a `RunSpec`; the rest of the package reads nothing else. This module
imports no torch, so that a login node checks a recipe in a fraction of a second. Steps are 0-based. Windows
are in blocks here (`StageSpec.window_blocks`) and in tokens everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from nanogpt.gpus import GpuName, types_with
from nanogpt.models import ModelSpec
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim import OPTIMIZERS, OptimizerSpec
from nanogpt.registry import kind_of, specs_of
from nanogpt.spec_end import CanonicalMask, End, has_mask
from nanogpt.spec_fields import (
    NOT_COMPILED,
    Compiled,
    Count,
    Directory,
    Few,
    FilePattern,
    Fraction,
    Index,
    Name,
    NonNegative,
    Positive,
    Problem,
    Seconds,
    Strict,
    Tokens,
)

WORLD_SIZES = (1, 2, 4, 8)
GPT2_TOKENS = 50257, 50256  # how many, and BOS
_MODEL: TypeAdapter[Any] = TypeAdapter(ModelSpec)


class CrossCheckError(ValueError):
    """Values that are each valid but do not fit together: a list of (path in the spec, what is wrong)."""

    def __init__(self, problems: list[tuple[tuple[str | int, ...], str]]):
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text in problems))


# --- training ---------------------------------------------------------------------------------------------------


class WindowBlocks(Strict):
    """Left attention windows in blocks of `training.window_block` tokens."""

    short: Annotated[Count, NOT_COMPILED]
    long: Annotated[Count, NOT_COMPILED]


class StageSpec(StageLoss):
    """A stretch of steps with one batch size, one pair of windows and the same terms of the loss."""

    steps: Annotated[Count, NOT_COMPILED]
    batch_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        description="tokens per step over all ranks and micro-steps"
    )
    window_blocks: WindowBlocks
    lr_factor: Annotated[Positive, NOT_COMPILED]
    max_document_tokens: Count | None = Field(default=None, description="null: training.max_document_tokens")
    max_segment_tokens: Count | None = Field(
        default=None, description="attention cuts documents into segments of this many tokens; null: not at all"
    )
    max_documents: Count | None = Field(
        default=None,
        description="room for documents, or their segments, in a micro-batch (less is faster); null: from its tokens",
    )


class CooldownSchedule(Strict):
    """Learning rate: the stage's factor, then linearly to end_factor at the end of the scheduled steps."""

    kind: Literal["stage_cooldown"]
    cooldown_start: Fraction = Field(description="fraction of the scheduled steps at which the cooldown starts")
    end_factor: NonNegative
    ramp_steps: Index = Field(
        default=0,
        description="first steps of a stage, in which the factor moves from the previous one to its own",
    )


class CosineSchedule(Strict):
    """Learning rate: linear warm-up, then a cosine down to end_factor at the last step."""

    kind: Literal["warmup_cosine"]
    warmup_steps: Index
    end_factor: NonNegative


LearningRateSchedule = Annotated[CooldownSchedule | CosineSchedule, Field(discriminator="kind")]


class TrainingSpec(Strict):
    """Steps, batches, windows and schedule."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1), NOT_COMPILED]
    slots: Annotated[int, Field(ge=1, le=512)] = Field(
        description="micro-batches per step, for any world size; accumulation steps = slots / world size"
    )
    max_document_tokens: Count
    window_block: Annotated[Count, NOT_COMPILED] = Field(description="tokens in a window block")
    stages: list[StageSpec] = Field(min_length=1, max_length=1000, description="the scheduled steps")
    extension: StageSpec | None = Field(description="steps after the schedule; null: none")
    final_window_blocks: Annotated[WindowBlocks, NOT_COMPILED] = Field(
        description="windows of the last validation, without a YaRN step"
    )
    lr_schedule: Annotated[LearningRateSchedule, NOT_COMPILED]
    end: Annotated[list[End], Compiled(has_mask)] = Field(
        default=[],
        max_length=100,
        description="what happens after the last step and before the last validation, in order",
    )
    warmup: Annotated[bool, NOT_COMPILED] = Field(
        description="run the steps around each stage change once before the clock starts"
    )

    @property
    def all_stages(self) -> list[StageSpec]:
        """Scheduled stages and the extension."""
        return [*self.stages, *([self.extension] if self.extension else [])]

    @property
    def scheduled_steps(self) -> int:
        """Steps of the scheduled stages, without the extension."""
        return sum(stage.steps for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(stage.steps for stage in self.all_stages)

    @property
    def masked(self) -> bool:
        """Whether the last validation uses the canonical mask."""
        return has_mask(self.end)

    @property
    def end_lines(self) -> list[str]:
        """What `end` lists, for the log and the record."""
        return [line for entry in self.end for line in entry.describe(self.total_steps)]

    @property
    def total_tokens(self) -> int:
        """Tokens trained on in the whole run."""
        return sum(stage.steps * stage.batch_tokens for stage in self.all_stages)


class EvaluationSpec(Strict):
    """Validation, outside the clock."""

    every: Annotated[Count | None, NOT_COMPILED] = Field(
        description="steps between validations, the first at step 0, the last at the end; null: only at the end"
    )
    tokens: Annotated[Tokens, NOT_COMPILED] = Field(description="validation tokens, from the stream's start")
    micro_batch_tokens: Count
    target_loss: Annotated[Positive | None, NOT_COMPILED] = Field(
        description="the run succeeds at this loss or below; null: no target"
    )

    def steps(self, total_steps: int) -> range:
        """The steps before which a run of `total_steps` is validated; its end is validated as well."""
        return range(0, total_steps if self.every is not None else 0, self.every or 1)


# --- data, machine, run -----------------------------------------------------------------------------------------


class DataSpec(Strict):
    """Where the token shards are."""

    directory: Directory | None = Field(
        default=None, description="shard directory; null: NANOGPT_DATA, else data/fineweb10B"
    )
    train_files: FilePattern = "fineweb_train_*.bin"
    val_files: FilePattern = "fineweb_val_*.bin"
    bos: Annotated[int, Field(ge=0, le=65535)] = 50256
    epochs: Count | None = Field(default=1, description="passes over the training shards; null repeats forever")


class HardwareSpec(Strict):
    """What the run uses, which a recipe may leave open for --on; world size = nodes * gpus_per_node."""

    gpu: GpuName = Field(description="GPU type; cpu runs the plain implementations")
    gpus_per_node: Few = Field(description="processes per node, one for each GPU")
    nodes: Few = 1


class RuntimeSpec(Strict):
    """How the model is computed. None of this changes what is computed, up to rounding."""

    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of matrices and activations")
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: on CUDA only")
    attention: Literal["auto", "fa4", "fa3", "fa2", "varlen", "plain"] = "auto"
    kernels: Literal["auto", "plain"] = Field(default="auto", description="plain: PyTorch instead of Triton kernels")
    head_precision: Literal["auto", "fp8", "bf16"] = "auto"
    mlp_precision: Literal["auto", "fp8", "bf16"] = Field(
        default="auto",
        description="of the MLP's products in training, if the model supports FP8; emulated on a CPU",
    )
    projection_precision: Literal["auto", "fp8", "bf16"] = Field(
        default="auto", description="likewise for the product that makes queries, keys and values"
    )
    cuda_graphs: Annotated[Literal["auto", "off"], NOT_COMPILED] = Field(  # the same code, launched otherwise
        default="auto",
        description="auto: compiled micro-steps and updates are captured and replayed, on GPUs of 60 GB or more",
    )
    deterministic: bool = Field(default=False, description="deterministic algorithms, at a cost in speed")
    row_gradients: Literal["dense", "sparse", "auto"] = Field(
        default="dense",
        description="how ranks add up gradients of embedding tables: whole, or by touched rows;"
        " auto: sparse if that sends fewer bytes",
    )

    def compiles(self, *, gpu: bool) -> bool:
        """Whether a run on a GPU, or a CPU, goes through torch.compile."""
        return self.compile == "on" or (self.compile == "auto" and gpu)


class CheckpointSpec(Strict):
    """When the run's full state is written."""

    every: Count | None = Field(default=None, description="steps between checkpoints; null: none during the run")
    at_end: bool = Field(default=True, description="write one after the last step")
    keep: Few = Field(default=2, description="checkpoints to keep; older ones are deleted once a newer one is complete")
    on_failure: Literal["continue", "stop"] = Field(
        default="continue",
        description="what to do if one cannot be written (disk full); earlier ones stay intact either way",
    )


class WatchdogSpec(Strict):
    """When the ranks of a run give up on one another, in seconds; a run on one process waits for nobody."""

    silence_seconds: Seconds = Field(
        default=20.0, description="a process not heard from for this long is dead or stopped"
    )
    step_seconds: Seconds = Field(default=300.0, description="a rank in the same step for this long hangs")
    phase_seconds: Seconds = Field(
        default=3600.0, description="likewise for starting, compiling, a validation or a checkpoint"
    )


class OutputSpec(Strict):
    """Where the run's directory is made."""

    directory: Directory | None = Field(
        default=None, description="parent of run directories; null: NANOGPT_RUNS, else ./runs"
    )
    log_every: Count = Field(default=1, description="steps between lines of the log; evaluations are always logged")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none",
        description="also write metrics for TensorBoard, Weights & Biases or Trackio into the run's directory",
    )
    online: bool = Field(
        default=False,
        description="wandb and trackio also upload them during the run",
    )


class ReferenceCurve(Strict):
    """Validation losses of a published run."""

    name: Name
    points: list[Annotated[tuple[Index, Positive], Field(strict=False)]] = Field(
        min_length=1, max_length=1000, description="(steps done, validation loss in nats), the end last"
    )


class ReferenceSpec(Strict):
    """Known results of the shipped recipe `recipe` on FineWeb; unused for runs whose result differs."""

    recipe: Name = Field(description="the shipped recipe that the curves belong to")
    curves: list[ReferenceCurve] = Field(min_length=1, max_length=20, description="a run is compared with the first")
    spread: list[Annotated[tuple[Index, Positive], Field(strict=False)]] = Field(
        min_length=1,
        max_length=1000,
        description="(steps done, standard deviation of the loss from run to run), linear in between",
    )


class RunSpec(Strict):
    """A whole run: what a recipe resolves to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100), NOT_COMPILED]
    description: Annotated[str, NOT_COMPILED] = ""
    model: ModelSpec
    optimizer: OptimizerSpec
    training: TrainingSpec
    evaluation: EvaluationSpec
    reference: Annotated[ReferenceSpec | None, NOT_COMPILED] = None
    data: Annotated[DataSpec, NOT_COMPILED] = DataSpec()
    # The GPU found decides; the world size only adds variants of the optimizer's functions.
    hardware: Annotated[HardwareSpec, NOT_COMPILED]
    runtime: RuntimeSpec = RuntimeSpec()
    checkpoint: Annotated[CheckpointSpec, NOT_COMPILED] = CheckpointSpec()
    watchdog: Annotated[WatchdogSpec, NOT_COMPILED] = WatchdogSpec()
    output: Annotated[OutputSpec, NOT_COMPILED] = OutputSpec()

    @model_validator(mode="before")
    @classmethod
    def _from_the_table(cls, data: Any) -> Any:
        """What the optimizer's part leaves to the model's table of parameters."""
        return with_table_defaults(data)

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.hardware.nodes * self.hardware.gpus_per_node

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank works through in a step."""
        return self.training.slots // self.world_size

    @model_validator(mode="after")
    def _cross_check(self) -> RunSpec:
        problems = list(_cross_checks(self))
        if problems:
            raise CrossCheckError(problems)
        return self


def with_table_defaults(data: Any) -> Any:
    """`data` of a RunSpec, with the model's table of parameters filling in what its optimizer's part leaves out.

    Returned unchanged if the model's part is invalid, which validation will report.
    """
    if not isinstance(data, dict) or not isinstance(optimizer := data.get("optimizer"), dict):
        return data
    kind = next((each for each in specs_of(OPTIMIZERS) if kind_of(each) == optimizer.get("kind")), None)
    if kind is None:
        return data
    try:
        model = _MODEL.validate_python(data.get("model"))
        rows = [row for row in model.parameters() if isinstance(row.train, kind.trains)]
    except (ValidationError, ArithmeticError, ValueError):
        return data
    return {**data, "optimizer": _below(kind.defaults(rows), optimizer)}


def _below(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **given}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(given.get(key), dict):
            merged[key] = _below(default, given[key])
    return merged


def _cross_checks(spec: RunSpec) -> Iterator[Problem]:
    training, evaluation, hardware = spec.training, spec.evaluation, spec.hardware
    for path, text in spec.model.problems():
        yield ("model", *path), text

    if spec.world_size not in WORLD_SIZES:
        yield (
            ("hardware", "gpus_per_node"),
            f"{hardware.nodes} x {hardware.gpus_per_node} makes a world size of {spec.world_size}; allowed are"
            f" {', '.join(map(str, WORLD_SIZES))}",
        )
    elif training.slots % spec.world_size:
        yield (
            ("training", "slots"),
            f"is {training.slots}, must be a multiple of the world size {spec.world_size}",
        )

    if spec.data.bos >= spec.model.vocab_size:
        yield ("data", "bos"), f"is {spec.data.bos}, outside the vocabulary of {spec.model.vocab_size} tokens"
    if (field := spec.model.token_classes_field) and not _has_gpt2_tokens(spec):
        yield ("model", field), _other_tokens(spec)
    yield from _runtime_problems(spec.runtime, hardware.gpu)
    if spec.runtime.mlp_precision == "fp8" and not spec.model.fp8_mlp:
        yield ("runtime", "mlp_precision"), f"is fp8, which the MLP of a {spec.model.kind} model cannot do"
    if spec.runtime.projection_precision == "fp8" and not spec.model.fp8_projection:
        yield ("runtime", "projection_precision"), f"is fp8, which a {spec.model.kind} model cannot do"

    for path, stage in _stages_with_paths(training):
        if stage.batch_tokens % (16 * training.slots):
            yield (
                (*path, "batch_tokens"),
                f"is {stage.batch_tokens}, must be a multiple of 16 * training.slots = {16 * training.slots}",
            )
        if stage.window_blocks.short > stage.window_blocks.long:
            yield (
                (*path, "window_blocks"),
                f"short window {stage.window_blocks.short} is longer than the long one {stage.window_blocks.long}",
            )
        for below, text in spec.model.stage_problems(stage):
            yield (*path, *below), text
    if evaluation.micro_batch_tokens % 16:
        yield (
            ("evaluation", "micro_batch_tokens"),
            f"is {evaluation.micro_batch_tokens}, must be a multiple of 16",
        )
    elif evaluation.tokens % (evaluation.micro_batch_tokens * training.slots):
        yield (
            ("evaluation", "tokens"),
            f"is {evaluation.tokens}, must be a multiple of micro_batch_tokens * training.slots"
            f" = {evaluation.micro_batch_tokens * training.slots}",
        )

    if spec.output.online and spec.output.tracker not in ("wandb", "trackio"):
        yield ("output", "online"), f"is true, which needs output.tracker wandb or trackio, found {spec.output.tracker}"

    schedule = training.lr_schedule
    if isinstance(schedule, CosineSchedule) and schedule.warmup_steps > training.total_steps:
        yield (
            ("training", "lr_schedule", "warmup_steps"),
            f"is {schedule.warmup_steps}, the run has {training.total_steps} steps",
        )

    rows = spec.model.parameters()
    for index, entry in enumerate(training.end):
        for path, text in entry.problems(training.total_steps, rows):
            yield ("training", "end", index, *path), text
        if isinstance(entry, CanonicalMask):
            yield from _mask_problems(spec, ("training", "end", index))
    if not all(isinstance(row.train, spec.optimizer.trains) for row in rows):
        fitting = [kind_of(c) for c in specs_of(OPTIMIZERS) if all(isinstance(row.train, c.trains) for row in rows)]
        yield (
            ("optimizer", "kind"),
            f"is {spec.optimizer.kind}, a {spec.model.kind} model trains with {' or '.join(fitting)}",
        )
        return
    world_size = spec.world_size if spec.world_size in WORLD_SIZES else 1
    stages, steps = len(training.all_stages), training.total_steps
    for path, text in spec.optimizer.problems(rows, world_size=world_size, stages=stages, total_steps=steps):
        yield ("optimizer", *path), text
    for name, table in spec.model.pulled_tables().items():
        if table.rows % world_size:
            yield (
                ("model", table.field),
                f"is {table.rows:,}, which {world_size} ranks cannot share evenly; take a multiple of {world_size}",
            )
        if spec.optimizer.table_rates(0, 1.0) is None:
            yield (
                ("optimizer", "kind"),
                f"is {spec.optimizer.kind}, which as it is here would never update the table {name}: it takes an"
                " optimizer with row_adam",
            )


def _runtime_problems(runtime: RuntimeSpec, gpu: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
    for key, value, gpus in (
        ("attention", "fa4", types_with("fa4")),
        ("attention", "fa3", types_with("fa3")),
        ("attention", "fa2", types_with("fa2")),
        ("attention", "varlen", types_with("varlen")),
        ("head_precision", "fp8", types_with("fp8")),
        ("mlp_precision", "fp8", (*types_with("fp8"), "cpu")),  # emulated there
        ("projection_precision", "fp8", (*types_with("fp8"), "cpu")),
    ):
        if getattr(runtime, key) == value and gpu not in gpus:
            yield ("runtime", key), f"{value} needs hardware.gpu {' or '.join(gpus)}, found {gpu}"


def _has_gpt2_tokens(spec: RunSpec) -> bool:
    return (spec.model.vocab_size, spec.data.bos) == GPT2_TOKENS


def _other_tokens(spec: RunSpec) -> str:
    vocabulary, bos = GPT2_TOKENS
    return (
        f"is for GPT-2's tokens: model.vocab_size {vocabulary} with data.bos {bos}, found"
        f" {spec.model.vocab_size} with {spec.data.bos}"
    )


def _mask_problems(spec: RunSpec, path: tuple[str | int, ...]) -> Iterator[Problem]:
    model = spec.model
    if not model.canonical_mask:
        yield path, f"canonical_mask: a {model.kind} model does not support it"
    elif not _has_gpt2_tokens(spec):
        yield path, f"canonical_mask {_other_tokens(spec)}"
    elif model.padded_vocab_size % 8:
        yield path, f"canonical_mask: model.padded_vocab_size is {model.padded_vocab_size}, must be a multiple of 8"


def _stages_with_paths(training: TrainingSpec) -> Iterator[tuple[tuple[str | int, ...], StageSpec]]:
    for index, stage in enumerate(training.stages):
        yield ("training", "stages", index), stage
    if training.extension:
        yield ("training", "extension"), training.extension
