"""Own text in tests: made-up documents, files of them, and what is in the shards that came of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from nanogpt.data.shards import read_tokens
from nanogpt.data.tokenizer import BOS, gpt2_encoding

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


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path) -> list[str]:
    """The texts of all documents of a set, validation first."""
    val, train = read_set(folder)
    return [gpt2_encoding().decode(one) for shard in [val, *train] for one in shard]
