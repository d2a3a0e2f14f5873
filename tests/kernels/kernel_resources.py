"""What every Triton kernel needs of a GPU, found without one: the record models' kernels compiled ahead of time.

    python tests/kernels/kernel_resources.py sm_90

A training micro-batch of each stage, a validation micro-batch and an optimizer step of two record models, and what the
third does with its table, its projections and its logits, run on tensors without memory (PyTorch's `meta` device), with
the kernels dispatched as on that GPU. Every launch is compiled as Triton would compile it there, with the dtypes, sizes
and options of that launch, and not made. Prints the kernels' resources as a table, with `--json` as a `Report`; and
ends with 1 where a kernel cannot run or spills.

To be run in a process of its own: it takes the place of Triton's driver and of some of PyTorch's functions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import nanogpt.kernels
from nanogpt.data.micro_batches import MicroBatch, cu_seqlens_length
from nanogpt.gpus import FP8, MULTIPROCESSORS, Multiprocessor, Needs, meets
from nanogpt.kernels.cross_entropy import head_loss
from nanogpt.kernels.dispatch import ANY
from nanogpt.kernels.fp8_head import select_head_precision
from nanogpt.kernels.fp8_mlp import NEEDS as FP8_MLP
from nanogpt.kernels.packed_qkv import Rotation, norm_and_rotate, packed_gradient
from nanogpt.kernels.table_rows import Gradients, RowAdam, Signs, entries_of, read_rows, row_adam, sum_rows
from nanogpt.layers.norm import EPS
from nanogpt.models.language_model import Implementations, Windows, make_model
from nanogpt.models.record92.model import Record92
from nanogpt.models.record_model import LossInputs, RecordModel
from nanogpt.models.record_spec import BIGRAM_ROWS
from nanogpt.optim.banks_and_adam_spec import BanksAndAdamRates
from nanogpt.optim.communication import Communicator
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam
from nanogpt.recipe import load_recipe
from nanogpt.spec import RunSpec
from nanogpt.training.micro_step import MicroStep


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    spills: int = 0  # bytes a thread that its assembler spills where that of sm_90 does not

    @property
    def each(self) -> Multiprocessor:
        """What a multiprocessor has."""
        return MULTIPROCESSORS[self.capability]


GRADIENTS = "model.mlp_fp8.gradients=all"
TABLE_RECIPE = "record92"  # of it only what it does with its table, its projections and its logits
# With each of these settings a recipe launches kernels of its own.
RECIPES = {
    "speedrun": ((),),
    "record89": (
        (),
        (GRADIENTS,),
        (GRADIENTS, "model.mlp_fp8.square=e4m3", "model.mlp_fp8.input_scale=bound"),
    ),
    TABLE_RECIPE: (),
}
COLUMNS = ("warps", "stages", "shared", "registers", "spilled", "blocks", "launch")  # of the table

GPUS = {
    "sm_80": Gpu((8, 0), 108),  # A100
    "sm_89": Gpu((8, 9), 142),  # L40S; an L4 has 58
    "sm_90": Gpu((9, 0), 132),  # H100, H200
    "sm_100": Gpu((10, 0), 148, spills=96),  # B200
    "sm_120": Gpu((12, 0), 188, spills=96),  # RTX PRO 6000
}
REGISTERS = 65_536  # of a multiprocessor
RESERVED_SHARED = 1_024  # bytes that CUDA adds to each block's

# Bytes a thread that may be spilled, stored and loaded. The cross-entropy keeps a row's gradient in registers and is
# held to 128 of them a thread, so that a multiprocessor takes two rows: options chosen by measurement. So are those of
# the queries' gradients: at 4 warps two programs share a multiprocessor (465 us against 668 at 8, on an H200).
SPILLS = {"_cross_entropy_kernel": 256, "_mix_heads_query_gradients_kernel": 128}


@dataclass(frozen=True)
class Resources:
    """A compiled kernel, as it was launched."""

    kernel: str
    launch: str  # dtypes and constants
    warps: int
    stages: int
    shared: int  # bytes a block
    registers: int  # a thread
    spilled: int  # bytes a thread, stored and loaded
    blocks: int  # that a multiprocessor holds at a time
    remarks: tuple[str, ...]  # the assembler's, on what it could not do well

    def problems(self, gpu: Gpu) -> list[str]:
        """Why this cannot run on `gpu`, or not well."""
        found = list(self.remarks)
        room, allowed = gpu.each.block_shared, SPILLS.get(self.kernel, 0) + gpu.spills
        if self.shared > room:
            found.append(f"needs {self.shared:,} bytes of shared memory, a block has at most {room:,}")
        elif self.blocks == 0:
            found.append(f"needs {self.registers} registers in each of {self.warps} warps")
        if self.spilled > allowed:
            found.append(f"spills {self.spilled} bytes a thread, allowed are {allowed}")
        return [f"{self.kernel} ({self.launch}): {problem}" for problem in found]


@dataclass(frozen=True)
class Report:
    """What was found on one kind of GPU."""

    kernels: list[Resources]
    problems: list[str]
    unused: list[str]  # kernels of the project that were not launched


# ---------------------------------------------------------------- Triton without a GPU


class _Driver:
    """What Triton's launcher asks of a driver before it compiles."""

    devices = itertools.count()

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.device = next(self.devices)  # Triton keeps what it has compiled by device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled_launches(gpu: Gpu, only: str | None, options: dict[str, int]) -> Iterator[dict[str, Resources]]:
    """Inside, launches of Triton kernels are compiled for `gpu` and not made: what each needs, by hash.

    `only`: the one kernel to compile. `options` replace those of every launch.
    """
    found: dict[str, Resources] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if only is not None and kernel.__name__ != only:
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = run(kernel, *args, grid=grid, warmup=True, **keywords | options)
        if compiled.hash not in found:
            found[compiled.hash] = _resources(kernel, compiled, log.getvalue(), gpu)

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1"),
        mock.patch.object(triton.runtime.driver, "_active", _Driver(gpu.capability)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield found


def _resources(kernel: JITFunction, compiled: Any, log: str, gpu: Gpu) -> Resources:
    metadata = compiled.metadata
    # Functions that a kernel calls and that are not inlined have lines of their own.
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", log))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not spills:
        raise RuntimeError(f"{kernel.__name__}: the assembler has not told what it spills: {log!r}")
    # A warp's registers are given out 256 at a time.
    blocks = min(
        REGISTERS // (-(-registers * 32 // 256) * 256 * metadata.num_warps),
        gpu.each.shared // (metadata.shared + RESERVED_SHARED),
        gpu.each.warps // metadata.num_warps,
    )
    signature, constants = compiled.src.signature, compiled.src.constants
    launch = [type_ for type_ in signature.values() if type_ != "constexpr"]
    launch += [f"{kernel.arg_names[place[0]]}={value}" for place, value in constants.items()]
    return Resources(
        kernel=kernel.__name__,
        launch=" ".join(launch),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared=metadata.shared,
        registers=registers,
        spilled=sum(int(stores) + int(loads) for stores, loads in spills),
        blocks=blocks,
        remarks=tuple(re.findall(r"Potential Performance Loss: .*", log)),
    )


# ---------------------------------------------------------------- the project without a GPU


class _RunLaunches(TorchDispatchMode):
    """Runs the project's operations on tensors without memory, where PyTorch would only make tensors of their shapes.

    All but plain attention, which has no kernel here to launch and stands for the libraries that have.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("nanogpt::") and "attention" not in name:
            return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dispatched_as_on(gpu: Gpu) -> Iterator[None]:
    """Inside, operations on `meta` tensors choose their kernels as on `gpu`."""

    def runs_kernel(*tensors: Tensor, needs: Needs = ANY, dtype: torch.dtype = torch.bfloat16) -> bool:
        return all(x.dtype == dtype for x in tensors) and meets(needs, gpu.capability)

    modules = [importlib.import_module(f"nanogpt.kernels.{path.stem}") for path in kernel_files("*.py")]
    properties = SimpleNamespace(multi_processor_count=gpu.multiprocessors)
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "runs_kernel"):
                stack.enter_context(mock.patch.object(module, "runs_kernel", runs_kernel))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties))
        stack.enter_context(_RunLaunches())
        yield


def kernel_files(pattern: str) -> list[Path]:
    """The files of nanogpt.kernels of that name."""
    return sorted(path for path in Path(nanogpt.kernels.__path__[0]).glob(pattern) if path.stem != "__init__")


def kernel_names() -> set[str]:
    """All kernels that the project has: the Triton functions whose names end so."""
    names = set()
    for path in kernel_files("*_triton.py"):
        module = importlib.import_module(f"nanogpt.kernels.{path.stem}")
        names |= {name for name, _ in inspect.getmembers(module, lambda x: isinstance(x, JITFunction))}
    return {name for name in names if name.endswith("_kernel")}


def _micro_batch(tokens: int, max_seqlen: int, max_documents: int | None) -> MicroBatch:
    return MicroBatch(
        inputs=torch.zeros(tokens, dtype=torch.int32, device="meta"),
        targets=torch.zeros(tokens, dtype=torch.int64, device="meta"),
        cu_seqlens=torch.zeros(cu_seqlens_length(tokens, max_documents), dtype=torch.int32, device="meta"),
        max_seqlen=max_seqlen,
        extras={BIGRAM_ROWS: torch.zeros(tokens, dtype=torch.int64, device="meta")},
    )


def make_steps(spec: RunSpec, implementations: Implementations) -> None:
    """All that a run of `spec` launches: training by stage, validation, optimizer steps on 1, 2, 4 and 8 ranks."""
    training, tokens = spec.training, spec.evaluation.micro_batch_tokens
    dtype = torch.bfloat16
    with torch.device("meta"):
        model: RecordModel[Any]
        model = make_model(spec.model, dtype=dtype, max_tokens=tokens, implementations=implementations)
    optimizer = NorMuonAdam(model, model.rows, spec.optimizer, Communicator())
    micro_step = MicroStep(model, model.training_loss, grad_scale=1.0)
    windows = Windows(short=training.window_block, long=3 * training.window_block).at_run_time()
    for stage in training.all_stages:
        longest = stage.max_document_tokens or training.max_document_tokens
        longest = min(longest, stage.max_segment_tokens or longest)
        batch = _micro_batch(stage.batch_tokens // training.slots, longest, stage.max_documents)
        weights = torch.ones(len(stage.token_weights), device="meta")
        prefix_weight = torch.ones((), device="meta") if stage.prefix_weight else None
        micro_step.compute(batch, LossInputs(windows, weights, prefix_weight))
    optimizer.step(BanksAndAdamRates(lr_factor=1.0, momentum=0.9))
    model.weights_changed(0)
    for ranks in (2, 4, 8):
        optimizer.warm_up(ranks)
    model.evaluation_loss(_micro_batch(tokens, tokens, None), windows)


def make_table_steps(spec: RunSpec) -> None:
    """What a run of `spec` launches for its table: a read, and updates on one and on several ranks."""
    [table] = spec.model.pulled_tables().values()
    tokens, rows = 49_152, 1_000
    with torch.device("meta"):
        values = torch.empty(rows, table.width, dtype=torch.bfloat16)
        moments, last_update = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        read = torch.empty(table.reads, tokens, dtype=torch.int32)
        updated, received = torch.empty(rows, dtype=torch.int64), torch.empty(2 * rows, dtype=torch.int64)
        owed, gradients = torch.empty(1), torch.empty(tokens, table.width, dtype=torch.bfloat16)
    signs = Signs(values, read)
    read_rows(values, read, signs)
    update = RowAdam(number=1, step_size=0.5, beta2=0.9, decay=0.1, eps=1e-10, divisor=1)
    state = values, moments, last_update, owed, updated
    own = entries_of(updated, read.flatten()), Gradients(gradients, signs)
    row_adam(*state, *own, update)
    sum_rows(*own, torch.bfloat16)
    row_adam(*state, entries_of(updated, received), Gradients(values), update)


def make_head_steps(spec: RunSpec) -> None:
    """What a run of `spec` launches by stage for its logits in e4m3."""
    training, cap, width = spec.training, spec.model.softcap, spec.model.width
    constants = {"cap": cap.cap, "shift": cap.shift, "scale": cap.scale, "precision": "fp8", "fp8": Record92.fp8_scales}
    for stage in training.all_stages:
        tokens, columns = stage.batch_tokens // training.slots, stage.candidates or spec.model.padded_vocab_size
        with torch.device("meta"):
            x = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
            lm_head = torch.empty(width, columns, dtype=torch.bfloat16)
            targets, weights = torch.empty(tokens, dtype=torch.int64), torch.empty(len(stage.token_weights))
        prefixes = {"prefixes": targets, "prefix_weight": weights[0]} if stage.prefix_weight else {}
        head_loss(x, lm_head, targets, weights, **prefixes, **constants).backward()


def make_projection_steps(spec: RunSpec) -> None:
    """What a micro-batch of `spec` launches between 8-bit products and attention, for each shape of its layers."""
    model, tokens = spec.model, 49_152
    layers = {(model.qk_dim(i), model.v_dim(i), i in model.paired_layers): i for i in model.attention_layers}
    with torch.device("meta"):
        cos, sin = (torch.empty(2 * tokens, 2 * model.rotary.frequencies, dtype=torch.bfloat16) for _ in range(2))
        for (channels, values, paired), layer in layers.items():
            qk = torch.empty(tokens, 2 * model.heads * channels, dtype=torch.bfloat16)
            rotation = Rotation(cos, sin, paired, model.is_wide(layer), EPS)
            q, k = norm_and_rotate(qk, rotation, heads=model.heads)
            v = torch.empty(tokens, model.heads, values, dtype=torch.bfloat16)
            packed_gradient(q, k, v, qk, rotation, factor=448.0)


def paths_on(gpu: Gpu) -> list[Implementations]:
    """What a run can take on `gpu`, but for attention's libraries."""
    bf16 = Implementations(attention="plain")
    if not meets(FP8, gpu.capability):
        return [bf16]
    mlp, _ = select_head_precision("auto", gpu.capability, lambda: True, kernels=FP8_MLP)
    return [bf16, replace(bf16, head_precision="fp8", mlp_precision=mlp)]


def all_launches(
    gpu: Gpu, recipes: Iterable[str] = RECIPES, only: str | None = None, options: dict[str, int] | None = None
) -> Report:
    """What the kernels need that the recipes' runs launch on `gpu`; `only` and `options` as in `compiled_launches`."""
    with compiled_launches(gpu, only, options or {}) as found, dispatched_as_on(gpu):
        for recipe in recipes:
            for settings, implementations in itertools.product(RECIPES[recipe], paths_on(gpu)):
                if not settings or implementations.mlp_precision == "fp8":  # which alone they change
                    make_steps(load_recipe(recipe, settings), implementations)
            if recipe == TABLE_RECIPE:
                spec = load_recipe(recipe, ["hardware.gpu=h100", "hardware.gpus_per_node=8"])
                make_table_steps(spec)
                if meets(FP8, gpu.capability):
                    make_head_steps(spec)
                    make_projection_steps(spec)
    kernels = sorted(found.values(), key=lambda entry: (entry.kernel, entry.launch))
    return Report(
        kernels=kernels,
        problems=[problem for entry in kernels for problem in entry.problems(gpu)],
        unused=sorted(kernel_names() - {entry.kernel for entry in kernels}),
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gpu", choices=GPUS)
    parser.add_argument("--json", action="store_true", help="print a Report")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="the launches of these alone")
    parser.add_argument("--kernel", help="the only one to compile")
    parser.add_argument("--stages", type=int, help="instead of what the launches ask for")
    chosen = parser.parse_args()
    report = all_launches(
        GPUS[chosen.gpu],
        chosen.recipe or RECIPES,
        chosen.kernel,
        {"num_stages": chosen.stages} if chosen.stages else {},
    )
    if chosen.json:
        json.dump(asdict(report), sys.stdout)
    else:
        print(f"| kernel | {' | '.join(COLUMNS)} |\n|{' --- |' * (1 + len(COLUMNS))}")
        for entry in report.kernels:
            print(f"| {entry.kernel} | {' | '.join(str(getattr(entry, name)) for name in COLUMNS)} |")
    print(*report.problems, sep="\n", end="\n" if report.problems else "", file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
