"""Recipes: YAML files that inherit from one another and resolve to a `RunSpec`.

A recipe may name a `base` (a path relative to itself). Mappings are merged key by key, lists and values replace; a
mapping whose `kind` differs from the base's replaces it whole. Every value remembers its file and line, so that errors
can point there. Command-line overrides (`--set training.stages.0.batch_tokens=65536`) come last, after `--on 4xh200`,
which replaces `hardware`. Hardware may also be left open, to be filled in from what is at hand.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nanogpt.errors import InputError
from nanogpt.files import open_regular
from nanogpt.hardware import Fill, parse_shape, shape, split_shape
from nanogpt.spec import CrossCheckError, HardwareSpec, RunSpec

KeyPath = tuple[str | int, ...]

# Keys of older recipes and runs, and their present names.
RENAMED: Mapping[KeyPath, str] = {("runtime", "bigram_gradient"): "row_gradients"}

# What an open recipe is checked for when nothing is started: the machine of the public records.
USUAL = HardwareSpec(gpu="h100", gpus_per_node=8)


class RecipeError(InputError):
    """A recipe that cannot be used. The message has one line for each problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        named = self.problems[:MAX_PROBLEMS]
        more = len(self.problems) - len(named)
        super().__init__("\n".join([*named, *([f"and {more} more problems"] if more else [])]))


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

# The longest recipe here has 2 % of these.
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # values
MAX_DEPTH = 40
MAX_KEY = 200  # characters
MAX_BASES = 20
MAX_PROBLEMS = 40  # reported at once


