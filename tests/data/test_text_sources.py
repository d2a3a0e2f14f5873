"""Splits by sources and near-duplicates: one source is on one side, and what is nearly equal is found."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_text import decoded
from text_samples import WORDS, contents, some_texts

from nanogpt.data import documents
from nanogpt.data.sources import SplitBy
from nanogpt.data.text import prepare_text
from nanogpt.errors import InputError


@pytest.mark.parametrize(
    ("split", "top", "path", "source"),
    [
        ("document", "/t", "/t/a/b.py", ""),
        ("field:x", "/t", "/t/a.jsonl", ""),
        ("directory:1", "/t", "/t/a/b/c.py", "a"),
        ("directory:2", "/t", "/t/a/b/c.py", "a/b"),
        ("directory:2", "/t/", "/t/a/c.py", "a"),
        ("directory:2", "/t", "/t/c.py", "."),
        ("directory:1", "/t/c.py", "/t/c.py", "c.py"),
        ("directory:1", "/v/lib/python3.12/site-packages", "/v/lib/python3.12/site-packages/numpy/a/b.py", "numpy"),
        ("source", "/t", "/t/a/b/c.py", "a"),
        ("source", "/t", "/t/c.txt", "."),
        ("source", "/t/c.txt", "/t/c.txt", "c.txt"),
        ("source", "/", "/v/lib/python3.12/site-packages/numpy/a/b.py", "numpy"),
        ("source", "/w/site-packages/numpy", "/w/site-packages/numpy/a/b.py", "numpy"),
        ("source", "/v", "/v/lib/python3.12/site-packages/numpy-2.4.6.dist-info/LICENSE.txt", "numpy"),
        ("source", "/v", "/v/lib/python3/dist-packages/_pytest/b.py", "pytest"),
        ("source", "/v", "/v/lib/python3/dist-packages/six.py", "six"),
        ("source", "/v", "/v/lib/python3.12/json/decoder.py", "json"),
        ("source", "/v", "/v/lib/python3.12/abc.py", "abc"),
        ("source", "/v", "/v/include/python3.12/cpython/abc.h", "include"),
        ("source", "/v", "/v/a/site-packages/pip/b/site-packages/c/d.py", "c"),
    ],
)
def test_a_file_has_one_source(split: str, top: str, path: str, source: str) -> None:
    assert SplitBy.parse(split).of_file(path, top) == source


@pytest.mark.parametrize("text", ["", "sources", "source:1", "directory", "directory:0", "directory:x", "field:"])
def test_what_is_no_split_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--split-by {text}: expected document, source, directory:DEPTH or field"):
        prepare_text([tmp_path], tmp_path / "out", split_by=text, quiet=True)


def test_a_source_is_on_one_side_whatever_the_workers_and_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = []
    for place, workers, unit in (("a", 1, 1 << 19), ("b/site-packages", 2, 300)):
        monkeypatch.setattr(documents, "UNIT_BYTES", unit)
        for source, number in itertools.product(range(30), range(8)):
            folder = tmp_path / place / f"source{source}" / f"part{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.txt").write_text(f"source{source} number {number} " + "word " * 50)
        out = tmp_path / f"out-{workers}"
        summary = prepare_text(
            [tmp_path / place], out, val_tokens=1500, split_by="source", shuffle=True, workers=workers, quiet=True
        )
        sets.append({name: data for name, data in contents(out).items() if name != "text.json"})
    assert sets[0] == sets[1]
    val, train = ({text.split()[0] for text in side} for side in decoded(out))
    assert not val & train
    assert len(val | train) == 30
    manifest = json.loads((out / "text.json").read_text())
    assert manifest["settings"]["split_by"] == "source"
    assert manifest["sources"] == {"val": len(val), "train": len(train), "val_names": sorted(val)}
    assert 1500 <= summary.val.tokens < 3000
    with pytest.raises(InputError, match=r"--val-tokens 13200: validation takes whole sources and would take all 30"):
        prepare_text([tmp_path / "a"], tmp_path / "c", val_tokens=13200, split_by="source", quiet=True)


def records(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_are_split_by_a_field(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"s{i % 9} {text}", "from": f"s{i % 9}"} for i, text in enumerate(some_texts(90))
    ]
    source = records(tmp_path / name, rows)
    prepare_text([source], tmp_path / "out", split_by="field:from", quiet=True)
    val, train = ({text.split()[0] for text in side} for side in decoded(tmp_path / "out"))
    assert not val & train
    assert len(val | train) == 9

    records(source, [*rows, {"text": "of nobody", "from": None}])
    with pytest.raises(Exception, match=rf"{name}:91: no source to split by"):
        prepare_text([source], tmp_path / "again", split_by="field:from", quiet=True)
    summary = prepare_text([source], tmp_path / "again", split_by="field:from", keep_damaged=True, quiet=True)
    assert summary.skipped == {"no source to split by": 1}


def test_fields_need_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a.txt: --split-by field:from needs records, but this is a text file"):
        prepare_text([tmp_path], tmp_path / "out", split_by="field:from", quiet=True)
    table = records(tmp_path / "a.parquet", [{"text": "a"}])
    with pytest.raises(InputError, match=r"'from' is missing.*--split-by field:NAME"):
        prepare_text([table], tmp_path / "out", split_by="field:from", quiet=True)


def changed(text: str, rng: random.Random, count: int) -> str:
    words = text.split(" ")
    for at in rng.sample(range(1, len(words)), count):
        words[at] = "changed"
    return " ".join(words)


def test_near_duplicates_are_counted_across_the_sides_or_left_out(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    rng = random.Random(0)
    vocabulary = [f"{a}{b}" for a in WORDS if a.isalpha() for b in range(100)]
    texts = [" ".join([f"package{i}", *rng.choices(vocabulary, k=400)]) for i in range(40)]
    for package in range(40):
        folder = tmp_path / "in" / f"p{package}"
        folder.mkdir(parents=True)
        (folder / "own.txt").write_text(texts[package])
        if package % 4 == 0:  # its neighbour vendors it, with three words in 400 changed, and a third has half of it
            (folder.with_name(f"p{package}-vendored") / "x").mkdir(parents=True)
            (folder.with_name(f"p{package}-vendored") / "x" / "copy.txt").write_text(changed(texts[package], rng, 3))
            (folder / "half.txt").write_text("half " + texts[package][:1000] + texts[-package - 1][:1000])
    sets = []
    for number, workers in enumerate((1, 2)):
        out = tmp_path / f"count{number}"
        summary = prepare_text(
            [tmp_path / "in"], out, split_by="source", near_duplicates="count", workers=workers, quiet=True
        )
        sets.append(contents(out))
    assert sets[0] == sets[1]
    assert summary.near_duplicates is not None
    assert summary.near_duplicates.documents == 10
    val, train = decoded(out)
    trained_on = {text.split()[0] for text in train}
    across = sum(text.split()[0] in trained_on for text in val if not text.startswith("half"))
    assert summary.near_duplicates.val_in_train == across > 0

    dropped = prepare_text([tmp_path / "in"], tmp_path / "drop", near_duplicates="drop", quiet=True)
    assert dropped.skipped == {"near-duplicate of a document before it": 10}
    assert dropped.near_duplicates is not None
    assert dropped.near_duplicates.val_in_train == 0
    left = sorted(text for side in decoded(tmp_path / "drop") for text in side)
    assert left == sorted(path.read_text() for path in (tmp_path / "in").rglob("*.txt") if path.name != "copy.txt")


def test_signatures_find_pairs_by_their_similarity() -> None:
    pytest.importorskip("rensa")
    from nanogpt.data.near_duplicates import near_duplicates, signatures

    rng = np.random.default_rng(0)
    pairs = []
    for similar in (0.9, 0.7):  # of 1,000 shingles each, so many are shared
        for _ in range(40):
            one = rng.integers(0, 50257, 1004, dtype=np.uint32)
            other = one.copy()
            kept = round(1000 * 2 * similar / (1 + similar))
            other[kept + 4 :] = rng.integers(0, 50257, 1000 - kept)
            pairs += [one, other]
    labels = near_duplicates(signatures(pairs))
    found = labels[1::2] == np.arange(0, 160, 2)
    assert found[:40].all()
    assert found[40:].mean() < 0.1
    assert (labels[::2] == np.arange(0, 160, 2)).all()
    alone = np.concatenate([signatures([one]) for one in pairs[:5]])
    assert (alone == signatures(pairs)[:5]).all()
    short = [np.array(tokens, dtype=np.uint32) for tokens in ([7], [7], [8], [7, 8, 9], [7, 8, 9])]
    assert near_duplicates(signatures(short)).tolist() == [0, 0, 2, 3, 3]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.data.near_duplicates.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--near-duplicates needs the package rensa.*pip install"):
        prepare_text([tmp_path], tmp_path / "out", near_duplicates="count", quiet=True)
