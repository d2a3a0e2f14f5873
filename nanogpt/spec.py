"""RunSpec: everything that decides a run, typed and bounded.

A recipe (YAML, see `nanogpt.recipe`) becomes a `RunSpec`; the rest of the package reads nothing else. This module
imports no torch, so that a recipe is checked on a login node in a fraction of a second. Steps are 0-based. Windows
are given in blocks here (`StageSpec.window_blocks`) and are in tokens everywhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from nanogpt.spec_model import (
    Beta,
    Betas,
    Count,
    Fraction,
    Gpt2ModelSpec,
    Index,
    NonNegative,
    Polynomial,
    Positive,
    Record89ModelSpec,
    RecordModelSpec,
    SpeedrunModelSpec,
    Strict,
)

WORLD_SIZES = (1, 2, 4, 8)
GpuType = Literal["h100", "h200", "a100", "cpu"]
GPU_TYPES: tuple[str, ...] = get_args(GpuType)


class CrossCheckError(ValueError):
    """Values that are each fine and do not fit together: a list of (path in the spec, what is wrong)."""

    def __init__(self, problems: list[tuple[tuple[str | int, ...], str]]):
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text in problems))


ModelSpec = Annotated[SpeedrunModelSpec | Record89ModelSpec | Gpt2ModelSpec, Field(discriminator="kind")]

# --- optimizer --------------------------------------------------------------------------------------------------

Communication = Literal["replicated", "sharded"]


class AdamGroup(Strict):
    """Adam's settings of one parameter."""

    betas: Betas
    lr_mul: Positive
    wd_mul: NonNegative
    communication: Communication


class AdamSpec(Strict):
    """Adam with cautious weight decay, for everything that is not a bank of matrices."""

    lr: Positive
    eps: Positive
    weight_decay: NonNegative
    every: Count = Field(description="Adam steps on the last step of every so many; gradients are summed over them")
    groups: dict[str, AdamGroup]
    delayed: list[str] = Field(
        default=[],
        description="groups that are updated one step later, so that ranks add up their gradients while that one runs",
    )


class MomentumSpec(Strict):
    """NorMuon's momentum: `low` to `high` over the first warmup_steps, back to `low` over the last cooldown_steps."""

    low: Beta
    high: Beta
    warmup_steps: Index
    cooldown_steps: Index


class BankGroup(Strict):
    """NorMuon's settings of one bank of matrices."""

    lr_muls: list[Positive] = Field(min_length=1, description="multipliers of the bank's matrices, repeated in turn")
    communication: Communication


class NorMuonSpec(Strict):
    """NorMuon: momentum, Polar Express, variance reduction by row, cautious decay."""

    lr: Positive
    beta2: Beta
    weight_decay: NonNegative
    momentum: MomentumSpec
    norm_margin: Positive = Field(description="the matrix is divided by this much times its Frobenius norm first")
    polar_express: list[Polynomial] = Field(
        min_length=1, description="(a, b, c) of each iteration X <- aX + (bA + cAA)X, A = XX^T"
    )
    groups: dict[str, BankGroup]


class TiedHeadSpec(Strict):
    """`embed` is `lm_head` transposed until they split after the first Adam step of a stage."""

    split_stage: Index


TIED_LABELS = ("embed", "lm_head")


class SpeedrunOptimizerSpec(Strict):
    """Adam and NorMuon side by side, with explicit orders of communication and work."""

    kind: Literal["normuon_adam"]
    adam: AdamSpec
    normuon: NorMuonSpec
    tied_head: TiedHeadSpec
    reduce_order: list[str]
    update_order: list[str]

    def problems(self, adam_labels: Sequence[str], banks: Sequence[str]) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Cross-checks against the model's parameters; yields (path below `optimizer`, message)."""
        for path, found, wanted in (
            (("adam", "groups"), list(self.adam.groups), list(adam_labels)),
            (("normuon", "groups"), list(self.normuon.groups), list(banks)),
            (("reduce_order",), self.reduce_order, [*banks, *adam_labels]),
            (("update_order",), self.update_order, [*banks, *adam_labels]),
        ):
            missing = [label for label in wanted if label not in found]
            unknown = [f"{label}{_nearest(label, wanted)}" for label in found if label not in wanted]
            twice = sorted({label for label in found if found.count(label) > 1})
            parts = [
                f"{word} {', '.join(labels)}"
                for word, labels in (("misses", missing), ("does not know", unknown), ("names twice", twice))
                if labels
            ]
            if parts:
                yield path, f"{'; '.join(parts)} (the model's parameters are {', '.join(wanted)})"
        may_wait = [label for label in adam_labels if label not in TIED_LABELS]
        for label in self.adam.delayed:
            if label not in may_wait:
                yield ("adam", "delayed"), f"{label}{_nearest(label, may_wait)}: can be any of {', '.join(may_wait)}"


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class AdamWSpec(Strict):
    """AdamW as the GPT-2 baseline uses it: decoupled decay of matrices only, gradient clipping."""

    kind: Literal["adamw"]
    lr: Positive
    betas: Betas
    eps: Positive
    weight_decay: NonNegative
    clip_norm: Positive | None = Field(description="largest global gradient norm; null does not clip")


