"""Record 92: hashed n-grams, candidates of the softmax, model, table of rows, 8-bit projection, recipe."""

from __future__ import annotations

from mutation import (
    CANDIDATES,
    COLUMNS,
    E4M3_HEAD,
    FP8_QKV,
    NGRAMS,
    PACKED_QKV,
    PULL_LISTS,
    PULLED_TABLE,
    RECIPE92,
    RECORD92,
    TABLE92,
    TABLE_CYCLES,
    TABLE_ROWS,
    TOKEN_CLASSES,
    Mutations,
)

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- the n-gram table ---

for _multiplier in ("36313", "27191", "17351", "60961", "45259", "48271", "30011", "58699", "39779", "26801"):
    _add("n-gram hashes", NGRAMS, f"{_multiplier} one more", (f"{_multiplier} *", f"{int(_multiplier) + 1} *"))
_add("n-gram rows", NGRAMS, "token 1's bigram has token 0", ("before[:1] = half - 1", "pass"))
_add("n-gram rows", NGRAMS, "unsigned numbers", ("mixed.view(np.int32)", "mixed"))
_add(
    "n-gram rows", NGRAMS, "64-bit products", ("tokens.astype(np.uint32)  # products", "tokens.astype(int)  # products")
)
_add("n-gram rows", NGRAMS, "trigrams among bigrams", ("= half + _remainder", "= _remainder"))
_add("n-gram rows", NGRAMS, "modulo the half", ("before[:-1], half - 1)", "before[:-1], half)"))
_add("n-gram rows", NGRAMS, "trigrams modulo the half", ("(trigram, half - 1)", "(trigram, half)"))
_add("n-gram rows", NGRAMS, "token 0's trigram alone without history", ("found[1, :2] =", "found[1, :1] ="))
_add("n-gram rows", NGRAMS, "one row for all without history", ("= half - 1, rows - 1", "= half - 1, half - 1"))
_add(
    "n-gram signs", NGRAMS, "half as many", ("30011 * own[:-1]) & (count - 1)", "30011 * own[:-1]) & (count // 2 - 1)")
)
_add("n-gram signs", NGRAMS, "another for tokens without history", ("np.zeros((2,", "np.ones((2,"))

_add("normalised n-grams", TOKEN_CLASSES, "accents stay", ('category(letter) != "Mn"', 'category(letter) != "Zl"'))
_add("normalised n-grams", TOKEN_CLASSES, "case stays", ("text.lower()", "text"))
_add("normalised n-grams", TOKEN_CLASSES, "blanks alone are nothing", ("text if text ==", "text.strip() if text =="))
_add("normalised n-grams", TOKEN_CLASSES, "no compatible forms", ('normalize("NFKC", text)', 'normalize("NFC", text)'))
_add("normalised n-grams", TOKEN_CLASSES, "empty texts are one class", ("        if text:", "        if True:"))
_add("normalised n-grams", TOKEN_CLASSES, "whatever the classes are", ("if found != SHA256:", "if False:"))
_add("normalised n-grams", TABLE92, "signs of the tokens", ("sign_rows(hashed,", "sign_rows(slot.inputs,"))
_add("normalised n-grams", TABLE92, "rows of the tokens", ("ngram_rows(hashed,", "ngram_rows(slot.inputs,"))

# --- candidates of the softmax ---

_add("candidates", CANDIDATES, "another sweep", ("STRIDE = 20011", "STRIDE = 20021"))
_add("candidates", CANDIDATES, "all slots start alike", ("vocabulary * slot // slots", "vocabulary * 0"))
_add("candidates", CANDIDATES, "fewer are drawn", ("int(1.7 * need)", "int(1.6 * need)"))
_add("candidates", CANDIDATES, "255 more are drawn", ("+ 256)", "+ 255)"))
_add("candidates", CANDIDATES, "more than a round is drawn", ("min(vocabulary, int(", "max(0, int("))
_add("candidates", CANDIDATES, "targets are drawn", ("negatives[~chosen[negatives]]", "negatives[negatives >= 0]"))
_add("candidates", CANDIDATES, "only so many as needed are read", ("(offset + drawn)", "(offset + need)"))
_add("candidates", CANDIDATES, "the offset stays", ("offset = (offset + drawn) % vocabulary", "pass"))
_add("candidates", CANDIDATES, "drawn where none is needed", ("if need:", "if need >= 0:"))
_add("candidates", CANDIDATES, "no fallback", ("if negatives.size < need:", "if False:"))
_add("candidates", CANDIDATES, "the fallback's first", ("others[:: max(1, others.size // need)]", "others"))
_add("candidates", CANDIDATES, "too many targets pass", ("if need < 0:", "if need < -1:"))

# --- the model ---

