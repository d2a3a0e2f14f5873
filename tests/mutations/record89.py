"""Record 89: gates and connections, attention, loss, 8-bit MLPs, the recipe."""

from __future__ import annotations

from mutation import (
    CONNECTIONS,
    EMBEDDING,
    FP8_MLP,
    FP8_SCALES,
    HEAD,
    HEADS,
    MICRO_BATCHES,
    MIXING,
    MLP,
    PREFIXES,
    RECIPE89,
    RECORD,
    RECORD89,
    RECORD_SPEC,
    SCHEDULE,
    STAGE_LOSS,
    TABLE89,
    Mutations,
)

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- gates and connections ---

_add("MUDD nets", CONNECTIONS, "tanh gelu", ("F.gelu(x @ w1.mT)", 'F.gelu(x @ w1.mT, approximate="tanh")'))
_add("MUDD nets", CONNECTIONS, "ReLU", ("F.gelu(x @ w1.mT)", "F.relu(x @ w1.mT)"))
_add("MUDD nets", CONNECTIONS, "bias not scaled", ("w2.mT + bias)", "w2.mT) + bias"), ("scale * (F.", "(scale * F."))
_add("MUDD nets", RECORD89, "one net for both", ("bias = self.mudd_w1[net],", "bias = self.mudd_w1[0],"))
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
    TABLE89,
    "bigram before x0",
    (
        '[Column("x0", layer, 0.0), Column("bigram", layer, start.bigram_gate)]',
        '[Column("bigram", layer, start.bigram_gate), Column("x0", layer, 0.0)]',
    ),
)
_add(
    "gate columns",
    TABLE89,
    "split one layer late",
    ("(layer > self.skip.from_layer) == late]", "(layer >= self.skip.from_layer) == late]"),
)
_add(
    "start of the residual", RECORD89, "no bigram", ('x0 + gates["bigram", 0] * bigram', 'x0 + 0 * gates["bigram", 0]')
)
_add(
    "saved start",
    RECORD89,
    "x0 for it",
    ('w["value from before"]), (start, saved, x)', 'w["value from before"]), (x0, saved, x)'),
)
_add("bigrams", RECORD89, "in layer 0 twice", ("if layer > 0:  # already", "if layer >= 0:  # it is"))
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
    ('post[layer][0], gates["x0", layer]), (x, y, x0))', "post[layer][0]), (x, y))"),
)
_add(
    "residual lambdas",
    RECORD89,
    "attention's for the MLP",
    ("weighted_sum((resid[layer][1],", "weighted_sum((resid[layer][0],"),
)
_add("post lambdas", RECORD89, "the MLP's for attention", ("post[layer][0], gates", "post[layer][1], gates"))
_add(
    "residual lambdas",
    RECORD89,
    "also in the skip's layer",
    ("x = x + torch.sigmoid(skip_scale)", "x = resid[layer][0] * x + torch.sigmoid(skip_scale)"),
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
    ("            last,\n            attended,", "            last,\n            norm(x),"),
)
_add("values of the last layer", RECORD89, "nothing added", ("if value_add is not None:", "if False:"))
_add(
    "values of the last layer",
    RECORD89,
    "after x has changed",
    (
        '(w["value from start"], w["value from saved"], w["value from before"]), (start, saved, x)',
        '(w["value from start"], w["value from saved"], w["value from before"]), (start, saved, norm(x))',
    ),
)
_add(
    "last value gate",
    RECORD89,
    "halves swapped",
    ('value_gates=w["value gate"]', 'value_gates=w["value gate"].flip(1)'),
)
_add(
    "last value gate",
    RECORD89,
    "heads in turn",
    ("value_gates.repeat_interleave(heads // 2, dim=1)", "value_gates.repeat(1, heads // 2)"),
)
_add(
    "last value gate", RECORD89, "a sigmoid", ("gate = value_gates.repeat", "gate = torch.sigmoid(value_gates).repeat")
)
_add("connections into the last layer", RECORD89, "no 1 +", ('(1 + w["input from before"]', '(w["input from before"]'))
_add(
    "connections into the last layer",
    RECORD89,
    "x0 for the start",
    ("(x, y, start, bigram),", "(x, y, x0, bigram),"),
)
_add(
    "connections into the last layer",
    RECORD89,
    "MLP's weights swapped",
    ('w["mlp post"]), (x, y))', 'w["mlp post"]), (y, x))'),
)
_add(
    "connections after the last layer",
    RECORD89,
    "none",
    ("x = x + weighted_sum(tuple(", "x = x + 0 * weighted_sum(tuple("),
)
_add(
    "connections after the last layer",
    RECORD89,
    "the second value table",
    ("embedded.values[0],", "embedded.values[1],"),
)
_add(
    "connections after the last layer",
    RECORD89,
    "the last layer's input changed",
    (
        "        before = x\n",
        "",
    ),
    (
        "        y = self._attention(\n            last,",
        "        before = x\n        y = self._attention(\n            last,",
    ),
)
_add(
    "final norm",
    RECORD89,
    "none",
    ("return norm(x)\n\n    def _mlp", "return x\n\n    def _mlp"),
)
_add("backout start", TABLE89, "added", ("-start.backout)", "start.backout)"))
_add(
    "bias starts",
    RECORD_SPEC,
    "not divided by the scale",
    ("divisor=scale)", "divisor=1.0)"),
)

# --- attention ---

