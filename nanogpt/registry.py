"""Registries: one line per kind, with its spec's class and the class built from it, each as `module:Class`.

The latter is loaded only when needed: specs need no torch.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Sequence
from typing import Any, get_args

Registry = Sequence[tuple[str, str]]


def load(name: str) -> Any:
    """The class `module:Class`."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def specs_of(registry: Registry) -> tuple[Any, ...]:
    """The specs' classes, in the registry's order."""
    return tuple(load(spec) for spec, _ in registry)


def union_of(registry: Registry) -> Any:
    """The union of the specs' types."""
    return functools.reduce(operator.or_, specs_of(registry))


def built_class(registry: Registry, spec: Any) -> Any:
    """The class that is built from `spec`."""
    own = f"{type(spec).__module__}:{type(spec).__qualname__}"
    return load(dict(registry)[own])


def kind_of(spec: type[Any]) -> str:
    """The `kind` of a spec's class."""
    kind: str = get_args(spec.model_fields["kind"].annotation)[0]
    return kind
