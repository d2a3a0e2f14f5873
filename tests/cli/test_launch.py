"""`nanogpt launch`: how its arguments are read and what its exit codes mean. Real ranks: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt.cli.launch import _hardware
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError
from nanogpt.launch.launcher import _start_on, exit_code, parse

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


@pytest.fixture
def four_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo $i, GPU-$i, NVIDIA H200, 580.95.05, 143771, 1; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "processes", "said"),
    [
        (["record89"], "4", ["--on=4xh200"]),
        (["record89", "--on", "2xh200", "--steps", "9"], "2", []),
        (["--", "--set", "hardware.gpu=a100", "gpt2"], "4", ["--on=4xa100"]),
        (["8xh100"], "8", []),
        (["demo"], "1", []),
    ],
)
def test_a_process_a_gpu(four_h200: None, arguments: list[str], processes: str, said: list[str]) -> None:
    args = parse(arguments)
    of_train = list(args.training_script_args)
    _start_on(args, _hardware)
    assert (args.nproc_per_node, args.standalone) == (processes, True)
    assert args.training_script_args == [*of_train, *said]


def test_several_nodes_meet_by_torchruns_options(four_h200: None) -> None:
    args = parse(["--nnodes", "2", "--rdzv-endpoint", "n1:29500", "record89"])
    _start_on(args, _hardware)
    assert (args.nproc_per_node, args.standalone) == ("4", False)
    assert args.training_script_args == ["train", "record89"]  # ranks see how many nodes have come
    with pytest.raises(InputError, match=r"2x4xh100 is 2 nodes.*--nnodes 2.*slurm/run\.sh"):
        _start_on(parse(["2x4xh100"]), _hardware)


def test_what_train_does_not_take_is_refused_before_anything_starts(nanogpt: Callable[..., Any]) -> None:
    outcome = nanogpt("launch", "demo", "--no-such-option")
    assert outcome.code == 2 and "No such option" in outcome.err


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
