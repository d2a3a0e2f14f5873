"""How long the commands take that people type all day, as ratios to a Python that does nothing.

    make bench-cli      or python tests/cli/bench_cli.py [--times N]

Each is started N times in turn with the others; the fastest start counts, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_runs import made_runs

from nanogpt.console import markdown_table

RUNS = 20  # that `runs` lists
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "python -c 'import nanogpt'": ("-c", "import nanogpt"),
    "nanogpt --help": ("-m", "nanogpt", "--help"),
    "nanogpt validate record89": ("-m", "nanogpt", "validate", "record89"),
    f"nanogpt runs, of {RUNS} runs": ("-m", "nanogpt", "runs"),
}


def seconds(arguments: tuple[str, ...], runs: Path) -> float:
    """Of one start."""
    start = time.perf_counter()
    environment = os.environ | {"NANOGPT_RUNS": str(runs)}
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=7, metavar="N", help="starts of each command")
    times = max(1, parser.parse_args().times)
    fastest = dict.fromkeys(COMMANDS, float("inf"))
    with tempfile.TemporaryDirectory() as directory:
        made_runs(Path(directory), [3.278 + 0.0001 * index for index in range(RUNS)])
        for _ in range(times):
            for name, arguments in COMMANDS.items():
                fastest[name] = min(fastest[name], seconds(arguments, Path(directory)))
    nothing = fastest["python -c pass"]
    rows = [(name, f"{best:.3f}", f"{best / nothing:.1f}") for name, best in fastest.items()]
    print(*markdown_table(("command", "s", "times python -c pass"), rows), sep="\n")


if __name__ == "__main__":
    main()
