"""The table of GPUs: whole, and what follows from it."""

from __future__ import annotations

import pytest

from nanogpt.gpus import (
    GPU_NAMES,
    GPU_TYPES,
    MULTIPROCESSORS,
    Needs,
    device_speed,
    meets,
    nearest_type,
    runs_on,
    types_with,
)


def test_every_name_that_a_recipe_may_give_has_its_row():
    assert (*GPU_TYPES, "cpu") == GPU_NAMES
    assert all(name == gpu.name for name, gpu in GPU_TYPES.items())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), set()),
        ((8, 0), {"fa2", "varlen", "triton"}),
        ((8, 9), {"fa2", "varlen", "triton", "fp8"}),
        ((9, 0), {"fa4", "fa3", "fa2", "varlen", "triton", "fp8"}),
        ((10, 0), {"fa4", "fa2", "varlen", "triton", "fp8"}),
        ((12, 0), {"fa2", "varlen", "triton", "fp8"}),
    ],
)
def test_what_runs_on_a_capability(capability: tuple[int, int], expected: set[str]):
    assert {what for what in ("fa4", "fa3", "fa2", "varlen", "triton", "fp8") if runs_on(what, capability)} == expected


def test_types_by_what_runs_on_them():
    assert types_with("fa3") == ("h100", "h200")
    assert types_with("fp8") == ("h100", "h200", "l40s")
    assert types_with("fa2") == ("h100", "h200", "a100", "l40s")
    assert [GPU_TYPES[nearest_type(found)].capability for found in ((7, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [
        (8, 0), (8, 0), (8, 9), (9, 0), (9, 0)
    ]  # fmt: skip


def test_every_type_has_its_multiprocessor():
    assert all(gpu.capability in MULTIPROCESSORS for gpu in GPU_TYPES.values())


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Needs((8, 0)), "8.0 8.9 9.0 10.0 12.0 13.0"),
        (Needs((9, 0), end=(10, 0)), "9.0"),
        (Needs((8, 0), shared=160_000), "8.0 9.0 10.0"),
        (Needs((9, 0), shared=200_000), "9.0 10.0"),
        (Needs((8, 9), shared=101_376), "8.9 9.0 10.0 12.0 13.0"),  # what is not known has no less than any other
    ],
)
def test_code_runs_where_it_is_for_the_gpu_and_has_room(needs: Needs, expected: str):
    found = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]
    assert " ".join(f"{major}.{minor}" for major, minor in found if meets(needs, (major, minor))) == expected


def test_a_device_is_found_by_its_name():
    assert device_speed("NVIDIA H100 80GB HBM3") == GPU_TYPES["h100"].speed
    assert device_speed("NVIDIA H100 PCIe") == (756e12, 2.0e12)
    assert device_speed("NVIDIA L40S") == (362e12, 0.86e12)
    assert device_speed("NVIDIA GH200 480GB") == (989e12, 4.0e12)  # and no H200
    assert device_speed("Radeon") is None
