"""Every Triton kernel compiles for the GPUs that it is dispatched on, fits them and does not spill: without a GPU.

Needs Triton, which PyTorch for CPUs does not bring. `make test` puts the image's release beside the virtual
environment's packages, since the environment's torch may want another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import TRITON

SCRIPT = Path(__file__).with_name("kernel_resources.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def triton() -> None:
    if sys.platform != "linux":
        pytest.skip("there is no Triton for this system")
    if not (TRITON / "triton").is_dir() and find_spec("triton") is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("there is no Triton; `make test` installs it")


def compiled(*arguments: str) -> dict[str, Any]:
    """What `kernel_resources.py` reports."""
    path = os.pathsep.join(map(str, (TRITON, Path(__file__).parents[2])))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments, "--json"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout, process.stderr
    report = json.loads(process.stdout)
    assert process.returncode == (1 if report["problems"] else 0), process.stderr
    return report


def test_all_kernels_fit_hopper() -> None:
    report = compiled("sm_90")
    assert report["problems"] == []
    assert report["unused"] == []  # neither does a kernel exist that this test does not see


EVERYWHERE = {
    "_add_across_blocks_kernel",
    "_add_within_blocks_kernel",
    "_cross_entropy_kernel",
    "_mix_heads_kernel",
    "_mix_heads_key_gradients_kernel",
    "_mix_heads_query_gradients_kernel",
    "_read_rows_kernel",
    "_row_adam_kernel",
    "_sum_blocks_kernel",
    "_sum_rows_kernel",
    "_transposed_add_kernel",
}
PRODUCTS = {"_symmetric_product_kernel", "_relu_squared_kernel"}
RECORDS = ("--recipe", "record89", "--recipe", "record92")
FP8 = {
    "_logits8_gradient_kernel",
    "_logits8_losses_kernel",
    "_logits8_targets_kernel",
    "_norm_and_rotate_kernel",
    "_packed_gradient_kernel",
    "_quantize_both_ways_kernel",
    "_transpose_gradient_kernel",
}


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        (("sm_80",), EVERYWHERE),
        (("sm_89",), EVERYWHERE | FP8),
        (("sm_100", *RECORDS), EVERYWHERE | FP8 | PRODUCTS),
        (("sm_120", *RECORDS), EVERYWHERE | FP8 | {"_symmetric_product_kernel"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_kernels_that_are_sent_to_another_gpu_fit_it(arguments: tuple[str, ...], kernels: set[str]) -> None:
    report = compiled(*arguments)
    assert report["problems"] == []
    assert {entry["kernel"] for entry in report["kernels"]} == kernels


def test_what_does_not_fit_is_seen() -> None:
    """Stages of loads for which no GPU has the shared memory: the keys' gradients once shipped with such."""
    kernel = "_mix_heads_key_gradients_kernel"
    report = compiled("sm_90", "--recipe", "record89", "--kernel", kernel, "--stages", "6")
    assert [entry["kernel"] for entry in report["kernels"]] == [kernel]
    assert report["kernels"][0]["shared"] > 232_448
    assert len(report["problems"]) == 1
    assert "bytes of shared memory, a block has at most 232,448" in report["problems"][0]
