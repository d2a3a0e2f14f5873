"""GPT-2's tokenizer as transformers and tokenizers read it, made from the ranks that ship with this package."""

from __future__ import annotations

import json
from typing import Any

from nanogpt.data.tokenizer import BOS, bpe_ranks

END = "<|endoftext|>"


def tokenizer_files(context: int) -> dict[str, str]:
    """vocab.json, merges.txt, tokenizer.json, tokenizer_config.json, by name. `context`: tokens the model was made for.

    Raises RunError as `bpe_ranks` does.
    """
    ranks = bpe_ranks()
    letters = byte_letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {words[token]: rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])} | {END: BOS}
    merges = [" ".join(words[part] for part in merged(token, ranks)) for token in ranks if len(token) > 1]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END),
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer.json": json.dumps(_fast(vocabulary, merges), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
    }


def byte_letters() -> dict[int, str]:
    """The printable character that GPT-2's files write for each byte: its own, or one from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def merged(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """The two tokens that byte-pair encoding merges last on its way to `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return tuple(parts)


def _fast(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": BOS, "content": END, **flags}],
        "normalizer": None,
        "pre_tokenizer": levels,
        "post_processor": {**levels, "trim_offsets": False},
        "decoder": levels,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
