"""Own text as people have it: JSON in every form, compressed by every common tool, marked, misnamed, cut off; bombs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from text_samples import documents_of, jsonl, some_texts, write_jsonl

from nanogpt.data import documents, streams
from nanogpt.data.skips import Skips
from nanogpt.data.text import prepare_text
from nanogpt.errors import InputError, RunError

TEXTS = [*some_texts(40), 'a \\ "quoted" [bracket], {brace}\n', "back\\\\", "\u2028 é 💡"]
PRETTY = [json.dumps({"id": {"n": [i, []]}, "text": text}, indent=2) for i, text in enumerate(TEXTS)]
UTF8_MARK = b"\xef\xbb\xbf"


def bgzf(data: bytes, block: int = 500) -> bytes:
    """As bgzip writes it: small members with a field of their own, and an empty one at the end."""
    members = []
    for part in [data[i : i + block] for i in range(0, len(data), block)] + [b""]:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = packer.compress(part) + packer.flush()
        head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(packed) + 25)
        members.append(head + packed + struct.pack("<II", zlib.crc32(part), len(part)))
    return b"".join(members)


def skippable(size: int) -> bytes:
    return b"\x53\x2a\x4d\x18" + struct.pack("<I", size) + b"\x28" * size


def tool(*command: str) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        if not shutil.which(command[0]):
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    return run


def halves(pack: Callable[[bytes], bytes], between: bytes = b"", after: bytes = b"") -> Callable[[bytes], bytes]:
    """Two members cut in the middle of a record, and what stands between and after them."""
    return lambda data: pack(data[:1777]) + between + pack(data[1777:]) + after


def long_distance(window_log: int) -> Callable[[bytes], bytes]:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)

    def run(data: bytes) -> bytes:
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: full window
        return packer.compress(data) + packer.flush()

    return run


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzip.compress),
    "gzip members": (".gz", halves(gzip.compress)),
    "gzip members, padded": (".gz", halves(gzip.compress, b"\0" * 7, b"\0" * 70_000)),
    "gzip, empty members": (".gz", halves(gzip.compress, gzip.compress(b"") * 500)),
    "gzip with a name": (".gz", tool("gzip", "-9", "-N", "-c")),
    "bgzip": (".gz", bgzf),
    "pigz": (".gz", tool("pigz", "-c")),
    "bzip2": (".bz2", bz2.compress),
    "bzip2 streams": (".bz2", halves(bz2.compress, b"", b"\0" * 512)),
    "bzip2 tool": (".bz2", tool("bzip2", "-c")),
    "xz": (".xz", lzma.compress),
    "xz streams": (".xz", halves(lzma.compress, b"\0" * 8, b"\0" * 4)),
    "xz tool, threads, 64 MiB of window": (".xz", tool("xz", "-9e", "-T2", "--block-size=2000", "-c")),
    "zstd": (".zst", zstandard.compress),
    "zstd frames": (".zst", halves(zstandard.compress, zstandard.compress(b"") * 3)),
    "zstd, skippable frames": (".zst", lambda data: skippable(4) + halves(zstandard.compress, skippable(9000))(data)),
    "zstd, 128 MiB of window": (".zst", long_distance(27)),
    "zstd tool": (".zst", tool("zstd", "--long=27", "-c", "-q")),
    "pzstd": (".zst", tool("pzstd", "-c", "-q", "-p", "2")),
}


@pytest.mark.parametrize("name", PACKED)
def test_files_compressed_as_common_tools_do(tmp_path: Path, name: str) -> None:
    suffix, pack = PACKED[name]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl(TEXTS)))
    prepare_text([tmp_path / f"a.jsonl{suffix}"], tmp_path / "out", val_tokens=50, quiet=True)
    assert sorted(documents_of(tmp_path / "out")) == sorted(TEXTS)


JSON: dict[str, tuple[str, bytes]] = {
    "ndjson": ("a.ndjson", jsonl(TEXTS)),
    "lines": ("a.json", jsonl(TEXTS)),
    "lines, blank ones first": ("a.JSON", b"\r\n \n" + jsonl(TEXTS).replace(b"\n", b"\r\n")),
    "array": ("a.json", json.dumps([json.loads(one) for one in PRETTY]).encode()),
    "pretty array": ("a.json", ("[\n" + ",\n".join(PRETTY) + "\n]\n").encode()),
    "array of UTF-8": ("a.json", json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False).encode()),
    "objects": ("a.json", "\n".join(PRETTY).encode()),
    "objects, end to end": ("a.json", "".join(PRETTY).encode()),
    "lines with a mark": ("a.jsonl", UTF8_MARK + jsonl(TEXTS)),
    "files with marks, joined": ("a.jsonl", UTF8_MARK + jsonl(TEXTS[:9]) + UTF8_MARK + jsonl(TEXTS[9:])),
    "array with a mark": ("a.json", UTF8_MARK + b"\n[" + ",".join(PRETTY).encode() + b"]"),
    "objects with a mark": ("a.json", UTF8_MARK + "\n".join(PRETTY).encode()),
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("read", [2, 3, 1 << 19])
def test_every_form_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, read: int) -> None:
    file, data = JSON[name]
    for size in ("READ_BYTES", "FEED_BYTES", "PIECE_BYTES"):  # a block ends at every place
        monkeypatch.setattr(streams, size, max(read, 6) if size == "FEED_BYTES" else read)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / (file + suffix)).write_bytes(pack(data))
    assert texts_of(tmp_path / (file + suffix)) == TEXTS


def texts_of(path: Path, skips: Skips | None = None) -> list[str]:
    """The texts of a file as `prep-text` reads them; nothing may be left out, unless it is counted in `skips`."""
    found = skips or Skips()
    texts = []
    for unit in documents.plan(documents.find_files([path], found), "text", found):
        for item in documents.read_unit(unit):
            if isinstance(item, documents.Skip):
                found.add(item.reason, item.place, note=item.note, named=True)
            else:
                texts.append(item.text)
    assert skips is not None or not found.counts, found
    return texts


def test_one_object_is_one_document(tmp_path: Path) -> None:
    for text in ('{"text": "one"}', '\n{\n "text":\n "one"\n}\n', '[{"text": "one"}]', '[\n{"text": "one"}\n,\n]'):
        (tmp_path / "a.json").write_text(text)
        assert texts_of(tmp_path / "a.json") == ["one"], text
    for text in ("[]", " [ ] ", "\n"):
        (tmp_path / "a.json").write_text(text)
        assert texts_of(tmp_path / "a.json") == [], text


def test_a_json_file_of_a_source_tree_can_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "x"}')
    (tmp_path / "b.json").write_text('{"name": "y"}')
    prepare_text([tmp_path], tmp_path / "out", suffixes=[".json"], val_tokens=1, quiet=True)
    assert sorted(documents_of(tmp_path / "out")) == ['{"name": "x"}', '{"name": "y"}']


def cut(data: bytes) -> bytes:
    return data[:-5]


GOOD = jsonl(TEXTS)
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    # name: (file, contents, reason in words)
    "cut gzip": ("a.jsonl.gz", cut(gzip.compress(GOOD)), r"damaged .*the compressed data end early"),
    "cut zstd": ("a.jsonl.zst", cut(zstandard.compress(GOOD)), r"damaged .*the compressed data end early"),
    "cut xz": ("a.jsonl.xz", cut(lzma.compress(GOOD)), r"damaged .*the compressed data end early"),
    "cut bzip2": ("a.jsonl.bz2", cut(bz2.compress(GOOD)), r"damaged .*the compressed data end early"),
    "cut between members": ("a.jsonl.gz", gzip.compress(GOOD) + b"\x1f", r"damaged .*the compressed data end early"),
    "wrong sum": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\1" * 8, r"damaged .*incorrect data check"),
    "no gzip": ("a.jsonl.gz", GOOD, r"damaged .*holds something other than \.gz data"),
    "no xz": ("a.jsonl.xz", gzip.compress(GOOD), r"damaged .*holds something other than \.xz data"),
    "nothing": ("a.jsonl.gz", b"", r"damaged .*the compressed data end early"),
    "garbage after": ("a.jsonl.gz", gzip.compress(GOOD) + b"garbage", r"damaged .*"),
    "huge window": ("a.jsonl.zst", long_distance(28)(GOOD), r"damaged .*a window above 128 MiB"),
    "array not closed": ("a.json", ("[" + ",".join(PRETTY)).encode(), r"damaged .*its array is not closed"),
    "array cut": ("a.json", ("[" + ",".join(PRETTY))[:-30].encode(), r"damaged .*its array is not closed"),
    "array, more after": ("a.json", ("[" + ",".join(PRETTY) + "] 1").encode(), r"damaged .*follows the end of the"),
    "array, another": ("a.json", ("[" + ",".join(PRETTY) + "] []").encode(), r"damaged .*follows the end of the"),
    "object cut": ("a.json", "\n".join(PRETTY)[:-1].encode(), "not JSON"),
    "a bad line": ("a.jsonl", GOOD + b'{"text": "cut off', "not JSON"),
    "UTF-16 lines": ("a.jsonl", GOOD.decode().encode("utf-16"), "UTF-16, not UTF-8"),
    "UTF-16, big end first": ("a.json", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "UTF-16, not UTF-8"),
    "UTF-16, compressed": ("a.jsonl.gz", gzip.compress(GOOD.decode().encode("utf-16")), "UTF-16, not UTF-8"),
    "UTF-32 text": ("a.txt", "text".encode("utf-32"), "UTF-32, not UTF-8"),
    "UTF-16 text": ("a.txt", "text".encode("utf-16"), "UTF-16, not UTF-8"),
    "Latin-1 text": ("a.txt", b"caf\xe9", "not UTF-8"),
    "binary text": ("a.txt", b"a\0b", r"binary \(NUL bytes\)"),
    "no Parquet": ("a.parquet", b"no Parquet at all", "damaged"),
    "empty Parquet": ("a.parquet", b"", "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_named_file_that_is_damaged_is_an_error_and_one_in_a_folder_is_counted(tmp_path: Path, name: str) -> None:
    file, data, reason = DAMAGED[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / file).write_bytes(data)
    good = write_jsonl(tmp_path / "good.jsonl", some_texts(5, seed=3))
    out = tmp_path / "out"
    with pytest.raises(RunError, match=rf"nothing is written:\n  {folder}/{file}[0-9:]*: {reason}[^\n]*\n.*--keep-dam"):
        prepare_text([good, folder / file], out, quiet=True)
    assert list(out.iterdir()) == []
    summaries = [
        prepare_text([good, folder / file], out, val_tokens=1, keep_damaged=True, quiet=True),
        prepare_text([good, folder], tmp_path / "out2", val_tokens=1, quiet=True),
    ]
    assert summaries[0].skipped == summaries[1].skipped
    assert sum(summaries[0].skipped.values()) == 1
    kept = set(documents_of(out)) - set(some_texts(5, seed=3))
    assert kept <= set(TEXTS)
    assert documents_of(out) == documents_of(tmp_path / "out2")
    # What stands before the damage is all there.
    before = {"wrong sum": 0, "cut between members": 0, "garbage after": 0, "array not closed": 1, "array cut": 1}
    before |= {"array, more after": 0, "array, another": 0, "object cut": 1, "a bad line": 0, "cut gzip": 1}
    if name in before:
        assert len(kept) >= len(set(TEXTS)) - before[name] - (name == "cut gzip")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_all_whole_records_before_a_cut_are_kept(tmp_path: Path, suffix: str) -> None:
    """At any place: as many as the library itself gives, from all of what is left in one call."""
    texts = [f"{i} " + zlib.crc32(str(i).encode()).to_bytes(4, "big").hex() * 9 for i in range(4000)]
    packer: Any = {".gz": gzip, ".xz": lzma, ".bz2": bz2, ".zst": zstandard}[suffix]
    whole = packer.compress(jsonl(texts))
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        left = whole[:at]
        reader: Any = {
            ".gz": lambda: zlib.decompressobj(wbits=31),
            ".xz": lzma.LZMADecompressor,
            ".bz2": bz2.BZ2Decompressor,
            ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
        }[suffix]()
        count = reader.decompress(left).count(b"\n")
        (tmp_path / f"a.jsonl{suffix}").write_bytes(left)
        skips = Skips()
        assert texts_of(tmp_path / f"a.jsonl{suffix}", skips) == texts[:count]
        assert skips.counts == {"damaged from some place on": 1}
        assert skips.examples["damaged from some place on"][0].startswith(f"{tmp_path}/a.jsonl{suffix}:{count + 1} (")


def test_the_first_of_many_losses_are_told_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{broken\n" * 5000)
    with pytest.raises(RunError) as error:
        prepare_text([tmp_path / "a.jsonl"], tmp_path / "out", quiet=True)
    assert f"{tmp_path}/a.jsonl:{len(TEXTS) + 1}: not JSON\n" in str(error.value)
    assert "\n  ... and 4990 more\n" in str(error.value)
    assert len(str(error.value).splitlines()) == 13


def test_the_fields_that_there_are_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"raw_content": "x", "content": "y", "n": 1, "odd\\n\\ud800": "z"}\n{"n": 2}\n')
    with pytest.raises(InputError, match=r"a.jsonl:1: no text in field 'text'") as error:
        prepare_text([path], tmp_path / "out", quiet=True)
    assert "raw_content, content, 'odd\\n\\ud800'; choose one with --field" in str(error.value)
    with pytest.raises(InputError, match=r"a.jsonl:1 \(its fields with text: raw_content, content"):
        prepare_text([tmp_path], tmp_path / "out", quiet=True)
    path.write_text('{"n": 1, "m": null}\n')
    with pytest.raises(InputError, match="its fields, none with text: n, m;"):
        prepare_text([path], tmp_path / "out", quiet=True)
    path.write_text('"text"\n')
    with pytest.raises(InputError, match="it is not an object;"):
        prepare_text([path], tmp_path / "out", quiet=True)
    # A file where it is missing here and there is read.
    path.write_bytes(jsonl(["one", "two"]) + b'{"other": 1}\n')
    assert prepare_text([path], tmp_path / "out", val_tokens=1, quiet=True).skipped == {"no text in field 'text'": 1}


def test_a_named_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    good = write_jsonl(tmp_path / "good.jsonl", some_texts(5))
    scandir = documents.os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(documents.os, "scandir", denied)
    with pytest.raises(RunError, match=r"locked: cannot be read \(Permission denied\)"):
        prepare_text([good, tmp_path / "locked"], tmp_path / "out", quiet=True)


READ_ALL = """
import re, sys
from pathlib import Path
from nanogpt.cli.prep_text import text_main
try:
    text_main()
