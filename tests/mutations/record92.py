"""Record 92: hashed n-grams, candidates of the softmax."""

from __future__ import annotations

from mutation import CANDIDATES, NGRAMS, Mutations

MUTATIONS = Mutations()
_add = MUTATIONS.add

# --- the n-gram table ---

for _multiplier in ("36313", "27191", "17351", "60961", "45259", "48271", "30011", "58699", "39779", "26801"):
    _add("n-gram hashes", NGRAMS, f"{_multiplier} one more", (f"{_multiplier} *", f"{int(_multiplier) + 1} *"))
_add("n-gram rows", NGRAMS, "token 1's bigram has token 0", ("before[:1] = half - 1", "pass"))
_add("n-gram rows", NGRAMS, "no signed remainder for bigrams", ("before[:-1]).view(np.int32)", "before[:-1])"))
_add("n-gram rows", NGRAMS, "no signed remainder for trigrams", ("trigram.view(np.int32)", "trigram"))
_add(
    "n-gram rows", NGRAMS, "64-bit products", ("tokens.astype(np.uint32)  # products", "tokens.astype(int)  # products")
)
_add("n-gram rows", NGRAMS, "trigrams among bigrams", ("= half + trigram", "= trigram"))
_add("n-gram rows", NGRAMS, "modulo the half", ("before[:-1]).view(np.int32) % (half - 1)", "before[:-1]) % half"))
_add("n-gram rows", NGRAMS, "trigrams modulo the half", ("trigram.view(np.int32) % (half - 1)", "trigram % half"))
_add("n-gram rows", NGRAMS, "token 0's trigram alone without history", ("found[1, :2] =", "found[1, :1] ="))
_add("n-gram rows", NGRAMS, "one row for all without history", ("= half - 1, rows - 1", "= half - 1, half - 1"))
_add(
    "n-gram signs", NGRAMS, "half as many", ("30011 * own[:-1]) & (count - 1)", "30011 * own[:-1]) & (count // 2 - 1)")
)
_add("n-gram signs", NGRAMS, "another for tokens without history", ("np.zeros((2,", "np.ones((2,"))

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
