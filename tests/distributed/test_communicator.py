"""Collectives over gloo, with real processes; `collectives.py` has what is checked in each."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import python


@pytest.mark.parametrize("processes", ["2", "4"])
def test_collectives(processes: str) -> None:
    script = Path(__file__).with_name("collectives.py")
    done = python(
        *("-W", "error::FutureWarning", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", processes, str(script), "gloo"),
        PYTHONWARNINGS="error::FutureWarning",
    )
    assert done.returncode == 0, done.stderr