@dataclass
class _Source:
    """Plain data with the place (`file:line` or `--set ...`) that each key path came from."""

    data: Any
    places: dict[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of its nearest container."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return "recipe"


def shipped_recipes() -> Path:
    """Directory of the recipes that come with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def own_keys(path: Path) -> tuple[str | None, set[str]]:
    """What the recipe file itself says: the name of its base, if any, and its other top-level keys."""
    data = dict(_parse(path.read_text(encoding="utf-8"), str(path), lambda line: f"{path}:{line}").data)
    base = data.pop("base", None)
    return (None if base is None else Path(base).stem), set(data)


def find_recipe(name: str | Path) -> Path:
    """The recipe's path: `name` itself, else a shipped recipe of that name, with or without `.yaml`.

    Raises `InputError`: no such file, a directory, or no such recipe.
    """
    path = Path(name)
    if _is_file(path):
        return path
    for candidate in (path.name, f"{path.name}.yaml"):
        shipped = shipped_recipes() / candidate
        if path.parent in (Path(), Path("recipes")) and shipped.is_file():
            return shipped
    if path.exists() and not path.is_dir():  # reading it says what is wrong
        return path
    if parts := _recipe_and_shape(path.name):
        recipe, on = parts
        raise InputError(
            f"{name}: a recipe no longer says hardware in its name. Type {recipe} --on {on}, as in"
            f" `nanogpt train {recipe} --on {on}`"
        )
    if path.is_dir() and str(name):
        raise InputError(f"{name}: is a directory; name a recipe in it, such as {path / 'NAME.yaml'}")
    known = sorted(file.stem for file in shipped_recipes().glob("*.yaml"))
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    what = "no such file" if path.suffix in (".yaml", ".yml") or path.name != str(name) else "no such recipe"
    raise InputError(f"{name}: {what}.{hint} `nanogpt recipes` lists the recipes of this package")


def _is_file(path: Path) -> bool:
    """Whether `path` is a file. Raises `InputError` if that cannot be determined."""
    try:
        return path.is_file()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _recipe_and_shape(file_name: str) -> tuple[str, str] | None:
    """The shipped recipe and the hardware that a name such as `record89-4xh200.yaml` is made of."""
    parts = split_shape(file_name.removesuffix(".yaml"))
    return parts if parts and (shipped_recipes() / f"{parts[0]}.yaml").is_file() else None


def load_recipe(
    name: str | Path,
    overrides: Iterable[str] = (),
    steps: int | None = None,
    *,
    on: str | None = None,
    fill: Fill | None = None,
) -> RunSpec:
    """Resolve a recipe to a validated `RunSpec`; see `resolve_recipe`."""
    return resolve_recipe(name, overrides, steps, on=on, fill=fill)[0]


def resolve_recipe(
    name: str | Path,
    overrides: Iterable[str] = (),
    steps: int | None = None,
    *,
    on: str | None = None,
    fill: Fill | None = None,
) -> tuple[RunSpec, set[str]]:
    """Resolve a recipe to a validated `RunSpec`, and the keys of `hardware` that it leaves open.

    Nothing is open if the recipe, `on` or `overrides` give type and number of GPUs.

    Args:
        name: path of the recipe, or the name of a shipped one.
        overrides: `key.path=value` strings; values are YAML.
        steps: shorten the schedule in proportion to this many steps. Overridden values stay as they are, except
            for the lengths of stages, which are shares of the whole.
        on: hardware instead of the recipe's, such as `4xh200`.
        fill: fills in hardware that is left open; None: as `USUAL`, for recipes that are only inspected.

    Raises:
        RecipeError: every problem found, each with file, line and key.
        InputError: no such recipe or hardware; and what `fill` raises.
    """
    source = _laid_over(name, overrides, on)
    left_open = _left_open(source)
    if left_open:
        _fill_in(source, fill or _as_usual, left_open)
    try:
        spec = RunSpec.model_validate(source.data)
        if steps is not None:
            data = shorten(spec, steps).model_dump()
            _keep_overrides(source, spec.model_dump(), data)
            spec = RunSpec.model_validate(data)
        return spec, left_open
    except ValidationError as error:
        problems = list(dict.fromkeys(_explain(error, source)))
        if left_open and fill is None and _fits(source, gpus_per_node=1):
            why = f" (checked for {shape(USUAL)}, as {name} leaves hardware open; --on names another)"
            problems = [f"{problem}{why}" for problem in problems]
        raise RecipeError(problems) from None
    except CrossCheckError as error:
        raise RecipeError([f"--steps {steps}: {text}" for _, text in error.problems]) from None


def _keep_overrides(source: _Source, whole: Any, short: Any, path: KeyPath = ()) -> None:
    """Restore in `short` what the user overrode in `whole` with --set."""
    if path[:2] in (("training", "stages"), ("training", "extension")):
        return
    for key in whole.keys() & short.keys() if isinstance(whole, dict) else range(min(len(whole), len(short))):
        here = (*path, key)
        if isinstance(whole[key], dict | list) and isinstance(short[key], dict | list):
            _keep_overrides(source, whole[key], short[key], here)
        elif source.place(here).startswith("--set "):
            short[key] = whole[key]


def shorten(spec: RunSpec, total_steps: int) -> RunSpec:
    """The same run with its schedule shortened in proportion to `total_steps` steps.

    Stages, extension, evaluation interval, warm-up and ramps of momentum and learning rate, and the averages at the end
    keep their shares of the run.
    Raises `CrossCheckError` for fewer steps than stages.
    """
    training = spec.training
    old_total = training.total_steps
    if total_steps < len(training.all_stages):
        raise CrossCheckError(
            [(("training",), f"a run of {total_steps} steps has no room for its {len(training.all_stages)} stages")]
        )
    ends, old_end = [0], 0
    for position, stage in enumerate(training.all_stages):
        old_end += stage.steps
        stages_left = len(training.all_stages) - position - 1
        ends.append(min(max(round(old_end * total_steps / old_total), ends[-1] + 1), total_steps - stages_left))
    lengths = [end - start for start, end in itertools.pairwise(ends)]

    def scaled(steps: int, at_least: int = 0) -> int:
        return max(at_least, round(steps * total_steps / old_total))

    data = spec.model_dump()
    for stage_data, steps in zip(
        [*data["training"]["stages"], *([data["training"]["extension"]] if training.extension else [])],
        lengths,
        strict=True,
    ):
        stage_data["steps"] = steps
    if spec.evaluation.every is not None:
        data["evaluation"]["every"] = scaled(spec.evaluation.every, at_least=1)
    schedule = data["training"]["lr_schedule"]
    schedule.update({name: scaled(steps) for name, steps in schedule.items() if name.endswith("_steps")})
    data["training"]["end"] = [entry.shortened(scaled, old_total, total_steps) for entry in training.end]
    data["optimizer"] = spec.optimizer.shortened(scaled, total_steps)
    return RunSpec.model_validate(data)


def dump_spec(spec: RunSpec, exclude: Mapping[str, Any] | None = None, *, ascii_only: bool = False) -> str:
    """The fully resolved spec as YAML, which `load_recipe` reads back to an equal spec; `exclude` is Pydantic's."""
    return yaml.dump(
        spec.model_dump(mode="json", exclude=exclude),
        Dumper=_Dumper,
        sort_keys=False,
        width=110,
        default_flow_style=None,
        allow_unicode=not ascii_only,
    )


def publishable_spec(spec: RunSpec) -> str:
    """`dump_spec` without the directories of the machine that the run was made on."""
    places = {name: getattr(spec, name).model_copy(update={"directory": None}) for name in ("data", "output")}
    return dump_spec(spec.model_copy(update=places))


def recipe_schema(*, resolved: bool = False) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors, or of a resolved `RunSpec`.

    In a recipe nothing is required, as it may inherit, except in the entries of a list, which replaces the base's list
    completely; and there is `base`. A part with several possible kinds need not say which: `oneOf` would refuse what
    fits several, so it becomes `anyOf`.
    """
    schema = RunSpec.model_json_schema()
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    if resolved:
        return {**dialect, **schema}
    required = {f"#/$defs/{name}": part.get("required", []) for name, part in schema["$defs"].items()}

    def relax(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                relax(child)
        if not isinstance(node, dict):
            return
        if isinstance(node.get("title"), str):
            del node["title"]
        if isinstance(node.get("required"), list):
            del node["required"]
        if isinstance(node.get("oneOf"), list):
            node["anyOf"] = node.pop("oneOf")
            node.pop("discriminator", None)
        for child in node.values():
            relax(child)
        items = node.get("items", {})
        if items.get("$ref") in required:
            items["required"] = required[items["$ref"]]

    relax(schema)
    schema["properties"] = {
        "base": {"type": "string", "description": "recipe to inherit from: a path relative to this file"},
        **schema["properties"],
    }
    return {**dialect, "title": "NanoGPT speedrun recipe", **schema}


def schema_text(*, resolved: bool = False) -> str:
    """`recipe_schema` as JSON text; without `resolved` that of recipes/schema.json."""
    return json.dumps(recipe_schema(resolved=resolved), indent=1) + "\n"


# --- hardware ---------------------------------------------------------------------------------------------------


def _left_open(source: _Source) -> set[str]:
    stated = source.data.get("hardware") or {}
    if not isinstance(stated, dict):
        return set()
    missing = HardwareSpec.model_fields.keys() - stated.keys()
    return set(missing) if missing & {"gpu", "gpus_per_node"} else set()


def _fill_in(source: _Source, fill: Fill, left_open: set[str]) -> None:
    stated = source.data["hardware"] = dict(source.data.get("hardware") or {})
    values, place = fill(stated)
    for key in left_open & values.keys():
        stated[key] = values[key]
        source.places["hardware", key] = place


def _as_usual(stated: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    return USUAL.model_dump(exclude={"nodes"}), f"hardware as {shape(USUAL)}"


def _fits(source: _Source, **hardware: Any) -> bool:
    """Whether the recipe is valid with other hardware."""
    try:
        RunSpec.model_validate({**source.data, "hardware": {**source.data["hardware"], **hardware}})
    except ValidationError:
        return False
    return True


# --- reading ----------------------------------------------------------------------------------------------------


def _laid_over(name: str | Path, overrides: Iterable[str], on: str | None) -> _Source:
    """The recipe over its bases, then `on`, then `overrides`."""
    source = _read(find_recipe(name), ())
    if on is not None:
        source.data["hardware"] = parse_shape(on)
        _come_from(source, ("hardware",), f"--on {on}")
    problems: list[str] = []
    for override in overrides:
        try:
            _override(source, override)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    _rename(source)
    return source


def _read(path: Path, chain: tuple[Path, ...]) -> _Source:
    """The recipe at `path` laid over its bases; `chain`: the recipes that led here."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError([f"{path}: is larger than {MAX_BYTES:,} bytes, the limit of a recipe"])
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from None
    source = _parse(text, str(path), lambda line: f"{path}:{line}")
    if not isinstance(source.data, dict):
        raise RecipeError([f"{path}:1: a recipe is a mapping of keys to values, found {_kind_of(source.data)}"])

    _rename(source)
    base_name = source.data.pop("base", None)
    place = source.places.pop(("base",), str(path))
    if base_name is None:
        return source
    if not isinstance(base_name, str):
        raise RecipeError([f"{place}: base: found {base_name!r}, expected the path of a recipe"])
    base_path = _find_base(path, base_name, place)
    chain = (*chain, path.resolve())
    if base_path.resolve() in chain:
        names = " -> ".join(file.name for file in (*chain, base_path))
        raise RecipeError([f"{place}: base: recipes inherit in a circle: {names}"])
    if len(chain) > MAX_BASES:
        raise RecipeError([f"{place}: base: more than {MAX_BASES} recipes inherit from one another"])
    base = _read(base_path, chain)
    _merge(base, source, ())
    return base


def _find_base(path: Path, name: str, place: str) -> Path:
    """`name` beside the recipe at `path`, else the shipped recipe of that name."""
    beside = path.parent / name
    try:
        if beside.is_file():
            return beside
    except OSError as error:
        raise RecipeError([f"{place}: base: {beside}: {error.strerror}"]) from None
    if Path(name).name == name and (shipped_recipes() / name).is_file():
        return shipped_recipes() / name
    if parts := _recipe_and_shape(Path(name).name):
        raise RecipeError(
            [
                f"{place}: base: a recipe no longer says hardware in its name. Write base: {parts[0]}.yaml, and start"
                f" it with --on {parts[1]}"
            ]
        )
    names = sorted({file.name for folder in (beside.parent, shipped_recipes()) for file in folder.glob("*.yaml")})
    close = difflib.get_close_matches(beside.name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RecipeError([f"{place}: base: {beside} does not exist and no shipped recipe is called {name}{hint}"])


def _parse(text: str, name: str, place: Callable[[int], str]) -> _Source:
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
                problems.append(f"{here}: {_dotted(path)}: cannot be read as {node.tag.rpartition(':')[2]}: {error}")
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
            dotted = _dotted((*path, key))
            if key == "<<":
                problems.append(
                    f"{here}: {dotted}: merge keys are not supported; repeat the keys, or inherit by `base:`"
                )
            elif key in result:
                problems.append(f"{here}: {dotted}: appears twice in this mapping, first at {places[(*path, key)]}")
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
    return _Source(data, places)


def _rename(source: _Source) -> None:
    """Give renamed keys their new names."""
    for (*folder, old), new in RENAMED.items():
        part: Any = source.data
        for key in folder:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and old in part:
            part[new] = part.pop(old)
            source.places[(*folder, new)] = source.places.pop((*folder, old))


def _kind_of(data: Any) -> str:
    names = {type(None): "nothing", list: "a list"}
    return names.get(type(data), f"the value {data!r}")


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
        if isinstance(old, dict | list):
            for old_path in [p for p in base.places if p[: len(here)] == here]:
                del base.places[old_path]
        if isinstance(value, dict | list):
            base.places.update({p: place for p, place in child.places.items() if p[: len(here)] == here})
        base.places[here] = child.places[here]


def _get(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


def _override(source: _Source, text: str) -> None:
    """Apply one `key.path=value`; the value is YAML and replaces what was there."""
    place = f"--set {text}"
    keys, separator, value_text = text.partition("=")
    words = keys.strip().split(".")
    if not separator or not all(words):
        raise RecipeError([f"{place}: expected key.path=value, for example --set training.seed=1"])
    value = _parse(value_text, place, lambda _: place).data
    path: KeyPath = ()
    parent: Any = source.data
    for depth, name in enumerate(words):
        key: str | int = name
        if isinstance(parent, list):
            if not re.fullmatch("[0-9]+", name) or int(name) >= len(parent):
                raise RecipeError([f"{place}: {_dotted(path)} has {_entries(parent)}, found {name!r}"])
            key = int(name)
        elif not isinstance(parent, dict):
            raise RecipeError([f"{place}: {_dotted(path)} is the value {parent!r}, which has no keys"])
        path = (*path, key)
        if depth == len(words) - 1:
            parent[key] = value
        elif isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = {}
            source.places[path] = place
            parent = parent[key]
        else:
            parent = parent[key]
    _come_from(source, path, place)


def _come_from(source: _Source, path: KeyPath, place: str) -> None:
    """Note that everything at `path` now comes from `place`."""
    for old_path in [p for p in source.places if p[: len(path)] == path]:
        del source.places[old_path]
    source.places[path] = place


def _entries(items: list[Any]) -> str:
    return f"entries 0..{len(items) - 1}" if items else "no entries"


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


# --- explaining -------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, source: _Source) -> Iterable[str]:
    found = error.errors(include_url=False)
    if any(details["loc"][:1] == ("model",) for details in found):  # then its table could not fill the optimizer's part
        found = [d for d in found if d["type"] != "missing" or d["loc"][0] != "optimizer" or len(d["loc"]) == 1]
    for details in found:
        cross = details.get("ctx", {}).get("error")
        if isinstance(cross, CrossCheckError):
            for path, text in cross.problems:
                yield f"{source.place(path)}: {_dotted(path)}: {text}"
        else:
            yield _explain_one(details, source)


def _explain_one(details: ErrorDetails, source: _Source) -> str:
    kind, found = details["type"], details["input"]
    path = _path_in_data(details["loc"], source.data, keep_last=kind in ("missing", "extra_forbidden"))
    name = _dotted(path) or "recipe"
    place = source.place(path)
    if kind == "extra_forbidden":
        allowed = _keys_at(path[:-1], source.data)
        return f"{place}: {name}: unknown key{_nearest(str(path[-1]), allowed)}; allowed keys: {', '.join(allowed)}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"{place}: {_dotted(path[:-1])}: has too few entries, entry {path[-1]} is missing"
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
