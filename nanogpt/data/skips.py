"""What `prep-text` leaves out, and why: counted by reason, with the first places of each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

KEPT_EXAMPLES = 3
KEPT_LOSSES = 10
# Read, but nothing is in them; anything else left out of a file that the user named is a loss.
HARMLESS = ("empty", "given twice", "no text in ")


class Skip(NamedTuple):
    """Something that was left out: why, where it is (`file` or `file:line`), and a note on it."""

    reason: str
    place: str
    note: str = ""


@dataclass
class Skips:
    """How many things were left out for each reason, and the first places of each.

    `losses` are those that the user named and that could not be read, `first_losses` the first of them, in words.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    losses: int = 0
    first_losses: list[str] = field(default_factory=list)

    def add(self, reason: str, place: str, *, note: str = "", count: int = 1, named: bool = False) -> None:
        """Count one more, or `count`; an empty `place` is not an example. `named`: the user named the file."""
        if not count:
            return
        self.counts[reason] = self.counts.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if place and len(examples) < KEPT_EXAMPLES:
            examples.append(as_text(place) + (f" ({note})" if note else ""))
        if named and not reason.startswith(HARMLESS):
            self.losses += count
            if len(self.first_losses) < KEPT_LOSSES:
                self.first_losses.append(f"{as_text(place)}: {reason}" + (f" ({note})" if note else ""))

    @classmethod
    def joined(cls, *parts: Skips) -> Skips:
        """The sum of `parts`, reasons in alphabetical order."""
        reasons = sorted({reason for part in parts for reason in part.counts})
        joined = cls(losses=sum(part.losses for part in parts))
        for part in parts:
            joined.first_losses += part.first_losses[: KEPT_LOSSES - len(joined.first_losses)]
        for reason in reasons:
            places = [place for part in parts for place in part.examples.get(reason, [])]
            joined.counts[reason] = sum(part.counts.get(reason, 0) for part in parts)
            joined.examples[reason] = places[:KEPT_EXAMPLES]
        return joined


def as_text(path: str) -> str:
    """`path`, with bytes that are not UTF-8 written as `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def listed(names: Iterable[str], most: int = 10, longest: int = 40) -> str:
    """Names from a file, fit to be shown: control characters escaped, long names and long lists cut."""
    shown = [
        name if name.isprintable() else ascii(name) for name in (name[:longest] for name in islice(names, most + 1))
    ]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
