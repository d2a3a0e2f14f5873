"""Compiled code that ships in an image, so that even a new user's first start is warm.

    python -m nanogpt.cache.shipped FROM TO      what `make sif CACHE=FILE` runs in the image while it is built

A file is taken only if this very installation made it: the image of the same commit, without the file. Its name says
for which GPU, processor and recipe it is, and whoever looks for it checks that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt.cache.compile_cache import differences, file_name
from nanogpt.cache.key import installation_key, key_sha256
from nanogpt.cache.pack import SUFFIX, Pack, PackError
from nanogpt.errors import InputError


def ship(source: Path, target: Path, installation: Mapping[str, Any]) -> list[Path]:
    """Copy the cache files in `source` to `target`, under the names that runs look for; returns the new paths.

    Raises `InputError` for a file that is not whole, that others may write, or that another installation made.
    """
    shipped = []
    for path in sorted(source.glob(f"*{SUFFIX}")):
        try:
            pack = Pack(path)
        except PackError as error:
            raise InputError(f"{path.name}: {error}") from error
        key = pack.header.key
        if pack.header.key_sha256 != key_sha256({**key, **installation}):
            raise InputError(
                f"{path.name}: made for other code: differs in {differences(key, {**key, **installation})}. Build the"
                " image without CACHE, fill a file with it (nanogpt warm RECIPE --out DIR), and build again with that"
            )
        target.mkdir(parents=True, exist_ok=True)
        shipped.append(target / file_name(key))
        shipped[-1].write_bytes(pack.raw)
        shipped[-1].chmod(0o644)
    return shipped


def main(source: str, target: str) -> None:
    """See the module."""
    try:
        for path in ship(Path(source), Path(target), installation_key()):
            print(f"{path}: {path.stat().st_size:,} bytes")
    except InputError as error:
        sys.exit(f"compiled code: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
