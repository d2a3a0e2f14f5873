"""What decides compiled code: versions, machine, the package's source, and the part of the spec that reaches a graph.

A cache file belongs to one key and is used for no other. Inside of it torch, Triton and FlashAttention have keys of
their own (each graph's and each kernel's), so a run whose graphs differ all the same, as another world size's do,
compiles what is missing and adds it to the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from nanogpt.optim.step_order import step_plan, updated_together
from nanogpt.runs.provenance import driver_version, package_directory, source_sha256
from nanogpt.spec import RunSpec, SpeedrunOptimizerSpec

if TYPE_CHECKING:
    import torch

FORMAT = 1

# What a graph is traced from and what it calls. Formulas of backward passes, which are in no graph that torch makes its
# keys from, are in kernels/.
SOURCES = (
    "kernels",
    "layers",
    "models",
    "optim",
    "training/implementations.py",
    "training/trainer.py",
    "training/micro_step.py",
)

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "quack-kernels",
)

# Variables of the compilers, but for those that only say where things are kept or how much is printed.
VARIABLES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TRITON_", "CUTE_DSL_", "FLASH_ATTENTION_")
PLACES = re.compile(
    r"TORCHINDUCTOR_(CACHE_DIR|COMPILE_THREADS|WORKER_START)|TORCH_COMPILE_(CACHE_DIR|DEBUG_DIR)"
    r"|TRITON_(CACHE_DIR|HOME|DUMP_DIR)|(CUTE_DSL|FLASH_ATTENTION_CUTE_DSL)_CACHE_(DIR|ENABLED)"
)


def _as_is(value: Any) -> Any:
    return value


# Keys of a spec that reach compiled code, and what of each does: the others are given to it as tensors, or not at all.
# `*` stands for any name of a table, `[]` for any entry of a list.
REACHES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (
            "model.kind",
            "model.padded_vocab_size",
            "model.layers",
            "model.width",
            "model.heads",
            "model.head_dim",
            "model.mlp_expansion",
            "model.mlp_bank_padding",
            "model.attention_free_layers",
            "model.long_window_layers",
            "model.paired_layers",
            "model.value_embed_layers",
            "model.skip.from_layer",
            "model.skip.to_layer",
            "model.backout_layer",
            "model.bigram_rows",
            "model.bigram_multipliers",
            "model.gate_inputs",
            "model.rotary.frequencies",
            "model.softcap.cap",
            "model.softcap.shift",
            "model.softcap.scale",
            "model.context",
            "model.qk_bank_padding",
            "model.vo_bank_padding",
            "model.saved_layer",
            "model.bigram_signs",
            "model.xsa_layers",
            "model.output_gate_layers",
            "model.dc_window",
            "model.mudd.hidden",
            "model.mudd.scale",
            "model.mlp_fp8.activation_headroom",
            "model.mlp_fp8.gradients",
            "model.mlp_fp8.input_scale",
            "model.mlp_fp8.square",
            "optimizer.kind",
            "optimizer.adam.eps",
            "optimizer.adam.groups.*.betas",
            "optimizer.adam.groups.*.communication",
            "optimizer.normuon.beta2",
            "optimizer.normuon.norm_margin",
            "optimizer.normuon.polar_express",
            "optimizer.normuon.groups.*.communication",
            "training.slots",
            "training.max_document_tokens",
            "training.stages[].batch_tokens",
            "training.extension.batch_tokens",
            "training.stages[].max_document_tokens",
            "training.extension.max_document_tokens",
            "training.stages[].max_documents",
            "training.extension.max_documents",
            "training.stages[].prefix_weight",  # null: there is none, and no term for it
            "training.extension.prefix_weight",
            "evaluation.micro_batch_tokens",
            "runtime.dtype",
            "runtime.compile",
            "runtime.attention",
            "runtime.kernels",
            "runtime.head_precision",
            "runtime.mlp_precision",
            "runtime.bigram_gradient",
            "runtime.deterministic",
        ),
        _as_is,
    ),
    "training.stages[].token_weights": len,
    "training.extension.token_weights": len,
}
STAYS_OUTSIDE = frozenset(
    (
        "name",
        "description",
        "model.vocab_size",  # sampling alone reads it
        "model.attention_scale",
        "model.rotary.base",
        "model.rotary.yarn_low",
        "model.rotary.yarn_high",
        "model.rotary.yarn_temperature",
        "model.init_bound",
        "model.head_init_std",
        "model.init_std",
        "model.scalars.residual",
        "model.scalars.attention_in",
        "model.scalars.attention_out",
        "model.scalars.bigram",
        "model.scalars.smear",
        "model.scalars.backout",
        "model.scalars.skip",
        "model.value_embed_init_std",
        "model.mlp_fp8.weight_headroom",
        "model.mlp_fp8.bootstrap_steps",
        "model.starts.attention_in",
        "model.starts.attention_out",
        "model.starts.smear",
        "model.starts.skip",
        "model.starts.residual",
        "model.starts.post",
        "model.starts.output_gate",
        "model.starts.bigram_gate",
        "model.starts.skip_gate",
        "model.starts.dc_scores",
        "model.starts.value_gate",
        "model.starts.backout",
        "optimizer.adam.lr",
        "optimizer.adam.weight_decay",
        "optimizer.adam.every",
        "optimizer.adam.delayed",  # when an update is made, not how
        "optimizer.adam.groups.*.lr_mul",
        "optimizer.adam.groups.*.wd_mul",
        "optimizer.normuon.lr",
        "optimizer.normuon.weight_decay",
        "optimizer.normuon.momentum.low",
        "optimizer.normuon.momentum.high",
        "optimizer.normuon.momentum.warmup_steps",
        "optimizer.normuon.momentum.cooldown_steps",
        "optimizer.normuon.groups.*.lr_muls",
        "optimizer.tied_head.split_stage",
        "optimizer.reduce_order",
        "optimizer.update_order",  # but for neighbours in it that are updated by one function: `_updates`
        # AdamW is not compiled.
        "optimizer.lr",
        "optimizer.betas",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "training.seed",
        "training.window_block",
        "training.stages[].steps",
        "training.stages[].window_blocks.short",
        "training.stages[].window_blocks.long",
        "training.stages[].lr_factor",
        "training.stages[].prefix_weight.first",
        "training.stages[].prefix_weight.last",
        "training.extension.prefix_weight.first",
        "training.extension.prefix_weight.last",
        "training.extension",  # null: there is none
        "training.extension.steps",
        "training.extension.window_blocks.short",
        "training.extension.window_blocks.long",
        "training.extension.lr_factor",
        "training.final_window_blocks.short",
        "training.final_window_blocks.long",
        "training.lr_schedule.kind",
        "training.lr_schedule.cooldown_start",
        "training.lr_schedule.warmup_steps",
        "training.lr_schedule.end_factor",
        "training.lr_schedule.ramp_steps",
        "training.warmup",
        "evaluation.every",
        "evaluation.tokens",
        "evaluation.target_loss",
        "reference",  # null: there is none
        "reference.recipe",
        "reference.curves[].name",
        "reference.curves[].points",
        "reference.spread",
        "data.directory",
        "data.train_files",
        "data.val_files",
        "data.bos",
        "data.epochs",
        # The GPU that is found decides; the world size only adds variants of the optimizer's functions.
        "hardware.gpu",
        "hardware.gpus_per_node",
        "hardware.nodes",
        "runtime.cuda_graphs",  # the same code, launched otherwise
        "checkpoint.every",
        "checkpoint.at_end",
        "checkpoint.keep",
        "checkpoint.on_failure",
        "watchdog.phase_seconds",
        "watchdog.step_seconds",
        "watchdog.silence_seconds",
        "output.directory",
        "output.log_every",
        "output.tracker",
    )
)


def graph_settings(spec: RunSpec) -> dict[str, Any]:
    """What of the spec reaches compiled code, by path. A key that nobody has classified is taken to reach it."""
    found = {}
    for path, pattern, value in _leaves(spec):
        if pattern not in STAYS_OUTSIDE:
            found[path] = REACHES.get(pattern, _as_is)(value)
    if isinstance(spec.optimizer, SpeedrunOptimizerSpec):
        found["updated together"] = _updates(spec.optimizer)
    return found


def _updates(spec: SpeedrunOptimizerSpec) -> list[list[str]]:
    """The labels of each update in any kind of step, whatever the order of the updates."""
    plans = [step_plan(spec, adam_step=adam_step, tied=tied) for adam_step in (False, True) for tied in (False, True)]
    found = {tuple(p.label for p in together) for plan in plans for together in updated_together(plan.update)}
    found |= {(p.label,) for plan in plans for p in plan.delayed}
    return [list(labels) for labels in sorted(found)]


def _leaves(value: Any, path: str = "", pattern: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, pattern, value) of everything in a spec that has no named parts of its own."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            dot = "." if path else ""
            yield from _leaves(getattr(value, name), f"{path}{dot}{name}", f"{pattern}{dot}{name}")
    elif isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}", f"{pattern}.*")
    elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]", f"{pattern}[]")
    else:
        yield path, pattern, value


def cache_key(spec: RunSpec, device: torch.device) -> dict[str, Any]:
    """Everything that decides the code of `spec` on `device`, as JSON values. Asks CUDA about the device."""
    import torch

    key = {
        "format": FORMAT,
        "python": f"{platform.python_version()} {sys.implementation.cache_tag}",
        "prefix": sys.prefix,
        "packages": _package_versions(),
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "libc": " ".join(platform.libc_ver()),
        "cpu": [platform.machine(), _cpu_flags_sha256(), torch.get_num_threads() if device.type == "cpu" else None],
        "device": _device(device),
        # Kernels are compiled by what comes with the packages; the driver loads them. A new major version may differ.
        "driver": (driver_version() or "").partition(".")[0] if device.type == "cuda" else "",
        "environment": _compiler_variables(os.environ),
        "source": graph_source_sha256(),
        "spec": graph_settings(spec),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key))  # as it comes back from a file: lists, no tuples
    return plain


def key_sha256(key: Mapping[str, Any]) -> str:
    """One hash of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def graph_source_sha256(package: Path | None = None) -> str:
    """Over the modules that graphs and kernels come from, of the installed package or the one in `package`."""
    package = package or package_directory()
    digest = hashlib.sha256()
    for name in SOURCES:
        path = package / name
        digest.update(
            (source_sha256(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()).encode()
        )
    return digest.hexdigest()


def _package_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _compiler_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(VARIABLES) and not PLACES.fullmatch(name)
    }


def _device(device: torch.device) -> list[Any]:
    import torch

    if device.type != "cuda":
        return [device.type]
    properties = torch.cuda.get_device_properties(device)
    return [properties.name, f"{properties.major}.{properties.minor}", properties.multi_processor_count]


def _cpu_flags_sha256() -> str | None:
    """Of the processor's instruction sets: host code is compiled for this very processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join(sorted(flags.partition(":")[2].split())).encode()).hexdigest()[:16]
