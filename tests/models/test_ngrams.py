"""Rows of hashed n-grams against their definitions, one token at a time in Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nanogpt.models.record92.ngrams import ngram_rows, sign_rows

ROWS = 84_602_880
RANDOM = np.random.default_rng(0).integers(0, 50257, 49_152).tolist()


def int32(number: int) -> int:
    """As a product of 32-bit integers wraps."""
    return (number + 2**31) % 2**32 - 2**31


def slow_rows(x: list[int], rows: int) -> list[list[int]]:
    half = rows // 2
    bigrams, trigrams = [], []
    for t in range(len(x)):
        if t == 0:
            bigrams.append(half - 1)
        else:
            before = half - 1 if t == 1 else x[t - 1]
            bigrams.append((int32(36313 * x[t]) ^ int32(27191 * before)) % (half - 1))
        if t < 2:
            trigrams.append(rows - 1)
        else:
            mixed = int32(17351 * x[t]) ^ int32(60961 * x[t - 1]) ^ int32(45259 * x[t - 2])
            trigrams.append(half + mixed % (half - 1))
    return [bigrams, trigrams]


def slow_signs(x: list[int]) -> list[list[int]]:
    bigrams, trigrams = [], []
    for t in range(len(x)):
        bigrams.append(0 if t < 1 else (int32(48271 * x[t]) ^ int32(30011 * x[t - 1])) & 8191)
        trigrams.append(
            0 if t < 2 else (int32(58699 * x[t]) ^ int32(39779 * x[t - 1]) ^ int32(26801 * x[t - 2])) & 8191
        )
    return [bigrams, trigrams]


@pytest.mark.parametrize("rows", [ROWS, ROWS // 4, 1000, 98, 4])
def test_rows_of_a_real_micro_batch(rows: int):
    found = ngram_rows(np.array(RANDOM, dtype=np.uint16), rows)
    assert found.dtype == np.int32 and found.shape == (2, 49_152)
    assert found.tolist() == slow_rows(RANDOM, rows)


def test_sign_rows_of_a_real_micro_batch():
    found = sign_rows(np.array(RANDOM, dtype=np.uint16), 8192)
    assert found.dtype == np.int32 and found.shape == (2, 49_152)
    assert found.tolist() == slow_signs(RANDOM)
    assert found.max() == 8191


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("token", [0, 1, 50_256, 65_535])
def test_short_micro_batches(count: int, token: int):
    x = [token, 7, 50_256, 50_255][:count]
    tokens = np.array(x, dtype=np.uint16)
    assert ngram_rows(tokens, ROWS).tolist() == slow_rows(x, ROWS)
    assert sign_rows(tokens, 8192).tolist() == slow_signs(x)


def test_rows_by_hand():
    # H = 42,301,440. 27191 * 42,301,439 = 1,150,218,427,849 is 268 * 2^32 - 832,807,479, xor 36313 makes it
    # -832,778,224; 17351 * 2 xor 60961 xor (45259 * 50256 - 2^32) is -2,020,424,993.
    found = ngram_rows(np.array([50_256, 1, 2], dtype=np.uint16), ROWS)
    assert found[0, :2].tolist() == [42_301_439, 13_250_556]
    assert found[1].tolist() == [84_602_879, 84_602_879, 52_345_519]


def test_no_hash_gives_the_last_row_of_a_half():
    found = ngram_rows(np.array(RANDOM, dtype=np.uint16), 98)
    assert sorted(set(found[0, 1:].tolist())) == list(range(48))
    assert sorted(set(found[1, 2:].tolist())) == list(range(49, 97))


@pytest.mark.parametrize("of", [lambda x: ngram_rows(x, ROWS), lambda x: sign_rows(x, 8192)])
def test_nothing_but_the_last_three_tokens_decides(of: Callable[[np.ndarray], np.ndarray]):
    tokens = np.array(RANDOM[:100], dtype=np.uint16)
    changed = tokens.copy()
    changed[50] += 1
    different = np.flatnonzero((of(tokens) != of(changed)).any(0)).tolist()
    assert different == [50, 51, 52]
