"""Blank the GPU kernels of unwanted architectures in the libraries of an installed environment.

Runs during the image's build, if `make sif KERNELS=80,90` asks for it: `python3 prune_kernels.py /opt/venv 80 90`.
Standard library only. CUDA's libraries hold each kernel once for every architecture; the driver looks through the
headers and loads the one that fits. Here headers, sizes and offsets stay, PTX stays, and the code of other
architectures becomes zeros, which the image's compression reduces to almost nothing. Anything unknown stays as it is.

A fat binary: magic 0xBA55ED50, version 1 (uint16), header size 16 (uint16), size (uint64); then entries: kind (uint16:
1 PTX, 2 machine code), version (uint16), header size (uint32), padded payload size (uint64), and at byte 28 the
architecture (uint32, 90 for sm_90 and sm_90a).
"""

from __future__ import annotations

import argparse
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
MACHINE_CODE = 2
KINDS = (1, 2, 16, 64)
WORTH_LOOKING = 1_000_000  # bytes of a file


class Entry(NamedTuple):
    """A kernel's code for one architecture, in a file."""

    kind: int
    architecture: int
    payload: int  # offset
    size: int


def fat_binaries(data: mmap.mmap | bytes) -> Iterator[list[Entry]]:
    """The entries of each fat binary in the file; those whose entries do not fill it exactly are skipped."""
    position = data.find(MAGIC)
    while position >= 0:
        (size,) = struct.unpack_from("<Q", data, position + 8)
        place, end = position + 16, position + 16 + size
        entries = []
        while place + 32 <= end <= len(data):
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, place)
            (architecture,) = struct.unpack_from("<I", data, place + 28)
            if kind not in KINDS or not 32 <= header <= 512 or place + header + payload > end:
                break
            entries.append(Entry(kind, architecture, place + header, payload))
            place += header + payload
        whole = place == end
        if whole:
            yield entries
        position = data.find(MAGIC, end if whole else position + 16)


def serves(architecture: int, wanted: set[int]) -> bool:
    """Whether code for `architecture` runs on a wanted one: the same major version, and no later minor version."""
    return any(architecture // 10 == other // 10 and architecture <= other for other in wanted)


def prune(path: Path, wanted: set[int]) -> int:
    """Blank what no wanted architecture can run; returns the bytes blanked."""
    saved = 0
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        for entries in list(fat_binaries(data)):
            for entry in entries:
                if entry.kind == MACHINE_CODE and not serves(entry.architecture, wanted):
                    data[entry.payload : entry.payload + entry.size] = bytes(entry.size)
                    saved += entry.size
        data.flush()
    return saved


def main() -> None:
    """Prune every large library below the environment, with a line for each that became smaller."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("architectures", type=int, nargs="+", help="80 of an A100, 90 of an H100 or H200")
    arguments = parser.parse_args()
    wanted = set(arguments.architectures)
    total = 0
    for path in sorted(arguments.environment.rglob("*.so*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size < WORTH_LOOKING:
            continue
        saved = prune(path, wanted)
        total += saved
        if saved > 1e6:
            print(f"{saved / 1e6:8.1f} MB  {path.name}: kernels of other architectures", flush=True)
    print(f"{total / 1e6:8.1f} MB  of kernels blanked, for sm_{', sm_'.join(map(str, sorted(wanted)))}", flush=True)


if __name__ == "__main__":
    main()
