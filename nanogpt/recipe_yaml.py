"""A recipe's text: YAML, of which every value remembers its file and line, so that errors can point there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nanogpt.errors import InputError

KeyPath = tuple[str | int, ...]

# The longest recipe here has 2 % of these.
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # values
MAX_DEPTH = 40
MAX_KEY = 200  # characters
MAX_PROBLEMS = 40  # reported at once


class RecipeError(InputError):
    """A recipe that cannot be used. The message has one line for each problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        named = self.problems[:MAX_PROBLEMS]
        more = len(self.problems) - len(named)
        super().__init__("\n".join([*named, *([f"and {more} more problems"] if more else [])]))


@dataclass
class Source:
    """Plain data with the place (`file:line` or `--set ...`) that each key path came from."""

    data: Any
    places: dict[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of its nearest container."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return "recipe"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-10 is a float, 010 is ten, `on` and 2026-01-01 are strings."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or `_Loader` would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes, PyYAML reads these line breaks back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _regexp, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_regexp})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, name: str, place: Callable[[int], str]) -> Source:
    """YAML text to plain data with the place of every key path; `place` turns a line number into one.

    Raises `RecipeError` with every problem of the text.
    """
    places: dict[KeyPath, str] = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            [f"{place(line)}: not valid YAML: contains the control character {chr(error.character)!r}"]
        ) from None
    nodes = 0

    def plain(node: yaml.Node, path: KeyPath) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MAX_NODES:
            raise RecipeError([f"{name}: more than {MAX_NODES:,} values; is it really a recipe?"])
        if len(path) > MAX_DEPTH:
            raise RecipeError([f"{name}: nested more than {MAX_DEPTH} deep; does an alias contain itself?"])
        here = place(node.start_mark.line + 1)
        places.setdefault(path, here)
        if isinstance(node, yaml.SequenceNode):
            return [plain(child, (*path, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return loader.construct_object(node, deep=True)
            except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a tag that does not fit
                problems.append(f"{here}: {dotted(path)}: cannot be read as {node.tag.rpartition(':')[2]}: {error}")
                return None
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{here}: a key must be a plain word, found a {key_node.id}")
                continue
            key = str(key_node.value)
            if len(key) > MAX_KEY:
                problems.append(f"{here}: a key of {len(key):,} characters, at most {MAX_KEY} allowed: {key[:40]}...")
                continue
            full = dotted((*path, key))
            if key == "<<":
                problems.append(f"{here}: {full}: merge keys are not supported; repeat the keys, or inherit by `base:`")
            elif key in result:
                problems.append(f"{here}: {full}: appears twice in this mapping, first at {places[(*path, key)]}")
            else:
                places[(*path, key)] = here
                result[key] = plain(value_node, (*path, key))
        return result

    try:
        node = loader.get_single_node()
        data = None if node is None else plain(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError([*problems, f"{place(line)}: not valid YAML: {error.problem}"]) from None
    except RecursionError:
        raise RecipeError([f"{name}: nested more than {MAX_DEPTH} deep; does an alias contain itself?"]) from None
    finally:
        loader.dispose()
    if problems:
        raise RecipeError(problems)
    return Source(data, places)


def dump_yaml(data: Any, *, ascii_only: bool = False) -> str:
    """YAML text of plain data, which `parse_yaml` reads back to equal data."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None, allow_unicode=not ascii_only
    )


def dotted(path: KeyPath) -> str:
    """As one types it after --set."""
    return ".".join(map(str, path))
