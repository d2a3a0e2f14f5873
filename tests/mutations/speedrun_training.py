"""The speedrun's training: optimizers, tied head and odd steps, schedule, data, the recipe's constants."""

from __future__ import annotations

from mutation import (
    ADAM,
    BATCHES,
    DOCUMENTS,
    MICRO_BATCHES,
    MICRO_STEP,
    NORMUON,
    OPTIMIZER,
    PLAN,
    POLAR,
    RATES,
    RECIPE,
    RECORD,
    ROW_TABLE,
    ROWS,
    SCHEDULE,
    STAGE_LOSS,
    TABLE,
    TRAINER,
    VALIDATION_BATCHES,
    Mutations,
)

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- Adam ---

_add("Adam bias correction", ADAM, "no root", ("math.sqrt(1 - betas[1] ** count)", "(1 - betas[1] ** count)"))
_add("Adam bias correction", ADAM, "none of the mean", (" / (1 - betas[0] ** count)", ""))
_add(
    "Adam bias correction",
    OPTIMIZER,
    "count from 0 after the split",
    ("self.adam_counts[tied] = self.adam_counts[head]", "self.adam_counts[tied] = 0"),
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
_add("weight-decay multipliers", OPTIMIZER, "ignored", (" * group.wd_mul * repeat)", ")"))
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
    ("torch.where(gate.to(weight.dtype) * weight >= 0, weight * decay, torch.zeros_like(weight))", "weight * decay"),
)
_add("NorMuon decay mask", NORMUON, "where signs differ", ("* weight >= 0", "* weight <= 0"))
_add("NorMuon decay mask", NORMUON, "not without update", ("* weight >= 0", "* weight > 0"))
_add(
    "NorMuon decay",
    NORMUON,
    "not times the step size",
    ("(x.to(weight.dtype) + decayed)", "x.to(weight.dtype) - decayed"),
)
_add("NorMuon decay", OPTIMIZER, "not times lr", ("banks.weight_decay * lr", "banks.weight_decay"))
_add("NorMuon learning rate", OPTIMIZER, "no schedule", ("lr = banks.lr * rates.lr_factor", "lr = banks.lr"))
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
    ("full.view(-1, self.matrix_rows[label], full.shape[-1])", "full.view(-1, *full.shape[-2:])"),
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
    ("            transpose_add(self._gradient(tied), self._gradient(head))\n", "            pass\n"),
)
_add(
    "tied head",
    OPTIMIZER,
    "embed not refreshed",
    ("transpose_copy(self.parameters[head].data, self.parameters[tied].data)", "pass"),
)
_add("tied head", OPTIMIZER, "embed's gradient not cleared", ("            self._clear(tied)\n", ""))
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
        "        reductions = self._start",
        "        if rates.split:\n            self._split(tied, head)\n            tied = head = None\n"
        "            plan = self.spec.step_plan(adam_step=rates.adam_step, tied=None, event=rates.event)\n"
        "        reductions = self._start",
    ),
)
_add("split step", RATES, "the stage's first step", ("while not self.is_adam_step(step):", "while False:"))
_add("odd steps", RATES, "even steps", ("== self.adam.every - 1", "== 0"))
_add("odd steps", PLAN, "Adam every step", ("event if self.cyclic else adam_step", "event or True"))
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
    ROW_TABLE,
    "of the first rows",
    ("look_up.part(look_up.parameter.grad)", "look_up.parameter.grad"),
)
_add(
    "tables' gradients",
    ROW_TABLE,
    "one order for all",
    ("orders.get(id(look_up.rows))", "next(iter(orders.values()), None)"),
)
_add("tables' gradients", ROWS, "not added to what is there", ("table.add_(total)", "table.copy_(total)"))
_add(
    "tables' gradients",
    RECORD,
    "first table for all",
    ("tokens, first, vocab) for first", "tokens, 0, vocab) for first"),
)

# --- schedule ---

