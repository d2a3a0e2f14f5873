"""What `prep-text` leaves out, and why: counted by reason, with the first places of each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT_EXAMPLES = 3


class Skip(NamedTuple):
    """Something that was left out: why, and where it stands (`file` or `file:line`)."""

    reason: str
    place: str


@dataclass
class Skips:
    """How many things were left out for each reason, and the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Count one more, or `count`; an empty `place` is no example."""
        if not count:
            return
        self.counts[reason] = self.counts.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if place and len(examples) < KEPT_EXAMPLES:
            examples.append(printable(place))

    @classmethod
    def joined(cls, *parts: Skips) -> Skips:
        """The sum of `parts`, reasons in alphabetical order."""
        reasons = sorted({reason for part in parts for reason in part.counts})
        joined = cls()
        for reason in reasons:
            places = [place for part in parts for place in part.examples.get(reason, [])]
            joined.counts[reason] = sum(part.counts.get(reason, 0) for part in parts)
            joined.examples[reason] = places[:KEPT_EXAMPLES]
        return joined


def printable(path: str) -> str:
    """`path` with those bytes that are not UTF-8 written as `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
