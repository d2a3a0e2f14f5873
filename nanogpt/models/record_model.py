"""What the public records' models share: the head with its losses, rotary tables, layer sets."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.cross_entropy import head_loss, head_mean_loss, head_token_losses, softcap
from nanogpt.kernels.fp8_head import Fp8Scales
from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_plain
from nanogpt.layers.past import Past
from nanogpt.layers.rotary import Rotary
from nanogpt.models.language_model import (
    Implementations,
    LanguageModel,
    RunTimeWindows,
    SchedulePoint,
    TokenBatch,
    Windows,
    to_device,
)
from nanogpt.models.record_spec import BIGRAM_ROWS, BigramModelSpec, RecordModelSpec
from nanogpt.optim.row_table import AnyLookUp, LookUp

Spec = TypeVar("Spec", bound=RecordModelSpec)
BigramSpec = TypeVar("BigramSpec", bound=BigramModelSpec)


class LossInputs(NamedTuple):
    """The loss's inputs from the schedule."""

    windows: RunTimeWindows
    token_weights: Tensor  # (K,) fp32: the loss weight of the k-th next token
    prefix_weight: Tensor | None = None  # () fp32: that of the next token's prefix; None: the step has no such term


class HeadInputs(NamedTuple):
    """The C classes of the training loss, and which of them each token's terms are for."""

    weight: Tensor  # (D, C)
    targets: Tensor  # (T,) int64: the next token's class
    prefixes: Tensor | None  # (T,) int64: its prefix's, -1 for none; None: the step has no such term


