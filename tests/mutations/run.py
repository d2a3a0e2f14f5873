"""Break each mechanism of the run on purpose and see that a test notices.

    python tests/mutations/run.py [-j JOBS] [-k WORD] [--list]

Every mutation of `table.py` is applied to a copy of the package in a temporary directory, and the tests that it names
run against that copy. Prints one row a mutation, mechanism | mutation | killed by, and exits 1 if any survived. A
developer's script: it takes minutes, and pytest does not collect it.

Tests run in forks of this process, which has imported PyTorch (but nothing of the package) and so spares them seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
sys.dont_write_bytecode = True

import hypothesis  # noqa: E402, F401
import numpy as np  # noqa: E402, F401
import pydantic  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.checkpoint  # noqa: E402, F401
from mutation import ROOT, Mutation, mutated  # noqa: E402
from table import MUTATIONS  # noqa: E402

COPIED = ("nanogpt", "recipes", "tests", "pyproject.toml")
TIMEOUT_SECONDS = 900


def copy_project(target: Path) -> None:
    """What the tests need, without caches (a stale one would hide a mutation)."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, target / name)


def obstacle(mutation: Mutation) -> str | None:
    """Why the mutation cannot be made, None if it can."""
    try:
        mutated(mutation, ROOT)
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


@dataclass
class Trial:
    """Tests running on a copy of the project, in a process of their own."""

    folder: tempfile.TemporaryDirectory
    process: int
    deadline: float
    mutation: Mutation | None

    @classmethod
    def start(cls, mutation: Mutation | None, tests: tuple[str, ...]) -> Trial:
        """Copy, mutate, fork."""
        folder = tempfile.TemporaryDirectory(prefix="mutation-")
        root = Path(folder.name)
        copy_project(root)
        if mutation:
            (root / mutation.file).write_text(mutated(mutation, root))
        sys.stdout.flush()
        process = os.fork()
        if not process:
            code = 99
            try:
                code = _run_tests(root, tests)
            finally:
                os._exit(code)
        return cls(folder, process, time.monotonic() + TIMEOUT_SECONDS, mutation)

    def poll(self) -> tuple[bool, str | None]:
        """(ended, the first test that failed or None)."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if not process:
            if time.monotonic() < self.deadline:
                return False, None
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            return True, f"no end within {TIMEOUT_SECONDS} s"
        output = Path(self.folder.name, "output.txt").read_text()
        with contextlib.suppress(OSError):
            self.folder.cleanup()
        if os.waitstatus_to_exitcode(status) == 0:
            return True, None
        if found := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE):
            return True, found[1].removeprefix("tests/")
        raise RuntimeError(f"pytest ended with status {status} on {self.mutation}:\n{output[-3000:]}")


def _run_tests(root: Path, tests: tuple[str, ...]) -> int:
    """In the fork: pytest's exit code, its output in output.txt."""
    with (root / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    sys.path[0] = str(root)
    # Processes that tests start by multiprocessing would import this script.
    vars(sys.modules["__main__"]).pop("__file__", None)
    import nanogpt

    if Path(nanogpt.__file__).parents[1] != root:
        raise RuntimeError(f"{nanogpt.__file__} would be tested instead of the copy in {root}")
    code = pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=line", f"--rootdir={root}", *tests])
    sys.stdout.flush()
    return int(code)


def run_unchanged(mutations: list[Mutation]) -> str | None:
    """The first of the mutations' tests that fails without any mutation."""
    trial = Trial.start(None, tuple(sorted({test for mutation in mutations for test in mutation.tests})))
    while True:
        ended, failed = trial.poll()
        if ended:
            return failed
        time.sleep(0.1)


def run(mutations: list[Mutation], jobs: int) -> int:
    """Print the table; returns how many survived."""
    print("mechanism | mutation | killed by\n--- | --- | ---", flush=True)
    waiting, running, survived = mutations[::-1], [], 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop()
            running.append(Trial.start(mutation, mutation.tests))
        time.sleep(0.05)
        for trial in list(running):
            ended, killer = trial.poll()
            if ended:
                running.remove(trial)
                survived += killer is None
                print(f"{trial.mutation.mechanism} | {trial.mutation.what} | {killer or '**survived**'}", flush=True)
    return survived


def main() -> int:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="mutations at a time")
    parser.add_argument("-k", "--only", default="", help="only mutations whose mechanism, text or file contains this")
    parser.add_argument("--list", action="store_true", help="check that every mutation applies, and run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only.lower() in f"{m.mechanism} {m.what} {m.file}".lower()]
    problems = [problem for mutation in chosen if (problem := obstacle(mutation))]
    if problems or options.list:
        print("\n".join(problems) or f"{len(chosen)} mutations apply")
        return int(bool(problems))
    if failed := run_unchanged(chosen):
        print(f"{failed} fails without any mutation")
        return 1
    survived = run(chosen, options.jobs)
    print(f"\n{len(chosen)} mutations, {len(chosen) - survived} killed, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
