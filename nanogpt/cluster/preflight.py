"""Preflight: can this node do the run? Takes seconds, before anything is compiled.

Each check says passed, warning or failed, what it found, and what to do. The checks of files (shards, output, space)
need no GPU and also run before the job's step; the rest run on every node. A recipe for the CPU has no GPU checks.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from nanogpt.cluster import bandwidth
from nanogpt.cluster.gpus import Gpu, GpuProcess, gpu_processes, oldest_driver, version_numbers, visible_gpus
from nanogpt.console import human_bytes, say
from nanogpt.data.manifest import ShardCheck, file_sha256, verify_directory
from nanogpt.data.shards import ShardError, check_shard_tokens
from nanogpt.data.tokenizer import VOCAB_SIZE
from nanogpt.environment import seen_inside
from nanogpt.errors import InputError, RunError
from nanogpt.gpus import GPU_TYPES, OTHER_DRIVER, known_type, same_type
from nanogpt.hardware import largest_count, shape
from nanogpt.image.build_checks import Check, Status
from nanogpt.spec import RunSpec

USED_MIB_WARNING, USED_MIB_FAILED = 1024, 8192  # an idle GPU has some hundred MiB in use
MIB = 1 << 20
HASH_PATIENCE_S = 10.0
WEIGHT_BYTES = 12  # per parameter in a checkpoint: weight and two moments in fp32
AVERAGE_BYTES = 4  # per averaged parameter


def _node(environ: Mapping[str, str]) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def raise_for_failures(checks: Iterable[Check], *, printed: bool = False) -> None:
    """Raise `InputError` with every failed check, if any; by name alone if they have been `printed`."""
    failed = [check for check in checks if check.status == "failed"]
    node = _node(os.environ)
    if failed and printed:
        raise InputError(f"preflight on {node}: the run cannot start: {', '.join(check.name for check in failed)}")
    if failed:
        raise InputError("\n".join(f"preflight on {node}: {check}" for check in failed))


def preflight(spec: RunSpec, data: Path, out: Path, environ: Mapping[str, str]) -> list[Check]:
    """All checks of this node, each reported as it ends.

    Args:
        spec: the run.
        data: directory of the shards.
        out: parent of run directories; made if missing.
        environ: CUDA_VISIBLE_DEVICES, APPTAINER_CONTAINER and NANOGPT_SIF_SHA256 matter.
    """
    began, node = time.monotonic(), _node(environ)
    hashing = _Hash(environ)
    checks: list[Check] = []

    def note(more: Iterable[Check]) -> None:
        for check in more:
            checks.append(check)
            say(f"preflight on {node}: {check}")

    if spec.hardware.gpu != "cpu":
        note(check_gpus(spec, environ))
    note(check_files(spec, data, out))
    if spec.hardware.gpu != "cpu" and spec.hardware.gpus_per_node > 1 and not _failed(checks, "GPUs"):
        note([check_links(spec, environ)])
    note(hashing.check(HASH_PATIENCE_S))
    count = {status: sum(check.status == status for check in checks) for status in get_args(Status)}
    say(
        f"preflight on {node}: {count['passed']} passed, {count['warning']} warning{'s' * (count['warning'] != 1)},"
        f" {count['failed']} failed, {time.monotonic() - began:.1f} s"
    )
    return checks


def _failed(checks: Sequence[Check], name: str) -> bool:
    return any(check.name == name and check.status == "failed" for check in checks)


# --- GPUs -------------------------------------------------------------------------------------------------------


def check_gpus(spec: RunSpec, environ: Mapping[str, str]) -> list[Check]:
    """Number and type, driver, memory in use and by whom."""
    try:
        gpus = visible_gpus(environ)
        processes = gpu_processes()
    except RunError as error:
        return [
            Check("GPUs", "failed", str(error), "Check `nvidia-smi` on this node, or leave the node out: --exclude")
        ]
    return [*_number_and_type(spec, gpus), *_driver(gpus), *_memory(gpus, processes)]


def _number_and_type(spec: RunSpec, gpus: Sequence[Gpu]) -> Iterable[Check]:
    hardware = spec.hardware
    names = [gpu.name for gpu in gpus]
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
    wanted = f"{hardware.gpus_per_node} x {hardware.gpu}"
    types = {gpu for gpu in map(known_type, names) if gpu}
    there = largest_count(len(gpus), hardware.nodes)
    here = shape(hardware.model_copy(update={"gpus_per_node": there, "gpu": max(types, default=hardware.gpu)}))
    ask_for = f"Ask for --gres=gpu:{hardware.gpu}:{hardware.gpus_per_node}"
    if len(gpus) < hardware.gpus_per_node:
        advice = f"{ask_for}, or run on fewer: --on {here}" if there else ask_for
        yield Check("GPUs", "failed", f"the recipe needs {wanted}, found {found}", advice)
        return
    wrong = [name for name in dict.fromkeys(names) if not same_type(name, hardware.gpu)]
    if wrong and not types:  # the recipe names the most similar one
        advice = f"{hardware.gpu} stands for it. `nanogpt doctor` tries the kernels; plain PyTorch replaces the others"
        yield Check("GPUs", "warning", f"the recipe needs {wanted}, found {found}, an unknown type", advice)
    elif wrong:
        advice = f"{ask_for}, or run on what there is: --on {here}"
        yield Check("GPUs", "failed", f"the recipe needs {wanted}, found {found}", advice)
    elif len(gpus) > hardware.gpus_per_node:
        advice = f"The rest idles; --on {here} uses more" if there > hardware.gpus_per_node else "The rest idles"
        yield Check("GPUs", "warning", f"the recipe uses {wanted} of {found}", advice)
    elif len(set(names)) > 1:
        yield Check("GPUs", "warning", f"of several kinds: {found}", "The slowest sets the pace of all")
    else:
        yield Check("GPUs", "passed", found)


def _driver(gpus: Sequence[Gpu]) -> Iterable[Check]:
    cuda, driver = cuda_version(), gpus[0].driver if gpus else None
    if cuda is None or driver is None:
        return
    oldest = oldest_driver(cuda)
    needed = ".".join(map(str, oldest))
    if version_numbers(driver) < oldest:
        yield Check("driver", "failed", f"{driver} is too old for CUDA {cuda}, which needs {needed}", OTHER_DRIVER)
    else:
        yield Check("driver", "passed", f"{driver}; CUDA {cuda} needs {needed}")


def cuda_version() -> str | None:
    """The CUDA version that the installed torch was built with, read without importing it; None: a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
                return node.value.value if isinstance(node.value.value, str) else None
    return None


