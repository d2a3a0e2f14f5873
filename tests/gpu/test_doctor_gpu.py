"""`nanogpt doctor` on a GPU: every kernel that runs are sent to is launched, and two steps are trained."""

from __future__ import annotations

import pytest

from nanogpt.cluster.checkup import checkup

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def test_this_gpu_is_fit_for_a_run() -> None:
    checks = {check.name: check for check in checkup(require_gpu=True)}
    print(*(check.line() for check in checks.values()), sep="\n")
    assert [check.line() for check in checks.values() if check.status == "failed"] == []
    assert "launched " in checks["kernels"].found
    assert "two steps on NVIDIA" in checks["training"].found
