"""Another Python, with transformers and without nanogpt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # untrained_runs

Others = Callable[..., Any]


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Others:
    """`others("logits", directory, ...)` runs a function of others.py there, offline; returns what it returns."""
    python = os.environ.get("NANOGPT_TEST_TRANSFORMERS")
    if not python:
        pytest.fail("NANOGPT_TEST_TRANSFORMERS: names no Python; run make test-export")
    home = tmp_path_factory.mktemp("home")
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}

    def run(function: str, *arguments: Any) -> Any:
        asked = json.dumps([function, *map(str, arguments)])
        done = subprocess.run(
            [python, str(HERE / "others.py"), asked],
            capture_output=True,
            text=True,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
