"""Own text that is damaged in any way: what is read is right, what is not is told, and nothing else happens.

`--fuzz N` takes N times as many damaged files; each has a number of its own, which a failure names.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from text_samples import documents_of, jsonl, some_texts

from nanogpt.data import documents, streams
from nanogpt.data.skips import Skips
from nanogpt.data.text import prepare_text
from nanogpt.errors import InputError, RunError

FILES = 120  # of each kind in a usual run
TEXTS = some_texts(30, seed=11)
LINES = jsonl(TEXTS)
PRETTY = json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=1).encode()


def halves(pack: Callable[[bytes], bytes]) -> bytes:
    return pack(LINES[:1500]) + pack(LINES[1500:])


def table(compression: str) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": TEXTS}), sink, row_group_size=11, compression=compression)
    return sink.getvalue().to_pybytes()


SUMMED_ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
KINDS: dict[str, bytes] = {
    "a.txt": "\n".join(TEXTS).encode(),
    "a.jsonl": LINES,
    "lines.json": LINES,
    "array.json": PRETTY,
    "objects.json": PRETTY[1:-1].replace(b"},", b"}"),
    "a.jsonl.gz": halves(gzip.compress),
    "array.json.gz": gzip.compress(PRETTY),
    "a.jsonl.bz2": halves(bz2.compress),
    "a.jsonl.xz": halves(lzma.compress),
    "a.jsonl.zst": halves(SUMMED_ZSTD),
    "a.parquet": table("none"),
    "packed.parquet": table("zstd"),
}
SUMMED = (".gz", ".bz2", ".xz", ".zst")  # damage does not go unseen
KNOWN = {"packed.parquet": [2677]}  # beyond the usual ones: what once went wrong
INTERESTING = [b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"\r\n"]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four places changed, cut out, doubled, overwritten or added to; or cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice([1, 1, 4, 30, 700]))
        what = rng.randrange(7)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at:to]
        elif what == 2:
            out[at:at] = out[at:to]
        elif what == 3:
            out[at:to] = bytes(to - at)
        elif what == 4:
            out[at:to] = rng.randbytes(to - at)
        elif what == 5:
            out[at:at] = rng.choice(INTERESTING) * rng.choice([1, 1, 2, 5000])
        else:
            del out[at:]
    return bytes(out)


def read(path: Path) -> tuple[list[str], Skips]:
    """The texts of a file as `prep-text` reads them, and what is left out."""
    skips = Skips()
    texts = []
    for unit in documents.plan(documents.find_files([path], skips), "text", skips):
        for item in documents.read_unit(unit):
            if isinstance(item, documents.Skip):
                skips.add(item.reason, item.place, note=item.note, named=True)
            else:
                texts.append(item.text)
    return texts, skips


def model_of_lines(data: bytes) -> list[str]:
    """The texts of JSON lines, written as plainly as can be."""
    texts = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line.decode().strip("\ufeff \t\r\n"))
            texts.append(record["text"])
            texts[-1].encode()
        except (ValueError, RecursionError, TypeError, KeyError):
            continue
        except AttributeError:
            texts.pop()
    return [text for text in texts if text and not text.isspace()]


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    count = FILES * int(request.config.getoption("--fuzz", default=1))
    whole, path = KINDS[name], tmp_path / name
    path.write_bytes(whole)
    assert read(path)[0] == (["\n".join(TEXTS)] if name == "a.txt" else TEXTS)
    read_whole = lost = 0
    for seed in [*range(count), *KNOWN.get(name, [])]:
        rng = random.Random(f"{name} {seed}")
        data = damaged(whole, rng)
        path.write_bytes(data)
        try:
            texts, skips = read(path)
        except InputError as error:
            assert name.endswith(".parquet"), seed
            assert "choose one with --field" in str(error), seed
            lost += 1
            continue
        read_whole += not skips.counts
        lost += skips.losses > 0
        if name.endswith(SUMMED):
            # All of it, or its beginning and the reason; members may be doubled or cut out whole.
            if data[: len(whole)] == whole[: len(data)]:
                assert texts == TEXTS[: len(texts)], seed
            assert skips.losses or set(texts) <= set(TEXTS), seed
            assert skips.losses or len(texts) == len(TEXTS) or len(data) != len(whole), seed
        elif not name.endswith(".parquet"):
            if name == "a.jsonl" and not streams.wide_encoding(data):
                assert texts == model_of_lines(data), seed
            with monkeypatch.context() as patch:  # where blocks and units end plays no part
                for size in ("READ_BYTES", "PIECE_BYTES"):
                    patch.setattr(streams, size, rng.choice([2, 7, 100]))
                patch.setattr(documents, "UNIT_BYTES", rng.choice([1, 50, 1000]))
                assert read(path) == (texts, skips), seed
    assert lost > count // 20  # it was damage
    assert read_whole or name.endswith(SUMMED)
    print(f"{name}: {count} damaged files, {read_whole} read whole, something of {lost} lost")


def test_damaged_files_never_make_a_smaller_set_unsaid(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count = 8 * int(request.config.getoption("--fuzz", default=1))
    for name, whole in KINDS.items():
        path, out = tmp_path / name, tmp_path / "out"
        for seed in range(count):
            path.write_bytes(damaged(whole, random.Random(f"set {name} {seed}")))
            try:
                prepare_text([path], out, val_tokens=1, workers=1, force=True, quiet=True)
            except RunError:
                assert read(path)[1].losses, (name, seed)
            except InputError as error:
                known = ("no documents", "would take all", "choose one with --field", "the input has")
                assert any(words in str(error) for words in known), (name, seed)
            else:
                texts, skips = read(path)
                assert not skips.losses, (name, seed)
                assert sorted(documents_of(out)) == sorted(texts), (name, seed)
