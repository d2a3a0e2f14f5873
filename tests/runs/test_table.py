"""A run as tables and as plain data."""

import io
import json

from rich.console import Console

from nanogpt.runs.metrics import run_metrics
from nanogpt.runs.table import run_summary, run_table, stage_summaries


def step(number, stage, ms, tokens):
    return {"kind": "step", "step": number, "stage": stage, "train_loss": 5.0, "train_time_ms": ms, "tokens": tokens}


def evaluation(number, loss, ms, tokens):
    average = ms / max(number, 1)
    return {
        "kind": "evaluation",
        "step": number,
        "total_steps": 5,
        "val_loss": loss,
        "train_time_ms": ms,
        "step_avg_ms": average,
        "tokens": tokens,
    }


START = {"kind": "start", "name": "demo", "total_steps": 5, "world_size": 8, "device": "H100", "resumed_at": None}
RECORDS = [
    START,
    evaluation(0, 10.83, 0.0, 0),
    step(1, 0, 490.0, 1000),
    step(2, 0, 510.0, 2000),
    step(3, 0, 530.0, 3000),
    evaluation(3, 7.5, 530.0, 3000),
    step(4, 1, 570.0, 5000),
    step(5, 1, 630.0, 7000),
    evaluation(5, 6.25, 630.0, 7000),
    {"kind": "end", "state": "finished", "reason": None, "train_time_ms": 630.0},
]


def test_stages_have_median_times_and_the_tokens_a_second_that_follow():
    times = [500.0, 510.0, 540.0, 550.0, 580.0, 590.0, 620.0]  # a slow first step; then 10 and 30 ms in turn
    of_stage_1 = [step(number, 0, ms, 1000 * number) for number, ms in enumerate(times, 1)]
    records = [START, *of_stage_1, step(8, 1, 670.0, 10_000)]
    assert stage_summaries(run_metrics(records)) == [
        {"stage": 0, "steps": 7, "tokens": 7000, "ms_per_step": 20.0, "tokens_per_second": 50_000},
        {"stage": 1, "steps": 1, "tokens": 3000, "ms_per_step": 50.0, "tokens_per_second": 60_000},
    ]


def test_step_records_may_be_sparse_or_poor():
    sparse = run_metrics([step(2, 0, 100.0, 2000), step(4, 0, 160.0, 4000)])
    assert stage_summaries(sparse) == [
        {"stage": 0, "steps": 4, "tokens": 4000, "ms_per_step": 40.0, "tokens_per_second": 25_000}
    ]
    poor = run_metrics([{"kind": "step", "step": 1}, {"kind": "step", "step": 2}])
    assert stage_summaries(poor) == [
        {"stage": 0, "steps": 2, "tokens": None, "ms_per_step": None, "tokens_per_second": None}
    ]
    assert stage_summaries(run_metrics([])) == []


def test_summary_is_data_that_json_holds():
    summary = run_summary(run_metrics(RECORDS))
    assert json.loads(json.dumps(summary)) == summary
    assert {key: summary[key] for key in ("name", "state", "steps", "total_steps", "tokens", "train_time_ms")} == {
        "name": "demo",
        "state": "finished",
        "steps": 5,
        "total_steps": 5,
        "tokens": 7000,
        "train_time_ms": 630.0,
    }
    assert (summary["first_val_loss"], summary["final_val_loss"]) == (10.83, 6.25)
    assert summary["evaluations"][1] == {"step": 3, "val_loss": 7.5, "train_time_ms": 530.0, "step_avg_ms": 530 / 3}


def test_a_killed_run_is_summed_up_as_far_as_it_got():
    summary = run_summary(run_metrics(RECORDS[:5]))
    assert (summary["state"], summary["steps"], summary["tokens"]) == ("unfinished", 3, 3000)
    assert (summary["first_val_loss"], summary["final_val_loss"]) == (10.83, 10.83)
    summary = run_summary(run_metrics([]))
    assert (summary["steps"], summary["first_val_loss"], summary["final_val_loss"]) == (0, None, None)


def words(line):
    return line.split()


def shown(records):
    stream = io.StringIO()
    Console(file=stream, width=80).print(run_table(run_summary(run_metrics(records))))
    return [words(line) for line in stream.getvalue().splitlines()]


def test_the_table_shows_what_the_data_say():
    lines = shown(RECORDS)
    assert lines[0] == words("demo: finished, 5 of 5 steps")
    assert lines[1] == words("8 x H100, 7,000 tokens, training time 0.6 s")
    assert ["0", "10.8300", "0.0", "s"] in lines
    assert ["3", "7.5000", "0.5", "s", "177"] in lines
    assert ["5", "6.2500", "0.6", "s", "126"] in lines
    assert ["1", "3", "3,000", "138", "7,273"] in lines
    assert ["2", "2", "4,000", "50.0", "40,000"] in lines


def test_the_table_of_a_run_that_failed_or_has_just_begun():
    failed = [START, {**evaluation(0, None, 0.0, 0)}, {"kind": "end", "state": "failed", "reason": "loss [nan]"}]
    lines = shown(failed)
    assert lines[0] == words("demo: failed (loss [nan]), 0 of 5 steps")
    assert ["0", "not", "finite", "0.0", "s"] in lines
    assert shown([])[0] == words("run: unfinished, 0 steps")
