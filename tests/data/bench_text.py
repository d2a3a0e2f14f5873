"""Measure `prepare_text` against a plain single-threaded tiktoken loop on the same input.

    python tests/data/bench_text.py [PATH...] [--runs 3]

Without a PATH the input is the embedded prose twelve times over, as one .jsonl.gz. The plain loop reads the same files,
calls `encode_ordinary` on each document and keeps nothing; `prepare_text` also splits, hashes and writes its shards.
The figures are megabytes of text a second of processor time, which is what a core does undisturbed by its neighbours,
and megabytes a second by the clock. Runs are interleaved; medians are shown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nanogpt.data.documents import SourceFile, find_files
from nanogpt.data.embedded import embedded_corpus
from nanogpt.data.skips import Skips
from nanogpt.data.text import prepare_text
from nanogpt.data.tokenizer import gpt2_encoding


def plain_loop(files: list[SourceFile]) -> int:
    """Bytes of text that went through `encode_ordinary`."""
    encode = gpt2_encoding().encode_ordinary
    done = 0
    for file in files:
        if file.kind == "lines":
            opened = gzip.open if file.path.endswith(".gz") else open
            with opened(file.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    encode(text)
                    done += len(text.encode())
        elif file.kind == "text":
            try:
                text = Path(file.path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            encode(text)
            done += len(text.encode())
    return done


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """(MB a second of processor time, MB a second by the clock) of `work`, which returns the bytes that it did."""
    before, start = os.times(), time.perf_counter()
    done = work()
    after, end = os.times(), time.perf_counter()
    processor = sum(after[:4]) - sum(before[:4])
    return done / 1e6 / processor, done / 1e6 / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.paths
        if not paths:
            big = Path(folder) / "prose.jsonl.gz"
            with gzip.open(embedded_corpus(), "rt", encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines]
            with gzip.open(big, "wt", compresslevel=6, encoding="utf-8") as out:
                for copy in range(12):
                    for record in records:
                        out.write(json.dumps({"text": f"{record['text']} ({copy})"}, ensure_ascii=False) + "\n")
            paths = [big]
        files = find_files(paths, Skips())
        gpt2_encoding()

        def prepare(workers: int) -> int:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                return prepare_text(paths, target, workers=workers, quiet=True).text_bytes

        works: dict[str, Callable[[], int]] = {"plain encode_ordinary loop": lambda: plain_loop(files)}
        for workers in arguments.workers:
            works[f"prepare_text, workers={workers}"] = partial(prepare, workers)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(arguments.runs):
            for name, work in works.items():
                runs[name].append(measured(work))
    print(f"{'':30}{'MB/s a core':>12}{'MB/s':>9}   ({len(files)} files, median of {arguments.runs})")
    for name, figures in runs.items():
        core, clock = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:30}{core:12.1f}{clock:9.1f}")


if __name__ == "__main__":
    main()
