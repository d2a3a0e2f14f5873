"""Record 92's schedule, every number of its public timeline: stages, rates, events, ticks of the averages."""

from __future__ import annotations

import itertools

import pytest

from nanogpt.models.language_model import Windows
from nanogpt.recipe import load_recipe
from nanogpt.training.schedule import Schedule

SPEC = load_recipe("record92", ["hardware.gpu=h100", "hardware.gpus_per_node=8"])
SCHEDULE = Schedule(SPEC)
STEPS = range(1194)


def changes(of) -> dict:
    """The steps at which `of(settings)` changes, and what to."""
    values = [of(SCHEDULE.at(step)) for step in STEPS]
    return {0: values[0]} | {
        step: after for step, (before, after) in enumerate(itertools.pairwise(values), start=1) if before != after
    }


def test_stages():
    assert SCHEDULE.total_steps == 1194
    assert SPEC.training.total_tokens == 328_663_040
    assert changes(lambda s: s.batch_tokens) == {0: 131072, 320: 262144, 681: 393216, 1107: 327680, 1174: 131072}
    assert changes(lambda s: s.point.loss.candidates) == {0: 10240, 681: 14336, 965: 24576, 1107: None}
    assert changes(lambda s: s.request.max_document_tokens) == {0: 896, 320: 2048, 681: 3072}
    assert changes(lambda s: s.request.max_segment_tokens) == {0: None, 681: 2560}
    assert changes(lambda s: len(s.point.token_weights)) == {0: 3, 320: 2, 681: 1}
    assert changes(lambda s: s.request.max_documents) == {0: 63, 320: 95, 681: 127, 1174: 63}
    blocks = {step: (w.short // 128, w.long // 128) for step, w in changes(lambda s: s.windows).items()}
    assert blocks == {0: (1, 3), 320: (3, 7), 681: (5, 11), 1174: (6, 13)}
    assert SCHEDULE.final_windows == Windows(768, 2560)
    assert changes(lambda s: s.point.prefix_weight) == {0: 0.25, 320: 0.2, 411: 0.15, 501: 0.1, 591: 0.05, 681: None}


def test_learning_rates_and_momentum():
    for step, factor in {
        0: 1.0, 233: 1.0, 234: 1.0, 320: 1.408, 514: 1.157, 681: 1.050, 1107: 0.391, 1174: 0.3, 1193: 0.3,
    }.items():  # fmt: skip
        assert SCHEDULE.lr_factor(step) == pytest.approx(factor, abs=5e-4), step
    assert max(STEPS, key=SCHEDULE.lr_factor) == 320
    for step, mu in {0: 0.85, 120: 0.89, 240: 0.93, 1144: 0.93, 1193: 0.8516}.items():
        assert SCHEDULE.at(step).rates.momentum == pytest.approx(mu, abs=1e-6), step
    assert changes(lambda s: s.rates.fast_share) == {0: 1.0, 514: 0.4385}
    assert [SCHEDULE.at(step).rates.fast_beta for step in (100, 514, 1193)] == [
        pytest.approx(0.85 + 0.08 * 100 / 240), 0.85, 0.85,
    ]  # fmt: skip
    assert [step for step in STEPS if SCHEDULE.at(step).rates.split] == [1175]


def test_events():
    events = [step for step in STEPS if SCHEDULE.at(step).rates.event]
    assert events == [*range(1, 336, 2), *range(339, 1192, 4)]
    assert len(events) == 382
    for step, beta2, doubled in ((335, 0.95, 1), (339, 0.9025, 2)):
        rates = SCHEDULE.at(step).rates.table
        lr = 0.008 * SCHEDULE.lr_factor(step) * 70
        assert rates.lr == pytest.approx(lr) and rates.beta2 == pytest.approx(beta2) and rates.eps == 1e-10
        assert rates.decay == pytest.approx(lr * lr * 0.005 * 5 * doubled)


def test_warm_up_steps():
    """After the split, in the last stage, Adam's update of the embedding is another one: that of step 1177."""
    around_stages = [step for first in (320, 681, 965, 1107, 1174) for step in (first - 1, first, first + 1)]
    assert SCHEDULE.warmup_steps() == sorted([0, 1, 2, 339, *around_stages, 1177])


def test_averages():
    head, tail, values, blend = (average.ticks(1194) for average in SPEC.training.end[0].averages)
    r = 2 / 299
    assert list(head) == [896, *range(897, 1194, 2)]
    assert head[897] == head[1191] == pytest.approx(1 - (1 - r) ** 2, rel=1e-9) and head[1193] == pytest.approx(r)
    assert list(tail) == list(range(945, 1194, 4)) and len(tail) == 63
    assert list(values) == list(range(947, 1192, 4)) and len(values) == 62
    assert list(blend) == sorted([*range(897, 1194, 4), 1192]) and len(blend) == 76
    for ticks, rate in ((tail, 4 / 53), (values, 4 / 53), (blend, 2 / 75)):
        assert list(ticks.values()) == pytest.approx([rate] * len(ticks), rel=1e-8)
    assert [average.blend for average in SPEC.training.end[0].averages] == [
        {"lm_head": 0.65, "embed": 0.65},
        {"vo": 1, "mlp": 1},
        {"value_embed": 1},
        {"qk": 0.55, "vo": 0.3493, "mlp": 0.3493},
    ]
    assert set(SPEC.training.end[0].keep_norms) == {"embed", "lm_head", "mlp", "qk", "vo"}
    assert SPEC.training.masked


def test_order_of_reductions_and_updates():
    small = SPEC.optimizer.reduce_order[:13]
    assert SPEC.optimizer.reduce_order[13:] == ["qk", "vo", "mlp", "value_embed", "lm_head", "embed"]
    assert SPEC.optimizer.update_order == ["qk", "vo", "lm_head", "embed", "value_embed", *small, "mlp"]
    assert SPEC.optimizer.tables.groups == ["value_embed"]
    assert SPEC.optimizer.anvil.groups["mlp"].lr_muls == [1, 2] * 7 + [0, 0] + [1, 2] * 4


def test_a_shortened_run_keeps_its_shares():
    spec = load_recipe("record92", ["hardware.gpu=h100", "hardware.gpus_per_node=8"], steps=300)
    schedule = Schedule(spec)
    assert schedule.total_steps == 300
    assert spec.optimizer.tables.from_step == 84 and spec.optimizer.anvil.slow_momentum.from_step == 129
    events = [step for step in range(300) if schedule.at(step).rates.event]
    assert events == [*range(1, 84, 2), *range(87, 300, 4)]
    assert [stage.steps for stage in spec.training.all_stages] == [80, 91, 71, 36, 17, 5]


def test_the_quarter_table():
    quarter = load_recipe("record92-quarter-table", ["hardware.gpu=h200", "hardware.gpus_per_node=1"])
    assert quarter.model.ngram_rows * 4 == SPEC.model.ngram_rows == 84_602_880
    assert quarter.model_copy(update={"model": SPEC.model, "name": "", "description": ""}).training == SPEC.training
