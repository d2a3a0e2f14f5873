"""`nanogpt launch`: how its arguments are read and what its exit codes mean. Real ranks: tests/launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from made_nvml import MadeNvml

from nanogpt.cli.launch import _hardware
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError
from nanogpt.launch.launcher import exit_code, parse
from nanogpt.launch.meeting import Meeting

TERM, USR1, KILL = -15, -10, -9


def test_options_and_those_of_train() -> None:
    several = ["--nnodes", "2", "--rdzv-endpoint=n0:7", "--nproc-per-node=4", "--rdzv-id", "7"]
    options = parse([*several, "8xh100", "--steps", "9", "--out", "x"])
    assert options.meeting == Meeting(2, 4, "n0", 7, run_id="7")
    assert (options.train, options.grace_s) == (["8xh100", "--steps", "9", "--out", "x"], 600)


def test_arguments_that_begin_with_an_option() -> None:
    options = parse(["--standalone", "--grace", "30", "--", "--resume", "runs/x", "--set", "a=1"])
    assert (options.meeting, options.grace_s) == (Meeting(), 30)
    assert options.train == ["--resume", "runs/x", "--set", "a=1"]


def test_benchmarks_of_several_gpus() -> None:
    options = parse(["--nproc-per-node=2", "--bench", "profile", "2xh100", "--rows", "3"])
    assert (options.command, options.train) == ("bench", ["profile", "2xh100", "--rows", "3"])
    options = parse(["--nproc-per-node=2", "--experiment", "ends", "2xh100", "--before", "3"])
    assert (options.command, options.train) == ("experiment", ["ends", "2xh100", "--before", "3"])
    assert options.grace_s == 0


@pytest.mark.parametrize(
    ("options", "meeting"),
    [
        ("", Meeting()),
        ("--nproc_per_node 2", Meeting(1, 2)),
        ("--standalone --rdzv-backend c10d --max-restarts 0", Meeting()),
        ("--nnodes 2:2 --rdzv-backend static --node-rank 1 --master-addr n0", Meeting(2, 1, "n0", 29500, node=1)),
        ("--nnodes=2 --master_addr=n0 --master_port=5", Meeting(2, 1, "n0", 5)),
        ("--nnodes=2 --rdzv-endpoint=[fd00::1]:5", Meeting(2, 1, "fd00::1", 5)),
        ("--nnodes=2 --rdzv-endpoint=fd00::1", Meeting(2, 1, "fd00::1", 29500)),
        ("--nnodes=2 --rdzv-endpoint=n0 --local-addr 10.0.0.1", Meeting(2, 1, "n0", 29500, local_address="10.0.0.1")),
        (
            "--nnodes=2 --rdzv-endpoint=n0:1 --rdzv-conf is_host=true,join_timeout=9",
            Meeting(2, 1, "n0", 1, is_first=True, join_s=9),
        ),
        ("--rdzv-endpoint=127.0.0.1:77", Meeting(1, 1, "127.0.0.1", 77)),
    ],
)
def test_where_and_with_how_many(options: str, meeting: Meeting) -> None:
    assert parse([*options.split(), "demo"]).meeting == meeting


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nnodes=2", "where do they meet? Give each of them --rdzv-endpoint"),
        ("--nnodes=1:4 --rdzv-endpoint=n0:1", "--nnodes 1:4: expected a number"),
        ("--nnodes=0", "--nnodes 0: expected a number of at least 1"),
        ("--nproc-per-node=many", "--nproc-per-node many: expected a number"),
        ("--nnodes=2 --rdzv-endpoint=n0:1 --node-rank=2", "--node-rank 2: expected 0 to 1"),
        ("--nnodes=2 --rdzv-endpoint=n0:x", "--rdzv-endpoint n0:x: expected HOST:PORT"),
        ("--nnodes=2 --standalone", "--standalone means one node"),
        ("--rdzv-conf=join_timeout=soon", "--rdzv-conf join_timeout=soon: expected"),
        ("--rdzv-backend=etcd", "invalid choice: 'etcd'"),
        ("--max-restarts=3", "invalid choice: 3"),
        ("--tee=3", "unrecognized arguments: --tee=3. `nanogpt launch --help` lists"),
    ],
)
def test_options_that_are_refused(options: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        parse([*options.split(), "demo"])
    assert words in str(error.value)


@pytest.fixture
def four_h200(nvml: MadeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.show(*["NVIDIA H200"] * 4)
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "processes", "said"),
    [
        (["record89"], 4, ["--on=4xh200"]),
        (["record89", "--on", "2xh200", "--steps", "9"], 2, []),
        (["--", "--set", "hardware.gpu=a100", "gpt2"], 4, ["--on=4xa100"]),
        (["8xh100"], 8, []),
        (["demo"], 1, []),
        (["--bench", "profile", "record89", "--rows", "3"], 4, ["--on=4xh200"]),
        (["--bench", "step", "record89", "--steps", "2", "--on", "2xh100"], 2, []),
    ],
)
def test_a_process_a_gpu(four_h200: None, arguments: list[str], processes: int, said: list[str]) -> None:
    options = parse(arguments, _hardware)
    assert (options.meeting.nodes, options.meeting.processes) == (1, processes)
    assert list(options.train) == [*(argument for argument in arguments if argument not in ("--", "--bench")), *said]


def test_several_nodes_meet_by_torchruns_options(four_h200: None) -> None:
    options = parse(["--nnodes", "2", "--rdzv-endpoint", "n1:29500", "record89"], _hardware)
    assert (options.meeting.nodes, options.meeting.processes) == (2, 4)
    assert list(options.train) == ["record89"]  # ranks see how many nodes have come
    with pytest.raises(InputError, match=r"2x4xh100 is 2 nodes.*--nnodes 2.*slurm/run\.sh"):
        parse(["2x4xh100"], _hardware)


def test_benchmarks_without_a_recipe_are_not_launched(four_h200: None) -> None:
    for arguments in (["--bench", "kernels"], ["--bench", "nothing"], ["--bench"]):
        with pytest.raises(InputError, match="takes step, profile or communication"):
            parse(arguments, _hardware)
    assert parse(["--bench", "--nproc-per-node=2", "kernels"], _hardware).meeting == Meeting(1, 2)


def test_what_train_does_not_take_is_refused_before_anything_starts(nanogpt: Callable[..., Any]) -> None:
    outcome = nanogpt("launch", "demo", "--no-such-option")
    assert outcome.code == 2 and "No such option" in outcome.err


@pytest.mark.parametrize(
    ("codes", "stop_asked", "expected"),
    [
        ([], False, 0),
        ([75, 75], False, REQUEUE_EXIT_CODE),
        ([75, TERM], False, REQUEUE_EXIT_CODE),  # a rank was ended that was about to
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


def test_an_unknown_option(nanogpt: Callable[..., Any]) -> None:
    outcome = nanogpt("launch", "--no-such-option", "8xh100")
    assert outcome.code == 2
    assert "--no-such-option" in outcome.err
