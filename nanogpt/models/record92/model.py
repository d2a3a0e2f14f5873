"""The model of public record 92 (PR #360, September 2026). Reads top to bottom as the forward pass runs.

Record 89's model (see `nanogpt.models.record89.model`) with

- fewer and narrower attentions: seven of eleven layers have one; those of the short window have queries half as wide,
  two of them values half as wide too; each width of queries has a rotary embedding and a softmax scale of its own;
- narrower MLPs, none in one layer, and two side by side in another;
- a large hashed table of bigrams and trigrams instead of a small one of bigrams; the ranks pull its rows;
- ten sources in the head's input, whose weights differ by groups of channels as well as by token;
- a loss over a sample of the classes, the same for all tokens of a micro-batch;
- no mixing of heads.

One quirk of the public code is kept (the hash of token 1), one is left out: the gradient of the softmax of multi-token
targets beyond a micro-batch's end.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.fp8_head import Fp8Scales
from nanogpt.kernels.table_rows import Signs
from nanogpt.layers.attention import head_attention, remove_own_value, rotated_queries_keys
from nanogpt.layers.columns import chosen_columns
from nanogpt.layers.dense_connections import for_every_token, token_numbers, weighted_sum
from nanogpt.layers.embedding import smear, value_gate
from nanogpt.layers.fp8_mlp import Fp8Mlp
from nanogpt.layers.fp8_qkv import Fp8Qkv
from nanogpt.layers.norm import norm
from nanogpt.layers.past import Past
from nanogpt.layers.residual import add
from nanogpt.layers.rotary import Rotary
from nanogpt.models.language_model import Implementations, RunTimeWindows, TokenBatch, Windows
from nanogpt.models.record92.spec import (
    CANDIDATES,
    HEAD_SOURCES,
    NGRAM_ROWS,
    NGRAM_SIGNS,
    NGRAM_TABLE,
    Record92ModelSpec,
)
from nanogpt.models.record_model import HeadInputs, LossInputs, RecordModel
from nanogpt.optim.pulled_table import TableLookUp
from nanogpt.optim.row_table import AnyLookUp

Gates = dict[tuple[str, int], Tensor]  # (what it is for, layer) -> (T, heads) or (T, 1)


class Embedded(NamedTuple):
    """What a micro-batch's tokens read from the tables, each (T, D)."""

    tokens: Tensor
    values: tuple[Tensor, ...]  # by value table
    ngrams: Tensor  # bigram and trigram, with their signs, added up


class AttentionWeights(NamedTuple):
    """One layer's: `qkv` (heads (2 dq + dv), D), q over k over v, for `scale_in` () times it; `out` (D, heads dv)."""

    qkv: Tensor
    scale_in: Tensor
    out: Tensor


class MlpWeights(NamedTuple):
    """One MLP's: `up` and `down` (F, D). The layer's post lambda is in `down`, and in the scale of 8-bit products."""

    up: Tensor
    down: Tensor
    down_scale: Tensor | None  # () fp32


