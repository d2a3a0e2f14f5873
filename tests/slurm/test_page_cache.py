"""What is mapped is read, once."""

from __future__ import annotations

import mmap
from pathlib import Path

from nanogpt.launch.page_cache import DATA_BYTES, _mapped, keep_code_in_memory, read_mapped_files

MAPS = """\
5500-9500 r-xp 00001000 fe:00 11 /opt/lib/libtorch cpu.so
10000000-20000000 r--p 00000000 fe:00 12 /opt/lib/libcublas.so
30000000-40000000 r-xp 00000000 fe:00 12 /opt/lib/libcublas.so
7000-8000 rw-p 00000000 00:00 0
7000-8000 rw-p 00000000 00:00 0 [heap]
9000-a000 rw-s 00000000 00:01 13 /memfd:x (deleted)
"""


def test_code_is_read_whole_and_data_in_part() -> None:
    assert list(_mapped(MAPS)) == [
        ("/opt/lib/libcublas.so", 0, DATA_BYTES),
        ("/opt/lib/libcublas.so", 0, 0x10000000),
        ("/opt/lib/libtorch cpu.so", 0x1000, 0x4000),
    ]


def test_this_process_s_files_are_read(tmp_path: Path) -> None:
    before, _ = read_mapped_files()
    assert before > 1_000_000  # Python itself
    (tmp_path / "file").write_bytes(bytes(9_000_000))
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        after, _ = read_mapped_files()
    assert after - before >= 9_000_000


def test_outside_of_a_container_nothing_is_read() -> None:
    keep_code_in_memory({}, wait=True)
    keep_code_in_memory({"APPTAINER_CONTAINER": "/nanogpt.sif"}, wait=True)
