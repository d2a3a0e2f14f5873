"""What the record models want of a batch besides its tokens: rows of bigrams and n-grams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanogpt.data.token_classes import token_classes
from nanogpt.data.tokenizer import BOS, encode_text
from nanogpt.models.model_spec import Slot
from nanogpt.models.record_spec import BIGRAM_ROWS
from nanogpt.recipe import load_recipe
from nanogpt.recipe_yaml import RecipeError
from nanogpt.spec_fields import compiled_values
from nanogpt.training.separate_documents import separate_documents


def bigram_rows(tokens: list[int], rows: int) -> np.ndarray:
    spec = load_recipe("speedrun", [f"model.bigram_rows={rows}", "hardware.gpus_per_node=1"]).model
    inputs = np.array(tokens, dtype=np.uint16)
    extras = spec.batch_extras(Slot(inputs, inputs))
    assert extras.state is None
    found = extras.arrays[BIGRAM_ROWS]
    assert found.dtype == np.int64
    return found


def test_bigram_rows():
    # 27191 * 50256 = 1,366,510,896; 36313 * 50256 = 1,824,946,128; 36313 * 50255 = 1,824,909,815
    assert bigram_rows([50256, 0, 1, 50256, 50255], 251520).tolist() == [
        251519,
        1_366_510_896 % 251_519,
        36_313 % 251_519,
        (1_824_946_128 ^ 27_191) % 251_519,
        (1_824_909_815 ^ 1_366_510_896) % 251_519,
    ]


def test_the_last_row_belongs_to_the_first_token_alone():
    rows = bigram_rows(np.random.default_rng(0).integers(0, 50257, 20_000).tolist(), 98)
    assert rows[0] == 97
    assert sorted(set(rows[1:].tolist())) == list(range(97))


NORMALIZED = "model.normalized_ngrams=true"


def ngrams(tokens: np.ndarray, *overrides: str) -> dict[str, Any]:
    """Record 92's rows and signs, with 10,000 rows."""
    spec = load_recipe("demo-record92", ["model.ngram_rows=10000", *overrides]).model
    return dict(spec.batch_extras(Slot(tokens.astype(np.uint16), np.zeros(tokens.size, np.uint16))).arrays)


def test_normalized_ngrams_are_those_of_the_classes():
    tokens = np.random.default_rng(0).integers(0, 50257, 20_000)
    found, expected = ngrams(tokens, NORMALIZED), ngrams(token_classes()[tokens])
    plain = ngrams(tokens)
    assert found.keys() == expected.keys() == plain.keys() and len(found) == 2
    for name, rows in found.items():
        assert (rows.dtype, rows.shape) == (plain[name].dtype, plain[name].shape)
        assert np.array_equal(rows, expected[name])
        differ = (rows != plain[name]).any(0)
        moved = token_classes()[tokens] != tokens
        reached = moved.copy()
        reached[1:] |= moved[:-1]
        reached[2:] |= moved[:-2]
        assert differ.any() and not (differ & ~reached).any()


def test_documents_that_differ_in_case_and_accents_read_the_same_rows():
    """As evaluation and sampling make them."""
    spec = load_recipe("demo-record92", [NORMALIZED]).model
    lower, upper = (encode_text(text).tolist() for text in (" the town of e", " The Town OF é"))
    assert lower != upper and len(lower) == len(upper)
    (one, _), (other, _) = (separate_documents([text], spec, BOS, "cpu") for text in (lower, upper))
    for name, rows in one.extras.items():
        assert rows.tolist() == other.extras[name].tolist()


def test_normalized_ngrams_are_no_part_of_compiled_code():
    plain, other = (load_recipe("record92", overrides).model for overrides in ([], [NORMALIZED]))
    assert list(compiled_values(plain)) == list(compiled_values(other))
    shipped = load_recipe("record92-normalized-ngrams").model
    assert shipped == other != plain


def test_a_smaller_table_is_no_part_of_compiled_code():
    """So recipes with a whole and a quarter table share a cache file."""
    one, other = (load_recipe(recipe).model for recipe in ("record92", "record92-quarter-table"))
    assert one != other and list(compiled_values(one)) == list(compiled_values(other))


@pytest.mark.parametrize("overrides", [("model.vocab_size=50000", "data.bos=49999"), ("data.bos=0",)])
def test_other_vocabularies_are_refused(overrides: tuple[str, ...]):
    message = r"model\.normalized_ngrams: is for GPT-2's tokens: model.vocab_size 50257 with data.bos 50256, found "
    with pytest.raises(RecipeError, match=message):
        load_recipe("record92", [NORMALIZED, "training.end=[]", *overrides])
