"""The model of public record 89 (July 2026). Reads top to bottom as the forward pass runs.

The speedrun's model (see `nanogpt.models.speedrun.model`) with

- q and k banked in pairs of heads, which the optimizer orthogonalizes; v and o whole;
- token-dependent connections (MUDD): small nets weigh earlier activations into the last layer, into its values and
  into the head's input, where they also replace the backout;
- token-dependent gates by nets of the same kind, from x0 for the first layers and from the residual for the rest;
- attention without the token's own value (XSA) in some layers; the last mixes heads in a short window;
- x0 and bigrams added after attention, bigrams told apart by sign vectors;
- one saved activation that feeds the attention of all later layers;
- MLPs whose products can run in 8-bit floats.

Two quirks of the public code, which affect a token or two per micro-batch, are left out: at token 1 its bigram hash
reads a constant instead of token 0, and the gradient keeps the softmax of multi-token targets beyond the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanogpt.kernels.head_mixing import mix_heads, normalized_weights
from nanogpt.layers.attention import head_attention, mix_new_heads, remove_own_value, rotated_queries_keys
from nanogpt.layers.dense_connections import for_every_token, token_numbers, weighted_sum
from nanogpt.layers.embedding import bigram_sign, smear, value_gate
from nanogpt.layers.fp8_mlp import Fp8Mlp
from nanogpt.layers.norm import norm
from nanogpt.layers.past import Past
from nanogpt.models.language_model import Implementations, RunTimeWindows, TokenBatch, Windows
from nanogpt.models.record89.spec import Record89ModelSpec
from nanogpt.models.record_model import BigramModel, Embedded

Gates = dict[tuple[str, int], Tensor]  # (what it is for, layer) -> (T, heads) or (T, 1)


class Record89(BigramModel[Record89ModelSpec]):
    """See the module. Shapes below are the record's: L = 11 layers, D = 768, H = 6 heads of 128, V = 50,304."""

    qk: nn.Parameter
    vo: nn.Parameter
    mlp: nn.Parameter
    ve_gate_bank: nn.Parameter
    smear_gate: nn.Parameter
    post_lambdas: nn.Parameter
    resid_lambdas: nn.Parameter
    mudd_w1: nn.Parameter
    mudd_w2: nn.Parameter
    mudd_b2: nn.Parameter
    mudd_gate_w1: nn.Parameter
    mudd_gate_w2: nn.Parameter
    mudd_gate_b2: nn.Parameter
    mudd_gate_scale: nn.Parameter
    scalars: nn.Parameter
    bigram_signs: Tensor  # (8192, D), +1 and -1

    def __init__(
        self, spec: Record89ModelSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations
    ):
        super().__init__(spec, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
        self.register_buffer("bigram_signs", torch.empty(spec.bigram_signs, spec.width, dtype=dtype))
        self.fp8_mlp = Fp8Mlp(
            spec.mlp_fp8,
            layers=spec.layers,
            hidden=spec.mlp_expansion * spec.width,
            width=spec.width,
            active=implementations.mlp_precision == "fp8",
            plain=implementations.plain_kernels,
        )
        self.register_load_state_dict_post_hook(lambda model, _: model.fp8_mlp.reload(model.mlp))

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Also the bigrams' signs, and the MLPs' 8-bit copies."""
        super().draw_parameters(generator)
        signs = torch.empty(self.bigram_signs.shape, dtype=torch.int8).random_(0, 2, generator=generator)
        self.bigram_signs.copy_(2 * signs - 1)
        self.fp8_mlp.restart(self.mlp)

    def _attention_banks(self) -> tuple[Tensor, Tensor]:
        """`qk` and `vo` by layer and without padding: (layers with attention, 2 D, D) each, q over k and v over o."""
        d, count = self.spec.width, len(self.spec.attention_layers)
        return self.qk[: self.spec.heads * count].view(count, 2 * d, d), self.vo[: 2 * count].view(count, 2 * d, d)

    def _gates(self, x: Tensor, *, late: bool) -> Gates:
        """The gates that a net computes from x (T, D)."""
        columns = self.spec.gate_columns(late=late)
        count = sum(column.width for column in columns)
        w1, w2, bias = self.mudd_gate_w1[int(late)], self.mudd_gate_w2[int(late)], self.mudd_gate_b2[int(late)]
        numbers = token_numbers(x, w1, w2[:count], bias[:count], self.mudd_gate_scale.to(x.dtype))
        parts = numbers.split([column.width for column in columns], dim=1)
        return {(column.name, column.layer): part for column, part in zip(columns, parts, strict=True)}

    def _connections(self, x: Tensor, *, after_last: bool) -> dict[str, Tensor]:
        """The weights that a MUDD net computes from x (T, D): (T, 1) by name."""
        columns, net = self.spec.connection_columns(after_last=after_last), int(after_last)
        count = sum(column.width for column in columns)
        w1, w2, bias = self.mudd_w1[net], self.mudd_w2[net], self.mudd_b2[net]
        numbers = token_numbers(x, w1, w2[:count], bias[:count], self.spec.mudd.scale)
        parts = numbers.split([column.width for column in columns], dim=1)
        return {column.name: part for column, part in zip(columns, parts, strict=True)}

    def hidden(
        self,
        batch: TokenBatch,
        embedded: Embedded,
        windows: Windows | RunTimeWindows,
        *,
        training: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D); in training the MLPs have their own precision."""
        spec, last, tokens = self.spec, self.spec.last, batch.inputs
        fp8 = training and self.fp8_mlp.active
        *attention_scales, smear_scale, skip_scale = self.scalars.unbind()
        resid, post = (
            for_every_token(lambdas, len(tokens), self.embed.dtype)
            for lambdas in (self.resid_lambdas, self.post_lambdas)
        )
        # Banks are split once: one concatenation joins their gradients again.
        weights = self._attention_weights(attention_scales)
        mlp_weights = [part.unbind() for part in self.mlp.unbind(1)]

        x0 = norm(smear(embedded.tokens, self.smear_gate, smear_scale, past))
        bigram = embedded.bigrams * bigram_sign(tokens, self.bigram_signs, past)
        values = dict(zip(spec.value_embed_layers, embedded.values, strict=True))
        gates = self._gates(x0, late=False)
        x = start = x0 + gates["bigram", 0] * bigram
        attended = x  # by the layers after `saved_layer`, which sets it

        for layer in range(last):
            if layer == spec.skip.from_layer + 1:
                skipped = x
                gates |= self._gates(x, late=True)
            if layer == spec.skip.to_layer:
                x = x + torch.sigmoid(skip_scale) * gates["skip", layer] * skipped
            else:
                u = norm(x) if layer <= spec.saved_layer else attended
                y = self._attention(layer, u, weights, values.get(layer), gates, batch, windows, past=past)
                x = weighted_sum((resid[layer][0], post[layer][0], gates["x0", layer]), (x, y, x0))
                if layer > 0:  # already in `start`
                    x = x + gates["bigram", layer] * bigram
            x = weighted_sum((resid[layer][1], post[layer][1]), (x, self._mlp(layer, norm(x), mlp_weights, fp8=fp8)))
            if layer == spec.saved_layer:
                saved = x
                attended = norm(x)

        before = x
        w = self._connections(x, after_last=False)
        value_add = weighted_sum(
            (w["value from start"], w["value from saved"], w["value from before"]), (start, saved, x)
        )
        x = weighted_sum((1 + w["input from before"], w["input from start"], w["input from saved"]), (x, start, saved))
        y = self._attention(
            last,
            attended,
            weights,
            values[last],
            gates,
            batch,
            windows,
            value_gates=w["value gate"],
            value_add=value_add,
            past=past,
        )
        x = weighted_sum(
            (
                w["attention residual"],
                w["attention post"],
                w["attention from start"],
                w["attention from bigram"],
            ),
            (x, y, start, bigram),
        )
        y = self._mlp(last, norm(x), mlp_weights, fp8=fp8)
        x = weighted_sum((w["mlp residual"], w["mlp post"]), (x, y))

        w = self._connections(x, after_last=True)
        sources = {"start": start, "saved": saved, "before": before, "values": embedded.values[0], "skipped": skipped}
        x = x + weighted_sum(tuple(w[f"from {name}"] for name in sources), tuple(sources.values()))
        return norm(x)

    def _mlp(self, layer: int, u: Tensor, weights: list[tuple[Tensor, ...]], *, fp8: bool) -> Tensor:
        """What the layer's MLP adds, (T, D). weights: up and down of each layer."""
        up, down = (part[layer] for part in weights)
        return self.fp8_mlp(layer, u, up, down) if fp8 else self.mlp_function(u, up, down)

    def _attention_weights(self, scales: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(3 D, D) for q, k, v, and (D, D) for o, of each layer with attention, times its scalars in `scales`.

        All layers at once: separately this takes twenty small kernels, and eighty for the gradients.
        """
        qk, vo = self._attention_banks()
        v, o = vo.chunk(2, dim=1)
        scale_in, scale_out = (
            torch.stack([scales[2 * layer + place] for layer in self.spec.attention_layers])[:, None, None]
            for place in (0, 1)
        )
        qkv = torch.cat((qk, v), dim=1)
        return (scale_in * qkv).to(qkv.dtype).unbind(), (scale_out * o).to(o.dtype).unbind()

    def _attention(
        self,
        layer: int,
        u: Tensor,  # (T, D), normalised
        weights: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],  # of `_attention_weights`
        value_embedding: Tensor | None,  # (T, D)
        gates: Gates,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        *,
        value_gates: Tensor | None = None,  # (T, 2), for the first and the second half of the heads; last layer only
        value_add: Tensor | None = None,  # (T, D), last layer only
        past: Past | None = None,
    ) -> Tensor:
        """What the layer's attention adds, (T, D)."""
        spec = self.spec
        count, heads, head_dim = u.shape[0], spec.heads, spec.head_dim
        qkv_weight, out_weight = (part[self.attention_row[layer]] for part in weights)
        q, k, v = (u @ qkv_weight.mT).view(count, 3, heads, head_dim).unbind(1)
        if value_embedding is not None:
            if value_gates is None:
                gate = 2 * value_gate(u, value_embedding, self.ve_gate_bank[self.value_table[layer]])
            else:
                gate = value_gates.repeat_interleave(heads // 2, dim=1).unsqueeze(-1)
            v = v + gate * value_embedding.view(count, heads, head_dim)
        if value_add is not None:
            v = v + value_add.view(count, heads, head_dim)

        paired, shifted = layer in spec.paired_layers, layer in spec.long_window_layers
        scale = self.rotary.run_time_scale
        q, k = rotated_queries_keys(q, k, self.rotary, paired=paired, shifted=shifted, layer=layer, past=past)
        y = head_attention(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            window=self.window(layer, windows),
            scale=scale,
            paired=paired,
            backend=self.implementations.attention,
            layer=layer,
            past=past,
        )
        if layer == spec.last:
            w1, w2 = normalized_weights(gates["dc_scores", layer]), gates["dc_output", layer]
            window, plain = spec.dc_window, self.implementations.plain_kernels
            if past is not None and past.length:
                y = mix_new_heads(y, q, w1, w2, past, layer, window=window, scale=scale, plain=plain)
            else:
                y = mix_heads(y, q, k, v, w1, w2, batch.cu_seqlens, window=window, scale=scale, plain=plain)
        if layer in spec.xsa_layers:
            y = remove_own_value(y, v, gates["xsa", layer])
        if layer in spec.output_gate_layers:
            y = y * gates["output", layer].unsqueeze(-1)
        return y.reshape(count, spec.width) @ out_weight.mT

    def weights_changed(self, step: int) -> None:
        """Also updates the MLPs' 8-bit copies."""
        self.fp8_mlp.follow(self.mlp, step)

    @property
    def settled_step(self) -> int | None:
        """See the base."""
        return self.fp8_mlp.settled_step

    def restart(self) -> None:
        """Also resets the MLPs' scales."""
        super().restart()
        self.fp8_mlp.restart(self.mlp)