_add("n-grams", RECORD92, "without signs", ("batch.extras[NGRAM_ROWS], signs)", "batch.extras[NGRAM_ROWS])"))
_add("n-grams", RECORD92, "signs by row", ("batch.extras[NGRAM_SIGNS])", "batch.extras[NGRAM_SIGNS].flip(0))"))
_add("n-grams", RECORD92, "none in the start", ('x0 + gates["ngram", 0] * emb', 'x0 + 0 * gates["ngram", 0] * emb'))
_add("n-grams", RECORD92, "again in layer 0", ("in spec.ngram_layers and layer > 0:", "in spec.ngram_layers:"))
_add("head's input", RECORD92, "no weights by group", ("+ self.mudd_w2g[:count])", "+ 0 * self.mudd_w2g[:count])"))
_add("head's input", RECORD92, "no common weights", ("(self.mudd_w2[1, :count, None] +", "(0 +"))
_add(
    "head's input",
    RECORD92,
    "groups of every twelfth",
    ("view(len(x), spec.channel_groups, -1) for", "view(len(x), -1, spec.channel_groups).mT for"),
    ("(weights, parts).view_as(x)", "(weights, parts).mT.reshape(x.shape)"),
)
_add("head's input", RECORD92, "scale of 1", ("columns, bias, spec.mudd.scale)", "columns, bias, 1.0)"))
_add("head's input", RECORD92, "the MLP's input not normed", ('"last MLP\'s input": u,', '"last MLP\'s input": x,'))
_add("head's input", TABLE92, "planes in order", ('"values 3", "values 2"', '"values 2", "values 3"'))
_add("second MLP", RECORD92, "none", ("if layer in self.second_mlp:", "if False:"))
_add(
    "second MLP",
    RECORD92,
    "reads the first one's output",
    ("self.second_mlp[layer], u, mlps", "self.second_mlp[layer], x, mlps"),
)
for _what, _old, _new in (
    ("none after attention", "post[:, :1], (1, 0), value=1.0)", "0 * post[:, :1] + 1, (1, 0), value=1.0)"),
    ("attention's before it", "post[:, :1], (1, 0), value=1.0)", "post[:, :1], (0, 1), value=1.0)"),
    ("the last layer's too", "F.pad(self.post_lambdas[:-1], (0, 0, 0, 1), value=1.0)", "self.post_lambdas"),
    ("attention's after an MLP", "_mlp_weights(post[:, 1]", "_mlp_weights(post[:, 0]"),
    ("no gradient", "for_every_token(post[:, None]", "for_every_token(post.detach()[:, None]"),
    ("the second MLP's is another layer's", "*self.spec.second_mlp_layers]", "*[0 * n for n in self.second_mlp]]"),
    ("not in 8-bit products", "down, down_scale) if fp8", "down, None) if fp8"),
):
    _add("lambdas in weights", RECORD92, _what, (_old, _new))
_add("layer without MLP", RECORD92, "no scale", ("x = resid[layer][1] * x", "x = 1 * x"))
_add("layer without MLP", RECORD92, "an MLP", ("if layer in spec.mlp_free_layers:", "if False:"))
_add(
    "saved activation",
    RECORD92,
    "not normed",
    ("attended = norm(x)", "attended = x"),
)
_add("narrow heads", RECORD92, "their rear", ("qk[slot][:, :dq]", "qk[slot][:, -dq:]"))
_add(
    "narrow heads",
    RECORD92,
    "scaled with the window of the wide ones",
    ("self.wide if wide else self.narrow", "self.wide"),
)
_add("half values", RECORD92, "the rear of v", ("d)[:, :dv].reshape(-1, d)", "d)[:, -dv:].reshape(-1, d)"))
_add(
    "half values",
    RECORD92,
    "the rear of o",
    ("spec.head_dim)[:, :, :dv].reshape(d, -1)", "spec.head_dim)[:, :, -dv:].reshape(d, -1)"),
)
_add(
    "half values",
    RECORD92,
    "the rear of the value embedding",
    ("spec.head_dim)[:, :, :dv]\n", "spec.head_dim)[:, :, -dv:]\n"),
)
_add("bank", TABLE92, "slots by layer", ("(self.is_wide(layer), self.is_half(layer), layer)", "layer"))
_add(
    "candidates",
    RECORD92,
    "gradient of the first classes",
    ("chosen_columns(self.lm_head, classes, place[:-1])", "self.lm_head[:, : len(classes)]"),
)
_add(
    "candidates",
    COLUMNS,
    "gradient of columns that are none",
    ("torch.where(place >= 0, ", "torch.where(place >= -1, "),
)
_add("candidates", COLUMNS, "gradient by class", ("gradient.index_select(1, place.clamp(min=0))", "gradient[:, :1]"))
_add(
    "candidates",
    RECORD92,
    "a prefix that is none is class 0",
    ("new_full((self.spec.padded_vocab_size + 1,), -1)", "new_full((self.spec.padded_vocab_size + 1,), 0)"),
)
_add(
    "YaRN",
    RECORD92,
    "narrow by the long window",
    ("(self.narrow, old.short, new.short)", "(self.narrow, old.long, new.long)"),
)
_add(
    "YaRN",
    RECORD92,
    "wide by the short window",
    ("(self.wide, old.long, new.long)", "(self.wide, old.short, new.short)"),
)
_add("8-bit head", RECORD92, "record 89's weight scale", ("weight=2.0 / 448", "weight=1.6 / 448"))
_add("8-bit head", RECORD92, "bf16 logits", ("logits8=True", "logits8=False"))
_add("8-bit head", E4M3_HEAD, "the largest is left out", ("cap + total.log()", "total.log()"))
_add("8-bit head", E4M3_HEAD, "terms beyond the end", ("weights * (ahead < tokens)", "weights * (ahead >= 0)"))
_add(
    "8-bit head",
    E4M3_HEAD,
    "no prefix is class 0",
    ("prefix_weight * (prefixes >= 0)", "prefix_weight * (prefixes > -2)"),
)
_add("8-bit head", E4M3_HEAD, "one layout twice", ("transposed_8bit_plain(grad)", "grad.reshape(s.mT.shape)"))
_add(
    "8-bit MLP",
    RECORD92,
    "in evaluation too",
    ("fp8_mlp = training and self.fp8_mlp.active", "fp8_mlp = self.fp8_mlp.active"),
)
_add("frozen MLP", TABLE92, "trained", ("((0, 0) if is_frozen else (1, 2))", "(1, 2)"))
_add(
    "gate columns",
    TABLE92,
    "split one layer late",
    ("(layer > self.skip.from_layer) == late]", "(layer >= self.skip.from_layer) == late]"),
)
_add(
    "table of parameters",
    TABLE92,
    "value embeddings every second step",
    ("sharded=True, cyclic=True)", "sharded=True)"),
)

