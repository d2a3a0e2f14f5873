"""The speedrun's model: attention, rotary embedding, embeddings and residual stream, head and loss."""

from __future__ import annotations

from mutation import (
    ATTENTION,
    EMBEDDING,
    FP8_HEAD,
    HEAD,
    HEADS,
    MLP,
    NORM,
    RECORD,
    RECORD_SPEC,
    ROTARY,
    SPEEDRUN,
    Mutations,
)

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- attention ---

_first = "torch.maximum(cu_seqlens.to(torch.int32)[document], position - window)"
_add("document mask", ATTENTION, "no documents", (_first, "(position - window).clamp(min=0)"))
_add("document mask", ATTENTION, "a document's first token sees the one before", ("position, right=True", "position"))
_add("window edge", ATTENTION, "one token fewer", (_first, _first.replace("- window", "- window + 1")))
_add("window edge", ATTENTION, "one token more", ("self.reach = min(window,", "self.reach = min(window + 1,"))
_add("window edge", ATTENTION, "no window", (_first, "cu_seqlens.to(torch.int32)[document]"))
_add(
    "causal mask",
    ATTENTION,
    "sees one token ahead",
    ("(key > self.position[queries, None])", "(key > self.position[queries, None] + 1)"),
)
_add(
    "attention backward", ATTENTION, "no scale in the gradient", (".mul_(weights).mul_(blocks.scale)", ".mul_(weights)")
)
_add("windows by layer", RECORD, "short layers get the long window", ("else windows.short", "else windows.long"))
_add(
    "paired window",
    HEADS,
    "window doubles with the length",
    ("max_seqlen=max_seqlen, window=window,", "max_seqlen=max_seqlen, window=(1 + paired) * window,"),
)
_doubled = "cu_seqlens, max_seqlen = 2 * cu_seqlens, 2 * max_seqlen"
_add("paired documents", HEADS, "boundaries do not double", (_doubled, "max_seqlen = 2 * max_seqlen"))
_add("paired documents", HEADS, "maximum length does not double", (_doubled, "cu_seqlens = 2 * cu_seqlens"))
_shifted = "shifted=shifted"
_add("key shift", SPEEDRUN, "none", (_shifted, "shifted=False"))
_add("key shift", SPEEDRUN, "in every unpaired layer", (_shifted, "shifted=not paired"))
_add("key shift", ROTARY, "from the token after", ("cat((still[:1], still[:-1]))", "cat((still[1:], still[-1:]))"))
_add("key shift", ROTARY, "token 0 gets zeros", ("cat((still[:1],", "cat((0 * still[:1],"))
_add("key shift", ROTARY, "all channels", ("cat((k[..., :rotated],", "cat((torch.cat((k[:1], k[:-1]))[..., :rotated],"))
_joined = "x.reshape(2 * count, heads // 2, x.shape[2])"
_add(
    "paired interleaving",
    HEADS,
    "rows hold even and odd heads",
    (
        _joined,
        "x.reshape(count, heads // 2, 2, -1).transpose(1, 2).reshape(2 * count, heads // 2, x.shape[2])",
    ),
)
_add(
    "paired interleaving",
    ROTARY,
    "heads 0, 1, 2 at 2t and 3, 4, 5 at 2t + 1",
    ("self.cos[2 * first : 2 * (first + tokens)].view(tokens, 1, 2", "self.cos[: 2 * tokens].view(tokens, 2, 1"),
    ("signed_sin[2 * first : 2 * (first + tokens)].view(tokens, 1, 2", "signed_sin[: 2 * tokens].view(tokens, 2, 1"),
    ("x.view(tokens, heads // 2, 2, head_dim)", "x.view(tokens, 2, heads // 2, head_dim)"),
)
_add("paired rotation", HEADS, "unpaired positions", ("rotary(norm(q), paired=paired, ", "rotary(norm(q), "))
_add("attention scale", SPEEDRUN, "1/sqrt(head)", ("scale=self.rotary.run_time_scale,", "scale=head_dim**-0.5,"))
_add("QK norm", HEADS, "queries not normalised", ("rotary(norm(q), paired", "rotary(q, paired"))
_add("QK norm", HEADS, "keys not normalised", ("rotary(norm(k), paired", "rotary(k, paired"))
_add("attention gate", SPEEDRUN, "none", ("y = y * head_gate(", "y = y + 0 * head_gate("))
_add(
    "attention gate",
    SPEEDRUN,
    "bank row is the layer's number",
    ("self.attn_gate_bank[self.attention_row[layer]]", "self.attn_gate_bank[min(layer, 9)]"),
)
_add(
    "attention gate",
    EMBEDDING,
    "reads the last channels",
    ("torch.sigmoid(u[:, : weight.shape[1]]", "torch.sigmoid(u[:, -weight.shape[1] :]"),
)
_add("attention scalars", SPEEDRUN, "out is in", ("attention_scales[layer, 1]", "attention_scales[layer, 0]"))
_add(
    "attention scalars", SPEEDRUN, "all ins, then all outs", (".view(layers, 2), rest[2", ".view(2, layers).mT, rest[2")
)
_add("bank layout", SPEEDRUN, "k before q", ("q, k, v = (u @", "k, q, v = (u @"))

