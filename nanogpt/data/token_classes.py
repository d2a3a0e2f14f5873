"""Classes of GPT-2's tokens: those whose texts differ only in case, accents or the white space around them. No torch.

For hashes of n-grams, which then share a row among ` The`, `the` and `THE`. The idea and the rule are PR #375's of
KellerJordan/modded-nanogpt: 32,980 classes.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

from nanogpt.data.prefixes import gpt2_tokens
from nanogpt.data.tokenizer import VOCAB_SIZE
from nanogpt.errors import RunError

SHA256 = (
    "79fb57ac259495ba36f1afb9b0d5da35f3048b5067fa59c101d5a3c1ed15c2a2"  # of GPT-2's classes as int32, little-endian
)
SPACES = re.compile(r"[ \t\r\n]+")


def normalized(text: str) -> str:
    """NFKC, without combining marks, in lower case, each run of blanks one space, and none at the ends.

    A text of blanks alone is one space. NFKC makes a space of a no-break one, and of an accent that stands alone.
    """
    if not text.isascii():
        letters = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        text = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
    text = SPACES.sub(" ", text.lower())
    return text if text == " " else text.strip()


@cache
def token_classes() -> npt.NDArray[np.uint16]:
    """(65536,) the smallest token with the same normalised text, for each token; built once per process (0.2 s).

    BOS, numbers that are no token, tokens that are not UTF-8 and those whose text becomes empty keep their own number.

    Raises:
        RunError: they are not the known ones, as after a change of Unicode; a checkpoint's rows would be others.
    """
    classes = np.arange(1 << 16, dtype=np.uint16)
    first: dict[str, int] = {}
    for number, token in enumerate(gpt2_tokens()):
        try:
            text = normalized(token.decode())
        except UnicodeDecodeError:
            continue
        if text:
            classes[number] = first.setdefault(text, number)
    found = hashlib.sha256(classes[:VOCAB_SIZE].astype("<i4").tobytes()).hexdigest()
    if found != SHA256:
        raise RunError(
            f"the classes of GPT-2's tokens have SHA-256 {found}, expected {SHA256}: this Python's Unicode"
            f" {unicodedata.unidata_version} normalises a token otherwise; use another Python"
        )
    classes.setflags(write=False)
    return classes
