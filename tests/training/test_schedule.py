"""The schedule: the speedrun's numbers typed in by hand, step by step, and the baseline's cosine."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from nanogpt.models.language_model import Windows
from nanogpt.optim.optimizer_spec import Rates
from nanogpt.recipe import load_recipe
from nanogpt.training.schedule import Schedule

SPEEDRUN = Schedule(load_recipe("speedrun"))
GPT2 = Schedule(load_recipe("gpt2"))

# first step, last step, batch, short and long window in tokens
STAGES = [
    (0, 504, 131_072, 128, 384),
    (505, 1009, 262_144, 384, 896),
    (1010, 1514, 393_216, 640, 1408),
    (1515, 1554, 393_216, 768, 1664),
]


def test_length():
    assert SPEEDRUN.total_steps == 1555
    assert SPEEDRUN.training.scheduled_steps == 1515


@pytest.mark.parametrize(("stage", "values"), list(enumerate(STAGES)))
def test_stage_boundaries_batches_and_windows(stage, values):
    first, last, batch, short, long = values
    for step in (first, first + 1, (first + last) // 2, last - 1, last):
        settings = SPEEDRUN.at(step)
        assert (settings.step, settings.stage, settings.batch_tokens) == (step, stage, batch)
        assert settings.windows == Windows(short, long)


def test_final_windows():
    assert SPEEDRUN.final_windows == Windows(768, 2560)


def test_window_changes():
    all_windows = [Windows(short, long) for _, _, _, short, long in STAGES]
    growths = list(pairwise(all_windows))
    for step, count in [(0, 0), (504, 0), (505, 1), (1009, 1), (1010, 2), (1514, 2), (1515, 3), (1554, 3)]:
        assert SPEEDRUN.window_changes(step) == growths[:count]
    short_alone = ["training.stages.1.window_blocks.long=3", "training.stages.2.window_blocks={short: 3, long: 3}"]
    changes = Schedule(load_recipe("speedrun", short_alone)).window_changes(1554)
    assert changes == [(Windows(128, 384), Windows(384, 384)), (Windows(384, 384), Windows(768, 1664))]


def test_tokens_before():
    assert [SPEEDRUN.tokens_before(step) for step in (0, 1, 504, 505, 506)] == [
        0,
        131_072,
        504 * 131_072,
        505 * 131_072,
        505 * 131_072 + 262_144,
    ]
    total = 505 * 131_072 + 505 * 262_144 + 545 * 393_216
    assert SPEEDRUN.tokens_before(1555) == total == SPEEDRUN.training.total_tokens


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (0, (1, 0.5, 0.25)),
        (1, (1, 0.5, 0.25 * 504 / 505)),
        (101, (1, 0.5, 0.2)),
        (504, (1, 0.5, 0.25 / 505)),
        (505, (1, 0.5)),
        (606, (1, 0.4)),
        (1009, (1, 0.5 / 505)),
        (1010, (1,)),
        (1514, (1,)),
        (1515, (1,)),
        (1554, (1,)),
    ],
)
def test_token_weights(step, weights):
    assert SPEEDRUN.at(step).point.token_weights == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1.0),
        (504, 1.0),
        (505, 1.52),
        (680, 1.52),
        (681, 1.52),  # int(1515 * 0.45)
        (682, 1.52 * 833 / 834 + 0.1 / 834),
        (1009, 1.52 * 506 / 834 + 0.1 * 328 / 834),
        (1010, 1.73 * 505 / 834 + 0.1 * 329 / 834),
        (1098, 0.5 * 1.73 + 0.05),
        (1514, 1.73 / 834 + 0.1 * 833 / 834),
        (1515, 0.1),
        (1516, 0.1),
        (1554, 0.1),
    ],
)
def test_learning_rate(step, factor):
    assert SPEEDRUN.at(step).rates.lr_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "mu"),
    [
        (0, 0.85),
        (1, 0.85 + 0.1 / 300),
        (150, 0.90),
        (299, 0.85 + 0.1 * 299 / 300),
        (300, 0.95),
        (301, 0.95),
        (1504, 0.95),
        (1505, 0.95),
        (1506, 0.948),
        (1530, 0.90),
        (1554, 0.852),
    ],
)
def test_momentum(step, mu):
    assert SPEEDRUN.at(step).rates.momentum == pytest.approx(mu, rel=1e-12)


def test_adam_steps_are_the_odd_ones():
    steps = [step for step in range(1555) if SPEEDRUN.at(step).rates.adam_step]
    assert steps == list(range(1, 1555, 2))
    assert len(steps) == 777
    assert steps[-1] == 1553


def test_the_split_is_at_step_1011_alone():
    assert [step for step in range(1555) if SPEEDRUN.at(step).rates.split] == [1011]
    assert SPEEDRUN.at(1011).rates.adam_step


def test_warm_up_steps():
    assert SPEEDRUN.warmup_steps() == [0, 1, 2, 504, 505, 506, 1009, 1010, 1011, 1514, 1515, 1516]


def test_warm_up_names_no_step_beyond_the_run():
    short = Schedule(load_recipe("speedrun", steps=4))
    assert short.total_steps == 4
    assert short.warmup_steps() == [0, 1, 2, 3]


def test_a_split_stage_that_starts_on_an_odd_step_splits_there():
    stages = "[{steps: 3, batch_tokens: 131072, window_blocks: {short: 1, long: 3}, token_weights: [1], lr_factor: 1}]"
    momentum = "{low: 0.85, high: 0.95, warmup_steps: 2, cooldown_steps: 2}"
    overrides = [f"training.stages={stages}", f"optimizer.normuon.momentum={momentum}"]
    for split_stage, step in ((1, 3), (0, 1)):
        spec = load_recipe("speedrun", [*overrides, f"optimizer.tied_head.split_stage={split_stage}"])
        assert spec.optimizer.split_step(Schedule(spec).first_steps) == step


# --- the baseline ---


def test_gpt2_has_a_learning_rate_and_one_window():
    for step in (0, 1, 2, 999):
        assert GPT2.at(step).rates == Rates(GPT2.lr_factor(step))
        assert GPT2.at(step).point.token_weights == (1,)
        assert GPT2.at(step).windows == Windows(1024, 1024)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.01), (49, 0.5), (99, 1.0), (100, 1.0), (550, 0.55), (325, 0.1 + 0.45 * (1 + math.sqrt(0.5)))],
)
def test_gpt2_learning_rate(step, factor):
    assert GPT2.at(step).rates.lr_factor == pytest.approx(factor, rel=1e-12)


def test_gpt2_learning_rate_falls_to_its_end():
    factors = [GPT2.at(step).rates.lr_factor for step in range(100, 1000)]
    assert factors == sorted(factors, reverse=True)
    assert 0.1 < factors[-1] < 0.10001