finally:
    print("PEAK", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], flush=True)
"""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def run_frame(line: bytes, mebibytes: int) -> bytes:
    """A zstd frame of `line` and then so many MiB of one letter, four bytes for each 128 KiB."""
    raw = struct.pack("<I", len(line) << 3)[:3] + line
    run = struct.pack("<I", (1 << 17 << 3) | 2)[:3] + b"a"
    end = struct.pack("<I", (3 << 3) | 1)[:3] + b'"}\n'
    return ZSTD_MAGIC + b"\0\x58" + raw + run * (8 * mebibytes) + end  # a window of 2 MiB


def gzip_of(before: bytes, part: bytes, times: int, after: bytes = b"") -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join([*map(packer.compress, [before, *[part] * times, after]), packer.flush()])


def dictionary_bomb(path: Path) -> None:
    """20,000 rows of one text of a megabyte."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x y " * 250_000]))
    parquet.write_table(pa.table({"text": column.slice(0, 20_000), "id": list(range(20_000))}), path)


MIB = 1 << 20
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one zstd line": ("a.jsonl.zst", lambda: run_frame(b'{"text": "', 3000)),
    "one zstd array": ("a.json.zst", lambda: run_frame(b'[{"text": "', 1000)),
    "one gzip line": ("a.jsonl.gz", lambda: gzip_of(b"", b"a" * MIB, 200)),
    "one bzip2 line": ("a.jsonl.bz2", lambda: bz2.compress(b"a" * 45 * MIB) * 4),
    "one xz line": ("a.jsonl.xz", lambda: lzma.compress(b"a" * 100 * MIB, preset=0) * 3),
    "blanks": ("a.json.gz", lambda: gzip_of(b"", b" " * MIB, 60, GOOD)),
    "nested arrays": ("a.json.gz", lambda: gzip_of(b"", b"[" * MIB, 100)),
    "a deep record": ("a.jsonl.gz", lambda: gzip_of(b"", b'{"a":' * 200_000, 20)),
    "a record of many values": ("a.jsonl.gz", lambda: gzip_of(b"[", b"{}," * 300_000, 30, b"{}]\n")),
    "a record of many escapes": ("a.json.gz", lambda: gzip_of(b'[{"text": "', b"\\n" * 400_000, 30, b'"}]')),
    "no place to cut": ("a.jsonl.gz", lambda: gzip_of(b'{"text": "', b"a" * MIB, 30, b'"}\n' + GOOD)),
    "records of 30 MiB": ("a.jsonl.gz", lambda: gzip_of(b"", b'{"n": "' + b"a" * 30 * MIB + b'"}\n', 3, GOOD)),
}