OptimizerSpec = Annotated[SpeedrunOptimizerSpec | AdamWSpec, Field(discriminator="kind")]

# --- training ---------------------------------------------------------------------------------------------------


class WindowBlocks(Strict):
    """Left attention windows in blocks of `training.window_block` tokens."""

    short: Count
    long: Count


class PrefixWeight(Strict):
    """Loss weight of the next token's prefix (its longest beginning that is a token), linear over a stage."""

    first: NonNegative
    last: NonNegative = Field(description="where it would arrive at the next stage's first step")


class StageSpec(Strict):
    """A stretch of steps with one batch size, one pair of windows and one list of multi-token weights."""

    steps: Count
    batch_tokens: Count = Field(description="tokens a step over all ranks and micro-steps")
    window_blocks: WindowBlocks
    token_weights: list[NonNegative] = Field(
        min_length=1,
        max_length=8,
        description="loss weights of the next tokens; the last of several falls to 0",
    )
    lr_factor: Positive
    prefix_weight: PrefixWeight | None = Field(default=None, description="null: prefixes are not predicted")
    max_document_tokens: Count | None = Field(default=None, description="null: training.max_document_tokens")
    max_documents: Count | None = Field(
        default=None, description="room for documents in a micro-batch (a tighter one is faster); null: by its tokens"
    )


class CooldownSchedule(Strict):
    """Learning rate: the stage's factor, then linearly to end_factor at the end of the scheduled steps."""

    kind: Literal["stage_cooldown"]
    cooldown_start: Fraction = Field(description="fraction of the scheduled steps at which the cooldown starts")
    end_factor: NonNegative
    ramp_steps: Index = Field(
        default=0, description="first steps of a stage, in which the factor goes from the one before's to its own"
    )


class CosineSchedule(Strict):
    """Learning rate: linear warm-up, then a cosine down to end_factor at the last step."""

    kind: Literal["warmup_cosine"]
    warmup_steps: Index
    end_factor: NonNegative


LearningRateSchedule = Annotated[CooldownSchedule | CosineSchedule, Field(discriminator="kind")]