# --- the table of rows ---

_add("row Adam", TABLE_ROWS, "missed updates are not paid for", ("* owed[last_update[places].long()]", ""))
_add(
    "row Adam",
    PULLED_TABLE,
    "its own update is paid for",
    ("concatenate(([1.0], np.cumprod(self.decays)))", "cumprod([1.0, *self.decays, 0.95])"),
)
_add("row Adam", TABLE_ROWS, "a moment a number", ("g.square().mean(dim=1)", "g.square().sum(dim=1)"))
_add("row Adam", PULLED_TABLE, "no bias correction", ("* math.sqrt(1 - rates.beta2 ** len(self.decays))", ""))
_add(
    "row Adam",
    TABLE_ROWS,
    "decay everywhere",
    ("torch.where(change * weights > 0, change", "torch.where(weights == weights, change"),
)
_add("row Adam", TABLE_ROWS, "no decay", ("change + weights * update.decay, change)", "change, change)"))
_add("row Adam", PULLED_TABLE, "the sum over ranks", ("divisor=self.communicator.size", "divisor=1"))
_add("row Adam", TABLE_ROWS, "signs of other tokens", ("signs.rows.flatten()[order]", "signs.rows.flatten()[rows]"))
_add(
    "row Adam",
    TABLE_ROWS,
    "the bigrams alone",
    ("tokens[order % len(tokens)]", "tokens[order.clamp(max=len(tokens) - 1)]"),
)
_add(
    "pulls",
    PULLED_TABLE,
    "rows of the first owner",
    (".flatten() - self.first\n", ".flatten() % self.own_rows\n"),
    ("places = (rows[piece] - self.first)", "places = (rows[piece] - 0)"),
)
_add(
    "pulls", PULLED_TABLE, "a validation's rows stay", ("            self._read_from = before\n", "            pass\n")
)
_add(
    "pulls",
    PULLED_TABLE,
    "one rank's gradients",
    ("entries_of(cycle.touched, cycle.asked)", "entries_of(cycle.touched, cycle.touched)"),
)
_add("cycles", PULLED_TABLE, "a step's gradients over the last's", ("kept.used = end", "kept.used = len(gradient)"))
_add("checkpoints", PULLED_TABLE, "without the cycle", ('state["cycles"] = self._cycles()', 'state["cycles"] = []'))
_add("checkpoints", PULLED_TABLE, "a cycle's mean for another world", ("scale = size / len(cycles)", "pass"))
_add("checkpoints", PULLED_TABLE, "no room for what came before", ("tokens += len(saved.tokens)", "pass"))
_add("cycles", TABLE_CYCLES, "one step each", ("last + 1 < self.schedule.total_steps and not", "last < 0 and not"))
_add("cycles", TABLE_CYCLES, "one step further", ("range(first, last + 1)", "range(first, last + 2)"))
_add(
    "cycles", TABLE_CYCLES, "prepares this one again", ("self._cycle_from(cycle.stop)", "self._cycle_from(cycle.start)")
)
_add(
    "pull lists",
    PULL_LISTS,
    "of the first step",
    ("[step.rows for step in steps]", "[step.rows for step in steps[:1]]"),
)
_add("pull lists", PULL_LISTS, "all by the first reader", ("(reader - self.share.rank)", "(0 - self.share.rank)"))
_add("pull lists", PULL_LISTS, "none by itself", (", self._in_part(own)]", "]"))
_add("pull lists", PULL_LISTS, "repeated", ("values[1:][values[1:] != values[:-1]]", "values[1:]"))
_add("pulls", PULLED_TABLE, "whatever was announced", ("coming.lists is lists and", ""))
_add("pulls", PULLED_TABLE, "announced for nothing", ("self._coming = Coming(lists, self._named(lists))", "pass"))
_add("cycles", TABLE_CYCLES, "announced in every step", ("or not self.is_event(settings.step)", ""))
_add("pulls", PULLED_TABLE, "what others have read before is not asked for", ('bool(state["cycles"])', "False"))
_add("memory", TABLE_CYCLES, "the whole table on each", ("table.rows * row / world.size", "table.rows * row"))
_add("memory", TABLE_CYCLES, "nothing beside it", ("USABLE * memory - other", "USABLE * memory"))

