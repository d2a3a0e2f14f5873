"""List what `import torch` reads of its files, so that read_ahead.py can request it in advance.

Runs during the image's build: `python3 import_pieces.py PYTHON --out FILE`; standard library only. Which files: those
that an import opens, tried here. Which pieces of a library: what its ELF headers say that the dynamic loader and the
library's constructors touch. So the list is the same wherever the same packages are installed; a list of observed
page faults would not be.

- tables: symbols, strings, hashes, versions and relocations are read from end to end;
- targets: each page that a relocation writes to;
- constructors: the functions that .init_array or .ctors point to, by the addends of its relocations;
- code and constants, whole, of libraries with many constructors for their size (CUDA's have one for each source file):
  what those call, and what they register to be called at exit, is spread all over them.

A line in the list: offset, bytes, file.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TABLES = (".dynamic", ".dynsym", ".dynstr", ".hash", ".gnu.hash", ".gnu.version", ".gnu.version_r", ".plt", ".got.plt")
RELOCATIONS = (".rela.dyn", ".rela.plt")
CONSTRUCTORS = (".init_array", ".ctors")
CODE = (".text", ".rodata", ".lrodata")
MANY = 2e-6  # constructors per byte of code, two per megabyte: few of an image's blocks then stay untouched
PT_LOAD = 1
WINDOW = 1 << 17  # bytes; what the kernel reads for one page fault
GAP = 2 * WINDOW  # a gap of at most this between two pieces is cheaper to read than to leave out

OPENED = """
import sys, torch
for line in sorted({line.split(maxsplit=5)[5] for line in open("/proc/self/maps") if ".so" in line}):
    print(line, end="")
for module in list(sys.modules.values()):
    specification = vars(module).get("__spec__")
    if specification is not None and specification.cached:
        print(specification.cached)
"""


class Section(NamedTuple):
    """Where a section is, in bytes."""

    address: int
    offset: int
    size: int


class Library:
    """Sections and segments of a 64-bit little-endian ELF file."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        programs, headers = struct.unpack_from("<QQ", data, 32)
        program_size, program_count, size, count, names = struct.unpack_from("<5H", data, 54)
        self.segments = []  # address, offset, bytes in the file
        for index in range(program_count):
            kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, programs + index * program_size)
            if kind == PT_LOAD:
                self.segments.append((address, offset, length))
        found = [struct.unpack_from("<IIQQQQ", data, headers + index * size) for index in range(count)]
        self.sections: dict[str, Section] = {}
        for name, _, _, address, offset, length in found:
            start = found[names][4] + name
            text = data[start : data.find(b"\0", start)].decode()
            if length:
                self.sections[text] = Section(address, offset, length)

    def offset(self, address: int) -> int | None:
        """Where in the file an address is stored; None: nowhere."""
        for start, offset, length in self.segments:
            if start <= address < start + length:
                return address - start + offset
        return None

    def whole(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """Offset and bytes of the sections with these names."""
        return ((self.sections[name].offset, self.sections[name].size) for name in names if name in self.sections)

    def touched(self) -> Iterator[tuple[int, int]]:
        """Offset and bytes of everything that an import touches."""
        yield 0, 64
        yield from self.whole((*TABLES, *RELOCATIONS))
        arrays = [self.sections[name] for name in CONSTRUCTORS if name in self.sections]
        constructors = 0
        for start, length in self.whole(RELOCATIONS):
            for address, _, addend in struct.iter_unpack("<QQq", self.data[start : start + length]):
                yield from self.word(address)
                if any(array.address <= address < array.address + array.size for array in arrays):
                    constructors += 1
                    yield from self.word(addend)
        code = self.sections.get(".text")
        if code is not None and constructors >= MANY * code.size:
            yield from self.whole(CODE)

    def word(self, address: int) -> Iterator[tuple[int, int]]:
        """Offset and bytes of the eight bytes at an address."""
        offset = self.offset(address)
        if offset is not None:
            yield offset, 8


def joined(touched: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Offset and bytes of whole windows, in order, with small gaps closed, in a file of `size` bytes."""
    windows = sorted({window for offset, length in touched for window in _windows(offset, length)})
    pieces: list[list[int]] = []  # first byte, and the one after the last
    for start in (window * WINDOW for window in windows):
        if pieces and start <= pieces[-1][1] + GAP:
            pieces[-1][1] = start + WINDOW
        else:
            pieces.append([start, start + WINDOW])
    return [(start, min(end, size) - start) for start, end in pieces]


def _windows(offset: int, length: int) -> range:
    return range(offset // WINDOW, (offset + length - 1) // WINDOW + 1)


def pieces_of(path: Path) -> list[tuple[int, int]]:
    """Offset and bytes of what an import reads of a file: for a library its pieces, for any other file all of it."""
    size = path.stat().st_size
    if size == 0:
        return []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            return [(0, size)]
        return joined(Library(data).touched(), size)


def main() -> None:
    """Try the import, and write the list of what it reads."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # A build without subordinate ids runs under the fakeroot command, whose library is not the image's.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    opened = subprocess.run(
        [arguments.python, "-c", OPENED], check=True, capture_output=True, text=True, env=environment
    ).stdout
    lines, total = [], 0
    for path in filter(Path.is_file, map(Path, dict.fromkeys(opened.splitlines()))):
        for offset, length in pieces_of(path):
            lines.append(f"{offset} {length} {path}\n")
            total += length
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(lines))
    print(f"{len(lines)} pieces, {total / 1e6:.0f} MB, in {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