# --- rotary ---

_add("rotary sign", ROTARY, "counter-clockwise", ("torch.stack((sin, -sin)", "torch.stack((-sin, sin)"))
_add("rotary frequencies", ROTARY, "j / n", ("/ max(n - 1, 1)", "/ n"))
_add(
    "rotary angles",
    ROTARY,
    "in fp64",
    ("torch.outer(position, self.frequency)", "torch.outer(position.double(), self.frequency.double())"),
)
_add(
    "rotary channels",
    ROTARY,
    "halves instead of neighbours",
    ("swapped = leading.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)", "swapped = leading.roll(rotated // 2, -1)"),
)
_add("YaRN", ROTARY, "no frequency changes", ("self.frequency.mul_(ratio + keep * (1 - ratio))", "pass"))
_add("YaRN", ROTARY, "kept and interpolated swapped", ("ratio + keep * (1 - ratio)", "1 - keep * (1 - ratio)"))
_add("YaRN", ROTARY, "turns counted by pi", ("(2 * math.pi)", "math.pi"))
_add("YaRN", ROTARY, "no clamp", (".clamp(0, 1)", ""))
_add("YaRN", ROTARY, "turns in the new window", ("rotations = old *", "rotations = new *"))
_add("YaRN", ROTARY, "attention scale stays", ("self.attention_scale *= 1 +", "self.attention_scale *= 1 + 0 *"))
_add("YaRN", ROTARY, "attention scale by log2", ("math.log(new / old)", "math.log2(new / old)"))
_add(
    "YaRN",
    ROTARY,
    "tables not rebuilt",
    ("math.log(new / old)\n        self._fill_tables()", "math.log(new / old)"),
)
_add("YaRN", ROTARY, "not cumulative", ("rotations = old *", "self.reset()\n        rotations = old *"))

# --- embedding and residual stream ---

_add("norm", NORM, "bf16's eps", ("2.0**-23", "2.0**-7"))
_add("norm", NORM, "no eps", ("2.0**-23", "0.0"))
_add("norm", NORM, "LayerNorm", ("F.rms_norm(wide", "F.layer_norm(wide"))
_add("smear", EMBEDDING, "subtracted", ("e[1:] + gate * e[:-1]", "e[1:] - gate * e[:-1]"))
_add("smear", EMBEDDING, "gate read from the token before", ("sigmoid(e[1:, :", "sigmoid(e[:-1, :"))
_add("smear", EMBEDDING, "no strength", ("gate = strength * torch", "gate = torch"))
_add(
    "smear",
    EMBEDDING,
    "not across the first two tokens",
    ("cat((e[:1], e[1:] + gate", "cat((e[:1], e[1:] + gate.index_fill(0, gate.new_zeros(1, dtype=torch.long), 0)"),
)
_add(
    "bigram hash",
    RECORD_SPEC,
    "multipliers swapped",
    ("own, before = self.bigram_multipliers", "before, own = self.bigram_multipliers"),
)
_add("bigram hash", RECORD_SPEC, "sum for xor", ("(own * wide[1:] ^ before", "(own * wide[1:] + before"))
_add(
    "bigram hash",
    RECORD_SPEC,
    "modulo all rows",
    (") % (self.bigram_rows - 1)\n        return", ") % self.bigram_rows\n        return"),
)
_add(
    "bigram hash",
    RECORD_SPEC,
    "token 0 takes row 0",
    ("np.full(wide.shape, self.bigram_rows - 1,", "np.full(wide.shape, 0,"),
)
_add("bigram scalars", SPEEDRUN, "layer 0's for all", ("bigram_scale[layer] * bigram", "bigram_scale[0] * bigram"))
_add("bigram scalars", SPEEDRUN, "none in layer 0", (" * x + bigram_scale[0] * bigram", " * x"))
_add("x0 scalars", SPEEDRUN, "none in layer 0", ("(residual_scale[0] + self.x0_lambdas[0])", "residual_scale[0]"))
_add("x0 scalars", SPEEDRUN, "x for x0", ("self.x0_lambdas[layer] * x0", "self.x0_lambdas[layer] * x"))
_add("residual scalars", SPEEDRUN, "layer 0's for all", ("residual_scale[layer] * x", "residual_scale[0] * x"))
_add("skip", SPEEDRUN, "none", ("* gate * skipped", "* gate * 0"))
_add("skip", SPEEDRUN, "no sigmoid of its scalar", ("torch.sigmoid(skip_scale)", "skip_scale"))
_add("skip", SPEEDRUN, "gate not doubled", ("gate = 2 * torch.sigmoid(x0", "gate = torch.sigmoid(x0"))
_add("skip", SPEEDRUN, "gate reads x", ("torch.sigmoid(x0[:, :", "torch.sigmoid(x[:, :"))
_add(
    "skip", SPEEDRUN, "saved one layer early", ("layer == spec.skip.from_layer:", "layer == spec.skip.from_layer - 1:")
)
_add("skip", SPEEDRUN, "enters one layer late", ("layer == spec.skip.to_layer:", "layer == spec.skip.to_layer + 1:"))
_add("backout", SPEEDRUN, "added", ("norm(x - backout_scale", "norm(x + backout_scale"))
_add("backout", SPEEDRUN, "of the layer after", ("layer == spec.backout_layer", "layer == spec.backout_layer + 1"))
_add("final norm", SPEEDRUN, "none", ("return norm(x - backout_scale * middle)", "return x - backout_scale * middle"))
_add("value gates", SPEEDRUN, "not doubled", ("gate = 2 * head_gate(", "gate = head_gate("))
_add(
    "value gates",
    SPEEDRUN,
    "one for all tables",
    ("self.ve_gate_bank[self.value_table[layer]]", "self.ve_gate_bank[0]"),
)
_add(
    "value embeddings",
    RECORD,
    "tables in reverse order",
    ("embedded[1], embedded[2:])", "embedded[1], embedded[2:][::-1])"),
)
_add("value embeddings", SPEEDRUN, "instead of v", ("v = v + gate * value", "v = gate * value"))
_add("MLP", SPEEDRUN, "input not normalised", ("mlp_function(norm(x)", "mlp_function(x"))
_add("MLP", MLP, "no square", ("torch.relu(u @ up.mT).square()", "torch.relu(u @ up.mT)"))

