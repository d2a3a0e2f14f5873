"""The mutations: one line each of mechanism, what is changed, and where."""

from __future__ import annotations

from dataclasses import dataclass

SPEEDRUN = "nanogpt/models/speedrun.py"
RECORD89 = "nanogpt/models/record89.py"
RECORD = "nanogpt/models/record.py"
GPT2 = "nanogpt/models/gpt2.py"
EMBEDDING = "nanogpt/layers/embedding.py"
NORM = "nanogpt/layers/norm.py"
ROTARY = "nanogpt/layers/rotary.py"
ATTENTION = "nanogpt/kernels/attention_plain.py"
HEADS = "nanogpt/layers/attention.py"
CONNECTIONS = "nanogpt/layers/dense_connections.py"
MIXING = "nanogpt/kernels/head_mixing.py"
FP8_MLP = "nanogpt/kernels/fp8_mlp.py"
FP8_SCALES = "nanogpt/layers/fp8_mlp.py"
PREFIXES = "nanogpt/data/prefixes.py"
RECIPE89 = "recipes/record89.yaml"
HEAD = "nanogpt/kernels/cross_entropy.py"
MLP = "nanogpt/kernels/relu_squared_mlp.py"
ADAM = "nanogpt/optim/adam.py"
ADAMW = "nanogpt/optim/adamw.py"
NORMUON = "nanogpt/optim/normuon.py"
POLAR = "nanogpt/optim/polar_express.py"
OPTIMIZER = "nanogpt/optim/normuon_adam.py"
PLAN = "nanogpt/optim/plan.py"
SCHEDULE = "nanogpt/training/schedule.py"
TRAINER = "nanogpt/training/trainer.py"
MICRO_STEP = "nanogpt/training/micro_step.py"
ROWS = "nanogpt/kernels/row_gradients.py"
BATCHES = "nanogpt/data/batches.py"
DOCUMENTS = "nanogpt/data/documents_index.py"
RECIPE = "recipes/speedrun.yaml"

