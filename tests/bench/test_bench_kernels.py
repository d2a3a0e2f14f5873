"""`nanogpt bench kernels`: its arithmetic, and that the cases of every kernel can be made and run."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt.bench.kernels import TABLE_HEAD, BenchResult, MachineRates, as_row, floor_ms
from nanogpt.kernels import bench
from nanogpt.kernels.attention_plain import first_visible_key
from nanogpt.kernels.bench import BenchCase, document_ends
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
    row = as_row(BenchResult(case, 4.0, 3.9, 4.1, 8.0, 2.0))
    assert row == "| copy | 2 x 2 | 4,000 | 3,900-4,100 | 8,000 | 2.00 | 2,000 | 50% |"
    assert row.count("|") == TABLE_HEAD.splitlines()[0].count("|")


def test_every_kernel_has_cases():
    found = {module.name: importlib.import_module(f"{bench.__name__}.{module.name}") for module in _modules()}
    assert all(callable(module.bench_cases) for module in found.values())
    kernels = {path.stem.removesuffix("_triton") for path in Path(bench.__path__[0]).parent.glob("*_triton.py")}
    assert kernels - found.keys() == {"fp8_head"}  # part of cross_entropy's


@pytest.mark.parametrize("name", ["relu_squared_mlp", "symmetric_matmul", "transpose"])
def test_cases_run_as_they_stand(name: str):
    with FakeTensorMode(allow_non_fake_inputs=True):
        cases = 0
        for case in importlib.import_module(f"{bench.__name__}.{name}").bench_cases("cpu"):
            case.fast()
            assert case.plain is not None
            case.plain()
            cases += 1
    assert cases >= 4


def _modules() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(bench.__path__)
