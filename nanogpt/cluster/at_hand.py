"""The hardware of a recipe that leaves it open: the GPUs of this machine, or of the Slurm job.

Under torchrun the number of processes decides the number of GPUs. If that is no valid world size, a run takes as many
GPUs as it can, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from nanogpt.cluster.allocation import read_allocation
from nanogpt.cluster.gpus import visible_gpus
from nanogpt.console import say
from nanogpt.errors import InputError, RunError
from nanogpt.gpus import GPU_NAMES, GPU_TYPES, known_type, same_type
from nanogpt.hardware import EXAMPLES, Fill, largest_count, shape
from nanogpt.spec import WORLD_SIZES, HardwareSpec

OPEN = "hardware: the recipe leaves it open"


def at_hand(environ: Mapping[str, str]) -> Fill:
    """What this machine has; the driver is asked if a recipe leaves type or number of GPUs open.

    Raises (when it fills):
        InputError: there is no GPU, or none of a known type; the message says how to continue.
    """

    def fill(stated: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        started = _started_by_torchrun(environ)
        if stated.get("gpu") == "cpu":
            return started or {"gpus_per_node": 1}, "the processes started"
        try:
            names = [gpu.name for gpu in visible_gpus(environ)]
        except RunError as error:
            raise InputError(f"{OPEN}, and there is no GPU here: {error}. {_say_it(1)}") from error
        if not names:
            visible = environ.get("CUDA_VISIBLE_DEVICES", "")
            raise InputError(f"{OPEN}, and CUDA_VISIBLE_DEVICES={visible} hides all GPUs here. {_say_it(1)}")
        found = {"gpu": stated.get("gpu") or _type_of(names), **(started or _count(len(names), stated))}
        _tell(environ, {**found, **stated}, "the processes started" if started else "the GPUs at hand", len(names))
        return found, f"hardware at hand ({len(names)} x {names[0]})"

    return fill


def of_the_job(environ: Mapping[str, str]) -> Fill:
    """What Slurm gave the job that `environ` describes; if it names no GPU types, the driver does.

    Raises (when it fills): as `at_hand`, and `RunError` if Slurm does not answer.
    """

    def fill(stated: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        allocation = read_allocation(environ)
        counts = [allocation.gpus[node] for node in allocation.nodes if node in allocation.gpus]
        gpus = min((count.total() for count in counts), default=0)
        if not gpus and stated.get("gpu") != "cpu":
            raise InputError(f"{OPEN}, and job {allocation.job_id} has no GPU. {_say_it(1)}")
        kinds = sorted({kind for count in counts for kind in count if kind})
        if "gpu" in stated:
            gpu = stated["gpu"]
        else:
            gpu = _type_of(kinds or [gpu.name for gpu in visible_gpus(environ)])
        nodes = {"nodes": len(allocation.nodes)}
        found = {"gpu": gpu, **_count(gpus or 1, {**nodes, **stated}), **nodes}
        _tell(environ, {**found, **stated}, f"of job {allocation.job_id}", gpus)
        return found, f"hardware of job {allocation.job_id}"

    return fill


def check_type(hardware: HardwareSpec, environ: Mapping[str, str]) -> None:
    """Refuse GPUs of a type other than `hardware` names; unknown types may stand for any.

    Raises:
        InputError: says how to run on the GPUs that are here.
    """
    if hardware.gpu == "cpu":
        return
    try:
        names = [gpu.name for gpu in visible_gpus(environ)]
    except RunError:  # PyTorch has the last word on whether there is a GPU
        return
    for name in names:
        if (found := known_type(name)) and not same_type(name, hardware.gpu):
            here = shape(hardware.model_copy(update={"gpu": found}))
            raise InputError(
                f"hardware.gpu: the recipe is for {hardware.gpu}, this machine has {name}. To run on it: --on {here}"
            )


def to_be_said(stated: Mapping[str, Any]) -> NoReturn:
    """For a job still to be submitted, when nothing says what it should run on. Raises `InputError`."""
    raise InputError(f"{OPEN}. {_say_it(8)}")


def _started_by_torchrun(environ: Mapping[str, str]) -> dict[str, int] | None:
    if "WORLD_SIZE" not in environ:
        return None
    size = int(environ["WORLD_SIZE"])
    here = int(environ.get("LOCAL_WORLD_SIZE", size))
    return {"gpus_per_node": here, "nodes": size // here}


def _count(gpus: int, stated: Mapping[str, Any]) -> dict[str, int]:
    nodes = stated.get("nodes", 1)
    fits = largest_count(gpus, nodes) if isinstance(nodes, int) and nodes > 0 else 0
    return {"gpus_per_node": fits or gpus}  # what does not fit is refused when the recipe is checked


def _type_of(names: Iterable[str]) -> str:
    kinds = list(dict.fromkeys(names))
    types = {known_type(kind) for kind in kinds}
    if len(types) > 1:
        raise InputError(f"{OPEN}, and the GPUs here are of several types: {', '.join(kinds)}. {_say_it(1)}")
    (gpu,) = types
    if gpu is None:
        known = ", ".join(GPU_TYPES)
        raise InputError(
            f"{OPEN}, and {kinds[0]} is not one of the known types: {known}. Name the most similar one:"
            " --set hardware.gpu=l40s (h100 for a newer GPU); the number of GPUs is still detected"
        )
    return gpu


def _say_it(count: int) -> str:
    types = ", ".join(GPU_NAMES)
    return f"Say what to run on: --on {count}xh100, {EXAMPLES} (types: {types}; cpu is for the recipe demo)"


def _tell(environ: Mapping[str, str], hardware: Mapping[str, Any], whence: str, there: int) -> None:
    if environ.get("RANK", "0") != "0":
        return
    count, nodes = hardware["gpus_per_node"], hardware.get("nodes", 1)
    some = f" ({count} of {there}: a run takes {', '.join(map(str, WORLD_SIZES))} in all)" if count < there else ""
    on = f"{nodes} nodes of {count} x {hardware['gpu']}" if nodes != 1 else f"{count} x {hardware['gpu']}"
    say(f"hardware: {on}, {whence}{some}; --on chooses another")