# --- packed 8-bit queries, keys and values ---

for _what, _old, _new in (
    ("input scale", "INPUT_SCALE = 8 / 448", "INPUT_SCALE = 10 / 448"),
    ("gradient scale", "GRADIENT_SCALE = 1 / 448", "GRADIENT_SCALE = 2 / 448"),
    (
        "weights not scaled by the layer",
        "_of(INPUT_SCALE, u), weight_scale * scale_in",
        "_of(INPUT_SCALE, u), weight_scale",
    ),
    ("gradient of the weights unscaled", "(scale_in * grad_w)", "(1 * grad_w)"),
    ("gradient of u unscaled", "        scale = weight_scale * scale_in", "        scale = weight_scale"),
    ("another layer's weights", "self.places[slot]", "self.places[-1]"),
    ("weights never rounded again", "round_matrices(matrices,", "same.any() or round_matrices(matrices,"),
):
    _add("packed QKV", FP8_QKV, _what, (_old, _new))
for _what, _old, _new in (
    ("not rounded after a step", "(self.mlp, step)\n        self._round_qkv()", "(self.mlp, step)"),
    ("not rounded when loaded", "reload(self.mlp)\n        self._round_qkv()", "reload(self.mlp)"),
    ("o's rows for v's", "spec.head_dim, d)[:, 0].split", "spec.head_dim, d)[:, 1].split"),
    ("keys never shifted", "                shifted=wide,", "                shifted=False,"),
    ("never in pairs", "paired=paired,\n                shifted", "paired=False,\n                shifted"),
):
    _add("packed QKV", RECORD92, _what, (_old, _new))
for _what, _old, _new in (
    ("back in the wrong direction", "leading - sin * _neighbours", "leading + sin * _neighbours"),
    ("the norm's backward", "m - n * (m * n).mean(-1, keepdim=True)", "m"),
    ("the first key's own gradient", "own + following", "following"),
    ("keys not shifted", "torch.cat((still[:1, 1], still[:-1, 1]))", "still[:, 1]"),
    ("a pair at one position", "(2, heads // 2) if rotation.paired else (1, 1)", "(1, 1)"),
):
    _add("packed QKV", PACKED_QKV, _what, (_old, _new))

# --- the recipe ---

for _old, _new in (
    ("ngram_rows: 84602880", "ngram_rows: 84602872"),
    ("mlp_width: 2816", "mlp_width: 3072"),
    ("steps: 361", "steps: 360"),
    (
        "lr_factor: 1.57927, max_segment_tokens: 2560, max_documents: 127}",
        "lr_factor: 1.73, max_segment_tokens: 2560, max_documents: 127}",
    ),
    ("candidates: 24576", "candidates: 14336"),
    ("levels: [0.2, 0.15, 0.1, 0.05]", "levels: [0.25, 0.15, 0.1, 0.05]"),
    ("cooldown_start: 0.2", "cooldown_start: 0.25"),
    ("end_factor: 0.3}", "end_factor: 0.2}"),
    ("fast_share: 0.4385", "fast_share: 0.5"),
    ("from_step: 336", "from_step: 340"),
    ("row_adam: {lr_mul: 70", "row_adam: {lr_mul: 75"),
    ("tied_head: {split_stage: 5}", "tied_head: {split_stage: 4}"),
    ("window_steps: 298", "window_steps: 300"),
    ("qk: 0.55", "qk: 0.65"),
):
    _add("recipe", RECIPE92, _new, (_old, _new))
