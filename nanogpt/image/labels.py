"""What an image says about itself: labels, the definition it was made from, its hash.

Inside a container Apptainer leaves labels and definition under /.singularity.d.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path("/.singularity.d")
REVISION_LABEL = "org.opencontainers.image.revision"
CLEAN_LABEL = "nanogpt.clean"
LOCK_LABEL = "nanogpt.lock.sha256"


@dataclass
class Built:
    """The facts beside an image, in NAME.sif.json."""

    key: str  # hash of everything that goes in
    sha256: str  # of the file
    bytes: int
    modified_ns: int
    content_sha256: str  # of the file system alone: equal in two builds of one commit
    seconds: float
    flavour: str
    commit: str
    clean: bool | None


def inside_labels(directory: Path = INSIDE) -> dict[str, str]:
    """Labels of the image that this process runs in; empty outside one."""
    try:
        found = json.loads((directory / "labels.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def inside_base(directory: Path = INSIDE) -> str | None:
    """What the image that this process runs in was made from: "docker debian:trixie-slim"; None: not known."""
    try:
        text = (directory / "Singularity").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    header = {key.lower(): value for key, value in re.findall(r"(?im)^(bootstrap|from):[ \t]*(\S+)", text)}
    if len(header) < 2:
        return None
    base = Path(header["from"]).name if header["bootstrap"] == "localimage" else header["from"]
    return f"{header['bootstrap']} {base}"


def sidecar(image: Path) -> Path:
    """Where the facts on an image lie."""
    return image.with_name(image.name + ".json")


def read_built(image: Path) -> Built | None:
    """The facts on the image at this path; None: there are none, or they were written for another file."""
    try:
        facts = Built(**json.loads(sidecar(image).read_text()))
        status = image.stat()
    except (OSError, ValueError, TypeError):
        return None
    return facts if (status.st_size, status.st_mtime_ns) == (facts.bytes, facts.modified_ns) else None


def known_sha256(image: Path) -> str | None:
    """The image's sha256 as `make sif` wrote it beside the file; None: it did not, or the file has changed since."""
    built = read_built(image)
    return built.sha256 if built else None