def _memory(gpus: Sequence[Gpu], processes: Sequence[GpuProcess]) -> Iterable[Check]:
    uuids = {gpu.uuid for gpu in gpus}
    foreign = [process for process in processes if process.gpu_uuid in uuids]
    for process in foreign:
        used = "" if process.used_mib is None else f" with {process.used_mib} MiB"
        yield Check(
            "foreign process",
            "warning",
            f"{process.name} (pid {process.pid}){used} computes on a GPU of this job",
            f"Times will not count. End it if it is yours, or leave out this node: --exclude={socket.gethostname()}",
        )
    in_use = [(gpu, gpu.used_mib) for gpu in gpus if gpu.used_mib is not None]
    if not in_use:
        return
    gpu, most = max(in_use, key=lambda pair: pair[1])
    total = f" of {gpu.memory_mib}" if gpu.memory_mib else ""
    found = f"{most}{total} MiB in use on GPU {gpu.index}"
    advice = f"See who: nvidia-smi. Leave out this node: --exclude={socket.gethostname()}"
    if most >= USED_MIB_FAILED:
        yield Check("GPU memory", "failed", found, advice)
    elif most >= USED_MIB_WARNING:
        yield Check("GPU memory", "warning", found, advice)
    else:
        yield Check("GPU memory", "passed", f"{found}, no more on any")


