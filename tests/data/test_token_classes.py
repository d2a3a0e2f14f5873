"""Classes of GPT-2's tokens: the public count and checksum, and what they join and keep apart."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nanogpt.data import token_classes as module
from nanogpt.data.prefixes import gpt2_tokens
from nanogpt.data.token_classes import normalized, token_classes
from nanogpt.data.tokenizer import BOS, VOCAB_SIZE, bpe_ranks
from nanogpt.errors import RunError

RANKS = bpe_ranks()


def of(text: str) -> int:
    return int(token_classes()[RANKS[text.encode()]])


def test_gpt2s():
    classes = token_classes()
    assert classes.dtype == np.uint16 and classes.shape == (65536,)
    assert len(np.unique(classes[:VOCAB_SIZE])) == 32_980
    assert hashlib.sha256(classes[:VOCAB_SIZE].astype("<i4").tobytes()).hexdigest()[:8] == "79fb57ac"
    assert (classes[classes] == classes).all() and (classes <= np.arange(65536)).all()
    assert classes[BOS:].tolist() == list(range(BOS, 65536))
    with pytest.raises(ValueError, match="read-only"):
        classes[0] = 1


@pytest.mark.parametrize(
    "texts",
    [
        ("the", "The", "THE", " the", " The", " THE"),
        ("e", "E", " e", " E", "é", "É", " é", "è", "ê", "ë"),
        ("\t", "\n", "\r", " ", "\n\n", "\xa0", " \xa0", "\u00b4", "¯", " ¯"),
        ("...", "…", " ..."),
        ("\ufffd", " \ufffd"),
    ],
)
def test_one_class(texts: tuple[str, ...]):
    present = [text for text in texts if text.encode() in RANKS]
    assert len(present) > 1
    assert {of(text) for text in present} == {min(RANKS[text.encode()] for text in present)}


def test_different_classes():
    texts = ["the", "them", "e", "3", "!", ".", "..", "ß", "ss", "\t", "\x0b", "\x1c", "\u064e", "\x00"]
    assert len({of(text) for text in texts}) == len(texts)


def test_what_has_no_text_keeps_its_own():
    broken = [number for number, token in enumerate(gpt2_tokens()) if token != token.decode(errors="ignore").encode()]
    assert len(broken) == 344
    assert token_classes()[broken].tolist() == broken
    assert normalized("\u064e") == normalized("\x0b") == "" and normalized(" \r\n") == normalized("¯") == " "
    for text in ("\u064e", "\x0b", "\x1f"):
        assert of(text) == RANKS[text.encode()]


def test_another_unicode_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "normalized", str.casefold)
    with pytest.raises(RunError, match=r"have SHA-256 [0-9a-f]{64}, expected 79fb57ac.*: this Python's Unicode"):
        token_classes.__wrapped__()
