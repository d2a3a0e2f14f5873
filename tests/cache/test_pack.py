"""The cache file: what goes in comes out, and a file that is not what it says is not used."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import zstandard
from triton_interpreter import needs_triton, run_with_triton

from nanogpt.cache import pack as pack_module
from nanogpt.cache.listing import list_files, prune_files
from nanogpt.cache.pack import SUFFIX, Pack, PackError, kept_files, peek, write_pack

KEY = {"device": ["cpu"], "torch": ["2.11.0", "", None]}


def fill(root: Path, size: int = 1000) -> dict[str, bytes]:
    """Files as compilers leave them; returns those that are to be kept."""
    content = random.Random(0)
    kept = {}
    for name in (
        "inductor/fxgraph/ab/abc/entry",
        "inductor/aotautograd/abd/entry",
        "inductor/xy/code.py",
        "triton/KEY/kernel.cubin",
        "triton/KEY/__triton_launcher.so",
        "cute/hash/fwd/func.o",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept[name] = content.randbytes(size)
        path.write_bytes(kept[name])
    (root / "triton/KEY/__triton_launcher.so").chmod(0o755)
    for name in ("inductor/locks/x.lock", "inductor/xy/__pycache__/code.pyc", "cute/hash/fwd/func.lock", ".lock"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not kept")
    return kept


def make(tmp_path: Path, size: int = 1000, name: str = "one") -> tuple[Path, dict[str, bytes]]:
    root = tmp_path / f"{name}-root"
    kept = fill(root, size)
    path = tmp_path / f"{name}{SUFFIX}"
    write_pack(path, root, key=KEY, key_sha256="k", recipe="speedrun")
    return path, kept


@pytest.mark.parametrize("apart", [False, True])
def test_what_goes_in_comes_out(tmp_path: Path, apart: bool):
    path, kept = make(tmp_path)
    pack = Pack(path)
    assert pack.header == peek(path)
    assert pack.header.recipe == "speedrun" and pack.header.key == KEY
    assert pack.header.files == len(kept) and pack.header.bytes == 6000
    assert pack.header.contents == {
        "graphs": 1,
        "graph parts": 1,
        "Triton kernels": 1,
        "CuTe kernels": 1,
        "C++ kernels": 0,
        "tuned kernels": 0,
    }
    target = tmp_path / "target"
    (target / "inductor/xy").mkdir(parents=True)
    (target / "inductor/xy/code.py").write_bytes(b"of this job")
    assert sorted(pack.unpack_apart(target) if apart else pack.unpack(target)) == sorted(kept)
    found = {name: file.read_bytes() for name, file in kept_files(target).items()}
    assert found == {**kept, "inductor/xy/code.py": b"of this job"}
    for name in kept:
        if name != "inductor/xy/code.py":
            assert (target / name).stat().st_mtime == int((tmp_path / "one-root" / name).stat().st_mtime)
    assert os.access(target / "triton/KEY/__triton_launcher.so", os.X_OK)
    assert not os.access(target / "triton/KEY/kernel.cubin", os.X_OK) or os.geteuid() == 0


@needs_triton
def test_a_kernel_is_not_compiled_again_in_another_directory(tmp_path: Path):
    """The first directory is gone, as that of the job which compiled it is."""
    assert run_with_triton(str(Path(__file__).with_name("moved_kernel.py")), str(tmp_path)).split() == ["1", "0"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"child_paths": 1}'])
def test_a_broken_list_of_a_kernels_files_is_refused(tmp_path: Path, content: bytes):
    root = tmp_path / "root"
    fill(root)
    (root / "triton/KEY/__grp__kernel.json").write_bytes(content)
    path = tmp_path / f"one{SUFFIX}"
    write_pack(path, root, key=KEY, key_sha256="k", recipe="speedrun")
    with pytest.raises(PackError, match="Triton's list of a kernel's files cannot be read"):
        Pack(path).unpack(tmp_path / "target")


def test_a_truncated_file_is_refused(tmp_path: Path):
    path, _ = make(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 40, 95, 96, 97, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PackError, match="damaged"):
            Pack(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(PackError, match="checksum"):
        Pack(path)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path):
    path, _ = make(tmp_path)
    whole = path.read_bytes()
    for position in {*range(0, len(whole), len(whole) // 300), *range(120), len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(PackError, match="damaged"):
            Pack(path)


def test_a_directory_that_cannot_be_written_is_said_by_the_other_process_too(tmp_path: Path):
    path, _ = make(tmp_path)
    (tmp_path / "target").write_text("a file")
    with pytest.raises(PackError, match=r"exists|directory"):
        Pack(path).unpack_apart(tmp_path / "target")


def test_another_users_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = make(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    if path.stat().st_uid == 0:
        assert Pack(path).header.recipe == "speedrun"  # root's
        os.chown(path, 1234, -1)
    with pytest.raises(PackError, match=r"belongs to user \d+; only files of this user \(4321\) or root"):
        Pack(path)
    assert Pack(path, in_image=True).header.recipe == "speedrun"


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int):
    path, _ = make(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(mode)
    for in_image in (False, True):
        with pytest.raises(PackError, match="others may write it"):
            Pack(path, in_image=in_image)


def test_what_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(PackError, match=r"not a plain file|No such file"):
            Pack(path)


@pytest.mark.parametrize("kind", ["parent", "absolute", "symlink", "device"])
def test_members_that_are_no_plain_files_below_the_directory_are_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    member = tarfile.TarInfo({"parent": "../outside", "absolute": f"{tmp_path}/outside"}.get(kind, "member"))
    if kind == "symlink":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
    elif kind == "device":
        member.type = tarfile.CHRTYPE
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        archive.addfile(member, io.BytesIO(b""))
    path, _ = make(tmp_path)
    pack = Pack(path)
    pack._body = zstandard.ZstdCompressor().compress(body.getvalue())
    for unpack in (pack.unpack, pack.unpack_apart):
        with pytest.raises(PackError, match="not a plain file"):
            unpack(tmp_path / "target")
    assert not (tmp_path / "outside").exists()


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = make(tmp_path)
    whole = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_pack(path, tmp_path / "one-root", key=KEY, key_sha256="other", recipe="other")
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


# --- several at once ------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from nanogpt.cache.pack import write_pack
path, root, recipe, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for _ in range(count):
    write_pack(path, root, key={}, key_sha256="k", recipe=recipe)
    print("written", flush=True)
"""


