"""Record 92's optimizer: two momenta, its maps, the gate of the decay, the cadence of tables."""

from __future__ import annotations

from mutation import (
    ANVIL,
    ANVIL_OPTIMIZER,
    ANVIL_RATES,
    COMMUNICATION,
    FP8_SCALES,
    NORMUON,
    OPTIMIZER,
    PLAN,
    RATES,
    RECIPE92,
    Mutations,
)

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- banks ---

_add(
    "ANVIL blend",
    ANVIL,
    "shares swapped",
    ("fast_share * fast + (1 - fast_share) * slow", "(1 - fast_share) * fast + fast_share * slow"),
)
_add("ANVIL blend", ANVIL, "none", ("blend = fast_share * fast + (1 - fast_share) * slow", "blend = fast"))
_add(
    "ANVIL blend",
    ANVIL_RATES,
    "share of 1 to the end",
    ("fast_share=slow.fast_share if blends else 1.0", "fast_share=1.0"),
)
_add(
    "ANVIL blend",
    ANVIL_RATES,
    "from the start",
    ("fast_share=slow.fast_share if blends else 1.0", "fast_share=slow.fast_share"),
)
_add("ANVIL blend", ANVIL_RATES, "one step late", ("blends = step >= slow.from_step", "blends = step > slow.from_step"))
_add(
    "ANVIL fast beta",
    ANVIL_RATES,
    "mu to the end",
    ("fast_beta=slow.fast_beta if blends else shared.momentum", "fast_beta=shared.momentum"),
)
_add(
    "ANVIL fast beta",
    ANVIL_RATES,
    "its own from the start",
    ("fast_beta=slow.fast_beta if blends else shared.momentum", "fast_beta=slow.fast_beta"),
)
_add("ANVIL fast beta", ANVIL, "mu", ("(g - fast) * (1 - fast_beta)", "(g - fast) * (1 - mu)"))
_add("ANVIL slow beta", ANVIL, "beta for 1 - beta", ("(g - slow) * (1 - slow_beta)", "(g - slow) * slow_beta"))
_add("ANVIL Nesterov", ANVIL, "none", ("return g + (blend - g) * mu", "return blend"))
_add(
    "ANVIL decay gate",
    ANVIL,
    "by the update",
    ("apply_update(weight, mantissa, x, slow,", "apply_update(weight, mantissa, x, x,"),
)
_add(
    "ANVIL decay gate",
    ANVIL,
    "by the fast momentum",
    ("apply_update(weight, mantissa, x, slow,", "apply_update(weight, mantissa, x, fast,"),
)
_add(
    "NorMuon decay gate",
    NORMUON,
    "by another",
    ("apply_update(weight, mantissa, x, x,", "apply_update(weight, mantissa, x, momentum,"),
)
for _number, _word in enumerate(("first", "second", "third", "fourth", "fifth", "sixth")):
    _add(
        "ANVIL maps",
        ANVIL,
        f"without the {_word}",
        (
            ".to(matrices.dtype), coefficients, plain_kernels)",
            f".to(matrices.dtype), [m for i, m in enumerate(coefficients) if i != {_number}], plain_kernels)",
        ),
    )
_add(
    "ANVIL first Gram matrix",
    ANVIL,
    "computed again",
    ("odd_polynomials(x, (gram / divisor.square()).to(matrices.dtype),", "odd_polynomials(x, None,"),
)
_add("ANVIL first Gram matrix", ANVIL, "divided once", ("gram / divisor.square()", "gram / divisor"))
_add(
    "ANVIL first Gram matrix",
    ANVIL,
    "of the larger side",
    ("matrices.mT if tall else matrices)", "matrices if tall else matrices.mT)"),
)
_add("ANVIL margin", ANVIL, "none", ("trace.sqrt() * norm_margin", "trace.sqrt()"))
_add("ANVIL margin", ANVIL, "inside the root", ("trace.sqrt() * norm_margin", "(trace * norm_margin).sqrt()"))
_add("ANVIL norm floor", ANVIL, "none", ("norm_margin + NORM_FLOOR", "norm_margin + 1e-30"))
_add("ANVIL rounding", ANVIL, "momentum not rounded", ("slow_beta).to(weight.dtype)", "slow_beta)"))
_add(
    "ANVIL multiplier 0",
    OPTIMIZER,
    "taken for 1",
    ("muls[(first + i) % len(muls)]", "(muls[(first + i) % len(muls)] or 1.0)"),
)
_add(
    "ANVIL multiplier 0",
    NORMUON,
    "decays all the same",
    (
        "weight - step_size * (x.to(weight.dtype) + decayed)",
        "weight - step_size * x.to(weight.dtype) - step_size.clamp(min=1e-3) * decayed",
    ),
)