def check_links(
    spec: RunSpec, environ: Mapping[str, str], measure: Callable[[], list[float]] = bandwidth.measure_apart
) -> Check:
    """Copies from each GPU to the next, against what such GPUs should reach."""
    try:
        gpus, rates = visible_gpus(environ), measure()
    except RunError as error:
        return Check("GPU links", "failed", str(error), "Check `nvidia-smi topo -m` and dmesg; leave this node out")
    kind = GPU_TYPES[spec.hardware.gpu]
    pcie = kind.nvlink is None or any("pcie" in gpu.name.lower() for gpu in gpus)
    expected = kind.pcie if pcie or kind.nvlink is None else kind.nvlink
    worst = min(range(len(rates)), key=rates.__getitem__)
    found = f"{'PCIe' if pcie else 'NVLink'}: {rates[worst]:.0f} GB/s from GPU {worst} to the next, the slowest"
    if rates[worst] >= expected:
        return Check("GPU links", "passed", f"{found}; at least {expected} expected")
    return Check(
        "GPU links",
        "warning",
        f"{found}; at least {expected} expected",
        "The run will work, but slowly. See `nvidia-smi topo -m` and `nvidia-smi nvlink --status`; try another node",
    )


# --- files ------------------------------------------------------------------------------------------------------


def check_files(spec: RunSpec, data: Path, out: Path) -> list[Check]:
    """Shards, output directory, free space."""
    return [*check_shards(spec, data), *_output(spec, out)]


def check_shards(spec: RunSpec, data: Path) -> list[Check]:
    """Training and validation shards: present, complete, and enough for the run."""
    return list(_shards(spec, data))


def _shards(spec: RunSpec, data: Path) -> Iterable[Check]:
    again = f"Make them again: prep-fineweb --dir {data} (on the login node), or prep-text"
    if not data.is_dir():
        advice = f"{again}; or name the directory: --data, NANOGPT_DATA, data.directory in the recipe"
        yield Check("shards", "failed", f"{data}: no such directory{seen_inside(data)}", advice)
        return
    for kind, pattern, tokens, more in (
        (
            "training",
            spec.data.train_files,
            spec.training.total_tokens if spec.data.epochs == 1 else 1,
            "Get more: prep-fineweb --chunks N, or prep-text with more text",
        ),
        (
            "validation",
            spec.data.val_files,
            spec.evaluation.tokens + 1,
            "Make them again with more of them: prep-text --val-tokens N --force (FineWeb's one shard has 100 million);"
            " or validate on fewer: --set evaluation.tokens=N",
        ),
    ):
        names = {path.name for path in data.glob(pattern)}
        if not names:
            advice = f"{again}; or name another directory: --data, NANOGPT_DATA"
            yield Check(f"{kind} shards", "failed", f"{data}: no {pattern} there", advice)
            continue
        try:
            checks = [one for one in verify_directory(data) if one.name in names or _gap(one.name, names)]
        except RunError as error:
            yield Check(f"{kind} shards", "failed", str(error), again)
            continue
        bad = [f"{data / one.name}: {one.state}: {one.detail}" for one in checks if one.state in ("corrupt", "missing")]
        bad += [f"{data / name}: missing, though later ones exist" for name in _gaps(names)]
        found = sum(one.tokens or 0 for one in checks)
        if bad:
            yield Check(f"{kind} shards", "failed", "; ".join(bad), again)
        elif found < tokens:
            text = f"{data}: {found:,} tokens, the run needs {tokens:,}"
            yield Check(f"{kind} shards", "failed", text, more)
        elif unread := _unreadable(spec, data, checks, spec.training.total_tokens if kind == "training" else tokens):
            yield Check(f"{kind} shards", "failed", unread, again)
        else:
            verified = sum(one.state == "valid" for one in checks)
            text = f"{len(checks)} with {found:,} tokens, {verified} of them verified by sha256"
            yield Check(f"{kind} shards", "passed", text)


