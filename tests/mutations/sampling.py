"""What sampling keeps of the tokens it has read."""

from __future__ import annotations

from mutation import PAST, Mutations

MUTATIONS = Mutations()
_add = MUTATIONS.add

_add("sampling's cache", PAST, "sees the document before", ("start=start, window", "start=0, window"))
_add("sampling's cache", PAST, "start of paired heads does not double", ("            start *= 2\n", ""))
_add("sampling's cache", PAST, "keeps the first rows", ("is None else both[-reach:]", "is None else both[:reach]"))
_add("sampling's cache", PAST, "mixes heads with the document before", ("max(0, self.start - first)", "0"))
_add("sampling's cache", PAST, "positions stay", ("self.length += tokens", "self.length = tokens"))
