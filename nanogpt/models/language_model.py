"""The interface between trainer and models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanogpt.kernels.dispatch import run_time_number
from nanogpt.layers.past import Past
from nanogpt.models import MODELS
from nanogpt.models.model_spec import BaseModelSpec
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim.communication import Communicator
from nanogpt.optim.pulled_table import PulledTable
from nanogpt.optim.row_table import AnyLookUp
from nanogpt.parameters import Normal, Parameter, TransposeOf, Uniform, Values, Zeros
from nanogpt.registry import built_class

Precision = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Windows:
    """Left attention windows in tokens: a query sees itself and this many tokens before it."""

    short: int
    long: int

    def at_run_time(self) -> RunTimeWindows:
        """The same, as tensors."""
        return RunTimeWindows(run_time_number(self.short, torch.int64), run_time_number(self.long, torch.int64))


@dataclass(frozen=True)
class RunTimeWindows:
    """`Windows` as CPU tensors (), int64: read by compiled code at run time, not constants in it."""

    short: Tensor
    long: Tensor


@dataclass(frozen=True)
class Implementations:
    """Which of several equivalent implementations computes a model; see `nanogpt.kernels`."""

    attention: str = "plain"
    head_precision: Precision = "bf16"
    mlp_precision: Precision = "bf16"
    projection_precision: Precision = "bf16"  # of queries, keys and values
    plain_kernels: bool = False  # plain PyTorch also where a Triton kernel could run


class Transformers(NamedTuple):
    """A model converted to one of Hugging Face transformers'."""

    config: dict[str, Any]  # config.json, except dtype and special tokens
    tensors: dict[str, Tensor]


class TokenBatch(Protocol):
    """A micro-batch, such as `nanogpt.data.micro_batches.MicroBatch`."""

    @property
    def inputs(self) -> Tensor:
        """(T,) int32 tokens."""

    @property
    def targets(self) -> Tensor:
        """(T,) int64: the token after each input."""

    @property
    def cu_seqlens(self) -> Tensor:
        """(n,) int32: 0, the cumulative ends of the documents, then T."""

    @property
    def max_seqlen(self) -> int:
        """An upper bound on a document's length."""

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """The arrays from the spec's `batch_extras`, by name; of any shape."""


@dataclass(frozen=True)
class SchedulePoint:
    """A step's place in the schedule, from which a model makes its loss's inputs."""

    step: int
    stage: int
    progress: float  # of the stage's steps, from 0
    windows: Windows
    loss: StageLoss

    @property
    def token_weights(self) -> tuple[float, ...]:
        """Loss weights of the next tokens."""
        return self.loss.token_weights_at(self.progress)

    @property
    def prefix_weight(self) -> float | None:
        """Loss weight of the next token's prefix; None if it is not predicted."""
        prefix = self.loss.prefix_weight
        return None if prefix is None else prefix.at(self.progress)


