"""The processes of a run: rank, world size and device, from the launcher's environment."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from nanogpt.environment import number_of
from nanogpt.errors import InputError, RunError
from nanogpt.gpus import OTHER_DRIVER, driver_cuda_version, newer_driver
from nanogpt.hardware import shape
from nanogpt.launch.watchdog import connect
from nanogpt.optim.communication import Communicator
from nanogpt.spec import WORLD_SIZES, RunSpec

T = TypeVar("T")
JOIN_TIMEOUT_S = 300.0  # for an answer of the store
TIMEOUT_MARGIN_S = 600.0


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    communicator: Communicator

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's directory."""
        return self.rank == 0

    def gather(self, value: T, kind: Any = None) -> list[T]:
        """`value` of every rank, in order. Every rank calls it; for small things.

        Values travel as JSON: nothing from a socket is unpickled.

        Args:
            value: plain, a dataclass or a pydantic model.
            kind: its type, if that is more than its class, as with `tuple[Path, int]`.

        Raises:
            RunError: another rank sent a different kind.
        """
        if self.size == 1:
            return [value]
        adapter: TypeAdapter[T] = TypeAdapter(type(value) if kind is None else kind)
        text = json.dumps(adapter.dump_python(value, mode="json")).encode()
        longest = max(int(length) for length in self._all_gather(torch.tensor([len(text)])))
        own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        try:
            return [adapter.validate_python(json.loads(bytes(found.tolist()))) for found in self._all_gather(own)]
        except ValueError as error:
            raise RunError(f"rank {self.rank}: what another rank sent cannot be read: {error}") from error

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """On the CPU; all ranks' tensors have one shape."""
        own = own.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [tensor.cpu() for tensor in found]

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def started_as() -> tuple[int, int, int]:
    """Rank, world size and local rank of this process from the launcher; 0, 1, 0 without one."""
    size = number_of("WORLD_SIZE", 1, least=1)
    rank, local_rank = number_of("RANK", 0), number_of("LOCAL_RANK", 0)
    if rank >= size or local_rank > rank:
        raise InputError(
            f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {size}: expected LOCAL_RANK <= RANK < WORLD_SIZE, as"
            " torchrun sets them; start it with torchrun or nanogpt launch, or unset them"
        )
    if size > 1:
        number_of("MASTER_PORT", 0, most=65535)
    return rank, size, local_rank


def check_world(spec: RunSpec) -> torch.device:
    """This process's device. Raises `InputError` if processes or GPUs are not what the spec needs."""
    _, size, local_rank = started_as()
    if size != spec.world_size:
        raise InputError(_other_world_size(spec, size))
    return _device(spec, local_rank)


def _other_world_size(spec: RunSpec, size: int) -> str:
    hardware = spec.hardware
    nodes = f"--nnodes {hardware.nodes} --rdzv-endpoint NODE:29500 --rdzv-id JOB " if hardware.nodes > 1 else ""
    if spec.world_size == 1:
        wanted, start = "1 process", "Start it without a launcher: `nanogpt train RECIPE`"
    else:
        wanted = f"{spec.world_size} processes"
        start = (
            f"Start them with `nanogpt launch {nodes}RECIPE`{' on each node' if nodes else ''} (a benchmark with"
            " --bench before RECIPE), or as a Slurm job with `slurm/run.sh RECIPE`"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    there = shape(hardware.model_copy(update={"gpus_per_node": here, "nodes": max(1, size // here)}))
    fits = size in WORLD_SIZES and spec.training.slots % size == 0
    return f"hardware: the recipe needs {wanted}, found {size}. {start}" + (
        f". To run on what there is: --on {there}" if fits else ""
    )


@contextmanager
def join_world(spec: RunSpec) -> Iterator[World]:
    """Join the spec's processes, and leave them at the end.

    A launcher starts the process if the world size is above 1 (RANK, WORLD_SIZE, LOCAL_RANK in the environment).

    Raises:
        InputError: the number of processes is not the recipe's, or a GPU that it needs is missing.
        RunError: the processes do not find each other.
    """
    rank, size, local_rank = started_as()
    device = check_world(spec)
    _choose_algorithms(spec)
    if device.type == "cuda" and device.index:  # for 0, which is current, it would only make a context, half a second
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, local_rank, device, Communicator())
        return
    # The watchdog's limits come first, as they do not count time in which the job is suspended.
    limit = datetime.timedelta(seconds=spec.watchdog.phase_seconds + TIMEOUT_MARGIN_S)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", connect(JOIN_TIMEOUT_S)),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} on {socket.gethostname()}: cannot join the other processes: {error}") from error
    try:
        yield World(rank, size, local_rank, device, Communicator(rank, size))
    finally:
        dist.destroy_process_group()


def _choose_algorithms(spec: RunSpec) -> None:
    deterministic = spec.runtime.deterministic
    if deterministic:  # read at cuBLAS's first call in the process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if spec.model.fp8_head:
        # In a workspace cuBLASLt's 8-bit products keep a counter of tiles, which is set to zero before each of them:
        # 6 us. Their other algorithms are as fast.
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call loads the compiler
        torch.use_deterministic_algorithms(deterministic)


def _device(spec: RunSpec, local_rank: int) -> torch.device:
    if spec.hardware.gpu == "cpu":
        return torch.device("cpu")
    alone = spec.world_size > 1 and see_own_gpu(os.environ, local_rank)
    if not torch.cuda.is_available():
        driver_cuda = driver_cuda_version()
        if driver_cuda and torch.version.cuda and (needed := newer_driver(torch.version.cuda, driver_cuda)):
            major, minor = driver_cuda
            raise InputError(f"the driver is for CUDA {major}.{minor}, and {needed}. {OTHER_DRIVER}")
        raise InputError(
            f"hardware.gpu: the recipe needs {spec.hardware.gpu}, this machine shows no GPU to PyTorch"
            f" {torch.__version__}. Run it on a GPU node (apptainer needs --nv), or try `nanogpt demo` on a CPU"
        )
    index = 0 if alone else local_rank
    if index >= torch.cuda.device_count():
        raise InputError(
            f"hardware.gpus_per_node: local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible"
            f" on {socket.gethostname()}"
        )
    return torch.device("cuda", index)


OWN_GPU = "NANOGPT_OWN_GPU"


def see_own_gpu(environ: MutableMapping[str, str], local_rank: int) -> bool:
    """Show this process only its own GPU in CUDA_VISIBLE_DEVICES; returns whether it is now device 0.

    torch compiles a graph for a device by number. If every rank's GPU is number 0, all ranks of a node share the same
    code, also with an earlier warm-up on one GPU. CUDA reads the variable once, at first use:
    if that is past, or there are fewer GPUs than ranks, nothing changes.
    """
    if environ.get(OWN_GPU) == str(local_rank):
        return True
    before = environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in before.split(",")] if before else None
    if torch.cuda.is_initialized() or local_rank >= (torch.cuda.device_count() if names is None else len(names)):
        return False
    environ["CUDA_VISIBLE_DEVICES"] = str(local_rank) if names is None else names[local_rank]
    if _cuda_devices() != 1:
        if before is None:
            del environ["CUDA_VISIBLE_DEVICES"]
        else:
            environ["CUDA_VISIBLE_DEVICES"] = before
        return False
    environ[OWN_GPU] = str(local_rank)
    return True


def _cuda_devices() -> int:
    """What the CUDA runtime itself counts, which is what a later allocation will see."""
    count = getattr(torch._C, "_cuda_getDeviceCount", torch.cuda.device_count)
    return int(count())