class Record92(RecordModel[Record92ModelSpec]):
    """See the module. Shapes below are the record's: L = 11 layers, D = 768, H = 6 heads, V = 50,304."""

    qk: nn.Parameter
    vo: nn.Parameter
    mlp: nn.Parameter
    ve_gate_bank: nn.Parameter
    smear_gate: nn.Parameter
    post_lambdas: nn.Parameter
    resid_lambdas: nn.Parameter
    mudd_w1: nn.Parameter
    mudd_w2: nn.Parameter
    mudd_w2g: nn.Parameter
    mudd_b2: nn.Parameter
    mudd_gate_w1: nn.Parameter
    mudd_gate_w2: nn.Parameter
    mudd_gate_b2: nn.Parameter
    mudd_gate_scale: nn.Parameter
    scalars: nn.Parameter
    ngram_signs: Tensor  # (8192, D), +1 and -1
    fp8_scales = Fp8Scales(weight=2.0 / 448, gradient=0.75 / 8 / 448, logits8=True)

    def __init__(
        self, spec: Record92ModelSpec, *, dtype: torch.dtype, max_tokens: int, implementations: Implementations
    ):
        super().__init__(spec, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
        scales = spec.attention_scales
        self.narrow, self.wide = (
            Rotary(spec.rotary, max_tokens=max_tokens, attention_scale=scale, dtype=dtype)
            for scale in (scales.narrow, scales.wide)
        )
        self.register_buffer("ngram_signs", torch.empty(spec.ngram_signs, spec.width, dtype=dtype))
        self.bank_slot = {layer: slot for slot, layer in enumerate(spec.attention_slots)}
        self.gate_table = {layer: table for table, layer in enumerate(spec.gated_value_layers)}
        self.fp8_mlp = Fp8Mlp(
            spec.mlp_fp8,
            layers=self.mlp.shape[0],
            hidden=spec.mlp_width,
            width=spec.width,
            active=implementations.mlp_precision == "fp8",
            plain=implementations.plain_kernels,
        )
        # Slots of the banks with q, k and v of one shape: it, how many channels a query and a value have.
        shapes = groupby((spec.qk_dim(layer), spec.v_dim(layer)) for layer in spec.attention_slots)
        self.qkv_shapes = [(len(list(slots)), *shape) for shape, slots in shapes]
        self.fp8_qkv = Fp8Qkv(
            [(slots, spec.heads * (2 * dq + dv)) for slots, dq, dv in self.qkv_shapes],
            width=spec.width,
            active=implementations.projection_precision == "fp8",
            plain=implementations.plain_kernels,
        )
        self.register_load_state_dict_post_hook(lambda model, _: model._loaded())
        self.second_mlp = {layer: spec.layers + place for place, layer in enumerate(spec.second_mlp_layers)}

    @torch.no_grad()
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Also the n-grams' signs, and the 8-bit copies."""
        super().draw_parameters(generator)
        signs = torch.empty(self.ngram_signs.shape, dtype=torch.int8).random_(0, 2, generator=generator)
        self.ngram_signs.copy_(2 * signs - 1)
        self.fp8_mlp.restart(self.mlp)
        self._round_qkv()

    # --- what a micro-batch reads ---

    def reads(self, batch: TokenBatch) -> tuple[tuple[nn.Parameter, Tensor, int, int], ...]:
        """Token, then the value tables."""
        return (self.embed, batch.inputs, 0, self.spec.padded_vocab_size), *self.value_reads(batch.inputs)

    def look_ups(self, batch: TokenBatch) -> tuple[AnyLookUp, ...]:
        """Also the two n-grams of each token."""
        signs = Signs(self.ngram_signs, batch.extras[NGRAM_SIGNS])
        return *super().look_ups(batch), TableLookUp(self.tables[NGRAM_TABLE], batch.extras[NGRAM_ROWS], signs)

    def embedded(self, batch: TokenBatch) -> Embedded:
        """The tables' rows of the batch's tokens."""
        return self.named(tuple(look_up.read() for look_up in self.look_ups(batch)))

    def named(self, embedded: tuple[Tensor, ...]) -> Embedded:
        """See the base."""
        tokens, *values, ngrams = embedded
        return Embedded(tokens, tuple(values), ngrams)

    # --- the small nets ---

    def _gates(self, x: Tensor, *, late: bool) -> Gates:
        """The gates that one net makes from x (T, D)."""
        columns = self.spec.gate_columns(late=late)
        count = sum(column.width for column in columns)
        w1, w2, bias = self.mudd_gate_w1[int(late)], self.mudd_gate_w2[int(late)], self.mudd_gate_b2[int(late)]
        numbers = token_numbers(x, w1, w2[:count], bias[:count], self.mudd_gate_scale.to(x.dtype))
        parts = numbers.split([column.width for column in columns], dim=1)
        return {(column.name, column.layer): part for column, part in zip(columns, parts, strict=True)}

    def _connections(self, x: Tensor) -> dict[str, Tensor]:
        """The weights into the last layer, (T, 1) by name, from x (T, D)."""
        columns = self.spec.connection_columns(after_last=False)
        w1, w2, bias = self.mudd_w1[0], self.mudd_w2[0], self.mudd_b2[0]
        numbers = token_numbers(x, w1, w2, bias, self.spec.mudd.scale)
        parts = numbers.split([column.width for column in columns], dim=1)
        return {column.name: part for column, part in zip(columns, parts, strict=True)}

    def _head_connections(self, x: Tensor, sources: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the sources, (T, D), for the head's input; weights from x (T, D).

        A source has a weight for all channels and, without a bias, one more for each group of neighbouring ones. The
        net makes their sums, so that nothing has to be summed over groups for each token in the backward pass.
        """
        spec, count = self.spec, len(HEAD_SOURCES)
        columns = (self.mudd_w2[1, :count, None] + self.mudd_w2g[:count]).flatten(0, 1)  # by source, then by group
        bias = self.mudd_b2[1, :count].repeat_interleave(spec.channel_groups)
        numbers = token_numbers(x, self.mudd_w1[1], columns, bias, spec.mudd.scale)
        weights = numbers.view(len(x), count, spec.channel_groups, 1).unbind(1)
        parts = tuple(sources[name].view(len(x), spec.channel_groups, -1) for name in HEAD_SOURCES)
        return weighted_sum(weights, parts).view_as(x)

    # --- forward ---

    def hidden(
        self,
        batch: TokenBatch,
        embedded: Embedded,
        windows: Windows | RunTimeWindows,
        *,
        training: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        """The last layer's normalised activations, (T, D); in training, products run in their own precision."""
        spec, last = self.spec, self.spec.last
        fp8_mlp = training and self.fp8_mlp.active
        fp8_attention = training and self.implementations.projection_precision == "fp8"
        post = F.pad(self.post_lambdas[:-1], (0, 0, 0, 1), value=1.0)  # the last layer's depend on the token
        attention_scales = self.scalars[:-2].view(-1, 2) * F.pad(post[:, :1], (1, 0), value=1.0)
        smear_scale, skip_scale = self.scalars[-2:].unbind()
        resid = for_every_token(self.resid_lambdas, len(batch.inputs), self.embed.dtype)
        weights = self._attention_weights(list(attention_scales.flatten().unbind()))
        mlps = self._mlp_weights(post[:, 1], fp8=fp8_mlp)

        x0 = norm(smear(embedded.tokens, self.smear_gate, smear_scale, past))
        values = dict(zip(spec.value_embed_layers, embedded.values, strict=True))
        gates = self._gates(x0, late=False)
        x = start = x0 + gates["ngram", 0] * embedded.ngrams
        attended = x  # by the layers after `saved_layer`, which sets it

        for layer in range(last):
            if layer == spec.skip.from_layer + 1:
                skipped = x
                gates |= self._gates(x, late=True)
            if layer == spec.skip.to_layer:
                x = x + torch.sigmoid(skip_scale) * gates["skip", layer] * skipped
            else:
                parts, scales = [x], [resid[layer][0]]
                if layer in spec.x0_layers:
                    parts.append(x0)
                    scales.append(gates["x0", layer])
                if layer in spec.ngram_layers and layer > 0:  # at layer 0 they are in `start` already
                    parts.append(embedded.ngrams)
                    scales.append(gates["ngram", layer])
                total = weighted_sum(tuple(scales), tuple(parts))
                if layer in self.bank_slot:
                    u = norm(x) if layer <= spec.saved_layer else attended
                    y = self._attention(
                        layer, u, weights[layer], values.get(layer), gates, batch, windows, past, fp8=fp8_attention
                    )
                    total = add(total, y)
                x = total
            if layer in spec.mlp_free_layers:
                x = resid[layer][1] * x
            else:
                u = norm(x)
                x = add(resid[layer][1] * x, self._mlp(layer, u, mlps, fp8=fp8_mlp))
                if layer in self.second_mlp:
                    x = add(x, self._mlp(self.second_mlp[layer], u, mlps, fp8=fp8_mlp))
            if layer == spec.saved_layer:
                saved = x
                attended = norm(x)

        before = x
        w = self._connections(x)
        value_add = weighted_sum(
            (w["value from start"], w["value from saved"], w["value from before"]), (start, saved, x)
        )
        x = weighted_sum((1 + w["input from before"], w["input from start"], w["input from saved"]), (x, start, saved))
        y = self._attention(
            last,
            attended,
            weights[last],
            values[last],
            gates,
            batch,
            windows,
            past,
            fp8=fp8_attention,
            value_gates=w["value gate"],
            value_add=value_add,
        )
        x = weighted_sum(
            (
                w["attention residual"],
                w["attention post"],
                w["attention from start"],
                w["attention from ngram"],
            ),
            (x, y, start, embedded.ngrams),
        )
        u = norm(x)
        x = weighted_sum((w["mlp residual"], w["mlp post"]), (x, self._mlp(last, u, mlps, fp8=fp8_mlp)))

        sources = {
            "start": start,
            "saved": saved,
            "before": before,
            "skipped": skipped,
            "last MLP's input": u,
            "attended": attended,
            **{f"values {table}": value for table, value in enumerate(embedded.values)},
        }
        return norm(x + self._head_connections(x, sources))

    def _mlp(self, slot: int, u: Tensor, weights: list[MlpWeights], *, fp8: bool) -> Tensor:
        """What the MLP in the bank's `slot` adds, (T, D)."""
        up, down, down_scale = weights[slot]
        return self.fp8_mlp(slot, u, up, down, down_scale) if fp8 else self.mlp_function(u, up, down)

    def _mlp_weights(self, post: Tensor, *, fp8: bool) -> list[MlpWeights]:
        """By slot of the bank. post (layers,) fp32: what each layer's MLPs are multiplied by.

        In the weights a lambda costs nothing: 8-bit products have a scale anyway, and its gradient is a sum over rows
        that are read to be multiplied by it. In the residual sum, its product is another (T, D) to write and to read.
        """
        layers = [*range(self.spec.layers), *self.spec.second_mlp_layers]
        rows = for_every_token(post[:, None], self.spec.mlp_width, post.dtype)
        numbers = post.detach().unbind()
        scales = self.fp8_mlp.down_scales([numbers[layer] for layer in layers]) if fp8 else [None] * len(layers)
        matrices = self.mlp.flatten(0, 1).unbind()
        return [
            MlpWeights(up, (rows[layer][0] * down).to(down.dtype), scale)
            for layer, up, down, scale in zip(layers, matrices[::2], matrices[1::2], scales, strict=False)
        ]

    def _attention_weights(self, scales: list[Tensor]) -> dict[int, AttentionWeights]:
        """By layer, what its attention reads from the banks, and its scalar from `scales`; the other one is in `out`.

        A bank's slot has whole heads; for narrower ones only the first channels are read.
        """
        spec, d, heads = self.spec, self.spec.width, self.spec.heads
        count = len(spec.attention_layers)
        qk = self.qk[: heads * count].view(count, 2 * heads, spec.head_dim, d).unbind()
        v, o = (part.unbind() for part in self.vo[: 2 * count].view(count, 2, d, d).unbind(1))
        found = {}
        for layer, slot in self.bank_slot.items():
            dq, dv = spec.qk_dim(layer), spec.v_dim(layer)
            own_v = v[slot].view(heads, spec.head_dim, d)[:, :dv].reshape(-1, d)
            qkv = torch.cat((qk[slot][:, :dq].reshape(-1, d), own_v))
            out = o[slot].view(d, heads, spec.head_dim)[:, :, :dv].reshape(d, -1)
            scale_in, scale_out = scales[2 * layer : 2 * layer + 2]
            found[layer] = AttentionWeights(qkv, scale_in, (scale_out * out).to(out.dtype))
        return found

    def _attention(
        self,
        layer: int,
        u: Tensor,  # (T, D), normalised
        weights: AttentionWeights,
        value_embedding: Tensor | None,  # (T, D)
        gates: Gates,
        batch: TokenBatch,
        windows: Windows | RunTimeWindows,
        past: Past | None,
        *,
        fp8: bool,
        value_gates: Tensor | None = None,  # (T, 2), for the first and the second half of the heads; last layer only
        value_add: Tensor | None = None,  # (T, D), last layer only
    ) -> Tensor:
        """What the layer's attention adds, (T, D)."""
        spec = self.spec
        count, heads = u.shape[0], spec.heads
        dq, dv = spec.qk_dim(layer), spec.v_dim(layer)
        paired, wide = layer in spec.paired_layers, spec.is_wide(layer)
        rotary = self.wide if wide else self.narrow
        if fp8:
            q, k, v = self.fp8_qkv(
                self.bank_slot[layer],
                u,
                weights.qkv,
                weights.scale_in,
                rotary,
                heads=heads,
                channels=dq,
                paired=paired,
                shifted=wide,
            )
        else:
            qkv = u @ (weights.scale_in * weights.qkv).to(u.dtype).mT
            q, k = qkv[:, : 2 * heads * dq].view(count, 2, heads, dq).unbind(1)
            q, k = rotated_queries_keys(q, k, rotary, paired=paired, shifted=wide, layer=layer, past=past)
            v = qkv[:, 2 * heads * dq :].view(count, heads, dv)
        if value_embedding is not None:
            if value_gates is None:
                gate = 2 * value_gate(u, value_embedding, self.ve_gate_bank[self.gate_table[layer]])
            else:
                gate = value_gates.repeat_interleave(heads // 2, dim=1).unsqueeze(-1)
            v = v + gate * value_embedding.view(count, heads, spec.head_dim)[:, :, :dv]
        if value_add is not None:
            v = v + value_add.view(count, heads, dv)

        y = head_attention(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            window=self.window(layer, windows),
            scale=rotary.run_time_scale,
            paired=paired,
            backend=self.implementations.attention,
            layer=layer,
            past=past,
        )
        if layer in spec.xsa_layers:
            y = remove_own_value(y, v, gates["xsa", layer])
        if layer in spec.output_gate_layers:
            y = y * gates["output", layer].unsqueeze(-1)
        return y.reshape(count, heads * dv) @ weights.out.mT

    # --- loss ---

    def head_inputs(self, batch: TokenBatch, inputs: LossInputs) -> HeadInputs:
        """The batch's candidates, if it has them: the softmax is over them as if they were the vocabulary.

        All targets are among them; for a prefix that is not, the term is dropped.
        """
        if CANDIDATES not in batch.extras:
            return super().head_inputs(batch, inputs)
        classes = batch.extras[CANDIDATES]
        place = classes.new_full((self.spec.padded_vocab_size + 1,), -1)  # the last one: for no prefix, which is -1
        place = place.scatter(0, classes, torch.arange(len(classes), device=classes.device))
        prefixes = None if inputs.prefix_weight is None else place[self.prefixes[batch.targets]]
        return HeadInputs(chosen_columns(self.lm_head, classes, place[:-1]), place[batch.targets], prefixes)

    # --- the schedule ---

    def change_windows(self, old: Windows, new: Windows) -> None:
        """YaRN, for each width with its window."""
        for rotary, before, after in ((self.narrow, old.short, new.short), (self.wide, old.long, new.long)):
            if before != after:
                rotary.extend_window(before, after)

    def weights_changed(self, step: int) -> None:
        """The 8-bit copies follow."""
        self.fp8_mlp.follow(self.mlp, step)
        self._round_qkv()

    @property
    def settled_step(self) -> int | None:
        """See the base."""
        return 0 if self.fp8_qkv.active and not self.fp8_mlp.active else self.fp8_mlp.settled_step

    def _loaded(self) -> None:
        self.fp8_mlp.reload(self.mlp)
        self._round_qkv()

    @torch.no_grad()
    def _round_qkv(self) -> None:
        """Make the 8-bit copies of what `_attention_weights` packs."""
        if not self.fp8_qkv.active:
            return
        spec, d, heads = self.spec, self.spec.width, self.spec.heads
        count = len(spec.attention_layers)
        sizes = [slots for slots, _, _ in self.qkv_shapes]
        qk = self.qk[: heads * count].view(count, 2 * heads, spec.head_dim, d).split(sizes)
        v = self.vo[: 2 * count].view(count, 2, heads, spec.head_dim, d)[:, 0].split(sizes)
        self.fp8_qkv.round(
            [
                torch.cat((own_qk[:, :, :dq].flatten(1, 2), own_v[:, :, :dv].flatten(1, 2)), dim=1)
                for own_qk, own_v, (_, dq, dv) in zip(qk, v, self.qkv_shapes, strict=True)
            ]
        )

    def restart(self) -> None:
        """Also resets rotary tables, attention scales and the MLPs' scales."""
        super().restart()
        self.fp8_mlp.restart(self.mlp)
        self._round_qkv()
        for rotary in (self.narrow, self.wide):
            rotary.reset()
