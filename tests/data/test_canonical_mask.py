"""The canonical mask of GPT-2's tokens: its known sums, and pair by pair what tiktoken makes of both."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from nanogpt.data import canonical_mask
from nanogpt.data.canonical_mask import NONZERO_BYTES, Mask, build, mark_never_next
from nanogpt.data.prefixes import gpt2_tokens
from nanogpt.data.tokenizer import gpt2_encoding
from nanogpt.errors import RunError
from nanogpt.training.mask_builder import MaskBuilder

ROWS = 50304
TOKENS = gpt2_tokens()


@pytest.fixture(scope="module")
def mask() -> Mask:
    made = np.zeros((ROWS, ROWS // 8), dtype=np.uint8)
    build(made)
    return made


def marked(mask: Mask, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (mask[before, after >> 3] >> (after & 7)) & 1 == 1


def test_its_sums_are_the_public_runs(mask: Mask):
    ones = np.array([bin(byte).count("1") for byte in range(256)])
    assert int(sum(ones[row].sum() for row in mask)) == 70_889_701
    assert int(mask.any(axis=1).sum()) == 47_432
    assert np.count_nonzero(mask) == NONZERO_BYTES == 58_810_565
    assert not mask[len(TOKENS) :].any()  # <|endoftext|> and the padding
    assert not mask[:, len(TOKENS) // 8 :].any()


def kind_of(token: bytes, last: bool) -> str:
    """Of the first or last character, by another way than the package's."""
    text = token.decode(errors="surrogateescape")
    character = text[-1 if last else 0]
    if "\udc80" <= character <= "\udcff":  # a byte of none
        return "inside"
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def may_be_cut(before: bytes, after: bytes) -> bool:
    one, other = kind_of(before, last=True), kind_of(after, last=False)
    if other == "inside" or (one, other) in (("space", "space"), ("other", "letter")):
        return True
    for word in (b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"):
        rest = before.removesuffix(word)
        if rest != before and (not rest or kind_of(rest, last=True) in ("letter", "number")):
            return True
    return False


def test_pairs_are_those_that_merge_across_the_seam(mask: Mask):
    rng = np.random.default_rng(0)
    before, after = rng.integers(len(TOKENS), size=(2, 20_000))
    rows = rng.integers(len(TOKENS), size=20_000)
    columns = np.array(
        [rng.choice(np.flatnonzero(np.unpackbits(mask[row])) if mask[row].any() else [0]) for row in rows]
    )
    columns = (columns & ~7) + 7 - (columns & 7)  # numpy counts from the highest bit
    # Tokens that end in contractions, and what merges with them.
    short = np.array([number for number, token in enumerate(TOKENS) if b"'" in token or len(token) < 3])
    extra = rng.choice(short, size=20_000)
    before = np.concatenate([before, rows, extra, rng.choice(short, size=20_000)])
    after = np.concatenate([after, columns, rng.integers(len(TOKENS), size=20_000), rng.choice(short, size=20_000)])
    encode = gpt2_encoding()._encode_single_piece
    expected = np.array(
        [
            encode(TOKENS[p] + TOKENS[x]) != [p, x] and not may_be_cut(TOKENS[p], TOKENS[x])
            for p, x in zip(before.tolist(), after.tolist(), strict=True)
        ]
    )
    assert np.array_equal(marked(mask, before, after), expected)
    assert 0.2 < expected.mean() < 0.8


def test_no_text_has_a_marked_pair(mask: Mask):
    rng = np.random.default_rng(1)
    encoding = gpt2_encoding()
    for _ in range(300):
        numbers = rng.integers(len(TOKENS), size=200) if rng.random() < 0.5 else rng.integers(700, size=200)
        text = b"".join(TOKENS[number] for number in numbers).decode(errors=str(rng.choice(["replace", "ignore"])))
        made = np.array(encoding.encode_ordinary(text))
        assert not marked(mask, made[:-1], made[1:]).any()


def test_another_table_of_characters_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canonical_mask, "gpt2_tokens", lambda: TOKENS[:300])
    with pytest.raises(RunError, match=r"has [\d,]+ bytes that are not zero, GPT-2's has 58,810,565"):
        build(np.zeros((ROWS, ROWS // 8), dtype=np.uint8))


def test_a_few_merges_by_hand():
    tokens = [bytes([byte]) for byte in range(256)] + [b"ca", b"ab", b"abb", b"aa"]
    mask = np.zeros((264, 33), dtype=np.uint8)
    mark_never_next(tokens, mask)
    found = {(tokens[p], tokens[x]) for p in range(260) for x in range(260) if marked(mask, np.array(p), np.array(x))}
    assert found == {
        *((b"a", b"b"), (b"c", b"a"), (b"a", b"a"), (b"ab", b"b")),  # these are tokens together
        *((b"c", b"ab"), (b"c", b"abb"), (b"c", b"aa")),  # ca merges before what begins with a
        (b"aa", b"b"),  # ab merges before aa; but in ca, b it comes too late
        (b"a", b"aa"),  # and of two aa the left one
    }


def test_a_process_builds_it_and_what_it_leaves_undone_is_done(mask: Mask):
    builder = MaskBuilder(ROWS)
    assert np.array_equal(builder.wait(), mask)
    builder.close()
    killed = MaskBuilder(ROWS)
    killed._process.kill()
    assert np.array_equal(killed.wait(), mask)
