"""Keeps code of the image in memory for the end of a run.

Without a set-uid Apptainer, a process beside the run (squashfuse) serves the image. When Slurm cancels or requeues a
job it signals all its processes, including this one. From then on, a library page that is not in the page
cache is a bus error, in the middle of the checkpoint that the signal asks for. So all mapped files are read once, in
order, which also helps the other processes of the node.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

BLOCK_BYTES = 4 << 20
DATA_BYTES = 64 << 20  # of a mapping that is not code: larger ones are GPU code, which the driver has by then


def keep_code_in_memory(environ: Mapping[str, str], *, wait: bool = False) -> None:
    """In a container, read this process's mapped files in a thread, however the image is mounted."""
    if environ.get("APPTAINER_CONTAINER") or environ.get("SINGULARITY_CONTAINER"):
        thread = threading.Thread(target=read_mapped_files, name="page cache", daemon=True)
        thread.start()
        if wait:
            thread.join()


def read_mapped_files() -> tuple[int, float]:
    """Read the files that this process has mapped, all code and other parts up to DATA_BYTES.

    Returns the bytes read and the seconds taken. Unreadable files are skipped.
    """
    began, total = time.monotonic(), 0
    for path, start, length in _mapped(Path("/proc/self/maps").read_text(errors="replace")):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a device, or a file that replaced the mapped one
                continue
            first = start
            while count := len(os.pread(descriptor, min(BLOCK_BYTES, start + length - first), first)):
                first, total = first + count, total + count
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return total, time.monotonic() - began


def _mapped(maps: str) -> Iterator[tuple[str, int, int]]:
    """Path, first byte and length of what `maps` (/proc/PID/maps) shows of files, by file and in order."""
    parts = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith("(deleted)"):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        length = end - start if "x" in fields[1] else min(end - start, DATA_BYTES)
        parts.add((fields[5], int(fields[2], 16), length))
    yield from sorted(parts)
