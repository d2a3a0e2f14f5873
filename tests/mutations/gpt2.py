"""The baseline: the GPT-2 model and AdamW."""

from __future__ import annotations

from mutation import ADAMW, GPT2, TABLE_GPT2, Mutations

MUTATIONS = Mutations()
_add = MUTATIONS.add

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
    ("layer_norm(block.ln_1, x), pieces,", "layer_norm(block.ln_1, x), batch.cu_seqlens,"),
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
_add("GPT-2 attention", GPT2, "scale", ("scale = 1 / math.sqrt(d // heads)", "scale = 1 / math.sqrt(d)"))
_add("GPT-2 GELU", GPT2, "exact", (', approximate="tanh"', ""))
_add(
    "GPT-2 head",
    GPT2,
    "not in the gradient",
    ("logits = x @ self.embed.weight.mT", "logits = x @ self.embed.weight.detach().mT"),
)
_add(
    "GPT-2 start",
    TABLE_GPT2,
    "residual matrices not smaller",
    ("Normal(self.init_std / math.sqrt(2 * self.layers))", "Normal(self.init_std)"),
)
_add(
    "AdamW decay",
    ADAMW,
    "of everything",
    ('not in decaying], "weight_decay": 0.0', 'not in decaying], "weight_decay": decay'),
)
_add("AdamW clipping", ADAMW, "none", ("if self.spec.clip_norm is not None:", "if False:"))
_add("AdamW learning rate", ADAMW, "no schedule", ("self.spec.lr * rates.lr_factor", "self.spec.lr"))
