"""Recipes: YAML files that inherit from one another and resolve to a `RunSpec`.

A recipe may name a `base` (a path beside itself). Mappings are merged key by key, lists and values replace; a mapping
whose `kind` differs from the base's replaces it whole. Every value remembers the file and line it came from, so that
an error can point there. Command-line overrides (`--set training.stages.0.batch_tokens=65536`) come last.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nanogpt.errors import InputError
from nanogpt.spec import CrossCheckError, RunSpec, shorten

KeyPath = tuple[str | int, ...]


class RecipeError(InputError):
    """A recipe that cannot be used. The message has one line for each problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 1e-10 is a float, `on` and `off` are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass
class _Source:
    """Plain data with the place (`file:line` or `--set ...`) that each key path came from."""

    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest thing that contains it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return "recipe"


def shipped_recipes() -> Path:
    """Directory of the recipes that come with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def find_recipe(name: str | Path) -> Path:
    """The recipe's path: `name` itself, else a shipped recipe of that name, with or without `.yaml`.

    Raises `InputError` naming the recipes there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    for candidate in (path.name, f"{path.name}.yaml"):
        shipped = shipped_recipes() / candidate
        if path.parent in (Path(), Path("recipes")) and shipped.is_file():
            return shipped
    known = sorted(file.stem for file in shipped_recipes().glob("*.yaml"))
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise InputError(f"{name}: no such recipe.{hint} Shipped recipes: {', '.join(known)}.")


def load_recipe(name: str | Path, overrides: Iterable[str] = (), steps: int | None = None) -> RunSpec:
    """Resolve a recipe to a validated `RunSpec`.

    Args:
        name: path of the recipe, or the name of a shipped one.
        overrides: `key.path=value` strings; values are YAML.
        steps: shorten the schedule in proportion to this many steps.

    Raises:
        RecipeError: every problem found, each with file, line and key.
        InputError: no such recipe.
    """
    source = _read(find_recipe(name), ())
    problems: list[str] = []
    for override in overrides:
        try:
            _override(source, override)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(problems)
    try:
        spec = RunSpec.model_validate(source.data)
        return spec if steps is None else shorten(spec, steps)
    except ValidationError as error:
        raise RecipeError(list(dict.fromkeys(_explain(error, source)))) from None
    except CrossCheckError as error:
        raise RecipeError([f"--steps {steps}: {text}" for _, text in error.problems]) from None


