"""Recipes: YAML files that inherit from one another and resolve to a `RunSpec`.

A recipe may name a `base` (a path relative to itself). Mappings are merged key by key, lists and values replace; a
mapping whose `kind` differs from the base's replaces it whole. Command-line overrides
(`--set training.stages.0.batch_tokens=65536`) come last, after `--on 4xh200`, which replaces `hardware`. Hardware may
also be left open, to be filled in from what is at hand. Text and places: `nanogpt.recipe_yaml`; words for what is
wrong: `nanogpt.recipe_problems`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanogpt.errors import InputError
from nanogpt.files import open_regular
from nanogpt.hardware import Fill, parse_shape, shape, split_shape
from nanogpt.recipe_problems import explain
from nanogpt.recipe_yaml import MAX_BYTES, KeyPath, RecipeError, Source, dotted, dump_yaml, parse_yaml
from nanogpt.spec import CrossCheckError, HardwareSpec, RunSpec

# Keys of older recipes and runs, and their present names.
RENAMED: Mapping[KeyPath, str] = {("runtime", "bigram_gradient"): "row_gradients"}

# What an open recipe is checked for when nothing is started: the machine of the public records.
USUAL = HardwareSpec(gpu="h100", gpus_per_node=8)

MAX_BASES = 20


def shipped_recipes() -> Path:
    """Directory of the recipes that come with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def own_keys(path: Path) -> tuple[str | None, set[str]]:
    """What the recipe file itself says: the name of its base, if any, and its other top-level keys."""
    data = dict(parse_yaml(path.read_text(encoding="utf-8"), str(path), lambda line: f"{path}:{line}").data)
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
        problems = list(dict.fromkeys(explain(error, source)))
        if left_open and fill is None and _fits(source, gpus_per_node=1):
            why = f" (checked for {shape(USUAL)}, as {name} leaves hardware open; --on names another)"
            problems = [f"{problem}{why}" for problem in problems]
        raise RecipeError(problems) from None
    except CrossCheckError as error:
        raise RecipeError([f"--steps {steps}: {text}" for _, text in error.problems]) from None


def _keep_overrides(source: Source, whole: Any, short: Any, path: KeyPath = ()) -> None:
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
    return dump_yaml(spec.model_dump(mode="json", exclude=exclude), ascii_only=ascii_only)


def publishable_spec(spec: RunSpec) -> str:
    """`dump_spec` without the directories of the machine that the run was made on."""
    places = {name: getattr(spec, name).model_copy(update={"directory": None}) for name in ("data", "output")}
    return dump_spec(spec.model_copy(update=places))


# --- hardware ---------------------------------------------------------------------------------------------------


def _left_open(source: Source) -> set[str]:
    stated = source.data.get("hardware") or {}
    if not isinstance(stated, dict):
        return set()
    missing = HardwareSpec.model_fields.keys() - stated.keys()
    return set(missing) if missing & {"gpu", "gpus_per_node"} else set()


def _fill_in(source: Source, fill: Fill, left_open: set[str]) -> None:
    stated = source.data["hardware"] = dict(source.data.get("hardware") or {})
    values, place = fill(stated)
    for key in left_open & values.keys():
        stated[key] = values[key]
        source.places["hardware", key] = place


def _as_usual(stated: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    return USUAL.model_dump(exclude={"nodes"}), f"hardware as {shape(USUAL)}"


def _fits(source: Source, **hardware: Any) -> bool:
    """Whether the recipe is valid with other hardware."""
    try:
        RunSpec.model_validate({**source.data, "hardware": {**source.data["hardware"], **hardware}})
    except ValidationError:
        return False
    return True


# --- reading ----------------------------------------------------------------------------------------------------


def _laid_over(name: str | Path, overrides: Iterable[str], on: str | None) -> Source:
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


def _read(path: Path, chain: tuple[Path, ...]) -> Source:
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
    source = parse_yaml(text, str(path), lambda line: f"{path}:{line}")
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


def _rename(source: Source) -> None:
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


def _merge(base: Source, child: Source, path: KeyPath) -> None:
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


def _override(source: Source, text: str) -> None:
    """Apply one `key.path=value`; the value is YAML and replaces what was there."""
    place = f"--set {text}"
    keys, separator, value_text = text.partition("=")
    words = keys.strip().split(".")
    if not separator or not all(words):
        raise RecipeError([f"{place}: expected key.path=value, for example --set training.seed=1"])
    value = parse_yaml(value_text, place, lambda _: place).data
    path: KeyPath = ()
    parent: Any = source.data
    for depth, name in enumerate(words):
        key: str | int = name
        if isinstance(parent, list):
            if not re.fullmatch("[0-9]+", name) or int(name) >= len(parent):
                raise RecipeError([f"{place}: {dotted(path)} has {_entries(parent)}, found {name!r}"])
            key = int(name)
        elif not isinstance(parent, dict):
            raise RecipeError([f"{place}: {dotted(path)} is the value {parent!r}, which has no keys"])
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


def _come_from(source: Source, path: KeyPath, place: str) -> None:
    """Note that everything at `path` now comes from `place`."""
    for old_path in [p for p in source.places if p[: len(path)] == path]:
        del source.places[old_path]
    source.places[path] = place


def _entries(items: list[Any]) -> str:
    return f"entries 0..{len(items) - 1}" if items else "no entries"
