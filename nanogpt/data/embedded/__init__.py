"""The prose that ships with the package, for the demo and for tests; see the README beside this file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

NAME = "public-domain-prose.jsonl.gz"
SHA256 = "88924f42448767a1f7de0c1b90e000db445c5991b5fc2b543ff11c204c9bf044"


def embedded_corpus() -> Path:
    """The embedded corpus: JSON lines, compressed with gzip, each with the fields `text` and `source`."""
    return Path(str(files(__package__).joinpath(NAME)))