def dump_spec(spec: RunSpec) -> str:
    """The fully resolved spec as YAML that `load_recipe` reads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, width=110, default_flow_style=None)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file for editors: `RunSpec`'s, with `base` and with nothing required (it may inherit)."""
    schema = RunSpec.model_json_schema()

    def relax(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("required"), list):
                del node["required"]
            for child in node.values():
                relax(child)
        elif isinstance(node, list):
            for child in node:
                relax(child)

    relax(schema)
    schema["properties"] = {
        "base": {"type": "string", "description": "recipe to inherit from, a path relative to this file"},
        **schema["properties"],
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "NanoGPT speedrun recipe"
    return schema


def schema_text() -> str:
    """`recipe_schema` as the text of recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


# --- reading ----------------------------------------------------------------------------------------------------


def _read(path: Path, chain: tuple[Path, ...]) -> _Source:
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(file.name for file in (*chain, resolved))
        raise RecipeError([f"{path}: recipes inherit in a circle: {names}"])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot be read: {error}"]) from error
    source = _Source({})
    try:
        node = yaml.compose(text, Loader=_Loader)
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError([f"{path}:1: a recipe is a mapping of keys to values, found {_kind_of(node)}"])
        source.data = _plain(node, (), str(path), source.places)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError([f"{path}:{line}: not valid YAML: {error.problem}"]) from None

    base_name = source.data.pop("base", None)
    if base_name is None:
        return source
    place = source.places.pop(("base",))
    if not isinstance(base_name, str):
        raise RecipeError([f"{place}: base: found {base_name!r}, expected the path of a recipe"])
    base_path = path.parent / base_name
    if not base_path.is_file():
        siblings = sorted(file.name for file in base_path.parent.glob("*.yaml"))
        close = difflib.get_close_matches(base_path.name, siblings, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RecipeError([f"{place}: base: {base_path} does not exist{hint}"])
    base = _read(base_path, (*chain, resolved))
    _merge(base, source, ())
    return base


def _kind_of(node: yaml.Node | None) -> str:
    return "nothing" if node is None else f"a {str(node.tag).rpartition(':')[2]}"


def _plain(node: yaml.Node, path: KeyPath, file: str, places: dict[KeyPath, str]) -> Any:
    places[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError([f"{place}: a key must be a plain word, found {_kind_of(key_node)}"])
            key = str(key_node.value)
            if key in result:
                raise RecipeError([f"{place}: {'.'.join(map(str, (*path, key)))}: stands twice in this mapping"])
            result[key] = _plain(value_node, (*path, key), file, places)
            places[(*path, key)] = place
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, index), file, places) for index, child in enumerate(node.value)]
    return _construct(node)


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _merge(base: _Source, child: _Source, path: KeyPath) -> None:
    """Lay `child`'s mapping at `path` over `base`'s."""
    base_map, child_map = _get(base.data, path), _get(child.data, path)
    for key, value in child_map.items():
        here = (*path, key)
        old = base_map.get(key)
        other_kind = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) != old.get("kind")
        )
        if isinstance(value, dict) and isinstance(old, dict) and not other_kind:
            base.places[here] = child.places[here]
            _merge(base, child, here)
            continue
        base_map[key] = value
        for old_path in [p for p in base.places if p[: len(here)] == here]:
            del base.places[old_path]
        base.places.update({p: place for p, place in child.places.items() if p[: len(here)] == here})


def _get(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


def _override(source: _Source, text: str) -> None:
    keys, separator, value_text = text.partition("=")
    if not separator or not keys.strip():
        raise InputError(f"--set {text}: expected key.path=value, for example --set training.seed=1")
    try:
        value = yaml.load(value_text, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"--set {text}: the value is not valid YAML; quote it") from None
    words = keys.strip().split(".")
    path: KeyPath = ()
    parent: Any = source.data
    for depth, name in enumerate(words):
        where = ".".join(map(str, path))
        key: str | int = name
        if isinstance(parent, list):
            if not name.isdigit() or int(name) >= len(parent):
                raise InputError(f"--set {text}: {where} has entries 0..{len(parent) - 1}, found {name!r}")
            key = int(name)
        elif not isinstance(parent, dict):
            raise InputError(f"--set {text}: {where} is the value {parent!r}, it has no keys")
        path = (*path, key)
        if depth == len(words) - 1:
            parent[key] = value
        else:
            if isinstance(parent, dict) and parent.get(key) is None:
                parent[key] = {}
            parent = parent[key]
    for old_path in [p for p in source.places if p[: len(path)] == path]:
        del source.places[old_path]
    source.places[path] = f"--set {text}"


# --- explaining -------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, source: _Source) -> Iterable[str]:
    for details in error.errors(include_url=False):
        cross = details.get("ctx", {}).get("error")
        if isinstance(cross, CrossCheckError):
            for path, text in cross.problems:
                yield f"{source.place(path)}: {'.'.join(map(str, path))}: {text}"
        else:
            yield _explain_one(details, source)


def _explain_one(details: ErrorDetails, source: _Source) -> str:
    path = _path_in_data(details["loc"], source.data, keep_last=details["type"] in ("missing", "extra_forbidden"))
    name = ".".join(map(str, path)) or "recipe"
    place = source.place(path)
    found = details["input"]
    if details["type"] == "extra_forbidden":
        allowed = _keys_at(path[:-1], source.data)
        return f"{place}: {name}: unknown key{_nearest(str(path[-1]), allowed)}; allowed keys: {', '.join(allowed)}"
    if details["type"] == "missing":
        return f"{source.place(path[:-1])}: {name}: is missing; add it, or inherit it with `base: speedrun.yaml`"
    if details["type"] == "union_tag_not_found":
        return (
            f"{place}: {name}.kind: is missing; allowed: {details['ctx']['expected_tags']}"
            if "ctx" in details
            else name
        )
    if details["type"] == "union_tag_invalid":
        return (
            f"{source.place((*path, 'kind'))}: {name}.kind: found {details['ctx']['tag']!r},"
            f" allowed: {details['ctx']['expected_tags']}"
        )
    if details["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        return f"{place}: {name}: found {found!r}{_nearest(str(found), allowed)}; allowed: {details['ctx']['expected']}"
    message = details["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("Input should", "must")
    shown = repr(found) if len(repr(found)) < 80 else repr(found)[:77] + "..."
    return f"{place}: {name}: {message}, found {shown}"


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _path_in_data(loc: tuple[str | int, ...], data: Any, *, keep_last: bool) -> KeyPath:
    """Pydantic's location without the names of union members, which are no keys of the recipe."""
    path: list[str | int] = []
    for position, key in enumerate(loc):
        inside = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if inside:
            data = data[key]
            path.append(key)
        elif keep_last and position == len(loc) - 1:
            path.append(key)
    return tuple(path)


def _keys_at(path: KeyPath, data: Any) -> list[str]:
    """Keys that the spec allows in the mapping at `path` of `data`."""
    annotation: Any = RunSpec
    for key in path:
        data = data[key]
        models = [m for m in _models_in(annotation) if isinstance(key, str) and key in m.model_fields]
        annotation = models[0].model_fields[str(key)].annotation if models else _item_of(annotation)
        if isinstance(data, dict) and "kind" in data:
            tagged = [m for m in _models_in(annotation) if "kind" in m.model_fields and data["kind"] in _literals(m)]
            annotation = tagged[0] if tagged else annotation
    names = [name for model in _models_in(annotation) for name in model.model_fields]
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