def _unreadable(spec: RunSpec, data: Path, checks: Sequence[ShardCheck], needed: int) -> str:
    """Problems in the shards with the first `needed` tokens; later ones are checked when a run reads them.

    Shards with the hub's sha256 have GPT-2's tokens.
    """
    known = spec.model.vocab_size >= VOCAB_SIZE and spec.data.bos == VOCAB_SIZE - 1
    problems = []
    for one in checks:
        if needed <= 0:
            break
        needed -= one.tokens or 0
        if not (known and one.state == "valid"):
            try:
                check_shard_tokens(data / one.name, spec.model.vocab_size, spec.data.bos)
            except ShardError as error:
                problems.append(str(error))
    return "; ".join(problems)


_NUMBERED = re.compile(r"^(.*_)(\d{6})(\.bin)$")


def _gaps(names: set[str]) -> list[str]:
    """Numbered names missing between existing ones."""
    parts = [match.groups() for name in names if (match := _NUMBERED.match(name))]
    numbers = [int(number) for _, number, _ in parts]
    if not numbers:
        return []
    head, _, tail = parts[0]
    return [f"{head}{n:06d}{tail}" for n in range(min(numbers), max(numbers)) if f"{head}{n:06d}{tail}" not in names]


def _gap(name: str, names: set[str]) -> bool:
    return name in _gaps(names)


def _output(spec: RunSpec, out: Path) -> Iterable[Check]:
    advice = "Name a writable directory: --out, NANOGPT_RUNS, output.directory in the recipe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(out).free
    except OSError as error:
        what = f"{out.absolute()}: cannot be written: {error.strerror}{seen_inside(out)}"
        yield Check("output", "failed", what, advice)
        return
    yield Check("output", "passed", f"{out.absolute()} can be written")
    copies = spec.checkpoint.keep + 1 if spec.checkpoint.every else 1
    needed = copies * checkpoint_bytes(spec)
    if free < needed:
        text = f"{human_bytes(free)} free in {out.absolute()}, checkpoints may take {human_bytes(needed)}"
        yield Check(
            "space", "failed", text, "Free some space, name another directory (--out), or --set checkpoint.keep=1"
        )
    else:
        yield Check("space", "passed", f"{human_bytes(free)} free, checkpoints take up to {human_bytes(needed)}")


def checkpoint_bytes(spec: RunSpec) -> int:
    """Bytes of a checkpoint, at most."""
    sizes = {row.name: row.size for row in spec.model.parameters()}
    averaged = (name for entry in spec.training.end for name in entry.averaged())
    return WEIGHT_BYTES * sum(sizes.values()) + AVERAGE_BYTES * sum(sizes[name] for name in averaged)


# --- image ------------------------------------------------------------------------------------------------------


class _Hash:
    """The image's sha256, computed while the other checks run."""

    def __init__(self, environ: Mapping[str, str]):
        self._image = environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER")
        self._expected = environ.get("NANOGPT_SIF_SHA256")
        self._began = time.monotonic()
        self._digest: str | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._image:
            self._thread.start()

    def _work(self) -> None:
        try:
            self._digest = file_sha256(Path(self._image or ""))
        except OSError:
            self._digest = None

    def check(self, patience_s: float) -> Iterable[Check]:
        if not self._image:
            yield Check("image", "warning", "not in a container", "The run's record will name no image")
            return
        self._thread.join(max(0.0, self._began + patience_s - time.monotonic()))
        if self._digest is None:
            why = "not read yet" if self._thread.is_alive() else "its file cannot be seen from inside"
            yield Check("image", "passed", f"{self._image}, sha256 unknown: {why}")
        elif self._expected and self._digest != self._expected:
            text = f"{self._image} has sha256 {self._digest}, NANOGPT_SIF_SHA256 says {self._expected}"
            yield Check(
                "image",
                "failed",
                text,
                "It is damaged or a different image: pull the right one (make pull), or correct the variable",
            )
        else:
            yield Check("image", "passed", f"{self._image}, sha256 {self._digest}")