class TrainingSpec(Strict):
    """Steps, batches, windows and schedule."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    slots: Annotated[int, Field(ge=1, le=512)] = Field(
        description="micro-batches a step, whatever the world size; accumulation steps = slots / world size"
    )
    max_document_tokens: Count
    window_block: Count = Field(description="tokens in a window block")
    stages: list[StageSpec] = Field(min_length=1, description="the scheduled steps")
    extension: StageSpec | None = Field(description="steps after the schedule has ended; null for none")
    final_window_blocks: WindowBlocks = Field(description="windows of the last validation, without a YaRN step")
    lr_schedule: LearningRateSchedule
    warmup: bool = Field(description="run the steps around each stage change once before the clock starts")

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
    def total_tokens(self) -> int:
        """Tokens trained on in the whole run."""
        return sum(stage.steps * stage.batch_tokens for stage in self.all_stages)


class EvaluationSpec(Strict):
    """Validation, outside the clock."""

    every: Count = Field(description="steps between validations; step 0 and the end are always validated")
    tokens: Count = Field(description="validation tokens, from the stream's start")
    micro_batch_tokens: Count
    target_loss: Positive | None = Field(description="the run is a success at this loss or below; null: no target")


# --- data, machine, run -----------------------------------------------------------------------------------------


class DataSpec(Strict):
    """Where the token shards are."""

    directory: str | None = Field(default=None, description="shard directory; null: NANOGPT_DATA, else data/fineweb10B")
    train_files: str = "fineweb_train_*.bin"
    val_files: str = "fineweb_val_*.bin"
    bos: Annotated[int, Field(ge=0, le=65535)] = 50256
    epochs: Count | None = Field(default=1, description="passes over the training shards; null repeats for ever")


class HardwareSpec(Strict):
    """What the run is started on; world size = nodes * gpus_per_node."""

    gpu: GpuType = Field(description="GPU type; cpu runs the plain path")
    gpus_per_node: Count = Field(description="processes a node, one a GPU")
    nodes: Count = 1


class RuntimeSpec(Strict):
    """How the model is computed. None of these changes what is computed, up to rounding."""

    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of matrices and activations")
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: on CUDA only")
    attention: Literal["auto", "fa4", "fa3", "fa2", "varlen", "plain"] = "auto"
    kernels: Literal["auto", "plain"] = Field(default="auto", description="plain: PyTorch in place of Triton kernels")
    head_precision: Literal["auto", "fp8", "bf16"] = "auto"
    mlp_precision: Literal["auto", "fp8", "bf16"] = Field(
        default="auto", description="of the MLP's products in training, for record89; fp8 is emulated on a CPU"
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: the record models' compiled micro-steps are recorded and replayed, on GPUs of 60 GB or more",
    )
    deterministic: bool = Field(default=False, description="deterministic algorithms, at a cost in speed")
    bigram_gradient: Literal["dense", "sparse", "auto"] = Field(
        default="dense",
        description="how ranks add up the bigram table's gradient: all of it, or the rows that were touched;"
        " auto: sparse where fewer bytes travel",
    )


class CheckpointSpec(Strict):
    """When the run's whole state is written."""

    every: Count | None = Field(default=None, description="steps between checkpoints; null: none on the way")
    at_end: bool = Field(default=True, description="write one after the last step")
    keep: Count = Field(default=2, description="checkpoints kept; older ones are deleted once a newer one is whole")
    on_failure: Literal["continue", "stop"] = Field(
        default="continue",
        description="what a run does that cannot write one (disk full): the earlier ones stay whole either way",
    )


class WatchdogSpec(Strict):
    """When the ranks of a run give up on one another, in seconds; a run on one process waits for nobody."""

    silence_seconds: Positive = Field(
        default=20.0, description="a process that has not been heard of for so long is dead or stopped"
    )
    step_seconds: Positive = Field(default=300.0, description="a rank that is at one step for so long hangs")
    phase_seconds: Positive = Field(
        default=3600.0, description="likewise for starting, compiling, a validation, a checkpoint"
    )


class OutputSpec(Strict):
    """Where the run's directory is made."""

    directory: str | None = Field(
        default=None, description="parent of run directories; null: NANOGPT_RUNS, else ./runs"
    )
    log_every: Count = Field(default=1, description="steps between lines of the log; evaluations are always logged")
    tracker: Literal["none", "tensorboard", "wandb"] = Field(
        default="none", description="also write the metrics for TensorBoard, or for Weights & Biases (offline)"
    )


class ReferenceCurve(Strict):
    """Validation losses of a published run."""

    name: str
    points: list[Annotated[tuple[Index, Positive], Field(strict=False)]] = Field(
        min_length=1, description="(steps done, validation loss in nats), the end last"
    )


class ReferenceSpec(Strict):
    """What the shipped recipe `recipe` is known to give on FineWeb; off for runs that differ from it in result."""

    recipe: str = Field(description="the shipped recipe that the curves belong to")
    curves: list[ReferenceCurve] = Field(min_length=1, description="a run is held against the first")
    spread: list[Annotated[tuple[Index, Positive], Field(strict=False)]] = Field(
        min_length=1, description="(steps done, standard deviation of the loss from run to run), linear in between"
    )