# --- head and loss ---

_add("softcap", HEAD, "no shift", ("logits[first : first + rows].add_(shift)", "logits[first : first + rows]"))
_add("softcap", HEAD, "no cap", ("torch.mul(s, cap * _LOG2_E", "torch.mul(s, _LOG2_E"))
_add(
    "softcap",
    HEAD,
    "tanh",
    (
        "logits[first : first + rows].add_(shift).mul_(1 / scale).sigmoid_()",
        "logits[first : first + rows].add_(shift).mul_(1 / scale).tanh_()",
    ),
)
_add(
    "softcap",
    HEAD,
    "gradient without 1 / scale",
    ("row_weights[block] * (cap / scale) / total", "row_weights[block] * cap / total"),
)
_add(
    "softcap",
    HEAD,
    "no shift in sampling",
    ("cap * torch.sigmoid((logits + shift) / scale)", "cap * torch.sigmoid(logits / scale)"),
)
_add(
    "softcap",
    HEAD,
    "in bf16",
    (
        "    wide = torch.float64 if x.dtype == torch.float64 else torch.float32\n    logit",
        "    wide = x.dtype\n    logit",
    ),
)
_add(
    "padding columns",
    RECORD,
    "left out of the loss",
    (
        "HeadInputs(self.lm_head, batch.targets, prefixes)",
        "HeadInputs(self.lm_head[:, :-3], batch.targets, prefixes)",
    ),
)
_add(
    "multi-token weights",
    HEAD,
    "in reverse order",
    ("    weights = weights.to(wide)\n", "    weights = weights.to(wide).flip(0)\n"),
)
_add(
    "multi-token weights",
    HEAD,
    "next token only",
    ("    weights = weights.to(wide)\n", "    weights = weights.to(wide)[:1]\n"),
)
_add("multi-token end", HEAD, "last target repeated", ("weights * (ahead < tokens)", "weights * (ahead >= 0)"))
_add(
    "multi-token end",
    HEAD,
    "softmax kept",
    ("row_weights = column_weights.sum(1)", "row_weights = weights.sum().expand(tokens)"),
)
_add("FP8 head's scales", FP8_HEAD, "the input's twice as large", ("X_SCALE = 100 / 448", "X_SCALE = 200 / 448"))
_add("FP8 head's scales", FP8_HEAD, "the weights' half as large", ("W_SCALE = 1.6 / 448", "W_SCALE = 0.8 / 448"))
_add("FP8 head's scales", FP8_HEAD, "the gradient's 1 / 448", ("GRAD_SCALE = 0.75 / 448", "GRAD_SCALE = 1 / 448"))
_add("FP8 head", HEAD, "the gradient as e4m3", ("grad_scale, torch.float8_e5m2", "grad_scale, torch.float8_e4m3fn"))
_add(
    "FP8 head", HEAD, "logits not rounded", ("torch.bfloat16 if fp8 else x.dtype", "torch.float32 if fp8 else x.dtype")
)
_add("evaluation loss", HEAD, "a sum", ("**constants)[0] / x.shape[0]", "**constants)[0]"))
