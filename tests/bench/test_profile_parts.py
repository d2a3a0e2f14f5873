"""Kernels' names as profiles on a GPU have shown them, and the parts of a step that they are counted to."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import in_ranks

from nanogpt.bench import profile as profiled
from nanogpt.bench.exposed import Exposure
from nanogpt.bench.profile import OTHER_PART, PARTS, KernelTime, StageProfile, as_table, part_of, parts_table
from nanogpt.launch.world import World, started_as
from nanogpt.optim.communication import Communicator

NAMES = {
    "ncclDevKernel_AllGather_RING_LL": "communication",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at_": "attention",
    "_relu_squared_kernel": "MLP: up-projection with its activation, and its backward product",
    "nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN": "FP8 matrix products",
    "nvjet_sm90_rqsss_144x128_128x6_1x2_h_bz_coopA_algo2_TNN": "FP8 matrix products",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "bf16 matrix products",
    "cublasLt::splitKreduce_kernel": "bf16 matrix products",
    "cutlass::Kernel2": "bf16 matrix products",
    "std::enable_if": OTHER_PART,
    "_cross_entropy_kernel": "head: cross-entropy",
    "_logits8_gradient_kernel": "head: cross-entropy",
    "_packed_gradient_kernel": "packed QKV: norm, rotary and back",
    "_transpose_gradient_kernel": "FP8: quantizing, transposing",
    "_fp8_relu_squared_kernel": "MLP: up-projection with its activation, and its backward product",
    "_fp8_relu_squared_gradient_kernel": "MLP: up-projection with its activation, and its backward product",
    "_quantize_mlp_kernel": "FP8: quantizing, transposing",
    "_quantize_both_ways_kernel": "FP8: quantizing, transposing",
    "_symmetric_product_kernel": "Polar Express: symmetric products",
    "_mix_heads_key_gradients_kernel": "DC correction",
    "_transposed_add_kernel": "tied head: transposes",
    "_sum_blocks_kernel": "table of rows",
    "triton_poi_fused_embedding_dense_backward_38": "embeddings' gradients",
    "triton_per_fused_flash_attention_backward_mul_sigmoid_13": "compiled elementwise work and reductions",
    "triton_red_fused__fused_rms_norm__to_copy_add_cat_flip_mul_slice_unbind_view_19": (
        "compiled elementwise work and reductions"
    ),
    "Memcpy DtoD (Device -> Device)": "copies and fills",
    "at::native::vectorized_elementwise_kernel": "copies and fills",
}

GPU = Exposure(span=10, computing=8, communicating=2, exposed=1.5, idle=0.5)


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_part_of_a_kernel(name: str, part: str) -> None:
    assert part_of(name) == part


def test_every_part_has_a_kernel_here() -> None:
    assert set(NAMES.values()) == {*PARTS, OTHER_PART}


def test_the_parts_of_a_stage_add_up_to_its_kernels() -> None:
    kernels = [KernelTime(name, 1, 0.5) for name in NAMES]
    stage = StageProfile(0, kernels, 12.0, Exposure(0, 0, 0, 0, 0))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts_table([stage, stage]).splitlines()]
    table = {part: times for part, *times in rows}
    assert table["bf16 matrix products"] == ["1.5", "1.5"]
    assert table["all kernels"] == [f"{len(NAMES) / 2:.1f}"] * 2


def test_the_longest_kernels_of_a_stage_and_its_communication() -> None:
    stage = StageProfile(1, [KernelTime(name, 2, ms) for name, ms in zip("abc", (4, 3, 1), strict=True)], 10.0, GPU)
    lines = as_table(stage, 1).splitlines()
    assert lines[0] == "Stage 2: 10.0 ms a step, kernels 8.0 ms, communication 2.00 ms, of which 1.50 exposed"
    assert lines[-2:] == ["| a | 2 | 4.00 | 40.0% |", "| 2 others | 4 | 4.00 | 40.0% |"]


def test_the_command_prints_tables_or_json(nanogpt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of two GPUs, whose profile is made up."""
    stage = StageProfile(0, [KernelTime("ncclX", 2, 3.0), KernelTime("_mix_heads", 1, 1.0)], 10.0, GPU)
    world = SimpleNamespace(is_main=True, size=2, device=torch.device("cuda"), gather=lambda own, _: [own, own])
    trainer = SimpleNamespace(world=world, spec=SimpleNamespace(name="made"), implementation_lines=["attention: fa4"])
    monkeypatch.setattr("nanogpt.cli.bench._trainer", lambda spec: contextlib.nullcontext(trainer))
    monkeypatch.setattr(profiled, "profile_stages", lambda *_, **__: iter([stage]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H")
    shown = nanogpt("bench", "profile", "speedrun", "--on", "2xh100")
    assert shown.code == 0 and "ncclX" in shown.out and "DC correction" in shown.out and "(rank 0)" in shown.out
    found = json.loads(nanogpt("bench", "profile", "speedrun", "--on", "2xh100", "--json").out)
    assert (found["recipe"], found["world_size"], found["device"]) == ("made", 2, "H")
    (only,) = found["stages"]
    assert only["kernels"][0] == {"name": "ncclX", "calls": 2, "milliseconds": 3.0}
    assert (only["parts_ms"]["communication"], only["parts_ms"]["DC correction"], only["busy_ms"]) == (3.0, 1.0, 4.0)
    assert [rank["exposed"] for rank in only["exposure_of_ranks"]] == [1.5, 1.5]


def test_a_cpu_is_refused_before_anything_is_built(nanogpt: Callable[..., Any]) -> None:
    outcome = nanogpt("bench", "profile", "demo")
    assert outcome == (2, "", "bench profile: demo runs on a CPU; name a GPU, such as --on 1xh100\n")


def _profiles(directory: Path) -> None:
    """Both ranks leave a file at each place; neither goes on before it sees the other's."""
    rank, size, local_rank = started_as()
    world = World(rank, size, local_rank, torch.device("cpu"), Communicator())
    for stage in ("stage 0", "stage 1"):
        time.sleep(0.2 * rank)
        (directory / f"{stage}, {rank}").touch()
        profiled.wait_for_all(world, stage)
        assert (directory / f"{stage}, {1 - rank}").exists()


def test_ranks_begin_a_profile_together(tmp_path: Path):
    for done in in_ranks(2, _profiles, tmp_path):
        assert done.returncode == 0, done.stderr
