"""What the fuzzers make bad input of: seeded, so that a failure comes back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from nanogpt.errors import NanogptError

# Values that somebody, or some program, could write where another is meant.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e300, -1e300, float("inf"), float("nan"), 10**30, 2**31, 2**63, "", " ", "x",
    "0", "-1", "é√", "\x1b[31m", "\u202e", "\udcff", "a" * 300, "../..", "/", "/abs/*", "**", "~nobody-here/x",
    "$NOT_SET/x", "${", "[/bold]", "{}", "2026-13-45T00:00:00Z", [], [[]], [None], ["x"] * 3, {}, {"x": 1},
    {"kind": "x"},
)  # fmt: skip
WORDS = (
    "", " ", "x", "-1", "0", "1", "7", "1e300", "nan", "inf", "-inf", "9" * 400, "²", "٣", "é√", "\x1b[31m", "\udcff",
    "a" * 300, "../..", "/", "/abs/*", "/dev/null", "~nobody-here/x", "$NOT_SET/x", "${", "*", "[", "null", "true",
    "=", "a=b", "--", "-", "%s", "\n", "1,2", "0x10", "1_0",
)  # fmt: skip
LINES = (
    "", "base: 3", "base: demo.yaml", "base: nosuch.yaml", "? [a]\n: b", "<<: {a: 1}", "name: !!float x", "a: *b",
    "a: &a [*a]", "- 1", "name: !!bool maybe", "name: !!timestamp x", "name: !!binary é", "name: !!set x", "\ttab: 1",
    "name: !!null x", "model: {kind: gpt2}", "model: {kind: [1]}", "optimizer: {kind: {}}", "model: null", "{", "...",
)  # fmt: skip


def examples(count: int, name: str) -> Iterator[random.Random]:
    """A source of chance for each example; `name` and the example's number are the seed."""
    for number in range(count):
        yield random.Random(f"{name} {number}")


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled or inserted, or an end cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 8, 100))
        match chance.randrange(6):
            case 0:
                changed[at : at + size] = chance.randbytes(min(size, len(changed) - at))
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                changed[at:at] = chance.randbytes(size)
            case 4 if chance.random() < 0.3:
                del changed[at:]
            case 5:
                changed[at : at + 4] = chance.choice((-1, 0, 1, 2**31 - 1)).to_bytes(4, "little", signed=True)
    return bytes(changed)


def mutated_text(text: str, chance: random.Random) -> bytes:
    """Lines dropped, doubled, swapped or replaced; now and then bytes as well."""
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines.insert(at, chance.choice(LINES))
            case 4:
                key, colon, _ = lines[at].partition(":")
                lines[at] = key + colon + " " + repr(chance.choice(VALUES)).encode("utf-8", "replace").decode()
            case 5:
                lines[at] = " " * chance.randrange(4) + lines[at]
        lines = lines or [""]
    data = "\n".join(lines).encode() + b"\n"
    return mutated_bytes(data, chance) if chance.random() < 0.15 else data


def mutated_data(data: Any, chance: random.Random) -> Any:
    """JSON-like `data` with some of its values, keys and entries replaced, removed or doubled."""
    changed = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(changed))
        if not places:
            return chance.choice(VALUES)
        parent, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case 2 if isinstance(parent, dict):
                parent[chance.choice(WORDS)] = parent.pop(key)
            case _:
                parent[key] = copy.deepcopy(chance.choice(VALUES))
    return changed


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


def refused_or_done(work: Callable[[], Any]) -> Any:
    """What `work` returns; None where it says what is wrong with its input. Anything else is a bug, and raised."""
    try:
        return work()
    except NanogptError as error:
        text = str(error)
        assert text and "Traceback" not in text
        return None
