"""What an import of PyTorch is said to read of a library; that it is asked for once, beforehand, and harms nothing."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CONTAINERS = Path(__file__).parents[2] / "containers"
FAR = 1 << 20  # bytes between the parts of a made-up library: more than is closed as a gap
SHIFT = 3 * FAR  # of addresses against offsets, as linkers leave it


def load(name: str) -> ModuleType:
    """A script of containers/, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", CONTAINERS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pieces() -> ModuleType:
    return load("import_pieces")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """image_start.py, as if its list were in an image, with a reader that notes that it runs and takes its time."""
    monkeypatch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(tmp_path)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    module = load("image_start")
    reader = tmp_path / "reader.py"
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write(' '.join(sys.argv[1:]) + '|' + open(3).read())"
    ended = tmp_path / "may-end"
    reader.write_text(
        f"import os, sys, time\n{note}\nuntil = time.monotonic() + 300\n"
        f"while not os.path.exists({str(ended)!r}) and time.monotonic() < until: time.sleep(0.01)\n"
    )
    (tmp_path / "pieces").write_text("0 1 x\n")  # its times are alike, as of a file in an image
    monkeypatch.setattr(module, "READ_AHEAD", str(reader))
    monkeypatch.setattr(module, "PIECES", str(tmp_path / "pieces"))
    yield module
    ended.touch()


