"""Classes that are named in a registry, one line each, as `module:Class`."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Sequence
from typing import Any


def classes_of(registry: Sequence[str]) -> tuple[Any, ...]:
    """The classes, in the registry's order."""
    parts = (name.split(":") for name in registry)
    return tuple(getattr(importlib.import_module(module), name) for module, name in parts)


def union_of(registry: Sequence[str]) -> Any:
    """The type that any of the classes is."""
    return functools.reduce(operator.or_, classes_of(registry))
