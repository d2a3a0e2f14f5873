"""`nanogpt bench kernels`: its arithmetic, and that the cases of every kernel can be made and run."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt.bench import kernels as timed
from nanogpt.bench.kernels import MachineRates, floor_ms
from nanogpt.kernels import bench
from nanogpt.kernels.attention_plain import first_visible_key
from nanogpt.kernels.bench import BenchCase, document_ends, fp8_head, table_rows
from nanogpt.kernels.bench.attention import visible_pairs


def test_made_up_documents_fill_the_stream():
    ends = document_ends(16_384, 2_048, 127)
    lengths = [b - a for a, b in itertools.pairwise([0, *ends])]
    assert (len(ends), ends[-1]) == (127, 16_384)
    assert max(lengths) <= 2_048
    assert sum(length > 0 for length in lengths) > 15
    assert ends == document_ends(16_384, 2_048, 127)


@pytest.mark.parametrize("window", [0, 7, 100])
def testvisible_pairs_are_counted_exactly(window):
    ends = [1, 20, 64, 64]
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    first = first_visible_key(cu_seqlens, 64, window)
    assert visible_pairs(ends, window) == (torch.arange(64) - first + 1).sum().item()


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    rates = MachineRates(matmul_flops=800e12, copy_bytes=4e12)
    case = BenchCase("product", "2 x 2", lambda: None, None, flops=800e9, bytes=2e9)
    assert floor_ms(case, rates) == pytest.approx(1.0)
    case = BenchCase("copy", "2 x 2", lambda: None, None, flops=800e9, bytes=8e9)
    assert floor_ms(case, rates) == pytest.approx(2.0)


def test_the_command_prints_a_table_or_json(nanogpt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose measuring is made up."""
    cases = [BenchCase(f"{name} copy", "2 x 2", lambda: 4.0, lambda: 8.0, 0, 8e9, lambda: 4.1e-3) for name in "ab"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H")
    monkeypatch.setattr(timed, "machine_rates", lambda: MachineRates(matmul_flops=800e12, copy_bytes=4e12))
    monkeypatch.setattr(timed, "all_bench_cases", lambda: iter(cases))
    monkeypatch.setattr(timed, "measure", lambda function: (function(), 3.9, 4.1))
    monkeypatch.setattr("nanogpt.cache.compile_cache.places_of_this_job", contextlib.nullcontext)
    outcome = nanogpt("bench", "kernels", "--only", "a c")
    assert outcome.code == 0 and outcome.err == "a copy, 2 x 2: 4,000 us\n"
    head, _, _, row = outcome.out.splitlines()
    assert head == f"H, torch {torch.__version__}: bf16 product 800 TFLOP/s, copy 4.00 TB/s"
    assert re.split("  +", row) == (
        ["a copy", "2 x 2", "4,000", "3,900-4,100", "8,000", "2.00", "2,000", "50%", "4.1e-03"]
    )
    found = json.loads(nanogpt("bench", "kernels", "--json").out)
    assert (found["device"], found["copy_bytes"], [one["kernel"] for one in found["kernels"]]) == (
        "H", 4e12, ["a copy", "b copy"]
    )  # fmt: skip
    assert found["kernels"][1] == {
        "kernel": "b copy", "shape": "2 x 2", "fast_ms": 4.0, "fast_low_ms": 3.9, "fast_high_ms": 4.1, "plain_ms": 8.0,
        "floor_ms": 2.0, "error": 4.1e-3,
    }  # fmt: skip


def test_every_kernel_has_cases():
    found = {module.name: importlib.import_module(f"{bench.__name__}.{module.name}") for module in _modules()}
    assert all(callable(module.bench_cases) for module in found.values())
    kernels = {path.stem.removesuffix("_triton") for path in Path(bench.__path__[0]).parent.glob("*_triton.py")}
    assert kernels <= found.keys()


@pytest.mark.parametrize("name", ["fp8_head", "relu_squared_mlp", "symmetric_matmul", "transpose"])
def test_cases_run_as_they_stand(name: str):
    with FakeTensorMode(allow_non_fake_inputs=True):
        cases = 0
        for case in importlib.import_module(f"{bench.__name__}.{name}").bench_cases("cpu"):
            case.fast()
            assert case.plain is not None
            case.plain()
            cases += 1
    assert cases >= 4


RECORD92 = {
    "fp8_mlp": [
        "8-bit relu^2 MLP, forward, all that is kept in 8 bits: 49,152 x 768 x 2,816",
        "8-bit relu^2 MLP, backward, all that is kept in 8 bits: 49,152 x 768 x 2,816",
        "8-bit up-projection and its square, all that is kept in 8 bits: 49,152 x 768 x 2,816",
        "8-bit gradient of the up-projection, all that is kept in 8 bits: 49,152 x 768 x 2,816",
    ],
    "packed_qkv": [
        "packed QKV, norm and rotary: 49,152 x 6 x (64, 128), paired",
        "packed QKV, gradient in 8 bits: 49,152 x 6 x (128, 128), wide, shifted",
        "packed QKV, 8-bit transpose of the gradient, tokens paired: 49,152 x 1,152",
    ],
}


@pytest.mark.parametrize("name", RECORD92)
def test_8_bit_cases_can_be_made_and_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with FP8, but for Triton: what is no operation of PyTorch's does nothing."""
    module = importlib.import_module(f"{bench.__name__}.{name}")
    monkeypatch.setattr(module, "runs_kernel", lambda *_, needs: True)
    for kernels in ("fp8_head_triton", "fp8_mlp_triton"):
        monkeypatch.setitem(sys.modules, f"nanogpt.kernels.{kernels}", MagicMock())
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case in module.bench_cases("cpu"):
            case.fast()
            if case.plain is not None:
                case.plain()
            found.append(f"{case.name}: {case.shape}")
    assert len(found) == len(set(found))
    assert set(RECORD92[name]) <= set(found)


def test_weights_are_rounded_as_finely_as_e4m3_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_head, "MATRICES", (("MLP bank", 2, 96, 64),))
    [case] = fp8_head.bench_cases("cpu")
    assert case.error is not None and 0.02 < case.error() < 0.03


def test_cases_of_a_large_table_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small one, in plain PyTorch: what the kernels' errors are measured by."""
    for size, value in {"ROWS": 64, "SIGNS": 8, "WIDTH": 16, "TOKENS": 48, "MICRO_BATCHES": 2}.items():
        monkeypatch.setattr(table_rows, size, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 20, 1 << 20))
    torch.manual_seed(0)
    cases = {case.name: case for case in table_rows.bench_cases("cpu")}
    assert [name.split()[-1] for name in cases] == ["read", "summed", "updated"]
    for case in cases.values():
        assert case.error is not None and 1e-4 < case.error() < 4e-3  # bf16's


def _modules() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(bench.__path__)
