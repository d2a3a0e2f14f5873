"""Own text to shards: every document arrives once, where the rule puts it, whatever the workers and the machine do."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from text_samples import contents, jsonl, read_set, some_texts, write_jsonl

from nanogpt.cli.prep_text import text_main
from nanogpt.data import documents, text_shards
from nanogpt.data.shards import read_tokens
from nanogpt.data.text import prepare_text
from nanogpt.data.tokenizer import gpt2_encoding
from nanogpt.errors import InputError


def decoded(folder: Path) -> tuple[list[str], list[str]]:
    val, train = read_set(folder)
    decode = gpt2_encoding().decode
    return [decode(one) for one in val], [decode(one) for shard in train for one in shard]


def model(texts: list[str], val_tokens: int) -> set[str]:
    """The texts that the rule puts into validation, written as plainly as the rule is stated."""
    encode_ordinary = gpt2_encoding().encode_ordinary
    tokens = {text: texts.count(text) * (1 + len(encode_ordinary(text))) for text in texts}

    def order(text: str) -> tuple[bool, int]:
        key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        return tokens[text] > val_tokens, key

    chosen: set[str] = set()
    for text in sorted(tokens, key=order):
        if sum(tokens[one] for one in chosen) < val_tokens:
            chosen.add(text)
    return chosen


TEXTS = st.lists(
    st.text(
        st.sampled_from("ab é語💡<|endoftext|>'s\n\r\t\x00\u3000") | st.characters(codec="utf-8"), min_size=1
    ).filter(lambda text: not text.isspace()),
    min_size=2,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, val_tokens=st.integers(1, 60), shard_tokens=st.integers(1, 40), unit=st.integers(1, 200))
def test_every_document_arrives_where_the_rule_puts_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], val_tokens: int, shard_tokens: int, unit: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    source = write_jsonl(folder / "in.jsonl", texts)
    encode_ordinary = gpt2_encoding().encode_ordinary
    expected = model(texts, val_tokens)
    total = sum(1 + len(encode_ordinary(text)) for text in texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "UNIT_BYTES", unit)
        patch.setattr(text_shards, "SPOOL_TOKENS", 7)
        if total < val_tokens or expected == set(texts):
            with pytest.raises(InputError, match=f"--val-tokens {val_tokens}: "):
                prepare_text([source], folder / "out", val_tokens=val_tokens, workers=1, quiet=True)
            assert list((folder / "out").iterdir()) == []
            return
        prepare_text([source], folder / "out", val_tokens=val_tokens, shard_tokens=shard_tokens, workers=1, quiet=True)
    val, shards = read_set(folder / "out")
    assert val == [encode_ordinary(text) for text in texts if text in expected]
    assert [one for shard in shards for one in shard] == [encode_ordinary(t) for t in texts if t not in expected]
    assert sum(len(one) + 1 for one in val) >= val_tokens
    sizes = [sum(len(one) + 1 for one in shard) for shard in shards]
    assert all(size <= shard_tokens or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    for size, following in zip(sizes, shards[1:], strict=False):  # no shard ends early
        assert size + len(following[0]) + 1 > shard_tokens


@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, longest=st.integers(2, 9))
def test_documents_cut_at_a_length_hold_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], longest: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    texts = [*texts, "one more"]
    source = write_jsonl(folder / "in.jsonl", texts)
    if len(set(texts)) == 1:
        return
    prepare_text([source], folder / "out", val_tokens=1, document_tokens=longest, workers=1, quiet=True)
    val, shards = read_set(folder / "out")
    parts = [one for shard in [val, *shards] for one in shard]
    assert max(len(one) + 1 for one in parts) <= longest
    expected = model(texts, 1)
    whole = [gpt2_encoding().encode_ordinary(text) for text in texts if text not in expected]
    cut = [one[a : a + longest - 1] for one in whole for a in range(0, len(one), longest - 1)]
    assert [one for shard in shards for one in shard] == cut


@settings(max_examples=40, deadline=None)
@given(
    texts=TEXTS,
    longest=st.none() | st.integers(2, 9),
    least=st.none() | st.integers(2, 4),
    unique=st.booleans(),
    shuffle=st.booleans(),
)
def test_copies_and_short_documents_are_left_out_and_the_order_is_a_hash_of_the_text(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    longest: int | None,
    least: int | None,
    unique: bool,
    shuffle: bool,
) -> None:
    assume(longest is None or least is None or least <= longest)
    folder = tmp_path_factory.mktemp("set")
    texts = [*texts, texts[0], "one more of some length", "and another of some length"]
    options = {"document_tokens": longest, "min_tokens": least, "unique": unique, "shuffle": shuffle}
    sets = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_shards, "SPOOL_TOKENS", 7)
        for name, given_texts in (("out", texts), ("reversed", texts[::-1])):
            source = write_jsonl(folder / f"{name}.jsonl", given_texts)
            summary = prepare_text(
                [source], folder / name, val_tokens=1, shard_tokens=20, workers=1, quiet=True, **options
            )
            val, shards = read_set(folder / name)
            sets.append((val, [one for shard in shards for one in shard]))
            assert summary.train.documents == len(sets[-1][1])
    encode_ordinary = gpt2_encoding().encode_ordinary
    kept = list(dict.fromkeys(texts)) if unique else texts
    cut = [
        one[a : a + (longest or len(one) + 1) - 1]
        for one in map(encode_ordinary, kept)
        for a in range(0, len(one), (longest or len(one) + 1) - 1)
    ]
    cut = [one for one in cut if len(one) + 1 >= (least or 0)]
    assert sorted(sets[0][0] + sets[0][1]) == sorted(cut)
    if shuffle:
        assert sets[0] == sets[1]
    elif longest is None:
        assert sets[0][1] == [one for one in cut if one not in sets[0][0]]
    if longest is None:  # parts of different texts may be equal, whole texts not
        assert not [one for one in sets[0][1] if one in sets[0][0]]
        assert sum(summary.skipped.values()) == len(texts) - len(cut)


def test_a_least_length_beyond_the_longest_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--min-tokens 9: nothing is left, since --document-tokens 8 cuts"):
        prepare_text([tmp_path / "not there"], tmp_path / "out", document_tokens=8, min_tokens=9, quiet=True)


def test_a_shuffled_set_mixes_folders_and_the_parts_of_long_documents(tmp_path: Path) -> None:
    for folder in "abcd":
        make_tree(tmp_path / "in" / folder, [f"{folder} {i} " + f"word{folder} " * 60 for i in range(20)])
    for name, shuffle in (("plain", False), ("shuffled", True)):
        prepare_text(
            [tmp_path / "in"],
            tmp_path / name,
            val_tokens=50,
            document_tokens=40,
            shuffle=shuffle,
            workers=2,
            quiet=True,
        )
    folders = {}
    for name in ("plain", "shuffled"):
        _, texts = decoded(tmp_path / name)
        found = [next(f for f in "abcd" if f"word{f}" in text) for text in texts if "word" in text]
        folders[name] = sum(a != b for a, b in pairwise(found)) / len(found)
    assert folders["plain"] < 0.05
    assert 0.6 < folders["shuffled"] < 0.9  # three quarters, if neighbours know nothing of each other


class ReversedScan:
    """`os.scandir` on a file system that lists the other way round."""

    def __init__(self, path: str) -> None:
        with REAL_SCANDIR(path) as entries:
            self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self.entries)

    def __exit__(self, *_: object) -> None:
        pass


REAL_SCANDIR = os.scandir


def make_tree(top: Path, texts: list[str], per_folder: int = 10) -> Path:
    for i, text in enumerate(texts):
        folder = top / f"part{i // per_folder:02d}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return top


def test_workers_units_and_listing_order_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = some_texts(200)
    tree = make_tree(tmp_path / "tree", texts)
    (tree / "part03" / "bad.txt").write_bytes(b"\xff")
    lines = write_jsonl(tmp_path / "more.jsonl", some_texts(100, seed=1))
    lines.write_bytes(lines.read_bytes() + b'{"text": \n{"text": "\xff"}\n' + b'{"text": "last", "n": 1}')
    large = tmp_path / "large.txt"
    large.write_text("\n".join(some_texts(50, seed=2)), encoding="utf-8")
    monkeypatch.setattr(documents, "LARGE_FILE", 2000)
    sets = []
    for number, (workers, unit, scandir) in enumerate(
        [(1, 1 << 19, REAL_SCANDIR), (2, 300, ReversedScan), (3, 1500, REAL_SCANDIR), (1, 1, ReversedScan)]
    ):
        monkeypatch.setattr(documents, "UNIT_BYTES", unit)
        monkeypatch.setattr(documents.os, "scandir", scandir)
        out = tmp_path / f"out{number}"
        summary = prepare_text(
            [tree, lines, large], out, shard_tokens=3000, workers=workers, keep_damaged=True, quiet=True
        )
        assert summary.skipped == {"not JSON": 1, "not UTF-8": 2}
        sets.append(contents(out))
    assert len(sets[0]) > 4
    assert all(one == sets[0] for one in sets[1:])
    assert time.strftime("%Y-%m-%d") not in sets[0]["text.json"].decode()


def test_validation_is_spread_over_the_sources(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", [f"folder {i // 50}, text {i}" for i in range(500)], per_folder=50)
    prepare_text([tree], tmp_path / "out", quiet=True)
    val, train = decoded(tmp_path / "out")
    assert 40 <= len(val) <= 60
    assert len({text.split(",")[0] for text in val}) >= 8
    assert val + train != train + val
    assert sorted(val + train) == sorted(f"folder {i // 50}, text {i}" for i in range(500))


def parquet_file(path: Path, column: pa.Array, rows: int = 3) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, row_group_size=rows)
    return path


FORMATS: dict[str, Any] = {
    "a.jsonl": write_jsonl,
    "no_end.jsonl": lambda path, texts: path.write_text("\r\n\n".join(json.dumps({"text": t}) for t in texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))),
    "members.jsonl.gz": lambda path, texts: path.write_bytes(
        gzip.compress(jsonl(texts[:2])) + gzip.compress(jsonl(texts[2:])) + b"\0" * 512
    ),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(jsonl(texts))),
    "frames.JSONL.zst": lambda path, texts: path.write_bytes(
        zstandard.compress(jsonl(texts[:1])) + zstandard.compress(jsonl(texts[1:]))
    ),
    "string.parquet": lambda path, texts: parquet_file(path, pa.array(texts)),
    "large.parquet": lambda path, texts: parquet_file(path, pa.array(texts, pa.large_string())),
    "dictionary.parquet": lambda path, texts: parquet_file(path, pa.array(texts).dictionary_encode()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_format_gives_the_same_shards(tmp_path: Path, name: str) -> None:
    texts = some_texts(9)
    FORMATS[name](tmp_path / name, texts)
    prepare_text([tmp_path / name], tmp_path / "out", val_tokens=50, quiet=True)
    val, train = decoded(tmp_path / "out")
    assert val == [text for text in texts if text in model(texts, 50)]
    assert train == [text for text in texts if text not in model(texts, 50)]


def test_folders_are_walked_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files = {
        "B.md": "one",
        "a/z.py": "two",
        "a.rst": "three",
        "b/__pycache__/x.py": None,
        "b/.git/config.txt": None,
        ".hidden.txt": None,
        "b/image.png": None,
        "b/x.TXT": "four",
        "c.log": "five",
        "out/old.txt": None,
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text or "not read", encoding="utf-8")
    (tree / "d.txt").symlink_to(tree / "B.md")
    (tree / "loop").symlink_to(tree)
    (tree / "e.jsonl").write_text('{"text": "six"}\n')
    os.mkfifo(tree / "pipe.txt")
    found = documents.Skips()
    listed = documents.find_files([tree, tree / "B.md"], found, suffixes=[".log"], exclude=tree / "out")
    assert [os.path.relpath(one.path, tree) for one in listed] == [
        *["B.md", "a/z.py", "a.rst", "b/x.TXT", "c.log", "e.jsonl"]
    ]
    assert found.counts == {
        "cache or version control": 1,
        "hidden": 2,
        "suffix not known": 1,
        "given twice": 2,
        "link to a folder or to nothing": 1,
        "special file": 1,
    }
    assert found.examples["given twice"] == [str(tree / "d.txt"), str(tree / "B.md")]


def test_what_cannot_be_used_is_counted_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_RECORD", 2000)
    monkeypatch.setattr(documents, "UNIT_BYTES", 300)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tree / "nul.txt").write_bytes(b"a\0b")
    (tree / "nothing.txt").write_bytes(b"")
    (tree / "blank.txt").write_bytes(b" \n\t\n")
    (tree / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    good = '{"text": "good %d"}'
    rows = [good % 0, "{broken", '["list"]', '{"other": 1}', '{"text": 5}', '{"text": ""}', r'{"text": "\ud800"}', ""]
    rows += [good % 1, json.dumps({"text": "x" * 1990}), json.dumps({"text": "y" * 5000}), "[" * 5000, good % 2]
    (tree / "rows.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xe9"}\n{"text": "a"} {"text": "b"}\n')
    hexes = [f"{i} " + random.Random(i).randbytes(300).hex() for i in range(50)]
    (tree / "short.jsonl.gz").write_bytes(gzip.compress(jsonl(hexes))[:8000])
    (tree / "wrong.jsonl.gz").write_bytes(b"not gzip at all")
    (tree / "short.jsonl.zst").write_bytes(zstandard.compress(jsonl(["lost"]))[:-9])
    (tree / "wrong.parquet").write_bytes(b"not parquet")
    parquet_file(tree / "null.parquet", pa.array(["row 0", None, "", "row 3"]))
    out = tmp_path / "out"
    summary = prepare_text([tree], out, val_tokens=1, quiet=True)
    val, train = decoded(out)
    kept = set(val + train)
    before_the_damage = [text for text in val + train if text in hexes]
    assert 10 < len(before_the_damage) < 40
    assert set(before_the_damage) == set(hexes[: len(before_the_damage)])
    assert kept - set(hexes) == {"good 0", "good 1", "good 2", "with a mark", "row 0", "row 3", "x" * 1990}
    damaged = summary.skipped.pop("damaged from some place on")
    assert damaged == 4
    assert summary.skipped == {
        "binary (NUL bytes)": 1,
        "empty": 4,
        "no text in field 'text'": 4,
        "not JSON": 3,
        "not UTF-8": 3,
        "record above 0 MiB": 1,
    }
    examples = summary.skipped_examples
    assert examples["not UTF-8"] == [f"{tree}/latin1.txt", f"{tree}/rows.jsonl:7", f"{tree}/rows.jsonl:14"]
    assert examples["record above 0 MiB"] == [f"{tree}/rows.jsonl:11"]
    assert examples["not JSON"] == [f"{tree}/rows.jsonl:{line}" for line in (2, 12, 15)]
    manifest = json.loads((out / "text.json").read_text())
    assert manifest["skipped"]["not UTF-8"] == {"count": 3, "first": examples["not UTF-8"]}
    for shard in manifest["shards"]:
        assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
        assert shard["tokens"] == read_tokens(out / shard["name"]).size


@pytest.mark.parametrize("end", ["", "\n\n", " \u3000"])
def test_a_large_file_read_in_segments_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(documents, "LARGE_FILE", 500)
    monkeypatch.setattr(documents, "READ_BYTES", 97)
    text = "\n".join(some_texts(60)) + end
    (tmp_path / "large.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "small.txt").write_text("small")
    units = list(
        documents.plan(documents.find_files([tmp_path / "large.txt"], documents.Skips()), "text", documents.Skips())
    )
    assert len(units) > 5
    prepare_text([tmp_path / "large.txt", tmp_path / "small.txt"], tmp_path / "out", val_tokens=1, quiet=True)
    val, train = read_set(tmp_path / "out")
    assert val == [gpt2_encoding().encode_ordinary("small")]
    assert train == [[gpt2_encoding().encode_ordinary(text)]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"word " * 300 + b"\xc3", "not UTF-8"),
        (b"word " * 300 + b"\0", "binary (NUL bytes)"),
        (b"\n" * 1500, "empty"),
        (b"word " * 300 + b"x" * 4000, "no space or line end in 0 MiB"),
    ],
)
def test_a_large_file_is_checked_to_its_end_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, reason: str
) -> None:
    for name, value in {"LARGE_FILE": 500, "READ_BYTES": 97, "MAX_SEGMENT": 2000}.items():
        monkeypatch.setattr(documents, name, value)
    (tmp_path / "large.txt").write_bytes(bad)
    lines = write_jsonl(tmp_path / "a.jsonl", some_texts(4))
    summary = prepare_text([tmp_path / "large.txt", lines], tmp_path / "out", keep_damaged=True, quiet=True)
    assert summary.skipped == {reason: 1}
    assert summary.val.documents + summary.train.documents == 4


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["prep-text", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        text_main()
    return int(exit_.value.code or 0)


def test_cli_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", some_texts(3))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "c.jsonl", some_texts(3))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"text"))
    image = tmp_path / "image.png"
    image.write_bytes(b"png")
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    (empty / "sub" / "latin1.txt").write_bytes(b"\xe9")
    columns = parquet_file(tmp_path / "a.parquet", pa.array([1, 2]))
    single = tmp_path / "single.txt"
    single.write_text("only one document")
    out = tmp_path / "out"
    cases: list[tuple[list[str | Path], str]] = [
        ([tmp_path / "missing", "--dir", out], "missing: no such file or folder"),
        ([image, "--dir", out], "image.png: the suffix '.png' is not known; known are .jsonl .ndjson .json, also with"),
        ([image, "--dir", out], "add --suffix .png"),
        ([empty, "--dir", out], "left out: 1 not UTF-8"),
        (["--dir", out], "no input: give files or folders, or --embedded"),
        ([lines, "--dir", out, "--val-tokens", "5000"], "--val-tokens 5000: the input has "),
        ([single, "--dir", out], "would take all 1 (4 tokens), so none is left for training"),
        ([packed, "--dir", out], "the suffix '.txt.gz' is not known"),
        ([packed, "--dir", out], "only JSON is read from compressed files: unpack it first"),
        ([lines, "--dir", out, "--field", "body"], "no text in field 'body', nor in any other record of the file; its"),
        ([lines, "--dir", out, "--field", "body"], "its fields with text: text; choose one with --field"),
        ([folder, "--dir", out, "--field", "body"], "left out: 3 no text in field 'body', first"),
        ([folder, "--dir", out, "--field", "body"], "c.jsonl:1 (its fields with text: text)"),
        ([columns, "--dir", out], "the column 'text' is int64, expected a string; its columns are id, text"),
        ([columns, "--dir", out, "--field", "x"], "the column 'x' is missing; its columns are id, text"),
        ([lines, "--dir", single], "single.txt: is a file, expected a folder"),
        ([lines, "--dir", out, "--suffix", "log"], "--suffix 'log': expected a dot"),
        ([lines, "--dir", out, "--workers", "0"], "--workers"),
        ([lines], "--dir"),
    ]
    for arguments, message in cases:
        assert run_cli(monkeypatch, *arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert message in " ".join(shown.split()), arguments
        assert not list(out.glob("*"))


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_reader_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"data")
    monkeypatch.setattr(documents, "find_spec", lambda wanted: None)
    with pytest.raises(InputError, match=rf"{name}: reading it needs the package {package}.*nanogpt-speedrun\[text\]"):
        prepare_text([tmp_path / name], tmp_path / "out", quiet=True)
    for other in ("b.txt", "c.txt"):
        (tmp_path / other).write_text(f"text of {other}")
    summary = prepare_text([tmp_path], tmp_path / "out", val_tokens=1, quiet=True)
    assert summary.skipped == {f"{package} is not installed": 1}


def test_a_table_without_text_is_refused_by_name_and_left_out_of_a_folder(tmp_path: Path) -> None:
    parquet_file(tmp_path / "numbers.parquet", pa.array([1, 2]))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    with pytest.raises(InputError, match=r"numbers.parquet: the column 'text' is int64"):
        prepare_text([tmp_path / "numbers.parquet"], tmp_path / "out", quiet=True)
    summary = prepare_text([tmp_path], tmp_path / "out", val_tokens=1, quiet=True)
    assert summary.skipped == {"no text in a column 'text'": 1}


def test_the_command_prepares_the_embedded_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "more.txt").write_bytes(b"\xff")
    monkeypatch.setattr(
        sys, "argv", ["prep-text", "--embedded", str(tmp_path), "--dir", str(out), "--val-tokens", "100000"]
    )
    with pytest.raises(SystemExit) as exit_:
        text_main()
    assert not exit_.value.code
    shown = capsys.readouterr()
    assert "not UTF-8" in shown.out
    assert "embedded" in shown.out
    assert shown.err.startswith("Tokenizing: ")
    manifest = json.loads((out / "text.json").read_text())
    assert manifest["inputs"][1] == {
        "path": "embedded",
        "files": 1,
        "documents": 3415,
        "tokens": 1_623_284,
        "text_bytes": 6_605_391,
    }
    assert 100_000 <= manifest["val"]["tokens"] < 110_000
    assert manifest["val"]["documents"] + manifest["train"]["documents"] == 3415


@pytest.mark.parametrize("terminal", [False, True])
def test_the_commands_tables(
    tmp_path: Path, nanogpt: Callable[..., Any], request: pytest.FixtureRequest, terminal: bool
) -> None:
    if terminal:
        request.getfixturevalue("terminal_of_80")
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"words of document {number}. " * 40)
    (folder / "bad.txt").write_bytes(b"\xff")
    outcome = nanogpt("prep-text", folder, "--dir", tmp_path / "out", "--val-tokens", 200)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    heads = [line.split() for line in lines if re.match("(input|left out) ", line)]
    assert heads == [["input", "files", "documents", "tokens", "text"], ["left", "out", "count", "first"]]
    rows = dict(line.split()[:2] for line in lines if re.match("(validation|training) ", line))
    assert int(rows["validation"]) + int(rows["training"]) == 20
    assert ("\u2500" in outcome.out) == terminal
    if terminal:
        assert max(map(len, lines)) <= 80
    else:  # a line for each row, however long its path
        assert any(line.startswith(f"{folder}  ") for line in lines)