@pytest.mark.slow
def test_memory_is_bounded_whatever_is_inside(tmp_path: Path) -> None:
    """Files of up to 1 MB that hold up to 3 GB: 400 MiB, of which records of 30 MiB and long words take most."""
    folder = tmp_path / "bombs"
    paths = []
    for name, (file, make) in BOMBS.items():
        path = folder / name.replace(" ", "_") / file
        path.parent.mkdir(parents=True)
        path.write_bytes(make())
        assert path.stat().st_size < 1_500_000
        paths.append(path)
    limit = 4 << 30  # of address space, of which threads and libraries reserve 2 GiB
    process = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths), "--dir", str(tmp_path / "out"), "--workers", "1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        check=False,
    )
    assert process.returncode == 1, process.stderr
    losses = [line.strip() for line in process.stderr.splitlines() if line.startswith(f"  {folder}")]
    assert len(losses) == 10, process.stderr
    assert "Traceback" not in process.stderr
    peak = int(process.stdout.split("PEAK ")[1]) / 1024
    print(f"{peak:.0f} MiB", *losses, sep="\n")
    assert peak < 400


def test_a_text_stored_once_for_many_rows_is_taken_in_parts(tmp_path: Path) -> None:
    dictionary_bomb(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    units = documents.plan(documents.find_files([tmp_path / "a.parquet"], Skips()), "text", Skips())
    for _, unit in zip(range(3), units, strict=False):
        assert isinstance(unit, documents.ValuesUnit)
        assert documents.held_bytes(unit) <= documents.MAX_RECORD
