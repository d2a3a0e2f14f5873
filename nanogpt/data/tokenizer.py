"""GPT-2's tokenizer, complete and offline: the ranks ship in `nanogpt/data/gpt2`, and nothing is ever downloaded.

tiktoken's own `get_encoding("gpt2")` fetches the ranks at first use, which fails on a compute node without
internet. Here they come from the package and are checked against the hash that tiktoken pins.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nanogpt.errors import RunError

if TYPE_CHECKING:
    import tiktoken

BOS = 50256  # <|endoftext|>, which starts every document
VOCAB_SIZE = 50257
RANKS_NAME = "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# GPT-2's pieces: an English contraction; letters, digits or other signs, each with the space before
# them; whitespace up to the last one before a word. Possessive where nothing can be gained by backtracking.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"| ?\p{L}++"
    r"| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)

# A space or newline before a character that is surely not whitespace. There the pattern starts a piece whatever
# comes before, and the piece before it ends as it does at the end of a text: cutting here changes no token.
# In UTF-8, the lead bytes left out (c2, e1, e2, e3) are those of Unicode's other whitespace.
TEXT_PIECE_START = re.compile(r"[ \n](?=[!-~\u00c0-\u0fff\u4000-\ud7ff])")
UTF8_PIECE_START = re.compile(rb"[ \n](?=[!-~\xc3-\xe0\xe4-\xf4])")
CUT_LENGTH = 1 << 20

# The same for a long run of whitespace, which makes the pattern's `\s+(?!\S)` run out of stack at a million.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE_END = re.compile(f"[{_SPACE}]{{4096,}}(?=[{_SPACE}][^{_SPACE}])")


def bpe_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, for the 50,256 mergeable tokens.

    Raises:
        RunError: the package's file is missing or not the one that was shipped.
    """
    path = files("nanogpt.data").joinpath("gpt2", RANKS_NAME)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: GPT-2's ranks cannot be read: {error.strerror}; install the package again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != RANKS_SHA256:
        raise RunError(
            f"{path}: GPT-2's ranks are damaged: SHA-256 {found}, expected {RANKS_SHA256}; install the package again"
        )
    pairs = (line.split() for line in data.splitlines())
    return {b64decode(token): int(rank) for token, rank in pairs}


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, equal to tiktoken's `gpt2`; built once per process (about 0.1 s).

    `encode_ordinary` treats text that looks like a special token as text; `BOS` is the one special token.
    """
    import tiktoken

    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=PATTERN,
        mergeable_ranks=bpe_ranks(),
        special_tokens={"<|endoftext|>": BOS},
    )


def encode_text(text: str) -> npt.NDArray[np.uint32]:
    """The tokens of a text as `encode_ordinary` gives them, quicker and in bounded memory: (n,) uint32.

    tiktoken's direct way to an array saves making a list; texts above a million characters are encoded in pieces.

    Raises:
        UnicodeEncodeError: `text` holds a lone surrogate.
    """
    if len(text) <= CUT_LENGTH:
        return _encode(text)
    starts = [0]
    while match := TEXT_PIECE_START.search(text, starts[-1] + CUT_LENGTH):
        starts.append(match.start())
    return np.concatenate([_encode(text[a:b]) for a, b in pairwise([*starts, len(text)])])


def _encode(text: str) -> npt.NDArray[np.uint32]:
    encoding = gpt2_encoding()
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except BaseException as error:
        # Out of stack: a ValueError, or from older tiktoken a Rust panic, which is not an Exception.
        if not (isinstance(error, ValueError) or type(error).__name__ == "PanicException"):
            raise
        cuts = [match.end() for match in LONG_SPACE_END.finditer(text)]
        if not cuts:
            raise
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])