class RecordModel(LanguageModel, Generic[Spec]):
    """Base of the record models; `hidden` gives the head's input."""

    lm_head: nn.Parameter  # (D, V)
    embed: nn.Parameter  # (V, D)
    value_embed: nn.Parameter  # (tables V, D): tables one after another
    prefixes: Tensor  # (V,) int64
    fp8_scales: ClassVar[Fp8Scales] = Fp8Scales()  # of the head

    def __init__(self, spec: Spec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations):
        super().__init__(spec, dtype=dtype)
        self.spec = spec
        self.implementations = implementations
        self.register_buffer("prefixes", torch.full((spec.padded_vocab_size,), -1, dtype=torch.int64), persistent=False)
        self.mlp_function = relu_squared_mlp_plain if implementations.plain_kernels else relu_squared_mlp
        self.attention_row = {layer: row for row, layer in enumerate(spec.attention_layers)}
        self.value_table = {layer: table for table, layer in enumerate(spec.value_embed_layers)}

    def forward(self, batch: TokenBatch, windows: Windows | RunTimeWindows, past: Past | None = None) -> Tensor:
        """The last layer's normalised activations, (T, D); with `past`, of tokens that follow those already seen."""
        x = self.hidden(batch, self.embedded(batch), windows, past=past)
        if past is not None:
            past.advance(x.shape[0])
        return x

    def hidden(
        self,
        batch: TokenBatch,
        embedded: Any,  # of `embedded`
        windows: Windows | RunTimeWindows,
        *,
        training: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D). `training`: as for the training loss."""
        raise NotImplementedError

    def embedded(self, batch: TokenBatch) -> Any:
        """The tables' rows for the batch's tokens."""
        return self.named(
            tuple(F.embedding(rows, full[first : first + n]) for full, rows, first, n in self.reads(batch))
        )

    def look_ups(self, batch: TokenBatch) -> tuple[AnyLookUp, ...]:
        """See the base."""
        return tuple(LookUp(*read) for read in self.reads(batch))

    def reads(self, batch: TokenBatch) -> tuple[tuple[nn.Parameter, Tensor, int, int], ...]:
        """A `LookUp` for each table, as a plain tuple, which compiled code can create."""
        raise NotImplementedError

    def named(self, embedded: tuple[Tensor, ...]) -> Any:
        """What is read, in the order of `look_ups`, in the form `hidden` takes."""
        raise NotImplementedError

    def value_reads(self, tokens: Tensor) -> tuple[tuple[nn.Parameter, Tensor, int, int], ...]:
        """Of the value tables, each (V, D)."""
        vocab = self.spec.padded_vocab_size
        return tuple((self.value_embed, tokens, first, vocab) for first in range(0, self.value_embed.shape[0], vocab))

    def window(self, layer: int, windows: Windows | RunTimeWindows) -> int | Tensor:
        """The layer's window in tokens."""
        return windows.long if layer in self.spec.long_window_layers else windows.short

    def loss_inputs(self, point: SchedulePoint, device: torch.device) -> LossInputs:
        """Windows and the weights of the loss's terms."""
        prefix = point.prefix_weight
        return LossInputs(
            point.windows.at_run_time(),
            to_device(point.token_weights, device),
            None if prefix is None else to_device(prefix, device),
        )

    def training_loss(
        self, batch: TokenBatch, inputs: LossInputs, embedded: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Weighted multi-token cross-entropy, summed over the micro-batch's tokens."""
        read = self.embedded(batch) if embedded is None else self.named(embedded)
        x = self.hidden(batch, read, inputs.windows, training=True)
        head = self.head_inputs(batch, inputs)
        cap = self.spec.softcap
        return head_loss(
            x,
            head.weight,
            head.targets,
            inputs.token_weights,
            prefixes=head.prefixes,
            prefix_weight=inputs.prefix_weight,
            cap=cap.cap,
            shift=cap.shift,
            scale=cap.scale,
            precision=self.implementations.head_precision,
            fp8=self.fp8_scales,
            plain=self.implementations.plain_kernels,
        )

    def head_inputs(self, batch: TokenBatch, inputs: LossInputs) -> HeadInputs:
        """All classes."""
        prefixes = None if inputs.prefix_weight is None else self.prefixes[batch.targets]
        return HeadInputs(self.lm_head, batch.targets, prefixes)

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """The training loss is a sum over tokens."""
        return float(batch.inputs.shape[0])

    def evaluation_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        embedded: tuple[Tensor, ...] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token, with the head in the model's dtype.

        mask: (V, V / 8) uint8, a bit for each class ruled out after a token (`head_token_losses`).
        """
        with torch.no_grad():
            x = self.hidden(batch, self.embedded(batch) if embedded is None else self.named(embedded), windows)
            cap = self.spec.softcap
            return head_mean_loss(
                x,
                self.lm_head,
                batch.targets,
                cap=cap.cap,
                shift=cap.shift,
                scale=cap.scale,
                plain=self.implementations.plain_kernels,
                inputs=batch.inputs,
                mask=mask,
            )

    @torch.no_grad()
    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows, mask: Tensor | None = None) -> Tensor:
        """(T,) fp32 cross-entropy of each next token in nats, with the head in the model's dtype; `mask` as above."""
        x = self(batch, windows)
        cap = self.spec.softcap
        return head_token_losses(
            x,
            self.lm_head,
            batch.targets,
            cap=cap.cap,
            shift=cap.shift,
            scale=cap.scale,
            inputs=batch.inputs,
            mask=mask,
        )

    @torch.no_grad()
    def next_token_logits(self, batch: TokenBatch, windows: Windows, past: Past | None = None) -> Tensor:
        """(vocab_size,) fp32 softcapped logits after the last token."""
        x = self(batch, windows, past)[-1]
        cap = self.spec.softcap
        return softcap(x @ self.lm_head, cap.cap, cap.shift, cap.scale)[: self.spec.vocab_size]

    def set_prefixes(self, prefixes: Tensor) -> None:
        """Set the table of prefixes."""
        self.prefixes.copy_(prefixes)

    def restart(self) -> None:
        """No prefixes."""
        self.prefixes.fill_(-1)


class Embedded(NamedTuple):
    """What a micro-batch's tokens read from the tables, each (T, D)."""

    tokens: Tensor
    bigrams: Tensor
    values: tuple[Tensor, ...]  # by value table


class BigramModel(RecordModel[BigramSpec]):
    """The records with a hashed table of bigrams, and one rotary embedding for all layers."""

    bigram_embed: nn.Parameter  # (bigram rows, D)

    def __init__(self, spec: BigramSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations):
        super().__init__(spec, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
        self.rotary = Rotary(spec.rotary, max_tokens=max_tokens, attention_scale=spec.attention_scale, dtype=dtype)

    def reads(self, batch: TokenBatch) -> tuple[tuple[nn.Parameter, Tensor, int, int], ...]:
        """Token, bigram, then the value tables."""
        return (
            (self.embed, batch.inputs, 0, self.spec.padded_vocab_size),
            (self.bigram_embed, batch.extras[BIGRAM_ROWS], 0, self.spec.bigram_rows),
            *self.value_reads(batch.inputs),
        )

    def named(self, embedded: tuple[Tensor, ...]) -> Embedded:
        """See the base."""
        return Embedded(embedded[0], embedded[1], embedded[2:])

    def change_windows(self, old: Windows, new: Windows) -> None:
        """Apply YaRN if the long window changes."""
        if new.long != old.long:
            self.rotary.extend_window(old.long, new.long)

    def restart(self) -> None:
        """Also resets rotary tables and attention scale."""
        super().restart()
        self.rotary.reset()
