"""Reading metrics.jsonl: whole, cut short, and continued."""

import json

import pytest

from nanogpt.errors import InputError
from nanogpt.runs.metrics import read_metrics, read_run, run_metrics


def start(resumed_at=None):
    return {"kind": "start", "name": "demo", "total_steps": 6, "world_size": 1, "resumed_at": resumed_at}


def step(number, loss=5.0):
    return {"kind": "step", "step": number, "total_steps": 6, "stage": 0, "train_loss": loss, "train_time_ms": number}


def evaluation(number, loss):
    return {"kind": "evaluation", "step": number, "total_steps": 6, "val_loss": loss}


def end(state, reason=None):
    return {"kind": "end", "state": state, "reason": reason}


def test_every_cut_of_a_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [start(), evaluation(0, 10.8), step(1), step(2)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        assert read_metrics(path)[:whole] == records[:whole]
        assert len(read_metrics(path)) <= whole + 1
    assert read_metrics(path) == records


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: expected a JSON object, found '\{\"st'"):
        read_metrics(path)
    path.write_text("3\n")
    with pytest.raises(InputError, match=r":1: expected a JSON object"):
        read_metrics(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_metrics(tmp_path / "none")


def test_a_whole_run():
    run = run_metrics(
        [
            start(),
            evaluation(0, 10.8),
            *map(step, range(1, 7)),
            evaluation(6, 4.0),
            {"kind": "checkpoint", "step": 6, "path": "c"},
            {"kind": "later invention"},
            end("finished"),
        ]
    )
    assert (run.name, run.starts, run.state, run.total_steps) == ("demo", 1, "finished", 6)
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [record["val_loss"] for record in run.evaluations] == [10.8, 4.0]
    assert [record["step"] for record in run.checkpoints] == [6]
    assert run.last == evaluation(6, 4.0)


def test_a_resumed_run_counts_what_it_did_again_once():
    killed = [start(), evaluation(0, 10.8), *map(step, range(1, 6)), evaluation(5, 7.0)]
    resumed = [start(resumed_at=3), step(4, 4.4)]

    run = run_metrics(killed)
    assert (run.state, run.last) == ("unfinished", evaluation(5, 7.0))

    run = run_metrics([*killed, *resumed])
    assert [(r["step"], r["train_loss"]) for r in run.steps] == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 4.4)]
    assert [r["step"] for r in run.evaluations] == [0]
    assert (run.starts, run.state) == (2, "unfinished")

    run = run_metrics([*killed, *resumed, step(5, 4.5), evaluation(5, 6.9), step(6, 4.6), end("finished")])
    assert [r["train_loss"] for r in run.steps] == [5.0, 5.0, 5.0, 4.4, 4.5, 4.6]
    assert [r["val_loss"] for r in run.evaluations] == [10.8, 6.9]
    assert run.last == step(6, 4.6)


def test_an_end_holds_until_the_next_start():
    assert run_metrics([start(), end("failed", "loss is nan")]).end["reason"] == "loss is nan"
    assert run_metrics([start(), end("interrupted"), start(resumed_at=2)]).state == "unfinished"
    assert [r["step"] for r in run_metrics([start(), step(1), step(2), start()]).steps] == []


def test_later_records_win_without_a_start_between():
    assert [r["train_loss"] for r in run_metrics([step(2, 1.0), step(1, 2.0), step(2, 3.0)]).steps] == [2.0, 3.0]


def test_nothing_recorded_yet():
    run = run_metrics([], name="fallback")
    assert (run.name, run.last, run.total_steps, run.state, run.starts) == ("fallback", {}, None, "unfinished", 0)


def test_read_run_refuses_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        read_run(tmp_path)
