"""Collectives over gloo, with real processes; `collectives.py` has what is checked in each."""

from __future__ import annotations

from pathlib import Path

from tiny_runs import python


def test_collectives_of_four_processes() -> None:
    script = Path(__file__).with_name("collectives.py")
    done = python(
        *("-W", "error::FutureWarning", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "4", str(script)),
        PYTHONWARNINGS="error::FutureWarning",
    )
    assert done.returncode == 0, done.stderr
