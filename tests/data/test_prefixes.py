"""The table of prefixes: by brute force, and GPT-2's by its checksum."""

from __future__ import annotations

import numpy as np

from nanogpt.data.prefixes import gpt2_tokens, prefix_table


def brute_force(tokens: list[bytes]) -> list[int]:
    table = []
    for token in tokens:
        shorter = [n for n, other in enumerate(tokens) if other != token and token.startswith(other)]
        table.append(max(shorter, key=lambda n: len(tokens[n])) if shorter else -1)
    return table


def test_by_brute_force():
    tokens = [b"a", b"b", b"abc", b"ab", b"abd", b"ba", b"abcde", b"c", b"abce", b"\xff", b"\xff\x00", b"bab"]
    assert prefix_table(tokens, 12).tolist() == brute_force(tokens)
    assert prefix_table(tokens, 15).tolist() == [*brute_force(tokens), -1, -1, -1]
    generator = np.random.default_rng(0)
    made_up = {bytes(generator.integers(97, 100, generator.integers(1, 7)).tolist()) for _ in range(300)}
    tokens = sorted(made_up, key=lambda token: generator.random())
    assert prefix_table(tokens, len(tokens)).tolist() == brute_force(tokens)


def test_gpt2s():
    tokens = gpt2_tokens()
    assert len(tokens) == 50_256 and tokens[:2] == [b"!", b'"'] and tokens[256] == b" t"
    table = prefix_table(tokens, 50_304)
    assert (table.dtype, table.shape) == (np.int64, (50_304,))
    assert int(table.sum()) == 548_403_601
    assert table.max() == 50_252
    # Single bytes have none, nor have the end of text and the padding; all others have.
    assert (table[:256] == -1).all() and (table[50_256:] == -1).all() and (table[256:50_256] >= 0).all()
    for number in (256, 5_000, 31_337, 50_255):
        token = tokens[number]
        longest = next(token[:n] for n in range(len(token) - 1, 0, -1) if token[:n] in set(tokens))
        assert tokens[table[number]] == longest
