"""`nanogpt version`: what is installed, without importing any of it."""

from __future__ import annotations

from typing import Annotated

import typer


def versions() -> dict[str, str | None]:
    """Versions of the package, Python and what decides speed and result; None: not installed."""
    import platform
    from importlib import metadata

    from nanogpt import __version__

    found: dict[str, str | None] = {
        "nanogpt-speedrun": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in ("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside of a checkout."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def version(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False) -> None:
    """Print the versions that a report of a problem needs: package, commit, Python, torch, Triton, FlashAttention."""
    import json

    found = versions()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name.ljust(width)}  {value or '-'}")
