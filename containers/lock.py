"""Write containers/*.lock again: `make lock`. Needs uv, which can resolve for a Python other than the running one.

Each lock names every package with the hashes of its files, for Linux on x86-64 and the Python of its flavour's Debian.
PyTorch's CPU builds are on an index of their own, named by PIP_EXTRA_INDEX_URL, or in a directory in PIP_FIND_LINKS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PYTHONS = {"cuda": "3.13", "cpu": "3.11"}


def main() -> int:
    """Resolve both flavours; the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--uv", default="uv")
    parser.add_argument("--upgrade", action="store_true", help="take newer versions even if the lock has fitting ones")
    arguments = parser.parse_args()
    folder = Path(__file__).parent
    for flavour, python in PYTHONS.items():
        command = [arguments.uv, "pip", "compile", "--quiet", "--no-config", "--generate-hashes", "--no-annotate"]
        command += ["--no-header", "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--extra", "text", "--output-file", f"{folder}/{flavour}.lock"]
        if arguments.upgrade:
            command.append("--upgrade")
        if flavour == "cpu":
            links = [link for link in os.environ.get("PIP_FIND_LINKS", "").split() if Path(link).is_dir()]
            for link in links:
                command += ["--find-links", link]
            for index in os.environ.get("PIP_EXTRA_INDEX_URL", "").split():
                command += ["--extra-index-url", index, "--index-strategy", "unsafe-best-match"]
        done = subprocess.run([*command, "pyproject.toml", f"{folder}/{flavour}.in"], check=False, cwd=folder.parent)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
