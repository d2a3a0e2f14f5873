"""Own text to shards: every document arrives once, where the rule puts it, whatever the workers and the machine do."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nanogpt.cli.prep_text import text_main
from nanogpt.data import documents, encode, text_shards
from nanogpt.data.shards import read_tokens
from nanogpt.data.text import embedded_corpus, prepare_text
from nanogpt.data.tokenizer import BOS, gpt2_encoding
from nanogpt.errors import InputError, RunError

WORDS = ["alpha", "beta", "gamma", "delta", "<|endoftext|>", "don't", "12", "é", "語", "\n", "", ";"]


def some_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, words))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def shard_documents(path: Path) -> list[list[int]]:
    """The documents of a shard as tokens, without BOS; a shard starts with a document."""
    tokens = read_tokens(path)
    starts = np.flatnonzero(tokens == BOS)
    assert tokens.size == 0 or starts[0] == 0
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])] if tokens.size else []


def read_set(folder: Path) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(validation documents, documents of each training shard)."""
    train = sorted(folder.glob("fineweb_train_*.bin"))
    assert [path.name for path in train] == [f"fineweb_train_{k:06d}.bin" for k in range(1, len(train) + 1)]
    return shard_documents(folder / "fineweb_val_000000.bin"), [shard_documents(path) for path in train]


def decoded(folder: Path) -> tuple[list[str], list[str]]:
    val, train = read_set(folder)
    decode = gpt2_encoding().decode
    return [decode(one) for one in val], [decode(one) for shard in train for one in shard]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    (tree / "part03" / "bad.txt").write_bytes(b"\xff\xfe")
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
        summary = prepare_text([tree, lines, large], out, shard_tokens=3000, workers=workers, quiet=True)
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


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


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
    summary = prepare_text([tmp_path / "large.txt", lines], tmp_path / "out", quiet=True)
    assert summary.skipped == {reason: 1}
    assert summary.val.documents + summary.train.documents == 4


@contextmanager
def running(code: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, ended at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in [child, *descendants(child)]]


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


PREPARE = """
import sys
from nanogpt.data.text import prepare_text
prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=1000, shard_tokens=100_000, workers=2)
"""


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 MB of JSON lines."""
    with gzip.open(embedded_corpus(), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    return write_jsonl(path, [f"{copy} {text}" for copy in range(3) for text in texts])


def test_a_killed_run_leaves_no_shard_and_no_worker(many_lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(PREPARE, many_lines, out) as process:
        spool = out / text_shards.STAGING / "spool_000000"
        wait_for(lambda: spool.exists() and spool.stat().st_size > 100_000)
        workers = descendants(process.pid)
        assert len(workers) == 3
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in workers), 20)
    assert [path.name for path in out.iterdir()] == [text_shards.STAGING]
    prepare_text([many_lines], out, val_tokens=1000, shard_tokens=1_000_000, workers=1, quiet=True)
    assert not (out / text_shards.STAGING).exists()
    assert sum(len(shard) for shard in read_set(out)[1]) + len(read_set(out)[0]) == 3 * 3415


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from itertools import pairwise
from pathlib import Path
from nanogpt.data import text_shards
from nanogpt.data.text import prepare_text
replace, count = Path.replace, 0
def die_at_the_nth(self, target):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = die_at_the_nth
prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=300, shard_tokens=1000, workers=1, force=True)
"""


