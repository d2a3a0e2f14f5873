"""The speedrun's model, about record 67 of the public history. Reads top to bottom as the forward pass runs.

A GPT-2-small-scale decoder over one flat stream of documents (no batch dimension), with

- banks: all attention and MLP matrices in two tensors, so that the optimizer orthogonalizes them in one go;
- attention inside documents over short and long sliding windows, in some layers over heads joined in pairs;
- QK-norm, half-truncated rotary, key shift in the long-window layers, YaRN when windows grow;
- value embeddings and hashed bigram embeddings, smeared token embeddings, per-head output gates;
- a gated skip past the attention-free layer and a subtracted "backout" of a middle layer;
- squared ReLU, softcapped logits, multi-token targets, a head tied to the embedding for the first two stages.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.attention import attention, takes_tensors
from nanogpt.kernels.cross_entropy import head_loss, head_mean_loss, softcap
from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_plain
from nanogpt.layers.embedding import bigram_hash, head_gate, smear
from nanogpt.layers.norm import norm
from nanogpt.layers.rotary import Rotary, shift_still_keys
from nanogpt.models.interface import LanguageModel, Paths, RunTimeWindows, TokenBatch, Windows
from nanogpt.spec_model import SpeedrunModelSpec


class Speedrun(LanguageModel):
    """See the module. Shapes below are the speedrun's: L = 11 layers, D = 768, H = 6 heads of 128, V = 50,304."""

    def __init__(self, spec: SpeedrunModelSpec, *, dtype: torch.dtype, max_tokens: int, paths: Paths):
        super().__init__()
        self.spec = spec
        self.paths = paths
        d, v, layers = spec.width, spec.padded_vocab_size, spec.layers
        gates, tables = spec.gate_inputs, len(spec.value_embed_layers)
        attention_layers = spec.attention_layers

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        # Row r of `attn` belongs to the r-th layer that has attention: q, k, v, o, each (D, D) stored (out, in).
        self.attn = matrix(len(attention_layers), 4 * d, d)
        self.mlp = matrix(layers + spec.mlp_bank_padding, 2, spec.mlp_expansion * d, d)  # [:, 0] up, [:, 1] down
        self.lm_head = matrix(d, v)
        self.embed = matrix(v, d)
        self.value_embed = matrix(tables * v, d)
        self.bigram_embed = matrix(spec.bigram_rows, d)
        self.attn_gate_bank = matrix(len(attention_layers), spec.heads, gates)
        self.ve_gate_bank = matrix(tables, spec.heads, gates)
        self.smear_gate = matrix(1, gates)
        self.skip_gate = matrix(1, gates)
        self.x0_lambdas = nn.Parameter(torch.empty(layers))
        self.scalars = nn.Parameter(torch.empty(4 * layers + 3))

        self.rotary = Rotary(spec.rotary, max_tokens=max_tokens, attention_scale=spec.attention_scale, dtype=dtype)
        self.mlp_function = relu_squared_mlp_plain if paths.plain_kernels else relu_squared_mlp
        self.attention_row = {layer: row for row, layer in enumerate(attention_layers)}
        self.value_table = {layer: table for table, layer in enumerate(spec.value_embed_layers)}

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Matrices uniform in +-bound, the head normal, everything else zeros or the given scalars."""
        spec, layers = self.spec, self.spec.layers
        for parameter in self.parameters():
            parameter.zero_()
        bound = math.sqrt(3) * spec.init_bound / math.sqrt(spec.width)
        for target in (self.attn, self.mlp[:, 0]):
            target.copy_(torch.empty(target.shape).uniform_(-bound, bound, generator=generator))
        self.lm_head.copy_(torch.empty(self.lm_head.shape).normal_(std=spec.head_init_std, generator=generator))
        self.embed.copy_(self.lm_head.mT)
        start = spec.scalars
        self.scalars.copy_(
            torch.tensor(
                [start.residual] * layers
                + [start.attention_in, start.attention_out] * layers
                + [start.bigram] * layers
                + [start.smear, start.backout, start.skip]
            )
        )

    def forward(
        self,
        tokens: Tensor,  # (T,) int32
        cu_seqlens: Tensor,  # (n,) int32
        max_seqlen: int,
        windows: Windows | RunTimeWindows,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D), which the head reads."""
        spec, layers, d = self.spec, self.spec.layers, self.spec.width
        residual_scale, rest = self.scalars[:layers], self.scalars[layers:]
        attention_scales, rest = rest[: 2 * layers].view(layers, 2), rest[2 * layers :]
        bigram_scale, (smear_scale, backout_scale, skip_scale) = rest[:layers], rest[layers:].unbind()
        # Banks are taken apart once: one concatenation puts their gradients together again.
        qkv_weights, out_weights = (part.unbind() for part in self.attn.split((3 * d, d), dim=1))
        up_weights, down_weights = (part.unbind() for part in self.mlp.unbind(1))

        x = x0 = norm(smear(F.embedding(tokens, self.embed), self.smear_gate, smear_scale))
        bigram = F.embedding(bigram_hash(tokens, spec.bigram_rows, spec.bigram_multipliers), self.bigram_embed)
        values = self._value_embeddings(tokens)
        skipped = middle = x  # both are set before they are read

        for layer in range(layers):
            if layer == spec.skip.to_layer:
                gate = 2 * torch.sigmoid(x0[:, : spec.gate_inputs] @ self.skip_gate.mT)
                x = x + torch.sigmoid(skip_scale) * gate * skipped
            if layer == 0:  # x is x0 here
                x = (residual_scale[0] + self.x0_lambdas[0]) * x + bigram_scale[0] * bigram
            else:
                x = residual_scale[layer] * x + self.x0_lambdas[layer] * x0 + bigram_scale[layer] * bigram
            if layer in self.attention_row:
                row = self.attention_row[layer]
                qkv_weight = attention_scales[layer, 0] * qkv_weights[row]
                out_weight = attention_scales[layer, 1] * out_weights[row]
                y = self._attention(layer, norm(x), qkv_weight, values.get(layer), cu_seqlens, max_seqlen, windows)
                x = x + y @ out_weight.mT
            x = x + self.mlp_function(norm(x), up_weights[layer], down_weights[layer])
            if layer == spec.skip.from_layer:
                skipped = x
            if layer == spec.backout_layer:
                middle = x
        return norm(x - backout_scale * middle)

    def _value_embeddings(self, tokens: Tensor) -> dict[int, Tensor]:
        """(T, D) for each layer that has a value embedding, from one lookup so that there is one gradient to make."""
        tables = len(self.spec.value_embed_layers)
        if not tables:
            return {}
        offsets = torch.arange(tables, device=tokens.device, dtype=torch.int64) * self.spec.padded_vocab_size
        looked_up = F.embedding(offsets[:, None] + tokens, self.value_embed)
        return dict(zip(self.spec.value_embed_layers, looked_up.unbind(), strict=True))

    def _attention(
        self,
        layer: int,
        u: Tensor,  # (T, D), normalised
        qkv_weight: Tensor,  # (3 D, D), scaled
        value_embedding: Tensor | None,  # (T, D)
        cu_seqlens: Tensor,
        max_seqlen: int,
        windows: Windows | RunTimeWindows,
    ) -> Tensor:
        """The joined and gated heads, (T, D), before the output projection."""
        spec = self.spec
        count, heads, head_dim = u.shape[0], spec.heads, spec.head_dim
        q, k, v = (u @ qkv_weight.mT).view(count, 3, heads, head_dim).unbind(1)
        q, k = norm(q), norm(k)

        if value_embedding is not None:
            gate = 2 * head_gate(u, self.ve_gate_bank[self.value_table[layer]])
            v = v + gate * value_embedding.view(count, heads, head_dim)

        paired = layer in spec.paired_layers
        q, k = self.rotary(q, paired=paired), self.rotary(k, paired=paired)
        if paired:
            # Row 2t holds the first half of token t's heads, row 2t + 1 the second half: a sequence twice as long.
            # The window keeps its number and so reaches half as many tokens.
            q, k, v = (x.reshape(2 * count, heads // 2, head_dim) for x in (q, k, v))
            cu_seqlens, max_seqlen = 2 * cu_seqlens, 2 * max_seqlen
        elif layer in spec.long_window_layers:
            k = shift_still_keys(k, spec.rotated_channels)

        y = attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen=max_seqlen,
            window=windows.long if layer in spec.long_window_layers else windows.short,
            scale=self.attention_scale(),
            backend=self.paths.attention,
        ).view(count, heads, head_dim)
        y = y * head_gate(u, self.attn_gate_bank[self.attention_row[layer]])
        return y.reshape(count, spec.width)

    def attention_scale(self) -> float | Tensor:
        """YaRN's, as a tensor where the backend takes one, so that a step of YaRN needs no graph of its own."""
        return self.rotary.run_time_scale if takes_tensors(self.paths.attention) else self.rotary.attention_scale

    def training_loss(self, batch: TokenBatch, windows: Windows | RunTimeWindows, token_weights: Tensor) -> Tensor:
        """Weighted multi-token cross-entropy, summed over the micro-batch's tokens."""
        x = self(batch.inputs, batch.cu_seqlens, batch.max_seqlen, windows)
        cap = self.spec.softcap
        return head_loss(
            x,
            self.lm_head,
            batch.targets,
            token_weights,
            cap=cap.cap,
            shift=cap.shift,
            scale=cap.scale,
            precision=self.paths.head_precision,
            plain=self.paths.plain_kernels,
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
            plain=self.paths.plain_kernels,
        )

    @torch.no_grad()
    def next_token_logits(self, batch: TokenBatch, windows: Windows) -> Tensor:
        """(vocab_size,) fp32 softcapped logits after the last token."""
        x = self(batch.inputs, batch.cu_seqlens, batch.max_seqlen, windows)[-1]
        cap = self.spec.softcap
        return softcap(x @ self.lm_head, cap.cap, cap.shift, cap.scale)[: self.spec.vocab_size]

    def extend_window(self, old: int, new: int) -> None:
        """YaRN."""
        self.rotary.extend_window(old, new)

    def reset_windows(self) -> None:
        """Rotary tables and attention scale of the start."""
        self.rotary.reset()
