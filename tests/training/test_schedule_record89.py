"""Record 89's schedule: its numbers typed in by hand, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nanogpt.data.training_batches import StepRequest
from nanogpt.models.language_model import Windows
from nanogpt.recipe import load_recipe, shorten
from nanogpt.spec import RunSpec
from nanogpt.training.schedule import Schedule

SPEC = load_recipe("record89")
SCHEDULE = Schedule(SPEC)

# first step, last step, batch, short and long window in tokens, longest document, room for documents
STAGES = [
    (0, 422, 131_072, 128, 384, 896, 63),
    (423, 846, 262_144, 384, 896, 2048, 95),
    (847, 1269, 393_216, 640, 1408, 2048, 127),
    (1270, 1284, 393_216, 768, 1664, 2048, 127),
]


def test_length():
    assert (SCHEDULE.total_steps, SCHEDULE.training.scheduled_steps) == (1285, 1270)
    assert round(SCHEDULE.training.total_tokens / 1e6) == 339


@pytest.mark.parametrize(("stage", "values"), list(enumerate(STAGES)))
def test_stages(stage, values):
    first, last, batch, short, long, longest, room = values
    for step in (first, first + 1, last):
        settings = SCHEDULE.at(step)
        assert (settings.stage, settings.batch_tokens, settings.windows) == (stage, batch, Windows(short, long))
        assert (settings.request.max_document_tokens, settings.request.max_documents) == (longest, room)


def test_multi_token_and_prefix_weights():
    assert SCHEDULE.at(0).point.token_weights == (1, 0.5, 0.25)
    assert SCHEDULE.at(100).point.token_weights == (1, 0.5, pytest.approx(0.25 * (1 - 100 / 423)))
    assert SCHEDULE.at(423).point.token_weights == (1, 0.5)
    assert SCHEDULE.at(500).point.token_weights == (1, pytest.approx(0.5 * (1 - 77 / 424)))
    assert SCHEDULE.at(847).point.token_weights == SCHEDULE.at(1284).point.token_weights == (1,)
    assert [SCHEDULE.at(step).point.prefix_weight for step in (0, 211, 422, 423)] == [0.25] * 4
    assert SCHEDULE.at(500).point.prefix_weight == pytest.approx(0.25 * (1 - 77 / 424))
    assert SCHEDULE.at(846).point.prefix_weight == pytest.approx(0.25 / 424)
    assert SCHEDULE.at(847).point.prefix_weight is SCHEDULE.at(1284).point.prefix_weight is None


def test_prefix_weights_in_levels():
    levels = (
        "training.stages.1={steps: 361, batch_tokens: 262144, window_blocks: {short: 3, long: 7}, lr_factor: 1.52, "
    )
    levels += "token_weights: [1, 0.5], prefix_weight: {levels: [0.2, 0.15, 0.1, 0.05]}}"
    spec = load_recipe("record89", ["training.stages.0.steps=320", levels])
    for first, steps in ((320, 361), (32, 36)):  # the second run is a tenth of the first
        schedule = Schedule(spec if steps == 361 else shorten(spec, round(spec.training.total_steps / 10)))
        assert schedule.first_steps[1:3] == [first, first + steps]
        found = [schedule.at(step).point.prefix_weight for step in range(first, first + steps)]
        assert found == [[0.2, 0.15, 0.1, 0.05][4 * k // steps] for k in range(steps)]
    weights = Schedule(spec)
    assert [weights.at(step).point.prefix_weight for step in (319, 320, 410, 411, 500, 501, 590, 591, 680)] == [
        0.25, 0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05
    ]  # fmt: skip
    assert load_recipe("record89", ["training.stages.0.steps=320", levels]) == spec
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_the_loader_is_asked_for_what_the_stage_says():
    spec = load_recipe("record89", ["training.stages.2.max_segment_tokens=1920"])
    request = Schedule(spec).at(900).request
    assert request == StepRequest(393_216, 2048, 127, spec.training.stages[2], 1920)
    assert (request.max_seqlen, SCHEDULE.at(900).request.max_seqlen, SCHEDULE.at(0).request.max_seqlen) == (
        1920, 2048, 896
    )  # fmt: skip


def test_learning_rate_and_momentum():
    assert [SCHEDULE.lr_factor(step) for step in (0, 422, 423, 508)] == [1.0, 1.0, 1.52, 1.52]
    t = (700 - 508) / 762
    assert SCHEDULE.lr_factor(700) == pytest.approx(1.52 * (1 - t) + 0.15 * t)
    assert SCHEDULE.lr_factor(1269) == pytest.approx(0.1521, abs=5e-5)
    assert SCHEDULE.lr_factor(1270) == SCHEDULE.lr_factor(1284) == 0.15
    assert [SCHEDULE.at(step).rates.momentum for step in (0, 300, 1235)] == [0.85, 0.95, 0.95]
    assert SCHEDULE.at(150).rates.momentum == pytest.approx(0.90)
    assert SCHEDULE.at(1284).rates.momentum == pytest.approx(0.852)


def test_the_learning_rate_may_take_its_time_at_a_change_of_stage():
    ramped = Schedule(load_recipe("record89", ["training.lr_schedule.ramp_steps=30"]))
    assert [ramped.lr_factor(step) for step in (0, 422, 453, 508)] == [1.0, 1.0, 1.52, 1.52]
    assert ramped.lr_factor(423) == pytest.approx(1 + 0.52 / 31)
    assert ramped.lr_factor(452) == pytest.approx(1 + 0.52 * 30 / 31)
    t = (847 - 508) / 762  # the cooldown has begun
    assert ramped.lr_factor(847) == pytest.approx((1.52 + 0.21 / 31) * (1 - t) + 0.15 * t)
    assert [ramped.lr_factor(step) for step in (877, 1269, 1270)] == [SCHEDULE.lr_factor(s) for s in (877, 1269, 1270)]
    assert shorten(ramped.spec, 257).training.lr_schedule.ramp_steps == 6


def test_adam_steps_and_the_split():
    assert SCHEDULE.spec.optimizer.split_step(SCHEDULE.first_steps) == 847
    assert not SCHEDULE.at(1284).rates.adam_step
    assert sum(SCHEDULE.at(step).rates.adam_step for step in range(1285)) == 642
    assert SCHEDULE.final_windows == Windows(768, 2560)
    windows = [Windows(128, 384), Windows(384, 896), Windows(640, 1408), Windows(768, 1664)]
    assert SCHEDULE.window_changes(1284) == list(pairwise(windows))