_add(
    "momentum schedule",
    RATES,
    "one step ahead at the start",
    ("* step / m.warmup_steps", "* (step + 1) / m.warmup_steps"),
)
_add("momentum schedule", RATES, "constant at the start", ("if step < m.warmup_steps:", "if False:"))
_add("momentum schedule", RATES, "constant at the end", ("if step > cooldown:", "if False:"))
_add(
    "momentum schedule",
    RATES,
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
_add("ramp", SCHEDULE, "a step too long", ("/ (schedule.ramp_steps + 1)", "/ (schedule.ramp_steps + 2)"))
_add("ramp", SCHEDULE, "from 1", ("self.stages[index - 1].lr_factor * (1 - ramp)", "(1 - ramp)"))
_add("stage boundaries", SCHEDULE, "one step late", ("if first <= step)", "if first < step or first == 0)"))
_add(
    "batch sizes",
    SCHEDULE,
    "the first stage's",
    ("batch_tokens=stage.batch_tokens,", "batch_tokens=self.stages[0].batch_tokens,"),
)
_add("window changes", SCHEDULE, "of the long one alone", ("if old != new]", "if old.long != new.long]"))
_add("window changes", RECORD, "a YaRN step for the short one", ("if new.long != old.long:", "if True:"))
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
_add("multi-token schedule", STAGE_LOSS, "constant", ("* (1 - progress))", "* 1)"))
_add(
    "multi-token schedule",
    STAGE_LOSS,
    "all weights fall",
    ("(*self.token_weights[:-1],", "(*(w * (1 - progress) for w in self.token_weights[:-1]),"),
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
    ("total_steps, self.schedule.final_windows, mask)", "total_steps, settings.windows, mask)"),
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
    MICRO_BATCHES,
    "length rounded down",
    ("max(128, -(-(tokens // 300) // 128) * 128)", "max(128, tokens // 300 // 128 * 128)"),
)
_add("cu_seqlens", MICRO_BATCHES, "last end beyond T", ("np.minimum(ends, self.tokens)", "ends"))
_add("cu_seqlens", BATCHES, "too many documents pass", ("if found.size > host.room:", "if found.size > host.room + 1:"))
_add("segments", BATCHES, "from the stream's start", ("starts = np.append(0, ends[:-1])", "starts = 0 * ends"))
_add("segments", BATCHES, "beyond the document", (", np.repeat(ends, counts))", ", np.repeat(ends, counts) + 1)"))
_add(
    "segments",
    BATCHES,
    "one too many",
    ("counts = -(-(ends - starts) // longest)", "counts = (ends - starts) // longest + 1"),
)
_add("segments", BATCHES, "of documents alone", ("host.tokens, longest) for slot", "host.tokens, None) for slot"))
_add(
    "segments",
    BATCHES,
    "a target has one",
    ("np.searchsorted(ends, tokens)) + 1]", "np.searchsorted(ends, tokens + 1)) + 1]"),
)
_add(
    "segments", BATCHES, "as long as documents", ("min(self.max_document_tokens, self.max_segment_tokens or", "max(0,")
)
_add("targets", MICRO_BATCHES, "the inputs themselves", ("targets[row] = piece[1:]", "targets[row] = piece[:-1]"))
_add("extras", BATCHES, "of states only the own", ("or host.has_state or", "or"))
_add(
    "extras",
    BATCHES,
    "of saved states only the own",
    ("host.has_state or position.states is not None", "host.has_state"),
)
_add("extras", BATCHES, "always of all slots", ("of_all = bool(kept) or", "of_all = True or"))
_add("extras", BATCHES, "without the loss", ("piece[1:], request.loss, slot,", "piece[1:], None, slot,"))
_add(
    "extras",
    BATCHES,
    "inputs for targets",
    ("Slot(piece[:-1], piece[1:], request", "Slot(piece[:-1], piece[:-1], request"),
)
_add("extras", BATCHES, "the first slot's state", ("else position.states[slot]", "else position.states[0]"))
_add("extras", BATCHES, "states not saved", ('state["file"], state.get("states")', 'state["file"], None'))
_add("extras", BATCHES, "shapes of the first request", ("or self._example[0] != request:", ":"))
_add("extras", MICRO_BATCHES, "any dtype", ('casting="no"', 'casting="unsafe"'))
_add("steps ahead", BATCHES, "not compared", ("if coming != request:", "if False:"))
_add("steps ahead", BATCHES, "all from one position", ("self._coming[-1][1] if self._coming else", ""))
_add("steps ahead", BATCHES, "a guess although others come", ("is not None and not self._coming:", "is not None:"))
_add(
    "rows ahead", BATCHES, "of the first step", ("in self._coming[first : len(requests)]]", "in self._coming[first:1]]")
)
_add("rows ahead", BATCHES, "of one extra", ("self._tables[name].extras:", "self._tables[name].extras[:1]:"))
_add("rows ahead", BATCHES, "of other steps", ("or self._gathered[0] != steps:", ":"))
_add("rows ahead", BATCHES, "of this rank's slots alone", ("or (self._world_size > 1 and bool(readers))", ""))
_add("steps ahead", TRAINER, "none", ("min(settings.step + 2,", "min(settings.step + 1,"))
_add("validation", VALIDATION_BATCHES, "all are slot 0", ("(piece % slots, own.copy(), ends)", "(0, own.copy(), ends)"))
_add(
    "validation",
    VALIDATION_BATCHES,
    "pieces overlap",
    (
        "own = stream[first : first + micro_batch_tokens + 1]",
        "own = stream[max(first - 1, 0) :][: micro_batch_tokens + 1]",
    ),
)
_add(
    "validation",
    VALIDATION_BATCHES,
    "pieces in blocks a rank",
    ("piece % world_size == rank", "piece * world_size * micro_batch_tokens // tokens == rank"),
)
_add(
    "validation",
    VALIDATION_BATCHES,
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
    ("NorMuon lr", "lr: 0.023", "lr: 0.03"),
    ("NorMuon beta2", "beta2: 0.95", "beta2: 0.9"),
    ("NorMuon weight decay", "weight_decay: 1.2", "weight_decay: 1.0"),
    ("norm margin", "norm_margin: 1.02", "norm_margin: 1.0"),
    ("Polar Express", "8.156554524902461", "8.156554524902"),
    ("split step", "split_stage: 2", "split_stage: 1"),
    ("stages", "window_blocks: {short: 5, long: 11}", "window_blocks: {short: 5, long: 10}"),
    ("stages", "lr_factor: 1.52", "lr_factor: 1.5"),
    ("final windows", "{short: 6, long: 20}", "{short: 6, long: 13}"),
    ("cooldown", "cooldown_start: 0.45", "cooldown_start: 0.5"),
    ("momentum schedule", "cooldown_steps: 50", "cooldown_steps: 40"),
):
    _add(_mechanism, RECIPE, f"`{_old.splitlines()[0]}` becomes `{_new.splitlines()[0]}`", (_old, _new))

_add("Adam betas", TABLE, "x0_lambdas as slow as most", ("Adam((0.65, 0.95), 5)", "Adam((0.9, 0.95), 5)"))
_add("lr multipliers", TABLE, "of the smear gate", ("Adam(slow, 0.01)", "Adam(slow, 1)"))
_add(
    "weight-decay multipliers",
    TABLE,
    "of the embedding",
    (
        'Adam(head, 1, 150, sharded=True),\n                TransposeOf("lm_head")',
        'Adam(head, 1, 15, sharded=True),\n                TransposeOf("lm_head")',
    ),
)
_add("NorMuon multipliers", TABLE, "of up for down", ("NorMuon(hidden, (1, 2))", "NorMuon(hidden, (2, 1))"))
