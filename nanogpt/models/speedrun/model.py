"""The speedrun's model, about record 67 of the public history. Reads top to bottom as the forward pass runs.

A GPT-2-small-scale decoder over one flat stream of documents (no batch dimension), with

- banks: all attention and MLP matrices in two tensors, so that the optimizer orthogonalizes them at once;
- attention inside documents over short and long sliding windows, in some layers over heads joined in pairs;
- QK-norm, half-truncated rotary, key shift in the long-window layers, YaRN when windows grow;
- value embeddings and hashed bigram embeddings, smeared token embeddings, per-head output gates;
- a gated skip past the attention-free layer and a subtracted "backout" of a middle layer;
- squared ReLU, softcapped logits, multi-token targets, a head tied to the embedding for the first two stages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanogpt.layers.attention import head_attention, rotated_queries_keys
from nanogpt.layers.embedding import head_gate, smear
from nanogpt.layers.norm import norm
from nanogpt.layers.past import Past
from nanogpt.layers.residual import add
from nanogpt.models.language_model import RunTimeWindows, TokenBatch, Windows
from nanogpt.models.record_model import BigramModel, Embedded
from nanogpt.models.speedrun.spec import SpeedrunModelSpec


class Speedrun(BigramModel[SpeedrunModelSpec]):
    """See the module. Shapes below are the speedrun's: L = 11 layers, D = 768, H = 6 heads of 128, V = 50,304."""

    attn: nn.Parameter
    mlp: nn.Parameter
    attn_gate_bank: nn.Parameter
    ve_gate_bank: nn.Parameter
    smear_gate: nn.Parameter
    skip_gate: nn.Parameter
    x0_lambdas: nn.Parameter
    scalars: nn.Parameter

    def hidden(
        self,
        batch: TokenBatch,
        embedded: Embedded,
        windows: Windows | RunTimeWindows,
        *,
        training: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D), which the head reads; the same in training."""
        spec, layers, d = self.spec, self.spec.layers, self.spec.width
        residual_scale, rest = self.scalars[:layers], self.scalars[layers:]
        attention_scales, rest = rest[: 2 * layers].view(layers, 2), rest[2 * layers :]
        bigram_scale, (smear_scale, backout_scale, skip_scale) = rest[:layers], rest[layers:].unbind()
        # Banks are split once: one concatenation joins their gradients again.
        qkv_weights, out_weights = (part.unbind() for part in self.attn.split((3 * d, d), dim=1))
        up_weights, down_weights = (part.unbind() for part in self.mlp.unbind(1))

        x = x0 = norm(smear(embedded.tokens, self.smear_gate, smear_scale, past))
        bigram = embedded.bigrams
        values = dict(zip(spec.value_embed_layers, embedded.values, strict=True))
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
                y = self._attention(layer, norm(x), qkv_weight, values.get(layer), batch, windows, past)
                x = add(x, y @ out_weight.mT)
            x = add(x, self.mlp_function(norm(x), up_weights[layer], down_weights[layer]))
            if layer == spec.skip.from_layer:
                skipped = x
            if layer == spec.backout_layer:
                middle = x
        return norm(x - backout_scale * middle)

    def _attention(
        self,
        layer: int,
        u: Tensor,  # (T, D), normalised
        qkv_weight: Tensor,  # (3 D, D), scaled
        value_embedding: Tensor | None,  # (T, D)
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        past: Past | None,
    ) -> Tensor:
        """The joined and gated heads, (T, D), before the output projection."""
        spec = self.spec
        count, heads, head_dim = u.shape[0], spec.heads, spec.head_dim
        q, k, v = (u @ qkv_weight.mT).view(count, 3, heads, head_dim).unbind(1)
        if value_embedding is not None:
            gate = 2 * head_gate(u, self.ve_gate_bank[self.value_table[layer]])
            v = v + gate * value_embedding.view(count, heads, head_dim)

        paired, shifted = layer in spec.paired_layers, layer in spec.long_window_layers
        q, k = rotated_queries_keys(q, k, self.rotary, paired=paired, shifted=shifted, layer=layer, past=past)
        y = head_attention(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            window=self.window(layer, windows),
            scale=self.rotary.run_time_scale,
            paired=paired,
            backend=self.implementations.attention,
            layer=layer,
            past=past,
        )
        y = y * head_gate(u, self.attn_gate_bank[self.attention_row[layer]])
        return y.reshape(count, spec.width)
