"""Where two specs differ, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanogpt.spec import RunSpec


def spec_differences(one: RunSpec, other: RunSpec) -> Iterator[tuple[str, Any, Any]]:
    """(key path with dots, value in `one`, value in `other`) wherever they differ; a missing part is None."""
    return differences(one.model_dump(mode="json"), other.model_dump(mode="json"))


def differences(one: Any, other: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """The same for two dumped specs; `path` is put before the keys."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from differences(one.get(key), other.get(key), (*path, str(key)))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, (*path, str(index)))
    elif one != other:
        yield ".".join(path), one, other
