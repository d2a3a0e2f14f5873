"""Candidate sets against their definition in plain lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanogpt.errors import InputError
from nanogpt.models.record92.candidates import candidate_classes, first_offset

V = 50_304


def slow_candidates(targets: list[int], count: int, offset: int, vocabulary: int) -> tuple[list[int], int]:
    marked = sorted(set(targets))
    need = count - len(marked)
    if need == 0:
        return marked, offset
    draws = min(vocabulary, math.floor(1.7 * need) + 256)
    drawn = [20011 * ((offset + k) % vocabulary) % vocabulary for k in range(draws)]
    members = set(marked)
    negatives = [c for c in drawn if c not in members]
    if len(negatives) < need:
        unmarked = [c for c in range(vocabulary) if c not in members]
        negatives = unmarked[:: max(1, len(unmarked) // need)]
    return sorted(marked + negatives[:need]), (offset + draws) % vocabulary


def check(targets: list[int], count: int, offset: int, vocabulary: int = V) -> tuple[list[int], int]:
    found, after = candidate_classes(np.array(targets, dtype=np.uint16), count, offset, vocabulary=vocabulary, slot=0)
    assert found.dtype == np.int64 and found.shape == (count,)
    expected = slow_candidates(targets, count, offset, vocabulary)
    assert (found.tolist(), after) == expected
    return expected


def zipf(tokens: int, seed: int) -> list[int]:
    draws = np.random.default_rng(seed).random(tokens)
    return np.minimum(50_257**draws, 50_256).astype(int).tolist()


@pytest.mark.parametrize(("tokens", "count"), [(16_384, 10_240), (32_768, 14_336), (49_152, 24_576)])
def test_a_run_of_steps_at_real_sizes(tokens: int, count: int):
    offset, wrapped = first_offset(3, 8, V), 0
    assert offset == 18_864
    for step in range(6):
        targets = zipf(tokens, step)
        classes, after = check(targets, count, offset)
        assert set(targets) <= set(classes)
        wrapped += after < offset
        offset = after
    assert wrapped


def test_first_offsets():
    assert [first_offset(slot, 8, V) for slot in range(8)] == [0, 6288, 12576, 18864, 25152, 31440, 37728, 44016]
    assert [first_offset(slot, 3, 64) for slot in range(3)] == [0, 21, 42]


def test_the_first_negatives_are_the_sweeps_and_targets_are_skipped():
    found, after = candidate_classes(np.array([20_011, 5], np.uint16), 5, 0, vocabulary=V, slot=0)
    # 0, 20011 (a target), 40022, 60033 - 50304 = 9729
    assert found.tolist() == [0, 5, 9_729, 20_011, 40_022]
    assert after == int(1.7 * 3) + 256


def test_padding_classes_can_be_negatives():
    classes, _ = check([1, 2, 3], 24_576, 0)
    assert max(classes) > 50_256


@pytest.mark.parametrize("offset", [0, 5, V - 1])
def test_the_ring_wraps_around(offset: int):
    check(list(range(0, 9000, 3)), 14_336, offset)


def test_nothing_is_drawn_where_nothing_is_needed():
    assert check([9, 4, 4, 7], 3, 17) == ([4, 7, 9], 17)


def test_a_whole_vocabulary():
    assert check([3, 60], 64, 10, 64)[0] == list(range(64))


@pytest.mark.parametrize("count", [4_800, 5_000, 5_100, 20_000])
def test_too_few_draws_that_are_no_targets(count: int):
    targets = [20_011 * k % V for k in range(4_700)]  # just what is drawn next
    classes, after = check(targets, count, 0)
    need = count - 4_700
    if need < 1_000:  # the fallback: every so manieth of the 45,604 others
        others = sorted(set(range(V)) - set(targets))
        assert set(classes) - set(targets) == set(others[:: 45_604 // need][:need])
    assert after == (int(1.7 * need) + 256) % V


def test_the_fallback_takes_all_where_there_are_no_more():
    targets = [20_011 * k % 600 for k in range(300)]
    classes, _ = check(targets, 600, 0, 600)
    assert classes == list(range(600))
    check(targets, 520, 0, 600)


def test_more_targets_than_candidates():
    targets = np.arange(400, dtype=np.uint16)
    with pytest.raises(InputError) as caught:
        candidate_classes(targets, 399, 0, vocabulary=V, slot=5)
    for part in ("slot 5", "399 candidates", "400 tokens", "400 different targets", "Raise the stage's candidates"):
        assert part in str(caught.value)
    check(targets.tolist(), 400, 3)