def writer(path: Path, root: Path, recipe: str, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(path), str(root), recipe, str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_two_writers_and_a_reader_see_whole_files_only(tmp_path: Path):
    fill(tmp_path / "root", 200_000)
    path = tmp_path / f"shared{SUFFIX}"
    writers = [writer(path, tmp_path / "root", recipe, 20) for recipe in ("one", "other")]
    seen = []
    while any(process.poll() is None for process in writers):
        if path.exists():
            seen.append(Pack(path).header.recipe)
    assert [process.wait() for process in writers] == [0, 0]
    assert set(seen) <= {"one", "other"} and seen
    Pack(path).unpack(tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


def test_a_killed_writer_leaves_a_whole_file_and_something_to_prune(tmp_path: Path):
    fill(tmp_path / "root", 400_000)
    path = tmp_path / f"shared{SUFFIX}"
    for attempt in range(4):
        process = writer(path, tmp_path / "root", f"writer {attempt}", 10_000)
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        time.sleep(0.01 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Pack(path).header.recipe == f"writer {attempt}"
    (tmp_path / f".half{SUFFIX}.abc.tmp").write_bytes(b"half")
    assert prune_files(tmp_path, keep=1) == []  # they may be somebody's
    half_written = list(tmp_path.glob(".*.tmp"))
    for file in half_written:
        os.utime(file, (0, 0))
    assert {file for file, _ in prune_files(tmp_path, keep=1)} == set(half_written)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


# --- list and prune -------------------------------------------------------------------------------------------------


def test_prune_keeps_what_was_used_last(tmp_path: Path, nanogpt):
    for age, name in enumerate(("new", "middle", "old")):
        path, _ = make(tmp_path, name=name)
        os.utime(path, (1e9 - age, 1e9 - age))
    damaged = tmp_path / f"damaged{SUFFIX}"
    damaged.write_bytes(b"nonsense")
    (tmp_path / "notes.txt").write_text("mine")

    listed = list_files(tmp_path)
    assert [file.path.stem for file in listed] == ["damaged", "new", "middle", "old"]
    assert [file.problem is None for file in listed] == [False, True, True, True]
    shown = nanogpt("cache", "ls", tmp_path).out
    assert "not usable" in shown and "speedrun" in shown and shown.index("new") < shown.index("old")

    out = nanogpt("cache", "prune", tmp_path, "--keep", 2).out
    assert "3 files deleted" not in out and "2 files deleted" in out
    assert sorted(file.stem for file in tmp_path.glob(f"*{SUFFIX}")) == ["middle", "new"]
    assert (tmp_path / "notes.txt").exists()
    nanogpt("cache", "prune", tmp_path, "--keep", 0)
    assert not list(tmp_path.glob(f"*{SUFFIX}"))
    assert "no cache files" in nanogpt("cache", "ls", tmp_path).err
