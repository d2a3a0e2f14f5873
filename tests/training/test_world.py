"""This process's place in the run, and what is refused before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import tiny_spec

from nanogpt.errors import InputError, RunError
from nanogpt.launch import world
from nanogpt.launch.world import check_world, join_world, see_own_gpu, started_as
from nanogpt.recipe import load_recipe


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def started_by_torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, local_rank: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))


def test_one_process_joins_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process group for one process")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    with join_world(tiny_spec()) as world:
        assert (world.rank, world.size, world.local_rank, world.is_main) == (0, 1, 0, True)
        assert world.device == torch.device("cpu")
        assert not dist.is_initialized()
        world.synchronize()
        world.communicator.barrier()
        tensor = torch.ones(4)
        assert world.communicator.average(tensor).wait() is tensor
        assert world.communicator.average_shard(tensor).wait() is tensor
        assert world.communicator.gather(tensor).wait() is tensor


def test_the_place_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_as() == (0, 1, 0)
    started_by_torchrun(monkeypatch, 5, 8, 1)
    assert started_as() == (5, 8, 1)


@pytest.mark.parametrize(
    ("recipe", "size", "message"),
    [
        ("8xh100", 1, "needs 8 processes, found 1. Start them with `nanogpt launch RECIPE`"),
        ("1xh100", 2, "needs 1 process, found 2. Start it without a launcher: `nanogpt train RECIPE`"),
    ],
)
def test_another_world_size(monkeypatch: pytest.MonkeyPatch, recipe: str, size: int, message: str) -> None:
    started_by_torchrun(monkeypatch, 0, size, 0)
    with pytest.raises(InputError) as error, join_world(load_recipe(recipe)):
        pass
    assert message in str(error.value)
    assert f"--on {size}xh100" in str(error.value)
    assert ("slurm/run.sh RECIPE" in str(error.value)) == (recipe == "8xh100")


def test_another_world_size_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_recipe("4xh100", ["hardware.nodes=2"])
    with pytest.raises(InputError, match=r"nanogpt launch --nnodes 2 --rdzv-endpoint NODE:29500 .*on each node"):
        check_world(spec)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="the recipe needs h200, this machine shows no GPU") as error:
        check_world(load_recipe("1xh200"))
    assert "apptainer needs --nv" in str(error.value)
    assert "`nanogpt demo`" in str(error.value)


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(world, "driver_cuda_version", lambda: (12, 8))
    with pytest.raises(
        InputError, match=r"for CUDA 12\.8, and CUDA 13 needs driver 580 or newer\. .*another partition"
    ):
        check_world(load_recipe("1xh200"))


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started_by_torchrun(monkeypatch, 1, 2, 1)
    with pytest.raises(InputError, match="local rank 1 has no GPU, 1 are visible"):
        check_world(load_recipe("2xh100"))


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for lack of an address, as when a launcher other than torchrun sets the ranks alone."""
    started_by_torchrun(monkeypatch, 1, 2, 1)
    with (
        pytest.raises(RunError, match=r"rank 1 on .*: cannot join the other processes"),
        join_world(tiny_spec("hardware.gpus_per_node=2")),
    ):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [(None, 3, "3"), ("4,5,6,7", 2, "6"), ("GPU-aa, GPU-bb", 1, "GPU-bb")],
)
def test_each_rank_sees_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, local_rank: int, expected: str
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(world, "_cuda_devices", lambda: len(environ["CUDA_VISIBLE_DEVICES"].split(",")))
    for _ in range(2):  # asked for twice, as a run does
        assert see_own_gpu(environ, local_rank)
        assert environ["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_where_cuda_has_been_asked_before_a_rank_sees_all_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    before = dict(environ)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(world, "_cuda_devices", lambda: 2)
    assert not see_own_gpu(environ, 1)
    assert not see_own_gpu(environ, 2)  # there is none
    assert environ == before
