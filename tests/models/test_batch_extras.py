"""What the record models want of a batch besides its tokens: the rows of the bigram table."""

from __future__ import annotations

import numpy as np

from nanogpt.models.model_spec import Slot
from nanogpt.models.record_spec import BIGRAM_ROWS
from nanogpt.recipe import load_recipe


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
