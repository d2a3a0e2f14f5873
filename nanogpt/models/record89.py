"""The model of public record 89 (July 2026). Reads top to bottom as the forward pass runs.

The speedrun's model (see `nanogpt.models.speedrun`) with

- q and k banked in pairs of heads, which the optimizer orthogonalizes; v and o whole;
- token-dependent connections (MUDD): small nets weigh earlier activations into the last layer, into its values and
  into the head's input, where they also take the backout's place;
- token-dependent gates by nets of the same kind, from x0 for the first layers and from the residual for the rest;
- attention that loses the token's own value (XSA) in some layers, and mixes its heads in a short window in the last;
- x0 and bigrams added after attention, bigrams told apart by sign vectors;
- one saved activation that feeds the attention of all later layers;
- MLPs whose products can run in 8-bit floats.

Two quirks of the public code are left out, a token or two of a micro-batch each: at token 1 its bigram hash reads a
constant in place of token 0, and the gradient keeps the softmax of multi-token targets beyond the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanogpt.kernels.head_mixing import mix_heads, normalized_weights
from nanogpt.layers.attention import head_attention, remove_own_value, rotated_queries_keys
from nanogpt.layers.dense_connections import for_every_token, token_numbers, weighted_sum
from nanogpt.layers.embedding import bigram_sign, smear, value_gate
from nanogpt.layers.fp8_mlp import Fp8Mlp
from nanogpt.layers.norm import norm
from nanogpt.models.language_model import Implementations, RunTimeWindows, Windows
from nanogpt.models.record import Embedded, RecordModel
from nanogpt.spec_model import Record89ModelSpec

CONNECTIONS_INTO_LAST, CONNECTIONS_AFTER_LAST = 14, 5  # numbers a token that the two MUDD nets make

Gates = dict[tuple[str, int], Tensor]  # (what it is for, layer) -> (T, heads) or (T, 1)


class Record89(RecordModel[Record89ModelSpec]):
    """See the module. Shapes below are the record's: L = 11 layers, D = 768, H = 6 heads of 128, V = 50,304."""

    bigram_signs: Tensor  # (8192, D), +1 and -1

    def __init__(
        self, spec: Record89ModelSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations
    ):
        super().__init__(spec, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
        d, v, layers = spec.width, spec.padded_vocab_size, spec.layers
        hidden, tables, matrices = spec.mlp_expansion * d, len(spec.value_embed_layers), spec.shardable_rows
        self.last = layers - 1

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        # The r-th layer with attention owns the H matrices of `qk` from H r on, half of them for q and half for k, each
        # (2 head_dim, D) for two neighbouring heads; and 2 r, 2 r + 1 of `vo`: v and o. All stored (out, in).
        self.qk = matrix(matrices["qk"], 2 * spec.head_dim, d)
        self.vo = matrix(matrices["vo"], d, d)
        self.mlp = matrix(layers + spec.mlp_bank_padding, 2, hidden, d)  # [:, 0] up, [:, 1] down
        self.lm_head = matrix(d, v)
        self.embed = matrix(v, d)
        self.value_embed = matrix(tables * v, d)
        self.bigram_embed = matrix(spec.bigram_rows, d)
        self.ve_gate_bank = matrix(tables, spec.heads, spec.gate_inputs)  # the last layer's is never read
        self.smear_gate = matrix(1, spec.gate_inputs)
        self.post_lambdas = nn.Parameter(torch.empty(layers, 2))  # [:, 0] attention, [:, 1] MLP
        self.resid_lambdas = nn.Parameter(torch.empty(layers, 2))
        self.mudd_w1 = matrix(2, spec.mudd.hidden, d)
        self.mudd_w2 = matrix(2, CONNECTIONS_INTO_LAST, spec.mudd.hidden)
        self.mudd_b2 = matrix(2, CONNECTIONS_INTO_LAST)
        self.mudd_gate_w1 = matrix(2, spec.mudd.hidden, d)
        self.mudd_gate_w2 = matrix(2, max(spec.gate_columns), spec.mudd.hidden)
        self.mudd_gate_b2 = matrix(2, max(spec.gate_columns))
        self.mudd_gate_scale = nn.Parameter(torch.empty(()))
        self.scalars = nn.Parameter(torch.empty(2 * layers + 2))
        self.register_buffer("bigram_signs", torch.empty(spec.bigram_signs, d, dtype=dtype))

        self.fp8_mlp = Fp8Mlp(
            spec.mlp_fp8,
            layers=layers,
            hidden=hidden,
            width=d,
            active=implementations.mlp_precision == "fp8",
            plain=implementations.plain_kernels,
        )
        self.register_load_state_dict_post_hook(lambda model, _: model.fp8_mlp.reload(model.mlp))

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Matrices uniform in +-bound, head and value embeddings normal, numbers as the spec says, the rest zeros."""
        spec, layers = self.spec, self.spec.layers
        for parameter in self.parameters():
            parameter.zero_()
        bound = math.sqrt(3) * spec.init_bound / math.sqrt(spec.width)
        qk, vo = self._attention_banks()
        for target, reach in (
            (qk, bound),
            (vo, bound),
            (self.mlp[:, 0], bound),
            (self.mudd_w1, 1 / math.sqrt(spec.width)),
            (self.mudd_gate_w1, 1 / math.sqrt(spec.width)),
        ):
            target.copy_(torch.empty(target.shape).uniform_(-reach, reach, generator=generator))
        for target, std in ((self.lm_head, spec.head_init_std), (self.value_embed, spec.value_embed_init_std)):
            target.copy_(torch.empty(target.shape).normal_(std=std, generator=generator))
        self.embed.copy_(self.lm_head.mT)
        signs = torch.empty(self.bigram_signs.shape, dtype=torch.int8).random_(0, 2, generator=generator)
        self.bigram_signs.copy_(2 * signs - 1)

        start = spec.starts
        self.scalars.copy_(torch.tensor([start.attention_in, start.attention_out] * layers + [start.smear, start.skip]))
        self.post_lambdas.fill_(start.post)
        self.resid_lambdas.fill_(start.residual)
        into_last = [0.0] * 6 + [start.value_gate] * 2
        into_last += [start.residual, start.post, 0.0, start.bigram_gate, start.residual, start.post]
        after_last = [0.0, -start.backout, 0.0, 0.0, 0.0]
        for bias, starts in zip(self.mudd_b2, (into_last, after_last), strict=True):
            bias[: len(starts)].copy_(torch.tensor(starts) / spec.mudd.scale)
        for late, bias in enumerate(self.mudd_gate_b2):
            starts = [value for _, width, value in self._gate_columns(bool(late)) for _ in range(width)]
            bias[: len(starts)].copy_(torch.tensor(starts) / spec.mudd.scale)
        self.mudd_gate_scale.fill_(spec.mudd.scale)
        self.fp8_mlp.restart(self.mlp)

    def _attention_banks(self) -> tuple[Tensor, Tensor]:
        """`qk` and `vo` by layer and without padding: (layers with attention, 2 D, D) each, q over k and v over o."""
        d, count = self.spec.width, len(self.spec.attention_layers)
        return self.qk[: self.spec.heads * count].view(count, 2 * d, d), self.vo[: 2 * count].view(count, 2 * d, d)

    def _gate_columns(self, late: bool) -> list[tuple[tuple[str, int], int, float]]:
        """What the columns of a gate net are for: ((name, layer), how many of them, start value), in order.

        The early net, which reads x0, has the gates of the layers up to `skip.from_layer`; the late one the others.
        """
        spec, start = self.spec, self.spec.starts
        layers = [layer for layer in spec.attention_layers if (layer > spec.skip.from_layer) == late]
        columns = [(("xsa", layer), spec.heads, 0.0) for layer in layers if layer in spec.xsa_layers]
        columns += [
            (("output", layer), spec.heads, start.output_gate) for layer in layers if layer in spec.output_gate_layers
        ]
        for layer in layers:
            if layer != self.last:
                columns += [(("x0", layer), 1, 0.0), (("bigram", layer), 1, start.bigram_gate)]
        if late:
            columns += [
                (("skip", spec.skip.to_layer), 1, start.skip_gate),
                (("dc_scores", self.last), spec.heads, start.dc_scores),
                (("dc_output", self.last), spec.heads, 0.0),
            ]
        return columns

    def _gates(self, x: Tensor, *, late: bool) -> Gates:
        """The gates that one net makes from x (T, D)."""
        columns = self._gate_columns(late)
        count = sum(width for _, width, _ in columns)
        w1, w2, bias = self.mudd_gate_w1[int(late)], self.mudd_gate_w2[int(late)], self.mudd_gate_b2[int(late)]
        numbers = token_numbers(x, w1, w2[:count], bias[:count], self.mudd_gate_scale.to(x.dtype))
        parts = numbers.split([width for _, width, _ in columns], dim=1)
        return {key: part for (key, _, _), part in zip(columns, parts, strict=True)}

    def _connections(self, net: int, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """The first `count` numbers of a MUDD net from x (T, D), each (T, 1)."""
        w2, bias = self.mudd_w2[net], self.mudd_b2[net]
        return token_numbers(x, self.mudd_w1[net], w2[:count], bias[:count], self.spec.mudd.scale).split(1, dim=1)

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
        """The last layer's normalised activations, (T, D); in training the MLPs have their own precision."""
        spec, last = self.spec, self.last
        fp8 = training and self.fp8_mlp.active
        *attention_scales, smear_scale, skip_scale = self.scalars.unbind()
        resid, post = (
            for_every_token(lambdas, len(tokens), self.embed.dtype)
            for lambdas in (self.resid_lambdas, self.post_lambdas)
        )
        # Banks are taken apart once: one concatenation puts their gradients together again.
        qkv_weights, out_weights = self._attention_weights(attention_scales)
        up_weights, down_weights = (part.unbind() for part in self.mlp.unbind(1))

        def attention(
            layer: int, u: Tensor, value_gates: Tensor | None = None, value_add: Tensor | None = None
        ) -> Tensor:
            row = self.attention_row[layer]
            return self._attention(
                layer,
                u,
                qkv_weights[row],
                out_weights[row],
                values.get(layer),
                value_gates,
                value_add,
                gates,
                cu_seqlens,
                max_seqlen,
                windows,
            )

        def mlp(layer: int, u: Tensor) -> Tensor:
            up, down = up_weights[layer], down_weights[layer]
            return self.fp8_mlp(layer, u, up, down) if fp8 else self.mlp_function(u, up, down)

        x0 = norm(smear(embedded.tokens, self.smear_gate, smear_scale))
        bigram = embedded.bigrams * bigram_sign(tokens, self.bigram_signs)
        tables = embedded.values
        values = dict(zip(spec.value_embed_layers, tables, strict=True))

        gates = self._gates(x0, late=False)
        x = start = x0 + gates["bigram", 0] * bigram
        skipped = saved = attended = x  # each is set before it is read

        for layer in range(last):
            if layer == spec.skip.from_layer + 1:
                skipped = x
                gates |= self._gates(x, late=True)
            if layer == spec.skip.to_layer:
                x = x + torch.sigmoid(skip_scale) * gates["skip", layer] * skipped
            else:
                u = norm(x) if layer <= spec.saved_layer else attended
                y = attention(layer, u)
                x = weighted_sum((resid[layer][0], post[layer][0], gates["x0", layer]), (x, y, x0))
                if layer > 0:  # it is in `start` already
                    x = x + gates["bigram", layer] * bigram
            x = weighted_sum((resid[layer][1], post[layer][1]), (x, mlp(layer, norm(x))))
            if layer == spec.saved_layer:
                saved = x
                attended = norm(x)

        before = x
        mu = self._connections(0, x, CONNECTIONS_INTO_LAST)
        value_add = weighted_sum(mu[0:3], (start, saved, x))
        x = weighted_sum((1 + mu[5], *mu[3:5]), (x, start, saved))
        y = attention(last, attended, value_gates=torch.cat(mu[6:8], dim=1), value_add=value_add)
        x = weighted_sum(mu[8:12], (x, y, start, bigram))
        x = weighted_sum(mu[12:14], (x, mlp(last, norm(x))))

        mu = self._connections(1, x, CONNECTIONS_AFTER_LAST)
        x = x + weighted_sum(mu, (start, saved, before, tables[0], skipped))
        return norm(x)

    def _attention_weights(self, scales: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(3 D, D) for q, k, v, and (D, D) for o, of each layer with attention, times its scalars in `scales`.

        All layers at once: one by one they are twenty small kernels, and eighty for the gradients.
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
        qkv_weight: Tensor,  # (3 D, D)
        out_weight: Tensor,  # (D, D)
        value_embedding: Tensor | None,  # (T, D)
        value_gates: Tensor | None,  # (T, 2), for the first and the second half of the heads; last layer only
        value_add: Tensor | None,  # (T, D), last layer only
        gates: Gates,
        cu_seqlens: Tensor,
        max_seqlen: int,
        windows: Windows | RunTimeWindows,
    ) -> Tensor:
        """What the layer's attention adds, (T, D)."""
        spec = self.spec
        count, heads, head_dim = u.shape[0], spec.heads, spec.head_dim
        q, k, v = (u @ qkv_weight.mT).view(count, 3, heads, head_dim).unbind(1)
        if value_embedding is not None:
            if value_gates is None:
                gate = 2 * value_gate(u, value_embedding, self.ve_gate_bank[self.value_table[layer]])
            else:
                gate = value_gates.repeat_interleave(heads // 2, dim=1).unsqueeze(-1)
            v = v + gate * value_embedding.view(count, heads, head_dim)
        if value_add is not None:
            v = v + value_add.view(count, heads, head_dim)

        paired, scale = layer in spec.paired_layers, self.rotary.run_time_scale
        q, k = rotated_queries_keys(q, k, self.rotary, paired=paired, shifted=layer in spec.long_window_layers)
        y = head_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            window=self.window(layer, windows),
            scale=scale,
            paired=paired,
            backend=self.implementations.attention,
        )
        if layer == self.last:
            w1, w2 = normalized_weights(gates["dc_scores", layer]), gates["dc_output", layer]
            window, plain = spec.dc_window, self.implementations.plain_kernels
            y = mix_heads(y, q, k, v, w1, w2, cu_seqlens, window=window, scale=scale, plain=plain)
        if layer in spec.xsa_layers:
            y = remove_own_value(y, v, gates["xsa", layer])
        if layer in spec.output_gate_layers:
            y = y * gates["output", layer].unsqueeze(-1)
        return y.reshape(count, spec.width) @ out_weight.mT

    def weights_changed(self, step: int) -> None:
        """The MLPs' 8-bit copies follow."""
        self.fp8_mlp.follow(self.mlp, step)

    def restart(self) -> None:
        """Also the MLPs' scales."""
        super().restart()
        self.fp8_mlp.restart(self.mlp)
