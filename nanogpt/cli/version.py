"""`nanogpt version`: what is installed, without importing any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def versions() -> dict[str, str | None]:
    """Versions of the package, of Python and of what decides speed and result; None: not installed.

    In a container also the image, its hash and that of its lock file.
    """
    import os

    from nanogpt import __version__
    from nanogpt.image.labels import LOCK_LABEL
    from nanogpt.runs.provenance import code_state, container_of, package_versions

    container = container_of(os.environ)
    code = code_state(container)
    commit = None if code.commit is None else code.commit + ("+changes" if code.clean is False else "")
    found: dict[str, str | None] = {"nanogpt-speedrun": __version__, "commit": commit, **package_versions()}
    if container is not None:
        found |= {
            "sif": container.image,
            "sif_sha256": container.sha256 or hash_of(Path(container.image)),
            "lock_sha256": container.labels.get(LOCK_LABEL),
        }
    return found


def hash_of(image: Path) -> str | None:
    """sha256 of the image's file; None: it cannot be seen from inside, or the image is unpacked."""
    from nanogpt.image.tree import file_sha256

    try:
        return file_sha256(image)
    except OSError:
        return None


def version(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False) -> None:
    """Print the versions that a bug report needs: package, commit, Python, torch, Triton, FlashAttention."""
    import json

    found = versions()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name.ljust(width)}  {value or '-'}")
