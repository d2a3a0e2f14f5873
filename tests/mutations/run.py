"""Break each mechanism of the run on purpose and see that a test notices.

    python tests/mutations/run.py [-j JOBS] [-k WORD] [--list]

Every mutation of `table.py` is applied to a copy of the package in a temporary directory, and the tests that it names
run against that copy. Prints one row a mutation, mechanism | mutation | killed by, and exits 1 if any survived. A
developer's script: it takes minutes, and pytest does not collect it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("nanogpt", "recipes", "tests", "pyproject.toml")
TIMEOUT_SECONDS = 600


def copy_project(target: Path) -> None:
    """What the tests need, without caches (a stale one would hide a mutation)."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "embedded"))
        else:
            shutil.copy2(ROOT / name, target / name)


def mutated(mutation: Mutation, root: Path) -> str:
    """The file's new text. Raises ValueError unless each old text occurs exactly once: the table follows the code."""
    text = (root / mutation.file).read_text()
    for old, new in mutation.changes:
        if text.count(old) != 1:
            raise ValueError(
                f"{mutation.mechanism}, {mutation.what}: {text.count(old)} times in {mutation.file}: {old!r}"
            )
        text = text.replace(old, new)
    if mutation.file.endswith(".py"):
        compile(text, mutation.file, "exec")
    return text


def obstacle(mutation: Mutation) -> str | None:
    """Why the mutation cannot be made, None if it can."""
    try:
        mutated(mutation, ROOT)
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


def run_tests(root: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails, or None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=line", *tests]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {TIMEOUT_SECONDS} s"
    if done.returncode == 0:
        return None
    if found := re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE):
        return found[1].removeprefix("tests/")
    raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def killed_by(mutation: Mutation) -> str | None:
    """The test that notices `mutation`, None if it survives."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        copy_project(root)
        (root / mutation.file).write_text(mutated(mutation, root))
        return run_tests(root, mutation.tests)


def check_copy(mutations: list[Mutation]) -> None:
    """The unchanged copy passes, and it is the copy that is tested."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        copy_project(root)
        where = subprocess.run(
            [sys.executable, "-c", "import nanogpt; print(nanogpt.__file__)"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if Path(where.strip()).resolve().parents[1] != root.resolve():
            raise RuntimeError(f"the tests would import {where.strip()}, not the copy in {root}")
        tests = tuple(sorted({test for mutation in mutations for test in mutation.tests}))
        if failed := run_tests(root, tests):
            raise RuntimeError(f"{failed} fails without any mutation")


def main() -> int:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="mutations at a time")
    parser.add_argument("-k", "--only", default="", help="only mutations whose mechanism or text contains this word")
    parser.add_argument("--list", action="store_true", help="check that every mutation applies, and run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only.lower() in f"{m.mechanism} {m.what} {m.file}".lower()]

    problems = [problem for mutation in chosen if (problem := obstacle(mutation))]
    if problems or options.list:
        print("\n".join(problems) or f"{len(chosen)} mutations apply")
        return int(bool(problems))

    check_copy(chosen)
    survived = 0
    print("mechanism | mutation | killed by", flush=True)
    print("--- | --- | ---", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, killer in zip(chosen, pool.map(killed_by, chosen), strict=True):
            survived += killer is None
            print(f"{mutation.mechanism} | {mutation.what} | {killer or '**survived**'}", flush=True)
    print(f"\n{len(chosen)} mutations, {len(chosen) - survived} killed, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
