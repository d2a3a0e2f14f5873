"""The shipped ranks are OpenAI's, and the encoding built from them is tiktoken's gpt2."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data import tokenizer
from nanogpt.data.embedded import SHA256, embedded_corpus
from nanogpt.data.tokenizer import BOS, VOCAB_SIZE, bpe_ranks, encode_text, gpt2_encoding
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


# Whitespace of every kind between words, which is where cutting a text could change its tokens.
SPACED = st.lists(
    st.sampled_from(
        ["a", "B7", "'s", "don't", "é", "語", "💡", "!", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x1c", "\u00a0"]
    )
).map("".join)


@given(text=SPACED, length=st.integers(1, 8))
def test_cutting_a_long_text_changes_no_token(text: str, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "CUT_LENGTH", length)
        assert encode_text(text).tolist() == gpt2_encoding().encode_ordinary(text)


@given(text=SPACED)
def test_every_cut_in_utf8_and_in_text_is_safe(text: str) -> None:
    encode = gpt2_encoding().encode_ordinary
    utf8 = text.encode()
    for match in tokenizer.UTF8_PIECE_START.finditer(utf8):
        cut = match.start()
        assert encode(utf8[:cut].decode()) + encode(utf8[cut:].decode()) == encode(text)
    for match in tokenizer.TEXT_PIECE_START.finditer(text):
        assert encode(text[: match.start()]) + encode(text[match.start() :]) == encode(text)


@pytest.mark.parametrize("spaces", [" " * 1_500_000, "\n\u3000" * 700_000 + " "], ids=["spaces", "mixed"])
def test_a_million_spaces_are_tokenized(spaces: str) -> None:
    text = f"before{spaces}after{spaces}"
    tokens = encode_text(text).tolist()
    assert gpt2_encoding().decode(tokens) == text
    # Linear runs of the same kind, short enough for the pattern itself, end in the same way.
    short = f"before{spaces[:9999]}{spaces[-1]}after{spaces[:10000]}"
    assert encode_text(short).tolist() == gpt2_encoding().encode_ordinary(short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "gpt2_encoding", OutOfStack)
        assert encode_text(short).tolist() == gpt2_encoding().encode_ordinary(short)


class OutOfStack:
    """The encoding, with the stack of its pattern used up at 5,000 characters of whitespace before a word."""

    def encode_to_numpy(self, text: str, **options: object) -> npt.NDArray[np.uint32]:
        if re.search(r"\s{5000}\S", text):
            raise ValueError("Max stack size exceeded for backtracking")
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())


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
