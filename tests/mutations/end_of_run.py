"""Mutations of a run's end: averages, norms, the canonical mask."""

from __future__ import annotations

from mutation import CANONICAL_MASK, END_OF_RUN, HEAD, RECIPE_AVERAGED, SPEC_END, Mutations

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- tail averages ---

_add(
    "tail averages: first tick",
    END_OF_RUN,
    "from zeros instead of a copy",
    ("self._averages[key] = own.clone()", "self._averages[key] = own * rates[step]"),
)
_add("tail averages: first tick", END_OF_RUN, "no copy, the weights themselves", ("own.clone()", "own"))
_add("tail averages: first tick", END_OF_RUN, "every tick copies", ("if step == min(rates):", "if step in rates:"))
_add("tail averages: rate", END_OF_RUN, "of the last value", ("own, rates[step])", "own, 1 - rates[step])"))
_add("tail averages: rate", SPEC_END, "of the last tick too", ("rates[max(rates)] = self.last_rate", "pass"))
_add(
    "tail averages: rate",
    SPEC_END,
    "not raised in a shortened run",
    ("1 - (1 - given) ** (before / after)", "given"),
)
_add("tail averages: stride", SPEC_END, "every step", ("self.window_steps, self.every)", "self.window_steps)"))
_add(
    "tail averages: window",
    SPEC_END,
    "a tick longer",
    ("self.last, self.window_steps,", "self.last, self.window_steps + 1,"),
)
_add("tail averages: last tick", SPEC_END, "the run's last step", ("range(self.last, ", "range(0, "))
_add("tail averages: further ticks", SPEC_END, "none", (", *self.also}", "}"))
_add("tail averages: counted from the end", SPEC_END, "one off", ("total_steps - 1 - each", "total_steps - each"))
_add(
    "tail averages: order of writing back",
    END_OF_RUN,
    "the last first",
    (
        "        before = self._norms()\n        for key, name, _, blend in self._each():",
        "        before = self._norms()\n        for key, name, _, blend in reversed([*self._each()]):",
    ),
)
_add(
    "tail averages: blend",
    END_OF_RUN,
    "all the way",
    ("self._averages.pop(key), blend)", "self._averages.pop(key), 1.0)"),
)
_add("norms", END_OF_RUN, "not restored", (".mul_(old / new)", ".mul_(1.0)"))
_add("norms", END_OF_RUN, "the other way round", (".mul_(old / new)", ".mul_(new / old)"))
_add(
    "norms",
    END_OF_RUN,
    "taken after the blends",
    (
        "zip(self.entry.keep_norms, before, self._norms(), strict=True)",
        "zip(self.entry.keep_norms, self._norms(), self._norms(), strict=True)",
    ),
)
_add("norms", END_OF_RUN, "of a rank's part", ("vector_norm(self.parameters[n].data,", "vector_norm(self._own(n),"))
_add(
    "tail averages: ranks",
    END_OF_RUN,
    "what others have written is not gathered",
    (
        "            if self._sharded(name):\n                self.communicator.gather",
        "            if False:\n                self.communicator.gather",
    ),
)
_add(
    "tail averages: lerp",
    END_OF_RUN,
    "fused in parts",
    (
        "    difference = end - start\n    return difference",
        "    return torch.lerp(start, end, weight)\n    return difference",
    ),
)
for _what, _old, _new in (
    ("rate of the banks", "rate: 0.0248}", "rate: 0.0348}"),
    ("the head's window", "window_steps: 321, every: 2, last: 1", "window_steps: 320, every: 2, last: 1"),
    ("ticks between Adam's steps", "every: 2, last: 1", "every: 2, last: 0"),
):
    _add("the recipe's averages", RECIPE_AVERAGED, _what, (_old, _new))

# --- the canonical mask ---

_add(
    "mask: merges",
    CANONICAL_MASK,
    "the rightmost of equal ranks first",
    ('-rank, side="right")', '-rank, side="left")'),
)
_add(
    "mask: merges",
    CANONICAL_MASK,
    "the merge that ends the last piece counts",
    ("merged[done][0] < ended", "merged[done][0] <= ended"),
)
_add("mask: merges", CANONICAL_MASK, "without a limit", (" and merged[done][0] < ended", ""))
_add(
    "mask: bits",
    CANONICAL_MASK,
    "the highest first",
    ('packed = np.packbits(marked, bitorder="little")', "packed = np.packbits(marked)"),
)
_add("mask: cuts", CANONICAL_MASK, "between white space", ("SPACE: (SPACE,), ", ""))
_add("mask: cuts", CANONICAL_MASK, "between sign and letter", (", OTHER: (LETTER,)}", "}"))
_add("mask: cuts", CANONICAL_MASK, "inside characters", ("return (INSIDE, *{", "return (-1, *{"))
_add("mask: cuts", CANONICAL_MASK, "no contractions", ("0 if token in CONTRACTIONS else ", ""))
_add(
    "mask: loss",
    HEAD,
    "the highest bit first",
    (
        "torch.arange(8, dtype=torch.uint8, device=rows.device)",
        "torch.arange(7, -1, -1, device=rows.device).to(torch.uint8)",
    ),
)
_add("mask: loss", HEAD, "by the target", ("mask[inputs[chunk]]", "mask[targets[chunk]]"))
_add("mask: loss", HEAD, "-20", ("MASKED = -60.0", "MASKED = -20.0"))
