"""What the models of the public record history share: their head with its losses, rotary tables, layer sets."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.cross_entropy import head_loss, head_mean_loss, head_token_losses, softcap
from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_plain
from nanogpt.layers.embedding import bigram_hash
from nanogpt.layers.rotary import Rotary
from nanogpt.models.language_model import Implementations, LanguageModel, LookUp, RunTimeWindows, TokenBatch, Windows
from nanogpt.spec_model import RecordModelSpec

Spec = TypeVar("Spec", bound=RecordModelSpec)


class Embedded(NamedTuple):
    """What a micro-batch's tokens read of the tables, each (T, D)."""

    tokens: Tensor
    bigrams: Tensor
    values: tuple[Tensor, ...]  # by value table


def _named(embedded: tuple[Tensor, ...]) -> Embedded:
    """What is read, in the order of `look_ups`."""
    return Embedded(embedded[0], embedded[1], embedded[2:])


class RecordModel(LanguageModel, Generic[Spec]):
    """Base of the record models; `hidden` gives the head's input. The parameters are made by the models themselves."""

    lm_head: nn.Parameter  # (D, V)
    embed: nn.Parameter  # (V, D)
    bigram_embed: nn.Parameter  # (bigram rows, D)
    value_embed: nn.Parameter  # (tables V, D): tables one after another
    prefixes: Tensor  # (V,) int64

    def __init__(self, spec: Spec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations):
        super().__init__()
        self.spec = spec
        self.implementations = implementations
        self.rotary = Rotary(spec.rotary, max_tokens=max_tokens, attention_scale=spec.attention_scale, dtype=dtype)
        self.register_buffer("prefixes", torch.full((spec.padded_vocab_size,), -1, dtype=torch.int64), persistent=False)
        self.mlp_function = relu_squared_mlp_plain if implementations.plain_kernels else relu_squared_mlp
        self.attention_row = {layer: row for row, layer in enumerate(spec.attention_layers)}
        self.value_table = {layer: table for table, layer in enumerate(spec.value_embed_layers)}

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, windows: Windows | RunTimeWindows) -> Tensor:
        """tokens (T,) int32, cu_seqlens (n,) int32; the last layer's normalised activations, (T, D)."""
        return self.hidden(tokens, self.embedded(tokens), cu_seqlens, max_seqlen, windows)

    def hidden(
        self,
        tokens: Tensor,  # (T,) int32
        embedded: Embedded,
        cu_seqlens: Tensor,  # (n,) int32
        max_seqlen: int,
        windows: Windows | RunTimeWindows,
        *,
        training: bool = False,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D). `training`: as the training loss is computed."""
        raise NotImplementedError

    def embedded(self, tokens: Tensor) -> Embedded:
        """The tables' rows of tokens (T,)."""
        reads = self._reads(tokens)
        return _named(tuple(F.embedding(rows, full[first : first + count]) for full, rows, first, count in reads))

    def look_ups(self, tokens: Tensor) -> tuple[LookUp, ...]:
        """Token, bigram, then the value tables."""
        return tuple(LookUp(*read) for read in self._reads(tokens))

    def _reads(self, tokens: Tensor) -> tuple[tuple[nn.Parameter, Tensor, int, int], ...]:
        """A `LookUp` for each table, as a plain tuple, which compiled code can make."""
        spec, vocab = self.spec, self.spec.padded_vocab_size
        bigrams = bigram_hash(tokens, spec.bigram_rows, spec.bigram_multipliers)
        return (
            (self.embed, tokens, 0, vocab),
            (self.bigram_embed, bigrams, 0, spec.bigram_rows),
            *((self.value_embed, tokens, first, vocab) for first in range(0, self.value_embed.shape[0], vocab)),
        )

    def window(self, layer: int, windows: Windows | RunTimeWindows) -> int | Tensor:
        """The layer's window in tokens."""
        return windows.long if layer in self.spec.long_window_layers else windows.short

    def training_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        token_weights: Tensor,
        prefix_weight: Tensor | None = None,
        embedded: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Weighted multi-token cross-entropy, summed over the micro-batch's tokens."""
        read = self.embedded(batch.inputs) if embedded is None else _named(embedded)
        x = self.hidden(batch.inputs, read, batch.cu_seqlens, batch.max_seqlen, windows, training=True)
        cap = self.spec.softcap
        return head_loss(
            x,
            self.lm_head,
            batch.targets,
            token_weights,
            prefixes=None if prefix_weight is None else self.prefixes[batch.targets],
            prefix_weight=prefix_weight,
            cap=cap.cap,
            shift=cap.shift,
            scale=cap.scale,
            precision=self.implementations.head_precision,
            plain=self.implementations.plain_kernels,
        )

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """The training loss is a sum over tokens."""
        return float(batch.inputs.shape[0])

    @torch.no_grad()
    def evaluation_loss(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """Mean cross-entropy of the next token, with the head in the model's dtype."""
        x = self(batch.inputs, batch.cu_seqlens, batch.max_seqlen, windows)
        cap = self.spec.softcap
        return head_mean_loss(
            x,
            self.lm_head,
            batch.targets,
            cap=cap.cap,
            shift=cap.shift,
            scale=cap.scale,
            plain=self.implementations.plain_kernels,
        )

    @torch.no_grad()
    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """(T,) fp32 cross-entropy of each next token in nats, with the head in the model's dtype."""
        x = self(batch.inputs, batch.cu_seqlens, batch.max_seqlen, windows)
        cap = self.spec.softcap
        return head_token_losses(x, self.lm_head, batch.targets, cap=cap.cap, shift=cap.shift, scale=cap.scale)

    @torch.no_grad()
    def next_token_logits(self, batch: TokenBatch, windows: Windows) -> Tensor:
        """(vocab_size,) fp32 softcapped logits after the last token."""
        x = self(batch.inputs, batch.cu_seqlens, batch.max_seqlen, windows)[-1]
        cap = self.spec.softcap
        return softcap(x @ self.lm_head, cap.cap, cap.shift, cap.scale)[: self.spec.vocab_size]

    def set_prefixes(self, prefixes: Tensor) -> None:
        """Take over the table of prefixes."""
        self.prefixes.copy_(prefixes)

    def extend_window(self, old: int, new: int) -> None:
        """YaRN."""
        self.rotary.extend_window(old, new)

    def restart(self) -> None:
        """Rotary tables and attention scale of the start, and no prefixes."""
        self.rotary.reset()
        self.prefixes.fill_(-1)