class RunSpec(Strict):
    """A whole run: what a recipe resolves to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    description: str = ""
    model: ModelSpec
    optimizer: OptimizerSpec
    training: TrainingSpec
    evaluation: EvaluationSpec
    reference: ReferenceSpec | None = None
    data: DataSpec = DataSpec()
    hardware: HardwareSpec
    runtime: RuntimeSpec = RuntimeSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    watchdog: WatchdogSpec = WatchdogSpec()
    output: OutputSpec = OutputSpec()

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


def _cross_checks(spec: RunSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
    training, evaluation, hardware = spec.training, spec.evaluation, spec.hardware
    for path, text in spec.model.problems():
        yield ("model", *path), text

    if spec.world_size not in WORLD_SIZES:
        yield (
            ("hardware", "gpus_per_node"),
            f"{hardware.nodes} x {hardware.gpus_per_node} makes a world size of {spec.world_size}, allowed are"
            f" {', '.join(map(str, WORLD_SIZES))}",
        )
    elif training.slots % spec.world_size:
        yield (
            ("training", "slots"),
            f"is {training.slots}, must be a multiple of the world size {spec.world_size}",
        )

    yield from _runtime_problems(spec.runtime, hardware.gpu)
    if spec.runtime.mlp_precision == "fp8" and not isinstance(spec.model, Record89ModelSpec):
        yield ("runtime", "mlp_precision"), f"fp8 is for the MLP of record89, the model is {spec.model.kind}"

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

    schedule = training.lr_schedule
    if isinstance(schedule, CosineSchedule) and schedule.warmup_steps > training.total_steps:
        yield (
            ("training", "lr_schedule", "warmup_steps"),
            f"is {schedule.warmup_steps}, the run has {training.total_steps} steps",
        )

    if isinstance(spec.model, RecordModelSpec) != isinstance(spec.optimizer, SpeedrunOptimizerSpec):
        wanted = "normuon_adam" if isinstance(spec.model, RecordModelSpec) else "adamw"
        yield (
            ("optimizer", "kind"),
            f"is {spec.optimizer.kind}, a {spec.model.kind} model trains with {wanted}",
        )
        return
    if isinstance(spec.optimizer, SpeedrunOptimizerSpec) and isinstance(spec.model, RecordModelSpec):
        if spec.world_size in WORLD_SIZES:
            yield from _sharding_problems(spec.optimizer, spec.model, spec.world_size)
        for path, text in spec.optimizer.problems(spec.model.adam_labels, spec.model.banks):
            yield ("optimizer", *path), text
        momentum = spec.optimizer.normuon.momentum
        if momentum.warmup_steps + momentum.cooldown_steps > training.total_steps:
            yield (
                ("optimizer", "normuon", "momentum"),
                f"warms up for {momentum.warmup_steps} and cools down for {momentum.cooldown_steps} steps,"
                f" the run has {training.total_steps}",
            )
        stage_count = len(training.all_stages)
        if spec.optimizer.tied_head.split_stage >= stage_count:
            yield (
                ("optimizer", "tied_head", "split_stage"),
                f"is {spec.optimizer.tied_head.split_stage}, the run has stages 0..{stage_count - 1}",
            )
    if isinstance(spec.model, Gpt2ModelSpec):
        for path, stage in _stages_with_paths(training):
            if stage.token_weights != [1.0]:
                yield (
                    (*path, "token_weights"),
                    f"is {stage.token_weights}, gpt2 predicts the next token only: [1.0]",
                )
            if stage.prefix_weight is not None:
                yield (*path, "prefix_weight"), "is set, gpt2 predicts the next token only: null"


def _runtime_problems(runtime: RuntimeSpec, gpu: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
    cuda, hopper = ("h100", "h200", "a100"), ("h100", "h200")
    for key, value, gpus in (
        ("attention", "fa4", hopper),
        ("attention", "fa3", hopper),
        ("attention", "fa2", cuda),
        ("attention", "varlen", cuda),
        ("head_precision", "fp8", hopper),
        ("mlp_precision", "fp8", (*hopper, "cpu")),  # emulated there
    ):
        if getattr(runtime, key) == value and gpu not in gpus:
            yield ("runtime", key), f"{value} needs hardware.gpu {' or '.join(gpus)}, found {gpu}"


def _sharding_problems(
    optimizer: SpeedrunOptimizerSpec, model: RecordModelSpec, world_size: int
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    groups: dict[str, dict[str, AdamGroup] | dict[str, BankGroup]]
    groups = {"adam": optimizer.adam.groups, "normuon": optimizer.normuon.groups}
    for part, by_label in groups.items():
        for label, group in by_label.items():
            rows = model.shardable_rows.get(label, 0)
            if group.communication == "sharded" and rows % world_size:
                unit = "matrices" if part == "normuon" else "rows"
                padding = f"{label}_bank_padding"
                hint = f"; model.{padding} can fill up" if hasattr(model, padding) else ""
                yield (
                    ("optimizer", part, "groups", label, "communication"),
                    f"sharded needs {unit} that {world_size} ranks share evenly, {label} has {rows}{hint}",
                )


def _stages_with_paths(training: TrainingSpec) -> Iterator[tuple[tuple[str | int, ...], StageSpec]]:
    for index, stage in enumerate(training.stages):
        yield ("training", "stages", index), stage
    if training.extension:
        yield ("training", "extension"), training.extension