# --- tables ---

_add(
    "cadence",
    ANVIL_RATES,
    "every other step to the end",
    ("every = self.tables.every * self.repeat(step)", "every = self.tables.every"),
)
_add(
    "cadence",
    ANVIL_RATES,
    "three steps late",
    ("if step >= self.tables.from_step else 1", "if step > self.tables.from_step + 2 else 1"),
)
_add("cadence", ANVIL_RATES, "the first of a cycle", ("step % every == every - 1", "step % every == 0"))
_add("cadence", RATES, "cyclic at Adam's steps", ("cyclic=label in self.cyclic_groups,", "cyclic=False,"))
_add("cadence", PLAN, "Adam at events", ("event if self.cyclic else adam_step", "event"))
_add("cadence", RATES, "every step an event", ("event=self.is_event(step)", "event=True"))
_add("cyclic betas", OPTIMIZER, "not squared", ("(group.betas[0] ** repeat, group.betas[1] ** repeat)", "group.betas"))
_add("cyclic betas", OPTIMIZER, "the second only", ("(group.betas[0] ** repeat,", "(group.betas[0],"))
_add("cyclic betas", OPTIMIZER, "everybody's", ("rates.repeat if self.plans[label].cyclic else 1", "rates.repeat"))
_add(
    "cyclic bias correction",
    OPTIMIZER,
    "the first betas",
    ("adam_step_size(lr, betas[-1],", "adam_step_size(lr, group.betas,"),
)
_add("cyclic decay", OPTIMIZER, "not doubled", ("group.wd_mul * repeat", "group.wd_mul"))
_add("rates of tables", ANVIL_RATES, "beta2 not squared", ("row_adam.beta2**repeat", "row_adam.beta2"))
_add("rates of tables", ANVIL_RATES, "decay not doubled", ("row_adam.wd_mul * repeat", "row_adam.wd_mul"))
_add("rates of tables", ANVIL_RATES, "decay by the learning rate once", ("decay=lr * lr *", "decay=lr *"))
_add(
    "dropped gradients",
    ANVIL_OPTIMIZER,
    "pushed every step",
    (
        "        if rates.event:\n            for table in self.tables.values():\n                table.start_push()",
        "        if True:\n            for table in self.tables.values():\n                table.start_push()",
    ),
)
_add(
    "dropped gradients",
    ANVIL_OPTIMIZER,
    "updated every step",
    (
        "        if rates.event:\n            for table in self.tables.values():\n                table.update(",
        "        if True:\n            for table in self.tables.values():\n                table.update(",
    ),
)
_add(
    "dropped gradients",
    ANVIL_RATES,
    "the run's end is an event",
    ('"repeat": self.repeat(step)}', '"repeat": self.repeat(step), "event": shared.event or step == total_steps - 1}'),
)
_START, _UPDATE = "super()._start_reductions(plans, rates)", "super()._update_all(batches, reductions, rates)"
_EACH = "        if rates.event:\n            for table in self.tables.values():\n                table."
_add(
    "order of tables",
    ANVIL_OPTIMIZER,
    "pushed ahead of all reductions",
    (
        f"        reductions = {_START}\n{_EACH}start_push()\n        return reductions",
        f"{_EACH}start_push()\n        return {_START}",
    ),
)
_add(
    "order of tables",
    ANVIL_OPTIMIZER,
    "updated first",
    (
        f"        gathers = {_UPDATE}\n{_EACH}update(rates.table)\n        return gathers",
        f"{_EACH}update(rates.table)\n        return {_UPDATE}",
    ),
)
_add("small gradients together", COMMUNICATION, "one by one", ("tensor.numel() > SMALL", "True"))
_add("small gradients together", COMMUNICATION, "large ones too", ("tensor.numel() > SMALL", "False"))
_add("small gradients together", COMMUNICATION, "not aligned", ("step = ALIGNMENT // first.dtype.itemsize", "step = 1"))
_add(
    "small gradients together",
    COMMUNICATION,
    "divided at each wait",
    ("functools.cache(self.average(flat).wait)", "self.average(flat).wait"),
)
_add(
    "unfinished cycles",
    OPTIMIZER,
    "known by Adam's steps",
    (
        "self.gathering = self.plans.keys() - due",
        "self.gathering = set() if rates.adam_step else self.plans.keys() - due",
    ),
)
_add("unfinished cycles", OPTIMIZER, "forgotten in a resumed run", ("            self.gathering.add(label)\n", ""))
_add(
    "unfinished cycles",
    ANVIL_OPTIMIZER,
    "tables not in the state",
    ('table.load_state_dict(state["tables"][name])', "pass"),
)
_add(
    "shortened run",
    ANVIL_RATES,
    "the cadence starts anywhere",
    ('round(data["tables"]["from_step"] / unit) * unit', 'data["tables"]["from_step"]'),
)
_add(
    "shortened run",
    ANVIL_RATES,
    "the blend starts where it did",
    ('(data["anvil"]["slow_momentum"], data["tables"])', '(data["tables"],)'),
)

