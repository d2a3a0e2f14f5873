"""`nanogpt version`: what is installed, without importing any of it."""

from __future__ import annotations

from typing import Annotated

import typer


def versions() -> dict[str, str | None]:
    """Versions of the package, Python and what decides speed and result; None: not installed."""
    from nanogpt import __version__
    from nanogpt.runs.provenance import code_state, package_versions

    code = code_state()
    commit = None if code.commit is None else code.commit + ("+changes" if code.clean is False else "")
    return {"nanogpt-speedrun": __version__, "commit": commit, **package_versions()}


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
