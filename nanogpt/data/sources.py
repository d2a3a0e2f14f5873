"""Which documents belong together, so that a split leaves them on one side: `prep-text --split-by`.

Texts that differ in a line may be one package in two environments, or two versions of a chapter. A split by
documents puts them on both sides, and validation then measures memorization.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from nanogpt.errors import InputError

PACKAGE_FOLDERS = ("site-packages", "dist-packages")
LIBRARY_FOLDER = re.compile(r"python\d+(\.\d+)?")
FORM = "document, source, directory:DEPTH or field:NAME"


@dataclass(frozen=True)
class SplitBy:
    """What goes to one side of the split as a whole.

    - document: each text, and its copies.
    - source: a package of an installed Python, by its name, wherever it is; elsewhere a PATH's top folder.
    - directory: the first `depth` folders below a PATH.
    - field: what this field or column of a record says.

    If PATH is a file and not a folder, source and directory treat it as one source. Equal names are one source, even
    below different PATHs.
    """

    kind: Literal["document", "source", "directory", "field"] = "document"
    depth: int = 1
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> SplitBy:
        """From text such as "directory:2". Raises `InputError`."""
        kind, _, argument = text.partition(":")
        if text in ("document", "source"):
            return cls("source" if text == "source" else "document")
        if kind == "directory" and argument.isdecimal() and int(argument) >= 1:
            return cls("directory", depth=int(argument))
        if kind == "field" and argument:
            return cls("field", field=argument)
        raise InputError(f"--split-by {text}: expected {FORM}, such as directory:2 or field:source")

    def of_file(self, path: str, top: str) -> str:
        """The source of a file that was found below `top`, or is `top`; "" if documents or fields decide."""
        if self.kind in ("document", "field"):
            return ""
        package = _package(Path(os.path.abspath(path)).parts) if self.kind == "source" else ""  # noqa: PTH100
        if package:
            return package
        if path == top:
            return os.path.basename(path)  # noqa: PTH119
        folders = Path(path).relative_to(top).parts[:-1]
        return "/".join(folders[: self.depth]) or "."


def source_key(name: str) -> int:
    """64 bits of BLAKE2b of a source's name: what decides between validation and training."""
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def _package(parts: Sequence[str]) -> str:
    """`numpy` for .../site-packages/numpy-2.4.dist-info/METADATA, `json` for .../lib/python3.13/json/decoder.py."""
    for index in range(len(parts) - 2, -1, -1):
        installed = parts[index] in PACKAGE_FOLDERS
        if installed or (LIBRARY_FOLDER.fullmatch(parts[index]) and parts[index - 1].startswith("lib")):
            return re.split(r"[-.]", parts[index + 1].lstrip("_"), maxsplit=1)[0].lower() or parts[index + 1]
    return ""
