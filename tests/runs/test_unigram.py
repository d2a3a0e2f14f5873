"""The unigram cross-entropy against the formula, token by token."""

import math
from collections import Counter

import numpy as np
import pytest

from nanogpt.data.shards import ShardError, train_name, val_name, write_tokens
from nanogpt.errors import InputError
from nanogpt.runs import unigram
from nanogpt.runs.unigram import unigram_cross_entropy

VOCABULARY = 50


def write(directory, name, tokens):
    path = directory / name
    write_tokens(path, tokens)
    return path


def by_hand(train, val, val_tokens):
    counts, total = Counter(train), len(train)
    return -sum(math.log((counts[t] + 1) / (total + VOCABULARY)) for t in val[1 : val_tokens + 1]) / val_tokens


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_equals_the_formula_over_several_shards(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(unigram, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(0)
    train = np.minimum(rng.geometric(0.1, 900), VOCABULARY - 1).tolist()
    val = np.minimum(rng.geometric(0.12, 300), VOCABULARY - 1).tolist()
    train_files = [write(tmp_path, train_name(1), train[:500]), write(tmp_path, train_name(2), train[500:])]
    pieces = [val[:1], val[1:120], val[120:]]  # the first token, which is not a target, has a shard of its own
    val_files = [write(tmp_path, val_name(index), piece) for index, piece in enumerate(pieces)]
    for val_tokens in (1, 118, 119, 120, 299):
        found = unigram_cross_entropy(train_files[::-1], val_files[::-1], val_tokens, VOCABULARY)
        assert found == pytest.approx(by_hand(train, val, val_tokens), rel=1e-12)


def test_a_token_never_seen_costs_the_smoothed_share(tmp_path):
    train = [write(tmp_path, train_name(1), [3] * 10)]
    val = [write(tmp_path, val_name(), [3, 4])]
    assert unigram_cross_entropy(train, val, 1, VOCABULARY) == pytest.approx(math.log(10 + VOCABULARY))


def test_errors(tmp_path):
    train = [write(tmp_path, train_name(1), [1, 2, 3])]
    val = [write(tmp_path, val_name(), [1, 2, 3])]
    with pytest.raises(InputError, match="the validation shards hold 3 tokens, 4 are needed"):
        unigram_cross_entropy(train, val, 3, VOCABULARY)
    with pytest.raises(InputError, match="has token 3, the vocabulary has 3"):
        unigram_cross_entropy(train, val, 2, 3)
    with pytest.raises(InputError, match="needs training and validation shards"):
        unigram_cross_entropy([], val, 2, VOCABULARY)
    with pytest.raises(ShardError, match="cannot be read"):
        unigram_cross_entropy([tmp_path / "none.bin"], val, 2, VOCABULARY)
