"""The classic GPT-2 124M (Radford et al., 2019), as a baseline with a well-known curve.

Pre-LayerNorm blocks with biases, learned positions, GELU, one matrix for embedding and head. It reads the same flat
stream of documents as the speedrun: positions start at 0 in every document, and a document longer than the learned
positions is read in pieces of that length, each blind to the one before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt.kernels.attention import attention
from nanogpt.models.language_model import Implementations, LanguageModel, RunTimeWindows, TokenBatch, Windows
from nanogpt.spec_model import Gpt2ModelSpec

LOSS_CHUNK = 8192  # tokens whose logits exist at a time


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual."""

    def __init__(self, spec: Gpt2ModelSpec, implementations: Implementations, dtype: torch.dtype):
        super().__init__()
        d = spec.width
        self.spec = spec
        self.implementations = implementations
        self.ln_1 = nn.LayerNorm(d, dtype=dtype)
        self.qkv = nn.Linear(d, 3 * d, dtype=dtype)
        self.attn_out = nn.Linear(d, d, dtype=dtype)
        self.ln_2 = nn.LayerNorm(d, dtype=dtype)
        self.mlp_up = nn.Linear(d, spec.mlp_expansion * d, dtype=dtype)
        self.mlp_down = nn.Linear(spec.mlp_expansion * d, d, dtype=dtype)

    def forward(self, x: Tensor, pieces: Tensor, window: int) -> Tensor:
        """x (T, D); pieces (n,) int32, the bounds of the documents' pieces; returns (T, D)."""
        count, d = x.shape
        heads = self.spec.heads
        q, k, v = self.qkv(self.ln_1(x)).view(count, 3, heads, d // heads).unbind(1)
        y = attention(
            q,
            k,
            v,
            pieces,
            max_seqlen=min(self.spec.context, count),
            window=window,
            scale=1 / math.sqrt(d // heads),
            backend=self.implementations.attention,
        )
        x = x + self.attn_out(y.reshape(count, d))
        return x + self.mlp_down(F.gelu(self.mlp_up(self.ln_2(x)), approximate="tanh"))


class Gpt2(LanguageModel):
    """See the module."""

    def __init__(self, spec: Gpt2ModelSpec, *, dtype: torch.dtype, implementations: Implementations):
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.padded_vocab_size, spec.width, dtype=dtype)
        self.positions = nn.Embedding(spec.context, spec.width, dtype=dtype)
        self.blocks = nn.ModuleList(Block(spec, implementations, dtype) for _ in range(spec.layers))
        self.ln_f = nn.LayerNorm(spec.width, dtype=dtype)

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Normal with init_std; matrices that write into the residual divided by sqrt(2 layers); biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # LayerNorm's gain, and every bias
                continue
            std = self.spec.init_std
            if name.endswith(("attn_out.weight", "mlp_down.weight")):
                std /= math.sqrt(2 * self.spec.layers)
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, windows: Windows | RunTimeWindows) -> Tensor:
        """tokens (T,) int32, cu_seqlens (n,) int32; returns the final LayerNorm's output (T, D)."""
        position, pieces = split_documents(cu_seqlens, tokens.shape[0], self.spec.context)
        x = self.embed(tokens) + self.positions(position)
        for block in self.blocks:
            x = block(x, pieces, windows.long)
        return self.ln_f(x)

    def _mean_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = [checkpoint(self._loss, *chunk, "sum", use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / targets.shape[0]

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of a chunk, at least in fp32."""
        logits = x @ self.embed.weight.mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction=reduction)

    def training_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        token_weights: Tensor,
        prefix_weight: Tensor | None = None,
        embedded: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token; `token_weights` is [1] and there are no prefixes for this model."""
        return token_weights[0] * self._mean_loss(self(batch.inputs, batch.cu_seqlens, windows), batch.targets)

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """The training loss is a mean already."""
        return 1.0

    @torch.no_grad()
    def evaluation_loss(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """Mean cross-entropy of the next token."""
        return self._mean_loss(self(batch.inputs, batch.cu_seqlens, windows), batch.targets)

    @torch.no_grad()
    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """(T,) fp32 cross-entropy of each next token in nats."""
        x = self(batch.inputs, batch.cu_seqlens, windows)
        chunks = zip(x.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
        return torch.cat([self._loss(*chunk, "none") for chunk in chunks])

    @torch.no_grad()
    def next_token_logits(self, batch: TokenBatch, windows: Windows) -> Tensor:
        """(vocab_size,) fp32 logits after the last token."""
        x = self(batch.inputs, batch.cu_seqlens, windows)[-1]
        return (x @ self.embed.weight.mT).float()[: self.spec.vocab_size]


def split_documents(cu_seqlens: Tensor, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """Cut documents into pieces of at most `context` tokens, with shapes that do not depend on the data.

    Returns the position of each token in its piece, (tokens,) int64, and the pieces' bounds like `cu_seqlens`:
    int32, (len(cu_seqlens) + tokens // context,), padded with `tokens`.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True) - 1
    position = (index - cu_seqlens[document]) % context
    piece = (position == 0).cumsum(0) - 1
    bounds = torch.full((cu_seqlens.shape[0] + tokens // context,), tokens, dtype=torch.int32, device=cu_seqlens.device)
    return position, bounds.scatter_reduce(0, piece, index.to(torch.int32), "amin")