_TESTS: dict[str, tuple[str, ...]] = {
    SPEEDRUN: ("tests/models/test_speedrun.py",),
    RECORD89: ("tests/models/test_record89.py", "tests/optim/test_record89_steps.py"),
    RECORD: (
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
        "tests/training/test_micro_step.py",
    ),
    HEADS: (
        "tests/layers/test_attention_layer.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    CONNECTIONS: ("tests/models/test_record89.py",),
    MIXING: ("tests/kernels/test_head_mixing.py", "tests/models/test_record89.py"),
    FP8_MLP: ("tests/layers/test_fp8_mlp.py",),
    FP8_SCALES: ("tests/layers/test_fp8_mlp.py",),
    PREFIXES: ("tests/data/test_prefixes.py",),
    GPT2: ("tests/models/test_gpt2.py",),
    EMBEDDING: (
        "tests/layers/test_embedding.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    NORM: ("tests/layers/test_norm.py",),
    ROTARY: ("tests/layers/test_rotary.py", "tests/models/test_speedrun.py"),
    ATTENTION: ("tests/kernels/test_attention.py", "tests/models/test_speedrun.py"),
    HEAD: (
        "tests/kernels/test_cross_entropy.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    MLP: ("tests/models/test_speedrun.py", "tests/layers/test_fp8_mlp.py"),
    ADAM: ("tests/optim/test_adam.py", "tests/optim/test_normuon_adam.py"),
    ADAMW: ("tests/optim/test_adamw.py",),
    NORMUON: ("tests/optim/test_normuon.py", "tests/optim/test_normuon_adam.py"),
    POLAR: ("tests/optim/test_polar_express.py", "tests/optim/test_normuon.py"),
    OPTIMIZER: ("tests/optim/test_normuon_adam.py",),
    PLAN: ("tests/optim/test_normuon_adam.py",),
    SCHEDULE: ("tests/training/test_schedule.py", "tests/training/test_schedule_record89.py"),
    TRAINER: (
        "tests/optim/test_micro_steps.py",
        "tests/training/test_trainer.py::test_each_stage_brings_its_batch_windows_weights_and_yarn",
    ),
    MICRO_STEP: ("tests/training/test_micro_step.py", "tests/optim/test_micro_steps.py"),
    ROWS: ("tests/kernels/test_row_gradients.py", "tests/training/test_micro_step.py"),
    BATCHES: ("tests/data/test_batches.py",),
    DOCUMENTS: ("tests/data/test_batches.py",),
    RECIPE89: (
        "tests/models/test_record89.py",
        "tests/training/test_schedule_record89.py",
        "tests/optim/test_record89_steps.py",
    ),
    RECIPE: (
        "tests/models/test_speedrun.py",
        "tests/layers",
        "tests/training/test_schedule.py",
        "tests/optim/test_normuon_adam.py",
        "tests/optim/test_polar_express.py",
    ),
}


@dataclass(frozen=True)
class Mutation:
    """One formula changed: texts of a file that each occur once, and what they become."""

    mechanism: str
    what: str
    file: str
    changes: tuple[tuple[str, str], ...]

    @property
    def tests(self) -> tuple[str, ...]:
        """The test files that must notice."""
        return _TESTS[self.file]


MUTATIONS: list[Mutation] = []


def _add(mechanism: str, file: str, what: str, *changes: tuple[str, str]) -> None:
    MUTATIONS.append(Mutation(mechanism, what, file, changes))


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
_shifted = "shifted=layer in spec.long_window_layers"
_add("key shift", SPEEDRUN, "none", (_shifted, "shifted=False"))
_add("key shift", SPEEDRUN, "in every unpaired layer", (_shifted, "shifted=not paired"))
_add("key shift", ROTARY, "from the token after", ("cat((still[:1], still[:-1]))", "cat((still[1:], still[-1:]))"))
_add("key shift", ROTARY, "token 0 gets zeros", ("cat((still[:1],", "cat((0 * still[:1],"))
_add("key shift", ROTARY, "all channels", ("cat((k[..., :rotated],", "cat((torch.cat((k[:1], k[:-1]))[..., :rotated],"))
_joined = "x.reshape(2 * count, heads // 2, head_dim)"
_add(
    "paired interleaving",
    HEADS,
    "rows hold even and odd heads",
    (
        _joined,
        "x.reshape(count, heads // 2, 2, head_dim).transpose(1, 2).reshape(2 * count, heads // 2, head_dim)",
    ),
)
_add(
    "paired interleaving",
    ROTARY,
    "heads 0, 1, 2 at 2t and 3, 4, 5 at 2t + 1",
    ("self.cos[: 2 * tokens].view(tokens, 1, 2, rotated)", "self.cos[: 2 * tokens].view(tokens, 2, 1, rotated)"),
    ("signed_sin[: 2 * tokens].view(tokens, 1, 2, rotated)", "signed_sin[: 2 * tokens].view(tokens, 2, 1, rotated)"),
    ("x.view(tokens, heads // 2, 2, head_dim)", "x.view(tokens, 2, heads // 2, head_dim)"),
)
_add("paired rotation", HEADS, "unpaired positions", ("rotary(norm(q), paired=paired)", "rotary(norm(q))"))
_add("attention scale", SPEEDRUN, "1/sqrt(head)", ("scale=self.attention_scale(),", "scale=head_dim**-0.5,"))
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
    ("swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)", "swapped = turned.roll(rotated // 2, -1)"),
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
    EMBEDDING,
    "multipliers swapped",
    ("(multipliers[0] * wide[1:])", "(multipliers[1] * wide[1:])"),
    ("(multipliers[1] * wide[:-1])", "(multipliers[0] * wide[:-1])"),
)
_add("bigram hash", EMBEDDING, "sum for xor", ("wide[1:]).bitwise_xor(", "wide[1:]).add("))
_add("bigram hash", EMBEDDING, "modulo all rows", ("% (rows - 1)", "% rows"))
_add("bigram hash", EMBEDDING, "token 0 takes row 0", ("new_full((1,), rows - 1)", "new_full((1,), 0)"))
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
_add("value embeddings", RECORD, "tables in reverse order", ("in tables.unbind())", "in tables.flip(0).unbind())"))
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
        "            self.lm_head,\n            batch.targets,\n            token_weights,",
        "            self.lm_head[:, : self.spec.vocab_size],\n            batch.targets,\n            token_weights,",
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
_add("evaluation loss", HEAD, "a sum", ("fp8=False)[0] / x.shape[0]", "fp8=False)[0]"))

# --- Adam ---

_add("Adam bias correction", ADAM, "no root", ("math.sqrt(1 - betas[1] ** count)", "(1 - betas[1] ** count)"))
_add("Adam bias correction", ADAM, "none of the mean", (" / (1 - betas[0] ** count)", ""))
_add(
    "Adam bias correction",
    OPTIMIZER,
    "count from 0 after the split",
    ("self.adam_counts[TIED] = self.adam_counts[HEAD]", "self.adam_counts[TIED] = 0"),
)
_add("Adam eps", ADAM, "inside the root", ("(exp_avg_sq.sqrt() + eps)", "(exp_avg_sq + eps).sqrt()"))
_add("Adam eps", ADAM, "none", ("(exp_avg_sq.sqrt() + eps)", "exp_avg_sq.sqrt().clamp(min=1e-37)"))
_add(
    "Adam moments",
    ADAM,
    "betas swapped",
    ("exp_avg.mul_(betas[0]).add_(g, alpha=1 - betas[0])", "exp_avg.mul_(betas[1]).add_(g, alpha=1 - betas[1])"),
)
_add(
    "Adam decay mask",
    ADAM,
    "always",
    ("torch.where(update * weight > 0, update + weight * decay, update)", "update + weight * decay"),
)
_add("Adam decay mask", ADAM, "where signs differ", ("update * weight > 0", "update * weight < 0"))
_add("Adam decay mask", ADAM, "also without update", ("update * weight > 0", "update * weight >= 0"))
_add("Adam decay", OPTIMIZER, "lr, not lr squared", ("torch.tensor(lr * lr * adam", "torch.tensor(lr * adam"))
_add("weight-decay multipliers", OPTIMIZER, "ignored", (" * group.wd_mul)", ")"))
_add("learning-rate multipliers", OPTIMIZER, "ignored", ("adam.lr * group.lr_mul * rates", "adam.lr * rates"))
_add("Adam learning rate", OPTIMIZER, "no schedule", ("group.lr_mul * rates.lr_factor", "group.lr_mul"))
_add(
    "Adam rounding",
    ADAM,
    "truncated to bf16",
    (
        "parameter.copy_(weight - update)",
        "kept = 16 if parameter.dtype == torch.bfloat16 else 0\n"
        "    parameter.copy_(((weight - update).view(torch.int32) >> kept << kept).view(torch.float32))",
    ),
)

# --- NorMuon ---

_add("NorMuon momentum", NORMUON, "weights swapped", ("(g - momentum) * (1 - mu)", "(g - momentum) * mu"))
_add("Nesterov", NORMUON, "none", ("return g + (momentum - g) * mu", "return momentum.clone()"))
_add(
    "NorMuon decay mask",
    NORMUON,
    "always",
    ("torch.where(x * weight >= 0, weight * decay, torch.zeros_like(weight))", "weight * decay"),
)
_add("NorMuon decay mask", NORMUON, "where signs differ", ("x * weight >= 0", "x * weight <= 0"))
_add("NorMuon decay mask", NORMUON, "not without update", ("x * weight >= 0", "x * weight > 0"))
_add(
    "NorMuon decay",
    NORMUON,
    "not times the step size",
    ("weight - step_size * (x + decayed)", "weight - step_size * x - decayed"),
)
_add("NorMuon decay", OPTIMIZER, "not times lr", ("normuon.weight_decay * lr", "normuon.weight_decay"))
_add("NorMuon learning rate", OPTIMIZER, "no schedule", ("lr = normuon.lr * rates.lr_factor", "lr = normuon.lr"))
_add("NorMuon multipliers", OPTIMIZER, "no sqrt(rows / columns)", ("math.sqrt(max(1.0, rows / columns))", "1.0"))
_add(
    "NorMuon multipliers",
    OPTIMIZER,
    "every shard starts with up",
    ("muls[(first + i) % len(muls)]", "muls[i % len(muls)]"),
)
_add(
    "bank layout",
    OPTIMIZER,
    "attn as (10, 3072, 768)",
    ('rows = width if label == "attn" else full.shape[-2]', "rows = full.shape[-2]"),
)
_add("mantissa", NORMUON, "rounded, not truncated", ("(bits >> 16)", "((bits + 0x8000) >> 16)"))
_add("mantissa", NORMUON, "low bits lost", ("    mantissa.copy_(lower)", "    mantissa.zero_()"))
_add("mantissa", NORMUON, "low half sign-extended", ("(mantissa.to(torch.int32) & 0xFFFF)", "mantissa.to(torch.int32)"))
_add("Polar Express", POLAR, "coefficients in reverse order", ("in coefficients:", "in reversed(coefficients):"))
_add("Polar Express", POLAR, "one iteration fewer", ("in coefficients:", "in coefficients[:-1]:"))
_add("Polar Express", POLAR, "b and c swapped", ("for a, b, c in", "for a, c, b in"))
_add("norm margin", POLAR, "none", ("length * norm_margin", "length"))
_add("norm floor", POLAR, "none", ("NORM_FLOOR = 1e-6", "NORM_FLOOR = 1e-30"))
_add(
    "variance reduction",
    NORMUON,
    "other dimension for tall matrices",
    ("return -1 if", "return -2 if"),
    ("else -2\n", "else -1\n"),
)
_add("variance reduction", NORMUON, "square matrices by columns", ("shape[-2] >= shape[-1]", "shape[-2] > shape[-1]"))
_add(
    "variance reduction", NORMUON, "norm not restored", ("(scaled * (old_norm / new_norm.clamp(min=FLOOR)))", "scaled")
)
_add("variance reduction", NORMUON, "beta2 for 1 - beta2", ("keepdim=True), 1 - beta2)", "keepdim=True), beta2)"))
_add("variance reduction", NORMUON, "a sum of squares", (".square().mean(", ".square().sum("))
_add("variance reduction", NORMUON, "no floor", ("FLOOR = 1e-10", "FLOOR = 1e-38"))
_add("variance reduction", NORMUON, "none", ("scaled = wide * second_moment.clamp(min=FLOOR).rsqrt()", "scaled = wide"))

# --- tied head, odd steps ---

_add(
    "tied head",
    OPTIMIZER,
    "embed's gradient not added",
    ("            transpose_add(self._gradient(TIED), self._gradient(HEAD))\n", "            pass\n"),
)
_add(
    "tied head",
    OPTIMIZER,
    "embed not refreshed",
    ("transpose_copy(self.parameters[HEAD].data, self.parameters[TIED].data)", "pass"),
)
_add("tied head", OPTIMIZER, "embed's gradient not cleared", ("            self._clear(TIED)\n", ""))
_add("split", OPTIMIZER, "never", ("if rates.split:", "if False:"))
_add(
    "split",
    OPTIMIZER,
    "moments not handed over",
    ("transposed = full.mT.contiguous()", "transposed = 0 * full.mT.contiguous()"),
)
_add(
    "split",
    OPTIMIZER,
    "before the update",
    (
        "        reductions = {",
        "        if rates.split:\n            self._split()\n"
        "            plan = step_plan(self.spec, adam_step=rates.adam_step, tied=self.tied)\n"
        "        reductions = {",
    ),
)
_add("split step", SCHEDULE, "the stage's first step", ("while not self.is_adam_step(step):", "while False:"))
_add("odd steps", SCHEDULE, "even steps", ("== self.adam_every - 1", "== 0"))
_add(
    "odd steps",
    PLAN,
    "Adam every step",
    ("plans[label].bank or (adam_step and not", "plans[label].bank or (True and not"),
)
_add(
    "gradient summing",
    OPTIMIZER,
    "cleared every step",
    (
        "        for gather in gathers.values():",
        "        for p in self.parameters.values():\n            p.grad = None\n"
        "        for gather in gathers.values():",
    ),
)
_add(
    "gradient summing",
    OPTIMIZER,
    "averaged over two steps",
    (
        "[reductions.pop(label).wait() for",
        "[reductions.pop(label).wait() / (1 if self.plans[label].bank else 2) for",
    ),
)
_add(
    "gradient clearing",
    OPTIMIZER,
    "banks' kept",
    (
        "                self._clear(p.label)\n",
        "                if not p.bank:\n                    self._clear(p.label)\n",
    ),
)
_add("gradient scale", MICRO_STEP, "none", ("(loss * self.grad_scale).backward()", "loss.backward()"))
_add(
    "gradient scale",
    TRAINER,
    "1/accumulation twice",
    ("grad_scale=1 / spec.accumulation_steps", "grad_scale=1 / spec.accumulation_steps**2"),
)
_add(
    "tables' gradients",
    MICRO_STEP,
    "of the first rows",
    ("look_up.part(look_up.parameter.grad)", "look_up.parameter.grad"),
)
_add(
    "tables' gradients",
    MICRO_STEP,
    "one order for all",
    ("orders.get(id(look_up.rows))", "next(iter(orders.values()), None)"),
)
_add("tables' gradients", ROWS, "not added to what is there", ("total.add_(table)", "total"))
_add(
    "tables' gradients", RECORD, "first table for all", ("tokens, first, rows) for first", "tokens, 0, rows) for first")
)

# --- schedule ---

_add(
    "momentum schedule",
    SCHEDULE,
    "one step ahead at the start",
    ("* step / m.warmup_steps", "* (step + 1) / m.warmup_steps"),
)
_add("momentum schedule", SCHEDULE, "constant at the start", ("if step < m.warmup_steps:", "if False:"))
_add("momentum schedule", SCHEDULE, "constant at the end", ("if step > cooldown:", "if False:"))
_add(
    "momentum schedule",
    SCHEDULE,
    "one step late at the end",
    ("* (step - cooldown) / m", "* (step - cooldown - 1) / m"),
)
_add(
    "cooldown",
    SCHEDULE,
    "start rounded up",
    ("int(scheduled * schedule.cooldown_start)", "math.ceil(scheduled * schedule.cooldown_start)"),
)
_add("cooldown", SCHEDULE, "to zero", ("factor * (1 - t) + schedule.end_factor * t", "factor * (1 - t)"))
_add(
    "cooldown",
    SCHEDULE,
    "ends with the extension",
    ("scheduled = self.training.scheduled_steps", "scheduled = self.total_steps"),
)
_add("cooldown", SCHEDULE, "from 1, not from the stage's factor", ("factor * (1 - t)", "(1 - t)"))
_add("stage boundaries", SCHEDULE, "one step late", ("if first <= step)", "if first < step or first == 0)"))
_add(
    "batch sizes",
    SCHEDULE,
    "the first stage's",
    ("batch_tokens=stage.batch_tokens,", "batch_tokens=self.stages[0].batch_tokens,"),
)
_add("windows", SCHEDULE, "in blocks, not tokens", ("blocks.long * self.training.window_block", "blocks.long"))
_add(
    "window changes",
    SCHEDULE,
    "one stage late",
    ("self.stages[: self.stage_of(step) + 1]", "self.stages[: self.stage_of(step)]"),
)
_add(
    "final windows",
    SCHEDULE,
    "the extension's",
    ("self._tokens(self.training.final_window_blocks)", "self._tokens(self.stages[-1].window_blocks)"),
)
_add("multi-token schedule", SCHEDULE, "constant", ("* (1 - progress))", "* 1)"))
_add(
    "multi-token schedule",
    SCHEDULE,
    "all weights fall",
    ("(*stage.token_weights[:-1],", "(*(w * (1 - progress) for w in stage.token_weights[:-1]),"),
)
_add(
    "multi-token schedule",
    SCHEDULE,
    "over the whole run",
    ("progress = (step - self.first_steps[index]) / stage.steps", "progress = step / self.total_steps"),
)
_add("warm-up steps", SCHEDULE, "not the step before a change", ("{first - 1, first, first + 1}", "{first, first + 1}"))

_growths = "for old, new in self.schedule.window_changes(settings.step)[done:]:"
_add("YaRN at stage changes", TRAINER, "none", (_growths, _growths.replace("[done:]", "[:0]")))
_add("YaRN at stage changes", TRAINER, "again every step", (_growths, _growths.replace("[done:]", "")))
_add(
    "final windows",
    TRAINER,
    "the extension's",
    ("self.schedule.total_steps, self.schedule.final_windows)", "self.schedule.total_steps, settings.windows)"),
)

# --- data ---

_add("document cut", DOCUMENTS, "none", ("np.minimum(ends - starts, max_document)", "ends - starts"))
_add("slot size", DOCUMENTS, "no token for the last target", ("wanted = taken + tokens + 1", "wanted = taken + tokens"))
_add("slots", DOCUMENTS, "the rest of a document is used", ("bounds.append(last + 1)", "bounds.append(last)"))
_add(
    "shard ends",
    DOCUMENTS,
    "last document dropped",
    (
        "ends = np.append(starts[document + 1 : last], self.count)",
        "last, ends = last - 1, starts[document + 1 : last]",
    ),
)
_add(
    "shard ends",
    BATCHES,
    "next shard's first document skipped",
    ("position._replace(shard=shard, document=0)", "position._replace(shard=shard, document=1)"),
)
_add(
    "slots of ranks",
    BATCHES,
    "in blocks",
    ("range(rank, slots, world_size)", "range(rank * slots // world_size, (rank + 1) * slots // world_size)"),
)
_add(
    "cu_seqlens",
    BATCHES,
    "length rounded down",
    ("max(128, -(-(tokens // 300) // 128) * 128)", "max(128, tokens // 300 // 128 * 128)"),
)
_add("cu_seqlens", BATCHES, "last end beyond T", ("np.minimum(ends[:fitting], tokens)", "ends[:fitting]"))
_add("cu_seqlens", BATCHES, "too many documents pass", ("if documents > room:", "if documents > room + 1:"))
_add("targets", BATCHES, "the inputs themselves", ("targets[row] = piece[1:]", "targets[row] = piece[:-1]"))
_add(
    "validation",
    BATCHES,
    "pieces overlap",
    (
        "own = stream[first : first + micro_batch_tokens + 1]",
        "own = stream[max(first - 1, 0) :][: micro_batch_tokens + 1]",
    ),
)
_add(
    "validation",
    BATCHES,
    "pieces in blocks a rank",
    ("piece % world_size == rank", "piece * world_size * micro_batch_tokens // tokens == rank"),
)
_add(
    "validation",
    BATCHES,
    "a boundary after the BOS",
    ("np.flatnonzero(own[1:-1] == bos) + 1", "np.flatnonzero(own[:-2] == bos) + 1"),
)

# --- the recipe's constants ---

for _mechanism, _old, _new in (
    ("layers: long windows", "long_window_layers: [3, 10]", "long_window_layers: [4, 10]"),
    ("layers: paired", "paired_layers: [0, 2, 5, 9]", "paired_layers: [0, 2, 4, 9]"),
    ("layers: value embeddings", "value_embed_layers: [0, 1, 8, 9, 10]", "value_embed_layers: [0, 1, 7, 9, 10]"),
    ("layers: skip", "from_layer: 3", "from_layer: 2"),
    ("layers: backout", "backout_layer: 7", "backout_layer: 8"),
    ("bigram hash", "[36313, 27191]", "[27191, 36313]"),
    ("attention scale", "attention_scale: 0.1", "attention_scale: 0.12"),
    ("rotary base", "base: 1024", "base: 10000"),
    ("YaRN", "yarn_high: 32", "yarn_high: 16"),
    ("YaRN", "yarn_temperature: 0.2", "yarn_temperature: 0.1"),
    ("softcap", "{cap: 23, shift: 5, scale: 7.5}", "{cap: 30, shift: 5, scale: 7.5}"),
    ("softcap", "{cap: 23, shift: 5, scale: 7.5}", "{cap: 23, shift: 5, scale: 8}"),
    ("initial values", "residual: 1.1", "residual: 1.0"),
    ("initial values", "skip: -1.5}", "skip: 1.5}"),
    ("initial values", "init_bound: 0.5", "init_bound: 1"),
    ("Adam lr", "lr: 0.008", "lr: 0.004"),
    ("Adam weight decay", "weight_decay: 0.005", "weight_decay: 0.01"),
    ("Adam betas", "x0_lambdas: {betas: [0.65, 0.95]", "x0_lambdas: {betas: [0.9, 0.95]"),
    ("lr multipliers", "smear_gate: {betas: [0.9, 0.99], lr_mul: 0.01", "smear_gate: {betas: [0.9, 0.99], lr_mul: 1"),
    (
        "weight-decay multipliers",
        "embed: {betas: [0.5, 0.95], lr_mul: 1, wd_mul: 150, communication: sharded}\n  normuon",
        "embed: {betas: [0.5, 0.95], lr_mul: 1, wd_mul: 15, communication: sharded}\n  normuon",
    ),
    ("NorMuon lr", "lr: 0.023", "lr: 0.03"),
    ("NorMuon beta2", "beta2: 0.95", "beta2: 0.9"),
    ("NorMuon weight decay", "weight_decay: 1.2", "weight_decay: 1.0"),
    ("norm margin", "norm_margin: 1.02", "norm_margin: 1.0"),
    ("Polar Express", "8.156554524902461", "8.156554524902"),
    ("NorMuon multipliers", "mlp: {lr_muls: [1, 2]", "mlp: {lr_muls: [2, 1]"),
    ("split step", "split_stage: 2", "split_stage: 1"),
    ("stages", "window_blocks: {short: 5, long: 11}", "window_blocks: {short: 5, long: 10}"),
    ("stages", "lr_factor: 1.52", "lr_factor: 1.5"),
    ("final windows", "{short: 6, long: 20}", "{short: 6, long: 13}"),
    ("cooldown", "cooldown_start: 0.45", "cooldown_start: 0.5"),
    ("momentum schedule", "cooldown_steps: 50", "cooldown_steps: 40"),
):
    _add(_mechanism, RECIPE, f"`{_old.splitlines()[0]}` becomes `{_new.splitlines()[0]}`", (_old, _new))

# --- the baseline ---

_add(
    "GPT-2 positions",
    GPT2,
    "do not restart at documents",
    ("(index - cu_seqlens[document]) % context", "index % context"),
)
_add(
    "GPT-2 documents",
    GPT2,
    "not cut at the context",
    ("x = block(x, pieces, windows.long)", "x = block(x, cu_seqlens, windows.long)"),
)
_add(
    "GPT-2 pieces",
    GPT2,
    "see one another",
    (
        'bounds.scatter_reduce(0, piece, index.to(torch.int32), "amin")',
        "bounds.index_fill(0, bounds.new_zeros(1, dtype=torch.long), 0)",
    ),
)
_add("GPT-2 attention", GPT2, "scale", ("scale=1 / math.sqrt(d // heads)", "scale=1 / math.sqrt(d)"))
_add("GPT-2 GELU", GPT2, "exact", (', approximate="tanh"', ""))
_add(
    "GPT-2 head",
    GPT2,
    "not in the gradient",
    ("logits = x @ self.embed.weight.mT", "logits = x @ self.embed.weight.detach().mT"),
)
_add("GPT-2 start", GPT2, "residual matrices not smaller", ("std /= math.sqrt(2 * self.spec.layers)", "pass"))
_add(
    "AdamW decay",
    ADAMW,
    "of everything",
    ('if p.ndim < 2], "weight_decay": 0.0', 'if p.ndim < 2], "weight_decay": spec.weight_decay'),
)
_add("AdamW clipping", ADAMW, "none", ("if self.spec.clip_norm is not None:", "if False:"))
_add("AdamW learning rate", ADAMW, "no schedule", ("self.spec.lr * rates.lr_factor", "self.spec.lr"))

# --- record 89: gates and connections ---

_add("MUDD nets", CONNECTIONS, "tanh gelu", ("F.gelu(x @ w1.mT)", 'F.gelu(x @ w1.mT, approximate="tanh")'))
_add("MUDD nets", CONNECTIONS, "ReLU", ("F.gelu(x @ w1.mT)", "F.relu(x @ w1.mT)"))
_add("MUDD nets", CONNECTIONS, "bias not scaled", ("w2.mT + bias)", "w2.mT) + bias"), ("scale * (F.", "(scale * F."))
_add("MUDD nets", RECORD89, "one net for both", ("self.mudd_w1[net], w2[:count]", "self.mudd_w1[0], w2[:count]"))
_add("MUDD nets", RECORD89, "scale of 1", ("bias[:count], self.spec.mudd.scale)", "bias[:count], 1.0)"))
_add("gate nets", RECORD89, "constant scale", ("self.mudd_gate_scale.to(x.dtype)", "0.1 + 0 * self.mudd_gate_scale"))
_add("gate nets", RECORD89, "x0 for the late ones", ("gates |= self._gates(x, late", "gates |= self._gates(x0, late"))
_add(
    "gate nets",
    RECORD89,
    "late ones read a norm",
    ("gates |= self._gates(x, late", "gates |= self._gates(norm(x), late"),
)
_add("gate nets", RECORD89, "early ones read x", ("self._gates(x0, late=False)", "self._gates(2 * x0, late=False)"))
_add(
    "gate columns",
    RECORD89,
    "bigram before x0",
    ('[(("x0", layer), 1, 0.0), (("bigram"', '[(("bigram", layer), 1, start.bigram_gate), (("x0"'),
    (", layer), 1, start.bigram_gate)]\n        if late", ", layer), 1, 0.0)]\n        if late"),
)
_add(
    "gate columns",
    RECORD89,
    "split one layer late",
    ("(layer > spec.skip.from_layer) == late]", "(layer > spec.skip.from_layer + 1) == late]"),
    (
        "layer == spec.skip.from_layer + 1:\n                skipped",
        "layer == spec.skip.from_layer + 2:\n                skipped",
    ),
)
_add(
    "start of the residual", RECORD89, "no bigram", ('x0 + gates["bigram", 0] * bigram', 'x0 + 0 * gates["bigram", 0]')
)
_add("saved start", RECORD89, "x0 for it", ("(start, saved, x))", "(x0, saved, x))"))
_add("bigrams", RECORD89, "in layer 0 twice", ("if layer > 0:  # it is", "if layer >= 0:  # it is"))
_add("bigrams", RECORD89, "no signs", ("embedded.bigrams * bigram_sign(", "embedded.bigrams + 0 * bigram_sign("))
_add("bigram signs", EMBEDDING, "from the sum", ("tokens[1:].bitwise_xor(tokens[:-1])", "(tokens[1:] + tokens[:-1])"))
_add(
    "bigram signs",
    EMBEDDING,
    "token 0 takes the last",
    ("cat((row.new_zeros(1)", "cat((row.new_full((1,), -1) % signs.shape[0]"),
)
_add(
    "bigram signs",
    RECORD89,
    "zeros and ones",
    ("self.bigram_signs.copy_(2 * signs - 1)", "self.bigram_signs.copy_(signs)"),
)
_add(
    "x0 after attention",
    RECORD89,
    "before it",
    (
        "                u = norm(x) if layer",
        '                x = x + gates["x0", layer] * x0\n                u = norm(x) if layer',
    ),
    (' * y + gates["x0", layer] * x0', " * y"),
)
_add("residual lambdas", RECORD89, "attention's for the MLP", ("resid[layer, 1] * x", "resid[layer, 0] * x"))
_add("post lambdas", RECORD89, "the MLP's for attention", ("post[layer, 0] * y", "post[layer, 1] * y"))
_add(
    "residual lambdas",
    RECORD89,
    "also in the skip's layer",
    ("x = x + torch.sigmoid(skip_scale)", "x = resid[layer, 0] * x + torch.sigmoid(skip_scale)"),
)
_add("skip", RECORD89, "no sigmoid of its scalar", ("torch.sigmoid(skip_scale) * gates", "skip_scale * gates"))
_add(
    "saved activation",
    RECORD89,
    "the running residual",
    ("if layer <= spec.saved_layer else attended", "if layer <= self.last else attended"),
)
_add(
    "saved activation",
    RECORD89,
    "one layer late",
    ("if layer == spec.saved_layer:", "if layer == spec.saved_layer + 1:"),
)
_add("saved activation", RECORD89, "not normalised", ("attended = norm(x)", "attended = x"))
_add(
    "saved activation",
    RECORD89,
    "last layer reads its input",
    ("y = attention(last, attended,", "y = attention(last, norm(x),"),
)
_add("values of the last layer", RECORD89, "nothing added", ("if value_add is not None:", "if False:"))
_value_add = "weighted_sum(mu[0:3], (start, saved, x))"
_mixed = "weighted_sum((1 + mu[5], *mu[3:5]), (x, start, saved))"
_add(
    "values of the last layer",
    RECORD89,
    "after x has changed",
    (
        f"value_add = {_value_add}\n        x = {_mixed}",
        f"x = {_mixed}\n        value_add = {_value_add}",
    ),
)
_add("last value gate", RECORD89, "halves swapped", ("torch.cat(mu[6:8], dim=1)", "torch.cat((mu[7], mu[6]), dim=1)"))
_add(
    "last value gate",
    RECORD89,
    "heads in turn",
    ("value_gates.repeat_interleave(heads // 2, dim=1)", "value_gates.repeat(1, heads // 2)"),
)
_add(
    "last value gate", RECORD89, "a sigmoid", ("gate = value_gates.repeat", "gate = torch.sigmoid(value_gates).repeat")
)
_add("connections into the last layer", RECORD89, "no 1 +", ("(1 + mu[5], *mu[3:5])", "(mu[5], *mu[3:5])"))
_add(
    "connections into the last layer",
    RECORD89,
    "x0 for the start",
    ("mu[8:12], (x, y, start, bigram)", "mu[8:12], (x, y, x0, bigram)"),
)
_add(
    "connections into the last layer",
    RECORD89,
    "MLP's weights swapped",
    ("mu[12:14], (x, mlp(last, norm(x)))", "mu[12:14], (mlp(last, norm(x)), x)"),
)
_add(
    "connections after the last layer",
    RECORD89,
    "none",
    ("x = x + weighted_sum(mu, (start", "x = x + 0 * weighted_sum(mu, (start"),
)
_add(
    "connections after the last layer",
    RECORD89,
    "the second value table",
    ("before, tables[0], skipped", "before, tables[1], skipped"),
)
_add(
    "connections after the last layer",
    RECORD89,
    "the last layer's input changed",
    (
        "        before = x\n        mu = self._connections(0, x, CONNECTIONS_INTO_LAST)",
        "        mu = self._connections(0, x, CONNECTIONS_INTO_LAST)",
    ),
    ("        y = attention(last, attended,", "        before = x\n        y = attention(last, attended,"),
)
_add(
    "final norm", RECORD89, "none", ("        return norm(x)\n\n    def _scaled", "        return x\n\n    def _scaled")
)
_add("backout start", RECORD89, "added", ("-start.backout, 0.0", "start.backout, 0.0"))
_add(
    "bias starts",
    RECORD89,
    "not divided by the scale",
    ("torch.tensor(starts) / spec.mudd.scale)\n        for late", "torch.tensor(starts))\n        for late"),
)

# --- record 89: attention ---

_add(
    "value gates",
    EMBEDDING,
    "of the input alone",
    ("torch.cat((u[:, :half], value_embedding[:, :half]), dim=1)", "u[:, : 2 * half]"),
)
_add("value gates", RECORD89, "not doubled", ("gate = 2 * value_gate(", "gate = value_gate("))
_add("bank layout", RECORD89, "k before q", ("q, k, v = (u @", "k, q, v = (u @"))
_add("bank layout", RECORD89, "o before v", ("v, o = vo.chunk(2)", "o, v = vo.chunk(2)"))
_add(
    "bank layout",
    RECORD89,
    "padding first",
    ("self.qk[: self.spec.heads * count]", "self.qk[-self.spec.heads * count :]"),
)
_add(
    "bank layout",
    RECORD89,
    "matrices of one head",
    ('matrix(matrices["qk"], 2 * spec.head_dim, d)', 'matrix(2 * matrices["qk"], spec.head_dim, d)'),
    ("self.qk[: self.spec.heads * count]", "self.qk[: 2 * self.spec.heads * count]"),
)
_add("attention scalars", RECORD89, "out is in", ("scale_out * o", "scale_in * o"))
_add("XSA", HEADS, "no tanh", ("share = torch.tanh(strength)", "share = strength"))
_add(
    "XSA",
    HEADS,
    "own value by its length",
    (".square().sum(-1, keepdim=True).clamp(min=XSA_FLOOR)", ".norm(dim=-1, keepdim=True).clamp(min=XSA_FLOOR)"),
)
_add("XSA", HEADS, "added", ("(wide_y - share", "(wide_y + share"))
_add("XSA", HEADS, "floor of 1e-12", ("XSA_FLOOR = 1e-8", "XSA_FLOOR = 1e-12"))
_add(
    "output gate",
    RECORD89,
    "a sigmoid",
    ('y * gates["output", layer].unsqueeze(-1)', 'y * gates["output", layer].sigmoid().unsqueeze(-1)'),
)
_add(
    "output gate",
    RECORD89,
    "in the last layer only",
    ("if layer in spec.output_gate_layers:", "if layer == self.last:"),
)
_add("DC weights", MIXING, "not normalised", ("return (wide * (wide.square()", "return (wide + 0 * (wide.square()"))
_add(
    "DC weights",
    MIXING,
    "normalised over tokens",
    ("square().mean(-1, keepdim=True) + WEIGHT_EPS", "square().mean(0, keepdim=True) + WEIGHT_EPS"),
)
_add("DC weights", MIXING, "eps of 1e-5", ("WEIGHT_EPS = 1e-6", "WEIGHT_EPS = 1e-5"))
_add(
    "DC weights",
    RECORD89,
    "w2 normalised too",
    (
        'normalized_weights(gates["dc_scores", layer]), gates["dc_output", layer]',
        'normalized_weights(gates["dc_scores", layer]), normalized_weights(gates["dc_output", layer])',
    ),
)
_add(
    "DC window",
    MIXING,
    "one token more",
    ("first_visible_key(cu_seqlens, q.shape[0], window - 1)", "first_visible_key(cu_seqlens, q.shape[0], window)"),
)
_add(
    "DC window",
    MIXING,
    "documents mix",
    (
        "self.hidden = (key > query) | (key < start)",
        "self.hidden = (key > query) | (key <= query - window) | (key < 0)",
    ),
)
_add("DC causality", MIXING, "sees the next token", ("(key > query) |", "(key > query + 1) |"))
_add("DC gradient", MIXING, "no scale", ("d_scores.to(narrow).to(wide) * scale", "d_scores.to(narrow).to(wide)"))
_add(
    "DC gradient",
    MIXING,
    "softmax's correction left out",
    ("(d_mixture[:, :, None] - d_mix[..., None])", "d_mixture[:, :, None]"),
)
_add(
    "DC gradient",
    MIXING,
    "keys of the block before forgotten",
    ("(own + torch.cat((before[1:], torch.zeros_like(before[:1]))))", "own"),
)
_add(
    "DC gradient",
    MIXING,
    "w2 of the rounded weights",
    ('torch.einsum("nqk,nqhk->nqh", mixture, d_weights)', 'torch.einsum("nqhk,nqhk->nqh", weights, d_weights)'),
)
_add(
    "DC rounding", MIXING, "weights not rounded", ("mixture[:, :, None]).to(q.dtype).to(wide)", "mixture[:, :, None])")
)
_add(
    "DC order",
    RECORD89,
    "before the key shift and rotary",
    ("y = mix_heads(y, q, k, v,", "y = mix_heads(y, q.flip(0), k, v,"),
)
_add(
    "DC scale",
    RECORD89,
    "1/sqrt(head)",
    ("window=window, scale=scale, plain=plain)", "window=window, scale=head_dim**-0.5, plain=plain)"),
)

# --- record 89: loss ---

_add(
    "prefix term",
    HEAD,
    "its softmax left out",
    ("row_weights = column_weights.sum(1)", "row_weights = column_weights[:, : len(weights)].sum(1)"),
)
_add(
    "prefix term",
    HEAD,
    "tokens without one count",
    ("(prefix_weight.to(wide) * (prefixes >= 0))", "(prefix_weight.to(wide) * (prefixes >= -1))"),
)
_add("prefix term", RECORD, "of the input", ("self.prefixes[batch.targets]", "self.prefixes[batch.inputs]"))
_add(
    "prefix table", PREFIXES, "the shortest", ("table[number] = open_prefixes[-1]", "table[number] = open_prefixes[0]")
)
_add(
    "prefix table",
    PREFIXES,
    "the neighbour in byte order",
    ("while open_prefixes and not token.startswith(tokens[open_prefixes[-1]]):", "while len(open_prefixes) > 1:"),
)
_add("prefix weight", SCHEDULE, "constant", ("(weight.last - weight.first) * progress", "0 * progress"))
_add(
    "stage limits",
    SCHEDULE,
    "documents as long as the run's",
    ("stage.max_document_tokens or self.training", "self.training"),
)
_add("stage limits", BATCHES, "room as by tokens", ("if max_documents is None else max_documents + 1", ""))

# --- record 89: 8-bit MLPs ---

_add(
    "8-bit activations",
    FP8_MLP,
    "scale of the input for the square",
    ("to_e4m3(post.float() / post_scale)", "to_e4m3(post.float() / u_scale)"),
)
_add("8-bit activations", FP8_MLP, "largest of 240", ("E4M3_MAX = 448.0", "E4M3_MAX = 240.0"))
_add(
    "8-bit input",
    FP8_MLP,
    "fixed scale",
    ("u_scale = current_scale(u.float())", "u_scale = 0.01 + 0 * current_scale(u.float())"),
)
_add(
    "8-bit backward",
    FP8_MLP,
    "the factor 2 forgotten",
    (
        "grad_pre = relu_squared_backward(grad, down, post, plain=ctx.plain)",
        "grad_pre = relu_squared_backward(grad, down, post, plain=ctx.plain) / 2",
    ),
)
_add(
    "8-bit backward",
    MLP,
    "square for root",
    (
        ".to(torch.promote_types(post.dtype, torch.float32)).sqrt()",
        ".to(torch.promote_types(post.dtype, torch.float32))",
    ),
)
_add("delayed scales", FP8_SCALES, "activation without headroom", ("self.spec.activation_headroom * peak", "peak"))
_add("delayed scales", FP8_SCALES, "weights without headroom", ("self.spec.weight_headroom * peaks", "peaks"))
_add("delayed scales", FP8_SCALES, "measured every time", ("if step < self.spec.bootstrap_steps:", "if True:"))
_add("delayed scales", FP8_SCALES, "no bootstrap", ("if step < self.spec.bootstrap_steps:", "if False:"))
_add(
    "delayed scales",
    FP8_SCALES,
    "one step later",
    ("if step < self.spec.bootstrap_steps:", "if step <= self.spec.bootstrap_steps:"),
)
_add(
    "delayed scales",
    FP8_SCALES,
    "up weights keep theirs",
    ('torch._foreach_copy_(self.scales("up_scale"), list(up_scale.float().unbind()))', "pass"),
)
_add("delayed scales", FP8_SCALES, "not restored", ("scale.fill_(value)", "pass"))
_buffer = 'self.register_buffer(f"{kind}_{layer}", torch.ones(()), persistent=False)'
_add("scales apart", FP8_SCALES, "slices of one tensor", (_buffer, _buffer.replace("ones(())", "ones(12)[layer]")))
_add("8-bit evaluation", RECORD89, "too", ("fp8 = training and self.fp8_mlp.active", "fp8 = self.fp8_mlp.active"))
_add("8-bit weights", RECORD89, "do not follow", ("self.fp8_mlp.follow(self.mlp, step)", "pass"))
_add(
    "8-bit weights",
    RECORD89,
    "not after a checkpoint",
    ("lambda model, _: model.fp8_mlp.reload(model.mlp)", "lambda model, _: None"),
)

# --- record 89: the recipe ---

_add("recipe", RECIPE89, "beta2", ("beta2: 0.9\n", "beta2: 0.95\n"))
_add("recipe", RECIPE89, "XSA layers", ("xsa_layers: [1, 3, 4, 7]", "xsa_layers: [1, 3, 4, 8]"))
_add(
    "recipe",
    RECIPE89,
    "value-embedding layers",
    ("value_embed_layers: [1, 2, 8, 9, 10]", "value_embed_layers: [0, 1, 8, 9, 10]"),
)
_add("recipe", RECIPE89, "DC window", ("dc_window: 112", "dc_window: 128"))
_add("recipe", RECIPE89, "cooldown", ("cooldown_start: 0.4,", "cooldown_start: 0.45,"))
_add("recipe", RECIPE89, "learning-rate floor", ("end_factor: 0.15", "end_factor: 0.1"))
_add("recipe", RECIPE89, "first stage's documents", ("max_document_tokens: 896", "max_document_tokens: 1024"))