def to_device(values: float | tuple[float, ...], device: torch.device) -> Tensor:
    """() or (n,) fp32, without a wait."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class LanguageModel(nn.Module):
    """Base of the models: creates the parameters of the spec's table, named after its rows."""

    rows: tuple[Parameter, ...]
    tables: dict[str, PulledTable]  # by name; empty until `make_tables`

    def __init__(self, spec: BaseModelSpec, *, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.table_specs = spec.pulled_tables()
        self.tables = {}
        self.rows = spec.parameters()
        for row in self.rows:
            *folders, name = row.name.split(".")
            module: nn.Module = self
            for folder in folders:
                if not hasattr(module, folder):
                    module.add_module(folder, nn.Module())
                module = getattr(module, folder)
            numbers = torch.empty(row.shape, dtype=torch.float32 if row.dtype == "fp32" else dtype)
            module.register_parameter(name, nn.Parameter(numbers))

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Fill every parameter from `generator` (on the CPU), as the table says; uniform ones draw first.

        Raises ValueError if table and parameters do not match, naming what is missing on which side.
        """
        check_table(self)
        parameters = dict(self.named_parameters())
        for kind in (Uniform, Normal, Values, TransposeOf):
            for row in self.rows:
                start = row.start
                target: Tensor = parameters[row.name]
                if not isinstance(start, kind):
                    continue
                if isinstance(start, Uniform):
                    target.zero_()
                    target = target[start.part]
                    target.copy_(torch.empty(target.shape).uniform_(-start.bound, start.bound, generator=generator))
                elif isinstance(start, Normal):
                    target.copy_(torch.empty(target.shape).normal_(std=start.std, generator=generator))
                elif isinstance(start, Values):
                    target.copy_(torch.tensor(start.values) / start.divisor)
                else:
                    target.copy_(parameters[start.name].mT)
        for row in self.rows:
            if isinstance(row.start, Zeros):
                parameters[row.name].zero_()

    def make_tables(self, communicator: Communicator, device: torch.device | str, *, plain: bool = False) -> None:
        """Create this rank's part of the spec's pulled tables, all zeros. plain: without Triton kernels."""
        place: dict[str, Any] = {"dtype": self.dtype, "communicator": communicator, "device": torch.device(device)}
        self.tables = {
            name: PulledTable(table.rows, table.width, **place, plain=plain) for name, table in self.table_specs.items()
        }

    def loss_inputs(self, point: SchedulePoint, device: torch.device) -> Any:
        """The inputs of `training_loss` from the schedule: the model's own type, a tree of tensors on `device`.

        Tensors on the CPU stay the same for all steps of a stage.
        """
        raise NotImplementedError

    def training_loss(self, batch: TokenBatch, inputs: Any, embedded: tuple[Tensor, ...] | None = None) -> Tensor:
        """The micro-batch's training loss, a scalar in fp32; the trainer multiplies it by 1 / accumulation steps.

        inputs: from `loss_inputs`. embedded: what `look_ups` reads, in order, if the caller handles the tables'
        gradients; None: the model reads, and autograd handles them.
        """
        raise NotImplementedError

    def look_ups(self, batch: TokenBatch) -> tuple[AnyLookUp, ...]:
        """What `training_loss` reads from large tables for this batch; may be passed as `embedded`."""
        return ()

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """The divisor that turns `training_loss` into a loss per token, for the log."""
        raise NotImplementedError

    def evaluation_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        embedded: tuple[Tensor, ...] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token in nats, a scalar in fp32; no gradient.

        embedded: as in training. mask: (V, V / 8) uint8, a bit for each class ruled out after a token; for
        models whose spec has `canonical_mask`.
        """
        raise NotImplementedError

    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """(T,) fp32: the cross-entropy of each next token in nats, whose mean is `evaluation_loss`; no gradient.

        Entry t is for `targets[t]`, so a document's last entry is for the BOS that follows it.
        """
        raise NotImplementedError

    def next_token_logits(self, batch: TokenBatch, windows: Windows, past: Past | None = None) -> Tensor:
        """(vocab_size,) fp32: the (softcapped) logits after the micro-batch's last token; for sampling.

        past: the first call stores there what later calls look back at; these read only the tokens that follow.
        """
        raise NotImplementedError

    def change_windows(self, old: Windows, new: Windows) -> None:
        """The windows change from `old` to `new` at a stage change; at least one of them differs."""

    def as_transformers(self, windows: Windows) -> Transformers | None:
        """The model with `windows` as transformers' own; None: transformers has no such model.

        Raises InputError if transformers' model differs for these windows.
        """
        return None

    def set_prefixes(self, prefixes: Tensor) -> None:
        """Set the prefix of each token, (rows of the embedding,) int64, -1 for none. Until then no token has one."""

    def weights_changed(self, step: int) -> None:
        """Called after the optimizer's `step`: derive from the parameters whatever the next forward pass needs."""

    @property
    def settled_step(self) -> int | None:
        """From this step on `weights_changed` launches the same kernels after each; None: it never launches any."""
        return None

    def restart(self) -> None:
        """Reset everything but the parameters to the start of a run; the parameters already are."""


def check_table(model: LanguageModel) -> None:
    """Raise ValueError if the model's parameters differ from its table's, or have other shapes."""
    shapes = {row.name: row.shape for row in model.rows}
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"the parameter {name} has no row in the table" for name in found if name not in shapes]
    problems += [f"the table's row {name} has no parameter" for name in shapes if name not in found]
    problems += [
        f"{name} is {found[name]}, its row says {shape}"
        for name, shape in shapes.items()
        if found.get(name, shape) != shape
    ]
    if len(shapes) != len(model.rows):
        problems.append("the table names a row twice")
    if problems:
        raise ValueError(f"{type(model).__name__}: {'; '.join(problems)}")


def make_model(
    spec: BaseModelSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations | None = None
) -> LanguageModel:
    """The spec's model, its parameters not yet drawn.

    max_tokens: at most, in a micro-batch. implementations: of attention, MLP and head; by default the plain ones.
    """
    kind = built_class(MODELS, spec)
    chosen = implementations or Implementations()
    model: LanguageModel = kind(spec, dtype=dtype, max_tokens=max_tokens, implementations=chosen)
    return model