def test_extra_packages_come_last_and_from_nobody_else(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = tmp_path / "extra"
    monkeypatch.setenv("NANOGPT_EXTRA", str(extra))
    monkeypatch.setattr(start.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    for mode in (None, 0o775, 0o757):  # not there, and others may write to it
        if mode:
            extra.mkdir(exist_ok=True)
            extra.chmod(mode)
        with pytest.raises(SystemExit, match="2"):
            start.start()
        assert f"NANOGPT_EXTRA={extra}: is not a directory" in capsys.readouterr().err
    extra.chmod(0o755)
    start.start()
    assert sys.path[-1] == str(extra)
    if os.geteuid() == 0:
        os.chown(extra, 12_345, 12_345)
    else:
        monkeypatch.setattr(start.os, "getuid", lambda: 12_345)
    monkeypatch.setattr(start, "unknown_root", set)
    with pytest.raises(SystemExit, match="2"):
        start.start()


def test_matplotlib_s_directory_is_taken_only_if_it_is_mine(start: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "matplotlib"
    assert start.is_mine(str(place)) and place.stat().st_mode & 0o777 == 0o700
    assert start.is_mine(str(place))
    place.chmod(0o720)
    assert not start.is_mine(str(place))
    (tmp_path / "link").symlink_to(tmp_path)
    assert not start.is_mine(str(tmp_path / "link")) and not start.is_mine(str(tmp_path / "none" / "x"))
    if os.geteuid() == 0:
        place.chmod(0o700)
        os.chown(place, 61_002, 61_002)
        assert not start.is_mine(str(place))


def library(path: Path, constructors: int) -> dict[str, int]:
    """Write an ELF file of several sections, FAR apart; the offset of each part."""
    names = [".dynsym", ".rela.dyn", ".init_array", ".text", ".data", ".nv_fatbin", ".rodata", ".shstrtab"]
    at = {name: (index + 1) * FAR for index, name in enumerate(names)}
    text_size = 600_000
    relocations = [(at[".data"] + SHIFT + 8 * 40_000, 1, 0)]  # 320,000 bytes into the data
    for index in range(constructors):
        relocations.append((at[".init_array"] + SHIFT + 8 * index, 8, at[".text"] + SHIFT + 500_000))
    sizes = dict.fromkeys(names, 100) | {
        ".rela.dyn": 24 * len(relocations),
        ".init_array": 8 * constructors,
        ".text": text_size,
        ".data": 600_000,
    }
    strings = b"\0" + b"\0".join(name.encode() for name in names) + b"\0"
    sizes[".shstrtab"] = len(strings)
    content = bytearray((len(names) + 2) * FAR)
    struct.pack_into("<6s", content, 0, b"\x7fELF\x02\x01")
    headers = (len(names) + 1) * FAR
    struct.pack_into("<QQ", content, 32, 64, headers)
    struct.pack_into("<5H", content, 54, 56, 1, 64, len(names) + 1, len(names))
    struct.pack_into("<IIQQQQ", content, 64, 1, 0, 0, SHIFT, 0, headers)
    for index, name in enumerate(names, start=1):
        place = strings.index(name.encode() + b"\0")
        struct.pack_into("<IIQQQQ", content, headers + 64 * index, place, 1, 2, at[name] + SHIFT, at[name], sizes[name])
    for index, relocation in enumerate(relocations):
        struct.pack_into("<QQq", content, at[".rela.dyn"] + 24 * index, *relocation)
    content[at[".shstrtab"] : at[".shstrtab"] + len(strings)] = strings
    path.write_bytes(content)
    return at


def test_pieces_of_a_library_are_what_its_headers_say(pieces: ModuleType, tmp_path: Path) -> None:
    """Tables, what relocations write to, and the function that a constructor is; neither kernels nor other code."""
    window = pieces.WINDOW
    at = library(tmp_path / "x.so", constructors=1)
    assert pieces.pieces_of(tmp_path / "x.so") == [
        (0, window),
        (at[".dynsym"], window),
        (at[".rela.dyn"], window),
        (at[".init_array"], window),
        (at[".text"] + 3 * window, window),  # the constructor, 500,000 bytes into the code
        (at[".data"] + 2 * window, window),  # where the first relocation writes
    ]


def test_code_of_a_library_with_many_constructors_is_read_whole(pieces: ModuleType, tmp_path: Path) -> None:
    at = library(tmp_path / "x.so", constructors=2)
    found = pieces.pieces_of(tmp_path / "x.so")
    assert (at[".text"], 5 * pieces.WINDOW) in found
    assert (at[".rodata"], pieces.WINDOW) in found
    assert at[".nv_fatbin"] not in [offset for offset, _ in found]


def test_pieces_of_a_real_library_lie_in_it_and_hold_its_symbols(pieces: ModuleType) -> None:
    import numpy._core._multiarray_umath as module

    path = Path(str(module.__file__))
    content, found = path.read_bytes(), pieces.pieces_of(path)
    assert found == pieces.pieces_of(path)
    assert all(0 <= offset < offset + length <= len(content) for offset, length in found)
    assert any(b"\0PyInit__multiarray_umath\0" in content[offset : offset + length] for offset, length in found)
    assert sum(length for _, length in found) < len(content)


def test_small_gaps_are_closed_and_the_end_of_the_file_is_the_end(pieces: ModuleType) -> None:
    window, gap = pieces.WINDOW, pieces.GAP // pieces.WINDOW
    touched = [(0, 1), ((gap + 1) * window, 1), ((2 * gap + 3) * window - 1, 2)]
    assert pieces.joined(touched, 100 * window) == [(0, (2 * gap + 4) * window)]
    assert pieces.joined([(0, 1), ((gap + 2) * window, 1)], (gap + 2) * window + 10) == [
        (0, window),
        ((gap + 2) * window, 10),
    ]


def test_a_file_that_is_no_library_is_read_whole(pieces: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.pyc").write_bytes(b"x" * 300_000)
    (tmp_path / "empty").touch()
    assert pieces.pieces_of(tmp_path / "x.pyc") == [(0, 300_000)]
    assert pieces.pieces_of(tmp_path / "empty") == []


def test_all_of_a_piece_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("read_ahead")
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "list").write_text(f"4096 300000 {tmp_path / 'a'}\n9000000 10 {tmp_path / 'a'}\n0 5 {tmp_path / 'b'}\n")
    asked: list[tuple[str, int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    module.read_ahead(os.open(tmp_path / "list", os.O_RDONLY), os.getpid())
    kernel = module.ASKED
    assert asked == [
        ("a", 4096, kernel),
        ("a", 4096 + kernel, kernel),
        ("a", 4096 + 2 * kernel, 300_000 - 2 * kernel),
        ("a", 9_000_000, 10),
        ("b", 0, 5),
    ]

    ended = subprocess.Popen(["true"])
    ended.wait()
    asked.clear()
    with pytest.raises(ProcessLookupError):
        module.read_ahead(os.open(tmp_path / "list", os.O_RDONLY), ended.pid)
    assert asked == []


def test_the_reader_leaves_quietly_when_nobody_needs_it(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("0 5 /no/such/file\n")
    with (tmp_path / "list").open() as stream:
        command = [sys.executable, "-I", "-S", CONTAINERS / "read_ahead.py", str(stream.fileno()), str(os.getpid())]
        done = subprocess.run(command, pass_fds=[stream.fileno()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def runs(tmp_path: Path, expected: int) -> list[str]:
    """What the reader of `start` was given each time that it ran, as soon as there are so many."""
    noted = tmp_path / "ran"
    end = time.monotonic() + 150
    while time.monotonic() < end and (not noted.exists() or len(noted.read_text().splitlines()) < expected):
        time.sleep(0.05)
    return noted.read_text().splitlines() if noted.exists() else []


def test_an_import_of_torch_starts_one_reader_however_many_import(start: Any, tmp_path: Path) -> None:
    finder = sys.meta_path[0]
    assert finder is start.Torch
    assert finder.find_spec("torch.nn", None) is None
    assert not (tmp_path / "ran").exists()
    for _ in range(3):
        assert finder.find_spec("torch", None) is None
    assert runs(tmp_path, 1) == [f"3 {os.getpid()}|0 1 x"]
    start.read_ahead()
    assert len(runs(tmp_path, 1)) == 1
    (tmp_path / "may-end").touch()
    (tmp_path / "ran").rename(tmp_path / "ran-first")
    until = time.monotonic() + 150
    while not (tmp_path / "ran").exists() and time.monotonic() < until:  # the first one has its lock to its end
        start.read_ahead()
        time.sleep(0.05)
    assert runs(tmp_path, 1)[:1] == [f"3 {os.getpid()}|0 1 x"]


def test_unpacked_or_without_a_list_nothing_starts(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(start.PIECES, (1, 1))
    monkeypatch.setattr(os, "posix_spawn", lambda *_, **__: pytest.fail("started"))
    start.read_ahead()
    monkeypatch.setattr(start, "PIECES", str(tmp_path / "none"))
    start.read_ahead()
