"""GPT-2's tokenizer, whole and offline: the ranks ship in `nanogpt/data/gpt2`, nothing is ever downloaded.

tiktoken's own `get_encoding("gpt2")` fetches the ranks at first use, which fails on a compute node without
internet. Here they come from the package and are checked against the hash that tiktoken pins.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from nanogpt.errors import RunError

if TYPE_CHECKING:
    import tiktoken

BOS = 50256  # <|endoftext|>, which starts every document
VOCAB_SIZE = 50257
RANKS_NAME = "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# What GPT-2's pieces are: an English contraction; letters, digits or other signs, each with the space before
# them; whitespace up to the last one before a word. Possessive where nothing can be gained by backtracking.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"| ?\p{L}++"
    r"| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)


def bpe_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, for the 50,256 mergeable tokens.

    Raises:
        RunError: the file in the package is missing or not the one that was shipped.
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
    """GPT-2's encoding, equal to tiktoken's `gpt2`; built once a process (about 0.1 s).

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
