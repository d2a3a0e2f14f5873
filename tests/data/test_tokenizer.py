"""The shipped ranks are OpenAI's, and the encoding built from them is tiktoken's gpt2."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data import tokenizer
from nanogpt.data.embedded import SHA256, embedded_corpus
from nanogpt.data.tokenizer import BOS, VOCAB_SIZE, bpe_ranks, gpt2_encoding
from nanogpt.errors import RunError

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def printable_bytes() -> dict[int, str]:
    """GPT-2's stand-in character of each byte: itself where it prints, else the next from U+0100 on."""
    prints = {b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    rest = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(rest)}


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge gives `token`: plain byte-pair encoding with the merges before its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, VOCAB_SIZE) for a, b in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def test_ranks_reproduce_both_files_of_the_release_byte_for_byte() -> None:
    ranks = bpe_ranks()
    stand_in = printable_bytes()

    def shown(token: bytes) -> str:
        return "".join(stand_in[b] for b in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    encoder = {shown(token): rank for rank, token in enumerate(by_rank)} | {"<|endoftext|>": BOS}
    assert hashlib.sha256(json.dumps(encoder).encode()).hexdigest() == ENCODER_JSON_SHA256

    merges = ["{} {}".format(*map(shown, merge_of(token, ranks))) for token in by_rank[256:]]
    vocab_bpe = "\n".join(["#version: 0.2", *merges, ""])
    assert hashlib.sha256(vocab_bpe.encode()).hexdigest() == VOCAB_BPE_SHA256


def test_known_encodings() -> None:
    encoding = gpt2_encoding()
    assert encoding.n_vocab == VOCAB_SIZE
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [BOS]
    assert gpt2_encoding() is encoding


@pytest.fixture(scope="module")
def original_pattern() -> tiktoken.Encoding:
    """The pattern of the GPT-2 release, with the same ranks."""
    return tiktoken.Encoding(
        name="original",
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=bpe_ranks(),
        special_tokens={},
    )


@given(text=st.text(st.sampled_from("aB é7٣ '\t\n\r  .!stll💡") | st.characters(codec="utf-8")))
def test_pattern_cuts_as_the_release_does(original_pattern: tiktoken.Encoding, text: str) -> None:
    tokens = gpt2_encoding().encode_ordinary(text)
    assert tokens == original_pattern.encode_ordinary(text)
    assert gpt2_encoding().decode(tokens) == text


def test_damaged_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "RANKS_SHA256", "0" * 64)
    with pytest.raises(RunError, match="damaged: SHA-256 306cd27f"):
        bpe_ranks()


def test_encoding_opens_no_connection() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from nanogpt.data.tokenizer import gpt2_encoding\n"
        "assert gpt2_encoding().encode_ordinary('Hello world') == [15496, 995]\n"
        "assert 'torch' not in sys.modules and 'requests' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"TIKTOKEN_CACHE_DIR": ""})


def test_embedded_corpus_is_the_one_described() -> None:
    assert hashlib.sha256(embedded_corpus().read_bytes()).hexdigest() == SHA256
