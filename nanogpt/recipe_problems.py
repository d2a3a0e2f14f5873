"""What is wrong with a recipe, in words: Pydantic's errors with file, line, key, value and what is allowed."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nanogpt.recipe_yaml import KeyPath, Source, dotted
from nanogpt.spec import CrossCheckError, RunSpec


def explain(error: ValidationError, source: Source) -> Iterable[str]:
    """A line for each problem that validating the source's data has found: place, key, what is wrong and allowed."""
    found = error.errors(include_url=False)
    if any(details["loc"][:1] == ("model",) for details in found):  # then its table could not fill the optimizer's part
        found = [d for d in found if d["type"] != "missing" or d["loc"][0] != "optimizer" or len(d["loc"]) == 1]
    for details in found:
        cross = details.get("ctx", {}).get("error")
        if isinstance(cross, CrossCheckError):
            for path, text in cross.problems:
                yield f"{source.place(path)}: {dotted(path)}: {text}"
        else:
            yield _explain_one(details, source)


def _explain_one(details: ErrorDetails, source: Source) -> str:
    kind, found = details["type"], details["input"]
    path = _path_in_data(details["loc"], source.data, keep_last=kind in ("missing", "extra_forbidden"))
    name = dotted(path) or "recipe"
    place = source.place(path)
    if kind == "extra_forbidden":
        allowed = _keys_at(path[:-1], source.data)
        return f"{place}: {name}: unknown key{_nearest(str(path[-1]), allowed)}; allowed keys: {', '.join(allowed)}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"{place}: {dotted(path[:-1])}: has too few entries, entry {path[-1]} is missing"
    if kind == "missing" and any(isinstance(key, int) for key in path):
        return f"{place}: {name}: is missing; add it (a list replaces the whole list of the base)"
    if kind == "missing":
        return f"{place}: {name}: is missing; add it, or inherit it from a recipe by `base:`"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        models = _models_in(_annotation_at(path, source.data))
        kinds = [str(value) for model in models for value in _literals(model)]
        allowed_text = f"allowed: {', '.join(kinds)}"
        if kind == "union_tag_not_found":
            return f"{place}: {name}.kind: is missing; {allowed_text}"
        tag = str(details["ctx"]["tag"])
        return f"{source.place((*path, 'kind'))}: {name}.kind: found {tag}{_nearest(tag, kinds)}; {allowed_text}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        return f"{place}: {name}: found {_show(found)}{_nearest(str(found), allowed)}; allowed: {', '.join(allowed)}"
    if kind == "value_error":
        return f"{place}: {name}: {details['ctx']['error']}, found {_show(found)}"
    message = _MESSAGES.get(kind) or re.sub(r"^\w+ should", "must", details["msg"])
    return f"{place}: {name}: {message}, found {_show(found)}"


_MESSAGES = {
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
}


def _show(value: Any) -> str:
    """A value as written in a recipe, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) < 80 else text[:77] + "..."


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _path_in_data(loc: tuple[str | int, ...], data: Any, *, keep_last: bool) -> KeyPath:
    """Pydantic's location without the `kind` after a mapping, which is not a key of the recipe."""
    path: list[str | int] = []
    kind: Any = None
    for position, key in enumerate(loc):
        if kind is not None and key == kind:
            kind = None
            continue
        inside = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if inside:
            data = data[key]
            path.append(key)
            kind = data.get("kind") if isinstance(data, dict) else None
        elif keep_last and position == len(loc) - 1:
            path.append(key)
    return tuple(path)


def _annotation_at(path: KeyPath, data: Any) -> Any:
    """The spec's type of what is at `path` in `data`."""
    annotation: Any = RunSpec
    for key in path:
        data = data[key]
        models = [m for m in _models_in(annotation) if isinstance(key, str) and key in m.model_fields]
        annotation = models[0].model_fields[str(key)].annotation if models else _item_of(annotation)
        if isinstance(data, dict) and "kind" in data:
            tagged = [m for m in _models_in(annotation) if "kind" in m.model_fields and data["kind"] in _literals(m)]
            annotation = tagged[0] if tagged else annotation
    return annotation


def _keys_at(path: KeyPath, data: Any) -> list[str]:
    """Keys that the spec allows in the mapping at `path` in `data`."""
    names = [name for model in _models_in(_annotation_at(path, data)) for name in model.model_fields]
    return list(dict.fromkeys([*names, *(["base"] if not path else [])]))


def _literals(model: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(model.model_fields["kind"].annotation)


def _item_of(annotation: Any) -> Any:
    """The element type of list[X] or dict[str, X]."""
    args = typing.get_args(annotation)
    return args[-1] if args else annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [model for arg in typing.get_args(annotation) for model in _models_in(arg)]
    return []
