"""`nanogpt launch`: how its arguments are read and what its exit codes mean. Real ranks: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.launch.launcher import exit_code, parse

TERM, USR1, KILL = -15, -10, -9


def test_torchruns_options_and_those_of_train() -> None:
    args = parse(["--nnodes", "2", "--nproc-per-node=4", "--rdzv-id", "7", "8xh100", "--steps", "9", "--out", "x"])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id, args.module) == ("2", "4", "7", True)
    assert (args.training_script, args.grace) == ("nanogpt", 600)
    assert args.training_script_args == ["train", "8xh100", "--steps", "9", "--out", "x"]
    assert "SIGTERM" not in args.signals_to_handle


def test_arguments_that_begin_with_an_option() -> None:
    args = parse(["--standalone", "--grace", "30", "--", "--resume", "runs/x", "--set", "a=1"])
    assert (args.standalone, args.grace) == (True, 30)
    assert args.training_script_args == ["train", "--resume", "runs/x", "--set", "a=1"]


@pytest.mark.parametrize(
    ("codes", "stop_asked", "expected"),
    [
        ([], False, 0),
        ([75, 75], False, REQUEUE_EXIT_CODE),
        ([75, TERM], False, REQUEUE_EXIT_CODE),  # torchrun ended a rank that was about to
        ([TERM, TERM], True, REQUEUE_EXIT_CODE),  # before they had handlers
        ([TERM, TERM], False, 1),
        ([75, USR1], True, REQUEUE_EXIT_CODE),
        ([75, 1], True, 1),
        ([75, KILL], True, 1),
        ([2, 2], False, 2),
        ([2, TERM], False, 2),
        ([2, 1], False, 1),
        ([KILL], False, 1),
    ],
)
def test_exit_codes(codes: list[int], stop_asked: bool, expected: int) -> None:
    assert exit_code(dict(enumerate(codes)), stop_asked=stop_asked) == expected


def test_help(nanogpt: Callable[..., Any]) -> None:
    assert "--grace" in nanogpt("launch", "--help").out
    assert nanogpt("launch").code == 0


def test_torchrun_refuses_an_option(nanogpt: Callable[..., Any]) -> None:
    outcome = nanogpt("launch", "--no-such-option", "8xh100")
    assert outcome.code == 2
    assert "--no-such-option" in outcome.err