def test_a_run_killed_while_its_shards_take_their_names_can_be_repeated(tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", some_texts(300, seed=5))
    new = write_jsonl(tmp_path / "new.jsonl", some_texts(100))
    prepare_text([new], tmp_path / "whole", val_tokens=300, shard_tokens=1000, quiet=True)
    whole = contents(tmp_path / "whole")
    for nth in (1, 2, 3, len(whole) + 1):
        out = tmp_path / f"out{nth}"
        prepare_text([old], out, val_tokens=300, shard_tokens=1000, quiet=True)
        before = contents(out)
        with running(KILLED_WHILE_PUBLISHING, new, out, str(nth)) as process:
            assert process.wait() == -signal.SIGKILL
        left = {path.name: path.read_bytes() for path in out.glob("*.bin")}
        if nth == 1:  # nothing is touched before the new set is whole
            assert left == {name: data for name, data in before.items() if name.endswith(".bin")}
        else:
            assert "text.json" not in contents_of_files(out)
            assert left.items() <= whole.items()
            prepare_text([new], out, val_tokens=300, shard_tokens=1000, quiet=True)
            assert contents(out) == whole


def contents_of_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def test_sets_are_not_mixed(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", some_texts(300, seed=5))
    second = write_jsonl(tmp_path / "second.jsonl", some_texts(40))
    out = tmp_path / "out"
    prepare_text([first], out, shard_tokens=1000, quiet=True)
    before = contents(out)
    (out / "notes.bin").write_text("mine")
    with pytest.raises(InputError, match=r"holds \d+ file\(s\) of a data set already \(text.json.*--force"):
        prepare_text([second], out, shard_tokens=1000, quiet=True)
    with pytest.raises(InputError, match="--val-tokens 999999"):  # a run that fails leaves the old set alone
        prepare_text([second], out, val_tokens=999_999, force=True, quiet=True)
    assert {name: data for name, data in contents(out).items() if name != "notes.bin"} == before
    prepare_text([second], out, shard_tokens=1000, force=True, quiet=True)
    prepare_text([second], tmp_path / "alone", shard_tokens=1000, quiet=True)
    assert contents(out) == contents(tmp_path / "alone") | {"notes.bin": b"mine"}
    (tmp_path / "alone" / "text.json").unlink()  # shards from elsewhere, such as FineWeb's, are a set too
    with pytest.raises(InputError, match=r"fineweb_train_000001\.bin, \.\.\."):
        prepare_text([second], tmp_path / "alone", quiet=True)


def test_two_runs_at_once_do_not_share_a_directory(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(40))
    with text_shards.writing_to(tmp_path / "out", force=False), pytest.raises(RunError, match="another prep-text"):
        prepare_text([source], tmp_path / "out", quiet=True)
    prepare_text([source], tmp_path / "out", quiet=True)


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(tmp_path: Path, many_lines: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    code += "import sys; from nanogpt.cli.prep_text import text_main; text_main()"
    with running(code, many_lines, "--dir", tmp_path / "out", "--workers", "2") as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(f"prep-text: {tmp_path}/out: writing failed")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_worker_ends_the_run(tmp_path: Path, many_lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = text_shards.Spool.write

    def kill_one(spool: text_shards.Spool, tokens: Any) -> None:
        write(spool, tokens)
        workers = descendants(os.getpid())
        if len(workers) == 3:
            os.kill(workers[-1], signal.SIGKILL)

    monkeypatch.setattr(text_shards.Spool, "write", kill_one)
    with pytest.raises(RunError, match="a tokenizing worker was killed"):
        prepare_text([many_lines], tmp_path / "out", workers=2, quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3])
def test_an_error_ends_the_workers_even_while_they_start(seconds: float) -> None:
    with pytest.raises(ZeroDivisionError), encode.Encoder(16):
        time.sleep(seconds)
        workers = descendants(os.getpid())
        raise ZeroDivisionError
    assert workers
    wait_for(lambda: not any(alive(pid) for pid in workers), 5)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LARGE_FILE", 500)
    source = tmp_path / "large.txt"
    source.write_text("\n".join(some_texts(60)))
    units = list(documents.plan(documents.find_files([source], documents.Skips()), "text", documents.Skips()))
    source.write_text("short")
    with encode.Encoder(2) as encoder, pytest.raises(RunError, match=r"large.txt: changed while it was read"):
        list(encoder.encode(units))


MEASURE = """
import json, re, resource, sys
from itertools import pairwise
from pathlib import Path
from nanogpt.data.text import prepare_text
summary = prepare_text(sys.argv[1:2], sys.argv[2], val_tokens=1, workers=2, quiet=True)
# Not the parent's ru_maxrss, which starts with the peak of the process that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
peaks = [peak / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]
print(json.dumps([summary.text_bytes, *peaks]))
"""


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt", "jsonl"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """60 MB in 4 kB records, 40 MB as one text: 120 MiB a process. 40 MB in records of 8 MB: 250 MiB."""
    with gzip.open(embedded_corpus(), "rt", encoding="utf-8") as lines:
        prose = "\n".join(json.loads(line)["text"] for line in lines)
    source = tmp_path / f"in.{kind}"
    if kind == "txt":
        source.write_text(prose * 6, encoding="utf-8")
        write_jsonl(tmp_path / "more.jsonl", ["two", "three"])
        source = tmp_path
    elif kind == "jsonl":
        write_jsonl(source, [f"{i}" + prose + prose[:1_400_000] for i in range(5)])
    else:
        pieces = [prose[i : i + 4000] for i in range(0, len(prose), 4000)]
        source.write_bytes(gzip.compress(jsonl([f"{copy} {piece}" for copy in range(9) for piece in pieces]), 1))
    with running(MEASURE, source, tmp_path / "out") as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    text_bytes, parent, worker = json.loads(stdout)
    bound = 250 if kind == "jsonl" else 120
    print(f"{kind}: parent {parent:.0f} MiB, worker {worker:.0f} MiB")
    assert text_bytes > 38e6
    assert parent < bound, f"the parent took {parent:.0f} MiB"
    assert worker < bound, f"a worker took {worker:.0f} MiB"


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["prep-text", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        text_main()
    return int(exit_.value.code or 0)


def test_cli_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", some_texts(3))
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
        ([image, "--dir", out], "image.png: the suffix '.png' is not known; known are .jsonl .jsonl.gz"),
        ([image, "--dir", out], "add --suffix .png"),
        ([empty, "--dir", out], "left out: 1 not UTF-8"),
        (["--dir", out], "no input: give files or folders, or --embedded"),
        ([lines, "--dir", out, "--val-tokens", "5000"], "--val-tokens 5000: the input has "),
        ([single, "--dir", out], "would take all 1 (4 tokens), so none is left for training"),
        ([lines, "--dir", out, "--field", "body"], "left out: 3 no text in field 'body'"),
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
