"""What the commands on records have in common: they are listed, name what is wrong, and import little."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from made_runs import made_run

ARGUMENTS = {
    "compare": (),
    "significance": (),
    "check": (),
    "submission": ("--description", "new", "--out", "submission"),
}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_what_is_no_run_is_named(nanogpt, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such run directory"), (tmp_path / "empty", "not a run directory")):
        refused = nanogpt(command, path, *ARGUMENTS[command])
        assert refused.code == 2 and f"{path}: {message}" in refused.err


@pytest.mark.parametrize("command", ARGUMENTS)
def test_it_is_listed_and_explained(nanogpt, command):
    assert f"\n  {command} " in nanogpt("--help").out
    assert "RUN" in nanogpt(command, "--help").out


def test_checking_needs_neither_torch_nor_scipy(tmp_path):
    run = made_run(tmp_path / "run")
    program = (
        "import sys\n"
        "from nanogpt.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print([name for name in ('torch', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    for arguments in (("check", run), ("compare", run, made_run(tmp_path / "other", 3.277))):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n")