# --- the recipe's numbers ---

for _old, _new in (
    ("weight_decay: 2.25", "weight_decay: 1.2"),
    ("momentum: {low: 0.85, high: 0.93", "momentum: {low: 0.85, high: 0.95"),
    ("warmup_steps: 240", "warmup_steps: 300"),
    ("beta: 0.98, from_step: 514", "beta: 0.98, from_step: 513"),
    ("{beta: 0.98", "{beta: 0.99"),
    ("fast_beta: 0.85", "fast_beta: 0.9"),
    ("norm_margin: 1.05", "norm_margin: 1.02"),
    ("[3.923798038567, -6.095026865488,", "[3.923798038567, -6.095026865489,"),
    ("[3.278126713798,", "[3.278126713799,"),
    ("5.137358782410, 1.968325560615]", "5.137358782410, 1.968325560616]"),
    ("[2.815058591845,", "[2.815058591846,"),
    ("2.443826979899,", "2.443826979898,"),
    ("0.929501253245]", "0.929501253246]"),
    ("wd_mul: 5, eps: 1e-10", "wd_mul: 10, eps: 1e-10"),
):
    _add("recipe's optimizer", RECIPE92, _new, (_old, _new))

# --- replayed updates ---

_add(
    "replayed updates",
    OPTIMIZER,
    "numbers in new places",
    ("return self._numbers[name].fill_(value)", "return torch.tensor(value)"),
)
_add(
    "replayed updates",
    OPTIMIZER,
    "step sizes in new places",
    (
        "step_sizes = torch.mul(self.multipliers[label], lr, out=self._step_sizes[label])",
        "step_sizes = self.multipliers[label] * lr",
    ),
)
_add(
    "replayed updates",
    OPTIMIZER,
    "averages in new places",
    ("if not (self.capture and plan.bank) or self.communicator.size == 1:", "if True:"),
)
_add(
    "replayed updates",
    OPTIMIZER,
    "gradients in new places",
    ("if self.capture and gradient is not None:", "if gradient is None:"),
)
_add(
    "replayed updates",
    FP8_SCALES,
    "scales measured at each",
    ("return self.spec.bootstrap_steps if self.active", "return self.spec.bootstrap_steps - 1 if self.active"),
)
