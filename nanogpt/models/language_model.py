"""What the trainer asks of a model, and what it tells it about a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.dispatch import run_time_number


@dataclass(frozen=True)
class Windows:
    """Left attention windows in tokens: a query sees itself and so many tokens before it."""

    short: int
    long: int

    def at_run_time(self) -> RunTimeWindows:
        """The same as tensors."""
        return RunTimeWindows(run_time_number(self.short, torch.int64), run_time_number(self.long, torch.int64))


@dataclass(frozen=True)
class RunTimeWindows:
    """`Windows` as CPU tensors (), int64: numbers that compiled code reads when it runs, and no constants of it."""

    short: Tensor
    long: Tensor


@dataclass(frozen=True)
class Implementations:
    """Which of several equal implementations computes a model; see `nanogpt.kernels`."""

    attention: str = "plain"
    head_precision: Literal["bf16", "fp8"] = "bf16"
    mlp_precision: Literal["bf16", "fp8"] = "bf16"
    plain_kernels: bool = False  # plain PyTorch also where a Triton kernel could run


class TokenBatch(Protocol):
    """One micro-batch; `nanogpt.data.batches.MicroBatch` is one."""

    @property
    def inputs(self) -> Tensor:
        """(T,) int32 tokens."""

    @property
    def targets(self) -> Tensor:
        """(T,) int64: the token after each input."""

    @property
    def cu_seqlens(self) -> Tensor:
        """(n,) int32: 0, the running ends of the documents, then T."""

    @property
    def max_seqlen(self) -> int:
        """An upper bound of a document's length."""


@dataclass(frozen=True)
class LookUp:
    """The rows of a table that a micro-batch's tokens read."""

    parameter: nn.Parameter  # (n, D)
    rows: Tensor  # (T,) integers; look-ups with the same rows share the tensor
    first: int  # row of the parameter from which `rows` count
    count: int  # of rows that may be read

    def part(self, full: Tensor) -> Tensor:
        """What `rows` count in, of the parameter or its gradient (n, D): a view."""
        return full[self.first : self.first + self.count]

    def read(self) -> Tensor:
        """The rows, (T, D), as a leaf: their gradient stays with it, to be added to the table's."""
        return F.embedding(self.rows, self.part(self.parameter.detach())).requires_grad_()


class LanguageModel(nn.Module):
    """Base of the models. A parameter's name is its label in the optimizer's tables."""

    def draw_parameters(self, generator: torch.Generator) -> None:
        """Fill every parameter from `generator` (on the CPU)."""
        raise NotImplementedError

    def training_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        token_weights: Tensor,
        prefix_weight: Tensor | None = None,
        embedded: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """The micro-batch's training loss, a scalar in fp32; the trainer multiplies it by 1 / accumulation steps.

        token_weights: (K,) fp32, the loss weight of the k-th next token. prefix_weight: () fp32, that of the next
        token's prefix (see `set_prefixes`); None where the step has no such term. embedded: what `look_ups` reads, in
        its order, where the caller sees to the tables' gradients; None: the model reads, and autograd sees to them.
        """
        raise NotImplementedError

    def look_ups(self, tokens: Tensor) -> tuple[LookUp, ...]:
        """What `training_loss` reads of large tables for these tokens (T,), and may be handed as `embedded`."""
        return ()

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """What `training_loss` is divided by to be a loss per token, for the log."""
        raise NotImplementedError

    def evaluation_loss(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """Mean cross-entropy of the next token in nats, a scalar in fp32; no gradient."""
        raise NotImplementedError

    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """(T,) fp32: the cross-entropy of each next token in nats, what `evaluation_loss` is the mean of; no gradient.

        Entry t is of `targets[t]`, so a document's last entry is of the BOS that follows it.
        """
        raise NotImplementedError

    def next_token_logits(self, batch: TokenBatch, windows: Windows) -> Tensor:
        """(vocab_size,) fp32: the (softcapped) logits after the micro-batch's last token; for sampling."""
        raise NotImplementedError

    def extend_window(self, old: int, new: int) -> None:
        """The long window goes from `old` to `new` tokens at a stage change."""

    def set_prefixes(self, prefixes: Tensor) -> None:
        """The prefix of each token, (rows of the embedding,) int64, -1 for none. Until then no token has one."""

    def weights_changed(self, step: int) -> None:
        """The optimizer has made `step`: time to derive from the parameters whatever the next forward pass needs."""

    def restart(self) -> None:
        """All but the parameters back to the start of a run; the parameters are there already."""
