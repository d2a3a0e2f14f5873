"""The classic GPT-2 124M (Radford et al., 2019), as a baseline with a well-known curve.

Pre-LayerNorm blocks with biases, learned positions, GELU, one matrix for embedding and head. It reads the same flat
stream of documents as the speedrun: positions start at 0 in every document, and a document longer than the learned
positions is read in pieces of that length, which do not see each other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanogpt.errors import InputError
from nanogpt.kernels.attention import attention
from nanogpt.layers.past import Past
from nanogpt.models.gpt2.spec import Gpt2ModelSpec
from nanogpt.models.language_model import (
    Implementations,
    LanguageModel,
    RunTimeWindows,
    SchedulePoint,
    TokenBatch,
    Transformers,
    Windows,
)

LOSS_CHUNK = 8192  # tokens whose logits exist at one time
TRANSFORMERS_NAMES = {
    "embed": "wte",
    "positions": "wpe",
    "qkv": "attn.c_attn",
    "attn_out": "attn.c_proj",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
}


class Gpt2(LanguageModel):
    """See the module."""

    embed: Any  # modules that hold the table's parameters
    positions: Any
    blocks: Any
    ln_f: Any

    def __init__(self, spec: Gpt2ModelSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations):
        super().__init__(spec, dtype=dtype)
        self.spec = spec
        self.implementations = implementations

    def forward(self, batch: TokenBatch, windows: Windows | RunTimeWindows, past: Past | None = None) -> Tensor:
        """The final LayerNorm's output (T, D); with `past`, of tokens that follow those already seen."""
        position, pieces = split_documents(batch.cu_seqlens, batch.inputs.shape[0], self.spec.context)
        if past is not None and past.length:
            position = position + past.length - past.start
        x = F.embedding(batch.inputs, self.embed.weight) + F.embedding(position, self.positions.weight)
        for layer, block in enumerate(self.blocks.children()):
            y = self._attention(layer, block, layer_norm(block.ln_1, x), pieces, windows.long, past)
            x = x + linear(block.attn_out, y)
            hidden = F.gelu(linear(block.mlp_up, layer_norm(block.ln_2, x)), approximate="tanh")
            x = x + linear(block.mlp_down, hidden)
        if past is not None:
            past.advance(x.shape[0])
        return layer_norm(self.ln_f, x)

    def _attention(
        self, layer: int, block: Any, u: Tensor, pieces: Tensor, window: int | Tensor, past: Past | None
    ) -> Tensor:
        """The joined heads, (T, D), of u (T, D); pieces (n,) int32, the bounds of the documents' pieces."""
        (count, d), heads = u.shape, self.spec.heads
        q, k, v = linear(block.qkv, u).view(count, 3, heads, d // heads).unbind(1)
        scale = 1 / math.sqrt(d // heads)
        y = None if past is None else past.attention(layer, q, k, v, window=window, scale=scale)
        if y is None:
            y = attention(
                q,
                k,
                v,
                pieces,
                max_seqlen=min(self.spec.context, count),
                window=window,
                scale=scale,
                backend=self.implementations.attention,
            )
        return y.reshape(count, d)

    def _mean_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = [checkpoint(self._loss, *chunk, "sum", use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / targets.shape[0]

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of a chunk, at least in fp32."""
        logits = x @ self.embed.weight.mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction=reduction)

    def loss_inputs(self, point: SchedulePoint, device: torch.device) -> RunTimeWindows:
        """The windows: the next token's weight is 1."""
        return point.windows.at_run_time()

    def training_loss(
        self, batch: TokenBatch, inputs: RunTimeWindows, embedded: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Mean cross-entropy of the next token."""
        return self._mean_loss(self(batch, inputs), batch.targets)

    def training_loss_scale(self, batch: TokenBatch) -> float:
        """The training loss is already a mean."""
        return 1.0

    def evaluation_loss(
        self,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        embedded: tuple[Tensor, ...] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token."""
        with torch.no_grad():
            return self._mean_loss(self(batch, windows), batch.targets)

    @torch.no_grad()
    def token_losses(self, batch: TokenBatch, windows: Windows | RunTimeWindows) -> Tensor:
        """(T,) fp32 cross-entropy of each next token in nats."""
        x = self(batch, windows)
        chunks = zip(x.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
        return torch.cat([self._loss(*chunk, "none") for chunk in chunks])

    @torch.no_grad()
    def next_token_logits(self, batch: TokenBatch, windows: Windows, past: Past | None = None) -> Tensor:
        """(vocab_size,) fp32 logits after the last token."""
        x = self(batch, windows, past)[-1]
        return (x @ self.embed.weight.mT).float()[: self.spec.vocab_size]

    def as_transformers(self, windows: Windows) -> Transformers:
        """GPT2LMHeadModel, whose matrices are stored (in, out); head and embedding are one."""
        spec = self.spec
        if windows.long < spec.context - 1:
            raise InputError(
                f"the model sees {windows.long} tokens back, its context is {spec.context}: transformers' GPT-2 has no"
                " sliding window; a run that ends with final_window_blocks of the context's length can be exported"
            )
        state: dict[str, Tensor] = self.state_dict()
        tensors = {}
        for name, value in state.items():
            folders, _, kind = name.rpartition(".")
            *block, part = folders.rsplit(".", 1)
            place = ".".join([*block, TRANSFORMERS_NAMES.get(part, part)]).replace("blocks.", "h.")
            transposed = kind == "weight" and part in ("qkv", "attn_out", "mlp_up", "mlp_down")
            tensors[f"transformer.{place}.{kind}"] = value.mT if transposed else value
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": spec.padded_vocab_size,
            "n_positions": spec.context,
            "n_embd": spec.width,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.mlp_expansion * spec.width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            "tie_word_embeddings": True,
        }
        return Transformers(config, tensors)


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


def linear(part: Any, x: Tensor) -> Tensor:
    """x (T, in) times the part's weight, plus its bias: (T, out)."""
    return F.linear(x, part.weight, part.bias)


def layer_norm(part: Any, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, with the part's gain and bias."""
    return F.layer_norm(x, x.shape[-1:], part.weight, part.bias)