_add(
    "value gates",
    EMBEDDING,
    "of the input alone",
    ("torch.cat((u[:, :half], value_embedding[:, :half]), dim=1)", "u[:, : 2 * half]"),
)
_add("value gates", RECORD89, "not doubled", ("gate = 2 * value_gate(", "gate = value_gate("))
_add("bank layout", RECORD89, "k before q", ("q, k, v = (u @", "k, q, v = (u @"))
_add("bank layout", RECORD89, "o before v", ("v, o = vo.chunk(2, dim=1)", "o, v = vo.chunk(2, dim=1)"))
_add(
    "bank layout",
    RECORD89,
    "padding first",
    ("self.qk[: self.spec.heads * count]", "self.qk[-self.spec.heads * count :]"),
)
_add(
    "bank layout",
    TABLE89,
    "matrices of one head",
    ("NorMuon(2 * self.head_dim)", "NorMuon(self.head_dim)"),
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
    ("cu_seqlens, window=window, scale=scale, plain", "cu_seqlens, window=window, scale=head_dim**-0.5, plain"),
)

# --- loss ---

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
_add("prefix weight", STAGE_LOSS, "constant", ("(self.last - self.first) * progress", "0 * progress"))
_add("prefix weight", STAGE_LOSS, "the first level", ("len(self.levels) * progress", "0 * progress"))
_add(
    "stage limits",
    SCHEDULE,
    "documents as long as the run's",
    ("stage.max_document_tokens or self.training", "self.training"),
)
_add("stage limits", MICRO_BATCHES, "room as by tokens", ("if max_documents is None else max_documents + 1", ""))

# --- 8-bit MLPs ---

_add(
    "8-bit activations",
    FP8_MLP,
    "scale of the input for the square",
    ("to_e4m3(square.float() / post_scale)", "to_e4m3(square.float() / u_scale)"),
)
_add("8-bit activations", FP8_MLP, "largest of 240", ("E4M3_MAX = 448.0", "E4M3_MAX = 240.0"))
_add(
    "8-bit input",
    FP8_MLP,
    "fixed scale",
    ("u8, u_scale = None, current_scale(u.abs().amax(1))", "u8, u_scale = None, torch.tensor(0.01)"),
)
_add(
    "8-bit backward",
    FP8_MLP,
    "the factor 2 forgotten",
    (
        "grad_pre = relu_squared_backward(grad, down, post, plain=plain)",
        "grad_pre = relu_squared_backward(grad, down, post, plain=plain) / 2",
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
_add("8-bit gradients", FP8_MLP, "largest of e4m3", ("GRADIENT_PEAK = 16.0", "GRADIENT_PEAK = 448.0"))
_add(
    "8-bit gradients",
    FP8_MLP,
    "before the activation by the weights' scale",
    ("to_e5m2(grad_pre.float() / grad_scale)", "to_e5m2(grad_pre.float() / down_scale)"),
)
_add(
    "8-bit gradients",
    FP8_MLP,
    "the floor of activations",
    ("peak.clamp(min=GRADIENT_FLOOR)", "peak.clamp(min=PEAK_FLOOR)"),
)
_add(
    "8-bit gradients",
    FP8_MLP,
    "up weights not transposed again",
    ("(bank[:, 0], up_scale, up8, up8_t,", "(bank[:, 0], up_scale, up8, None,"),
)
_add(
    "8-bit gradients",
    FP8_SCALES,
    "always",
    ('active and spec.gradients == "all"', "active"),
)
_add(
    "8-bit gradients",
    FP8_MLP,
    "of up by the scale of its weights",
    ("_product(grad_pre8_t, grad_scale, u8_t, u_scale,", "_product(grad_pre8_t, grad_scale, u8_t, up_scale,"),
)
_add(
    "8-bit gradients",
    FP8_MLP,
    "of down by the scale of its weights",
    ("_product(post8_t, post_scale, grad8_t,", "_product(post8_t, down_scale, grad8_t,"),
)
_add(
    "8-bit gradients",
    FP8_MLP,
    "of down by the scale of the next call",
    (
        "down_scale, u_scale, *kept)",
        "down_scale, u_scale, *kept[:2], post_scale.data)",
    ),
)
_add("8-bit input", FP8_SCALES, "bound too small", ("math.sqrt(width) / E4M3_MAX", "math.sqrt(width) / (2 * E4M3_MAX)"))
_add("8-bit input", FP8_SCALES, "bound always", ('spec.input_scale == "bound" else None', "spec.input_scale else None"))
_add("8-bit input", FP8_SCALES, "bound never", ("u_scale=self.u_scale,", "u_scale=None,"))
_add("8-bit square", FP8_SCALES, "always", ('square8=self.spec.square == "e4m3"', "square8=self.gradients8"))
_add("8-bit square", FP8_SCALES, "never", ('square8=self.spec.square == "e4m3"', "square8=False"))
_add(
    "8-bit square",
    FP8_MLP,
    "its scale forgotten",
    ("post if square_scale is None else post.to(u_scale.dtype) * square_scale", "post.to(u_scale.dtype)"),
)
_add("delayed scales", FP8_SCALES, "activation without headroom", ("self.spec.activation_headroom * peak", "peak"))
_add("delayed scales", FP8_SCALES, "weights without headroom", ("self.spec.weight_headroom * down_peak", "down_peak"))
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
    ('torch._foreach_copy_(self.scales("up_scale"), list(up_scale.unbind()))', "pass"),
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

# --- the recipe ---

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
