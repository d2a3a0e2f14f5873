"""An Apptainer definition as spython reads it, apart from the code that is tested."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from spython.main.parse.parsers import get_parser


class Definition(NamedTuple):
    """A definition with its arguments filled in."""

    bootstrap: str
    base: str
    arguments: dict[str, str]  # name -> default
    labels: dict[str, str]
    files: list[tuple[str, str]]  # from the directory of the build, into the image
    environment: list[str]
    post: list[str]


def read_definition(path: Path, scratch: Path, values: Mapping[str, str] | None = None) -> Definition:
    """Parse a definition file, with `values` instead of its arguments' defaults; `scratch` is a directory to write to.

    spython knows neither arguments nor a base that is not Docker's: both are replaced in a copy of the text.
    """
    text = path.read_text()
    section = re.search(r"^%arguments\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)
    defaults = dict(re.findall(r"^\s*(\w+)=(.*)$", section.group(1), re.MULTILINE)) if section else {}
    filled = defaults | dict(values or {})
    text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: filled[match.group(1)], text)
    (bootstrap,) = re.findall(r"(?im)^bootstrap: (.*)$", text)
    (base,) = re.findall(r"(?im)^from: (.*)$", text)
    copy = scratch / "definition-for-spython"
    copy.write_text(re.sub(r"(?im)^bootstrap:.*$", "Bootstrap: docker", text))
    recipe = next(iter(get_parser("singularity")(str(copy)).recipe.values()))
    pairs = [line.strip().partition(" ") for line in recipe.labels]
    return Definition(
        bootstrap=bootstrap,
        base=base,
        arguments=defaults,
        labels={key: value.strip() for key, _, value in pairs if key},
        files=[(source, target) for source, target in (line.split() for line in recipe.files)],
        environment=list(recipe.environ),
        post=list(recipe.install),
    )
