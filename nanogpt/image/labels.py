"""What an image says of itself: labels, the definition it was made from, its hash.

Inside a container Apptainer leaves labels and definition under /.singularity.d; those of a file are read through
spython, which also parses definitions.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError, RunError

INSIDE = Path("/.singularity.d")
REVISION_LABEL = "org.opencontainers.image.revision"
CLEAN_LABEL = "nanogpt.clean"
LOCK_LABEL = "nanogpt.lock.sha256"


@dataclass
class Definition:
    """A definition file with its arguments filled in."""

    bootstrap: str = ""  # docker, localimage, ...
    base: str = ""
    arguments: dict[str, str] = field(default_factory=dict)  # name -> default, of %arguments
    labels: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)  # from the directory of the build, into the image
    environment: list[str] = field(default_factory=list)  # assignments of %environment
    post: list[str] = field(default_factory=list)  # lines


@dataclass
class Built:
    """What lies beside an image, in NAME.sif.json."""

    key: str  # hash over all that goes in
    sha256: str  # of the file
    bytes: int
    modified_ns: int
    content_sha256: str  # of the file system alone: equal in two builds of one commit
    seconds: float
    flavour: str
    commit: str
    clean: bool | None


def read_definition(path: Path, values: Mapping[str, str] | None = None) -> Definition:
    """Parse a definition file, with `values` instead of the defaults of its arguments.

    Raises:
        InputError: it cannot be read, has no Bootstrap or From, or names an argument that has no value.
    """
    from spython.main.parse.parsers import get_parser

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected an Apptainer definition") from error
    defaults = _arguments(text)
    filled = defaults | dict(values or {})
    unknown = sorted(set(re.findall(r"\{\{\s*(\w+)\s*\}\}", text)) - set(filled))
    if unknown:
        raise InputError(f"{path}: no value for {', '.join(unknown)}; add a default in %arguments")
    text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: filled[match.group(1)], text)
    header = {
        key.lower(): value
        for key, value in re.findall(r"^(Bootstrap|From):[ \t]*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    }
    if "bootstrap" not in header or "from" not in header:
        raise InputError(f"{path}: has no Bootstrap or no From line; is it an Apptainer definition?")
    # spython takes a docker base only, and what is parsed does not depend on it.
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "definition")
        copy.write_text(re.sub(r"(?im)^bootstrap:.*$", "Bootstrap: docker", text), encoding="utf-8")
        recipe = next(iter(get_parser("singularity")(str(copy)).recipe.values()))
    return Definition(
        bootstrap=header["bootstrap"],
        base=header["from"],
        arguments=defaults,
        labels={key: value.strip() for key, value in (_pair(line) for line in recipe.labels) if key},
        files=[_pair(line) for line in recipe.files],
        environment=list(recipe.environ),
        post=list(recipe.install),
    )


def _arguments(text: str) -> dict[str, str]:
    match = re.search(r"^%arguments[^\n]*\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)
    lines = match.group(1).splitlines() if match else []
    pairs = (line.strip().partition("=") for line in lines if "=" in line and not line.strip().startswith("#"))
    return {name: value for name, _, value in pairs}


def _pair(line: str) -> tuple[str, str]:
    first, _, second = line.strip().partition(" ")
    return first, second.strip()


def inside_labels(directory: Path = INSIDE) -> dict[str, str]:
    """Labels of the image that this process runs in; empty outside of one."""
    try:
        found = json.loads((directory / "labels.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def inside_base(directory: Path = INSIDE) -> str | None:
    """What the image that this process runs in was made from: "docker debian:trixie-slim"; None: not known."""
    path = directory / "Singularity"
    if not path.is_file():
        return None
    try:
        definition = read_definition(path)
    except (InputError, OSError, NotImplementedError):
        return None
    base = Path(definition.base).name if definition.bootstrap == "localimage" else definition.base
    return f"{definition.bootstrap} {base}"


def file_labels(image: Path) -> dict[str, str]:
    """Labels of an image's file.

    Raises:
        InputError: no such file, or not an image.
        RunError: Apptainer cannot be started.
    """
    if not image.is_file():
        raise InputError(f"{image}: no such image; `make sif` builds one")
    if shutil.which("apptainer") is None:
        raise RunError("there is no apptainer on PATH; load its module or install it")
    from spython.main import get_client

    client = get_client(quiet=True)
    # spython says `singularity`, a link that not every installation of Apptainer has.
    client._init_command = lambda action, flags=None: [
        "apptainer",
        *(flags or []),
        *([action] if isinstance(action, str) else action),
    ]
    found: Any = client.inspect(str(image), quiet=True)
    try:
        labels = found["attributes"]["labels"]
    except (KeyError, TypeError):
        raise InputError(f"{image}: Apptainer finds no labels in it: {str(found)[:200]}; is it an image?") from None
    return {str(key): str(value) for key, value in labels.items()}


def sidecar(image: Path) -> Path:
    """Where the facts on an image lie."""
    return image.with_name(image.name + ".json")


def read_built(image: Path) -> Built | None:
    """The facts on the image at this path; None: there is none, or it is not the file that they were written for."""
    try:
        facts = Built(**json.loads(sidecar(image).read_text()))
        status = image.stat()
    except (OSError, ValueError, TypeError):
        return None
    return facts if (status.st_size, status.st_mtime_ns) == (facts.bytes, facts.modified_ns) else None


def known_sha256(image: Path) -> str | None:
    """The image's sha256 as `make sif` wrote it beside the file; None: it did not, or the file is another by now."""
    built = read_built(image)
    return built.sha256 if built else None
