"""Recipes: inheritance, overrides, error messages, hardware, round trips."""

import itertools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from recipe_files import problem_of, problems_of

from nanogpt.errors import InputError
from nanogpt.recipe import dump_spec, find_recipe, load_recipe, resolve_recipe, shipped_recipes
from nanogpt.recipe_yaml import RecipeError
from nanogpt.spec import RunSpec

SHIPPED = sorted(path.stem for path in shipped_recipes().glob("*.yaml"))
SPEEDRUN = load_recipe("speedrun")


# --- shipped recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_round_trip(name, recipe):
    spec = load_recipe(name)
    assert load_recipe(recipe(dump_spec(spec))) == spec
    assert load_recipe(recipe(spec.model_dump_json(indent=2))) == spec


@pytest.mark.parametrize(
    ("gpu", "count"),
    [*itertools.product(("h100", "h200", "a100"), (1, 2, 4, 8)), ("l40s", 1), ("l40s", 2), ("l40s", 4)],
)
def test_hardware_recipes_differ_in_hardware_and_name_only(gpu, count):
    spec = load_recipe(f"{count}x{gpu}")
    assert (spec.hardware.gpu, spec.world_size, spec.name) == (gpu, count, f"speedrun-{count}x{gpu}")
    assert spec.model_copy(update={"name": SPEEDRUN.name, "hardware": SPEEDRUN.hardware}) == SPEEDRUN


@pytest.mark.parametrize("name", ["8xh200", "8xh200.yaml", "recipes/8xh200.yaml", "recipes/8xh200"])
def test_shipped_recipes_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "speedrun-8xh200"


def test_a_file_comes_before_a_shipped_recipe(recipe, tmp_path, monkeypatch):
    recipe(dump_spec(SPEEDRUN.model_copy(update={"name": "mine"})), "8xh200")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("8xh200").name == "mine"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("8xh20", "no such recipe"),
        ("", "no such recipe"),
        ("8xh20.yaml", "no such file"),
        ("elsewhere/8xh20.yaml", "no such file"),
        ("recipes", "is a directory; name a recipe in it, such as recipes/NAME.yaml"),
    ],
)
def test_what_is_no_recipe_says_why(name, what):
    with pytest.raises(InputError, match=f"^{name}: {what}") as caught:
        find_recipe(name)
    assert caught.value.exit_code == 2
    assert ("Did you mean 8xh200?" in str(caught.value) or "8xh100?" in str(caught.value)) == ("8xh20" in name)


# --- inheritance --------------------------------------------------------------------------------------------------


def test_a_child_lays_its_values_over_its_bases(recipe):
    recipe("base: speedrun.yaml\nname: middle\nmodel: {rotary: {base: 2048}, attention_scale: 0.2}\n", "middle.yaml")
    spec = load_recipe(recipe("base: middle.yaml\nname: leaf\nmodel: {attention_scale: 0.3}\n"))
    expected = SPEEDRUN.model_dump()
    expected["name"] = "leaf"
    expected["model"]["rotary"]["base"] = 2048.0
    expected["model"]["attention_scale"] = 0.3
    assert spec.model_dump() == expected


def test_a_base_is_looked_for_beside_the_recipe_then_among_the_shipped(recipe, tmp_path):
    (tmp_path / "sub").mkdir()
    recipe("base: 8xh200.yaml\nname: near\n", "sub/base.yaml")
    assert load_recipe(recipe("base: sub/base.yaml\n")).name == "near"
    recipe("base: ../base.yaml\n", "sub/leaf.yaml")
    recipe("base: speedrun.yaml\nname: up\n", "base.yaml")
    assert load_recipe(tmp_path / "sub/leaf.yaml").name == "up"
    assert load_recipe(recipe(f"base: {tmp_path}/base.yaml\n")).name == "up"
    recipe("base: 1xa100.yaml\nname: shadow\n", "speedrun.yaml")
    assert "speedrun.yaml -> 1xa100.yaml" in problem_of(recipe("base: speedrun.yaml\n", "1xa100.yaml"))


def test_lists_are_replaced_whole(recipe):
    spec = load_recipe(recipe("base: speedrun.yaml\nmodel: {paired_layers: [0]}\n"))
    assert spec.model.paired_layers == [0]


def test_a_part_of_another_kind_replaces_the_bases_whole(recipe):
    spec = load_recipe(
        recipe(
            "base: speedrun.yaml\n"
            "training: {lr_schedule: {kind: warmup_cosine, warmup_steps: 10, end_factor: 0}, extension: null}\n"
            "optimizer: {normuon: {momentum: {warmup_steps: 1}}}\n"
        )
    )
    assert spec.training.lr_schedule.model_dump() == {"kind": "warmup_cosine", "warmup_steps": 10, "end_factor": 0.0}
    assert spec.training.extension is None
    assert spec.optimizer.normuon.momentum.warmup_steps == 1


def test_a_part_that_repeats_its_kind_inherits(recipe):
    spec = load_recipe(recipe("base: speedrun.yaml\nmodel: {kind: speedrun, backout_layer: 5}\n"))
    assert (spec.model.backout_layer, spec.model.layers) == (5, 11)


def test_circles_and_missing_bases(recipe):
    recipe("name: b\nbase: recipe.yaml\n", "b.yaml")
    assert problem_of(recipe("base: b.yaml\n")).endswith(
        "b.yaml:2: base: recipes inherit in a circle: recipe.yaml -> b.yaml -> recipe.yaml"
    )
    assert problem_of(recipe("base: recipe.yaml\n")).startswith("recipe.yaml:1: base: recipes inherit in a circle")
    problem = problem_of(recipe("name: x\n\nbase: speedruns.yaml\n"))
    assert problem.startswith("recipe.yaml:3: base: ")
    assert problem.endswith("did you mean speedrun.yaml?")
    assert problem_of(recipe("base: [speedrun.yaml]\n")).startswith("recipe.yaml:1: base: found ['speedrun.yaml']")


def test_no_base_is_the_same_as_an_empty_one(recipe):
    assert load_recipe(recipe("base:\n" + dump_spec(SPEEDRUN))) == SPEEDRUN


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.stages.0.batch_tokens=65536", 65536),
        ("training.seed=7", 7),
        (" training.seed = 7", 7),
        ("name=a=b", None),
        ("description=a=b: c", None),
        ('description="a: b"', "a: b"),
        ("description=two words", "two words"),
        ("data.directory=/scratch/me/fineweb", "/scratch/me/fineweb"),
        ("data.directory=", None),
        ("training.extension=null", None),
        ("evaluation.target_loss=null", None),
        ("model.paired_layers=[]", []),
        ("model.paired_layers.3=8", 8),
        ("hardware={gpu: a100, gpus_per_node: 2}", {"gpu": "a100", "gpus_per_node": 2, "nodes": 1}),
        ("runtime.dtype=fp32", "fp32"),
        ("runtime={}", None),
    ],
)
def test_overrides(override, value):
    key = override.partition("=")[0].strip()
    if override in ("name=a=b", "description=a=b: c"):
        assert f"--set {override}: " in problem_of("speedrun", override)
        return
    found = load_recipe("speedrun", [override]).model_dump(mode="json")
    expected = SPEEDRUN.model_dump(mode="json")
    for name in key.split("."):
        found, expected = (part[int(name)] if isinstance(part, list) else part[name] for part in (found, expected))
    assert found == (expected if override == "runtime={}" else value)


def test_overrides_apply_in_order_and_only_where_they_point():
    spec = load_recipe("speedrun", ["training.seed=1", "training.stages.1.steps=9", "training.seed=2"])
    expected = SPEEDRUN.model_dump()
    expected["training"]["seed"] = 2
    expected["training"]["stages"][1]["steps"] = 9
    assert spec.model_dump() == expected


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.seed", "--set training.seed: expected key.path=value, for example --set training.seed=1"),
        ("=1", "--set =1: expected key.path=value, for example --set training.seed=1"),
        ("training..seed=1", "--set training..seed=1: expected key.path=value, for example --set training.seed=1"),
        ("model.paired_layers.4=1", "--set model.paired_layers.4=1: model.paired_layers has entries 0..3, found '4'"),
        (
            "model.paired_layers.-1=1",
            "--set model.paired_layers.-1=1: model.paired_layers has entries 0..3, found '-1'",
        ),
        ("training.stages.²=1", "--set training.stages.²=1: training.stages has entries 0..2, found '²'"),
        ("training.seed.x=1", "--set training.seed.x=1: training.seed is the value 0, which has no keys"),
        ("training.seed=[", "--set training.seed=[: not valid YAML: expected the node content, but found"),
        ("training={a: 1, a: 2}", "--set training={a: 1, a: 2}: a: appears twice in this mapping"),
        ("training.seed=x", '--set training.seed=x: training.seed: must be a whole number, found "x"'),
        ("training.sed=1", "--set training.sed=1: training.sed: unknown key, did you mean seed?"),
        ("trainin.seed=1", "--set trainin.seed=1: trainin: unknown key, did you mean training?"),
        ("model.width=640", "--set model.width=640: model.width: is 640, must be heads * head_dim"),
        ("training.slots=4", "--set training.slots=4: training.slots: is 4, must be a multiple of the world size 8"),
    ],
)
def test_wrong_overrides(override, problem):
    assert problem_of("speedrun", override).startswith(problem)


def test_wrong_overrides_come_together():
    assert len(problems_of("speedrun", "x", "training.seed.x=1", "model.paired_layers.9=1")) == 3


# --- errors -------------------------------------------------------------------------------------------------------

MISTAKES = """\
base: speedrun.yaml
name: mistakes
model:
  widht: 768
  layers: "11"
  rotary:
    base: fast
training:
  seed: -1
  stages:
    - steps: 0
      batch_tokens: 131072
      window_blocks: {short: 1}
      token_weights: [1]
      lr_factor: 1.0
optimizer:
  kind: normuon_adam
  adam:
    groups:
      embed: {beta: [0.5, 0.9]}
hardware:
  gpu: H200
  gpus: 8
runtime: fast
extra: 1
"""


def test_every_problem_is_named_with_file_line_key_value_and_what_is_allowed(recipe):
    problems = problems_of(recipe(MISTAKES))
    lines = {
        4: r"model\.widht: unknown key, did you mean width\?; allowed keys: kind, vocab_size, .*scalars$",
        5: r'model\.layers: must be a whole number, found "11"$',
        7: r'model\.rotary\.base: must be a number, found "fast"$',
        9: r"training\.seed: must be greater than or equal to 0, found -1$",
        11: r"training\.stages\.0\.steps: must be greater than or equal to 1, found 0$",
        13: r"training\.stages\.0\.window_blocks\.long: is missing; add it \(a list replaces .*\)$",
        20: r"optimizer\.adam\.groups\.embed\.beta: unknown key, did you mean betas\?; allowed keys: betas, lr_mul, "
        r"wd_mul, communication$",
        22: r'hardware\.gpu: found "H200", did you mean h200\?; allowed: h100, h200, a100, l40s, cpu$',
        23: r"hardware\.gpus: unknown key, did you mean gpu\?; allowed keys: gpu, gpus_per_node, nodes$",
        24: r'runtime: must be a mapping, found "fast"$',
        25: r"extra: unknown key; allowed keys: name, description, model, .*base$",
    }
    assert len(problems) == len(lines)
    for line, pattern in lines.items():
        (problem,) = [problem for problem in problems if problem.startswith(f"recipe.yaml:{line}: ")]
        assert re.search(rf": {pattern}", problem), problem


def test_cross_checks_point_at_the_line_that_is_to_blame(recipe):
    path = recipe(
        "base: speedrun.yaml\nmodel:\n  # a comment\n  width: 640\nhardware: {gpu: cpu, gpus_per_node: 3}\n"
        "runtime:\n  head_precision: fp8\n"
    )
    assert problems_of(path) == [
        "recipe.yaml:4: model.width: is 640, must be heads * head_dim = 6 * 128 = 768",
        "recipe.yaml:5: hardware.gpus_per_node: 1 x 3 makes a world size of 3; allowed are 1, 2, 4, 8",
        "recipe.yaml:7: runtime.head_precision: fp8 needs hardware.gpu h100 or h200 or l40s, found cpu",
    ]


def test_an_error_in_a_base_names_the_base(recipe):
    recipe("name: base\nbase: speedrun.yaml\ntraining: {seed: x}\n", "wrong.yaml")
    path = recipe("base: wrong.yaml\nmodel:\n  layers: y\n")
    assert sorted(problems_of(path)) == [
        'recipe.yaml:3: model.layers: must be a whole number, found "y"',
        'wrong.yaml:3: training.seed: must be a whole number, found "x"',
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "model: {kind: gpt}",
            "recipe.yaml:2: model.kind: found gpt, did you mean gpt2?; allowed: speedrun, record89, record92, gpt2",
        ),
        ("training: {lr_schedule: {kind: 3}}", "recipe.yaml:2: training.lr_schedule.kind: found 3; allowed:"),
        ("training: {stages: {a: 1}}", 'recipe.yaml:2: training.stages: must be a list, found {"a": 1}'),
        ("optimizer: {adam: {groups: [1]}}", "recipe.yaml:2: optimizer.adam.groups: must be a mapping, found [1]"),
        ("name: 2026", "recipe.yaml:2: name: must be text, found 2026"),
        ("name: a/b", "recipe.yaml:2: name: must match pattern '^[A-Za-z0-9]"),
        ("optimizer: {adam: {lr: .inf}}", "recipe.yaml:2: optimizer.adam.lr: must be a finite number, found"),
        (
            "model: {bigram_multipliers: [1]}",
            "recipe.yaml:2: model.bigram_multipliers: has too few entries, entry 1 is missing",
        ),
        ("model: {bigram_multipliers: 1}", "recipe.yaml:2: model.bigram_multipliers: must be a list, found 1"),
        ("model: {gpt2: 1}", "recipe.yaml:2: model.gpt2: unknown key; allowed keys: kind"),
        ("model: {speedrun: 1}", "recipe.yaml:2: model.speedrun: unknown key; allowed keys: kind"),
        ("training: {seed: " + "9" * 200 + "}", "recipe.yaml:2: training.seed: must be less than or equal to"),
        (
            "optimizer: {normuon: {groups: {mpl: {lr_muls: [1], communication: sharded}}}}",
            "recipe.yaml:2: optimizer.normuon.groups: does not know mpl (did you mean mlp?)",
        ),
    ],
)
def test_messages(text, problem, recipe):
    found = problem_of(recipe(f"base: speedrun.yaml\n{text}\n"))
    assert found.startswith(problem)


def test_a_part_that_is_missing_and_a_kind_that_is_missing(recipe):
    problems = problems_of(recipe("name: x\nmodel: {layers: 3}\nhardware: {gpu: cpu}\n"))
    assert problems == [
        "recipe.yaml:2: model.kind: is missing; allowed: speedrun, record89, record92, gpt2",
        "recipe.yaml:1: optimizer: is missing; add it, or inherit it from a recipe by `base:`",
        "recipe.yaml:1: training: is missing; add it, or inherit it from a recipe by `base:`",
        "recipe.yaml:1: evaluation: is missing; add it, or inherit it from a recipe by `base:`",
    ]


# --- hardware -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["speedrun", "record89", "record89-fp8-backward", "record89-averaged", "gpt2"])
def test_recipes_of_a_model_leave_hardware_open(name):
    asked = []

    def fill(stated):
        asked.append(dict(stated))
        return {"gpu": "a100", "gpus_per_node": 4, "nodes": 1}, "at hand"

    assert load_recipe(name, fill=fill).hardware.model_dump() == {"gpu": "a100", "gpus_per_node": 4, "nodes": 1}
    spec, left_open = resolve_recipe(name, ["hardware.gpu=h200"], fill=fill)
    assert (spec.hardware.gpu, spec.world_size, left_open) == ("h200", 4, {"gpus_per_node", "nodes"})
    assert asked == [{}, {"gpu": "h200"}]
    spec, left_open = resolve_recipe(name, on="2x4xh100", fill=fill)
    assert (spec.hardware.nodes, spec.hardware.gpus_per_node, left_open) == (2, 4, set())
    assert len(asked) == 2
    assert load_recipe(name, ["hardware.gpu=h200"], on="2x4xh100").hardware.gpu == "h200"


@pytest.mark.parametrize("name", ["demo", "4xh200"])
def test_a_recipe_that_says_its_hardware_is_not_filled(name):
    def fill(stated):
        raise AssertionError(stated)

    assert load_recipe(name, fill=fill) == load_recipe(name)
    assert load_recipe(name, on="1xa100", fill=fill).hardware.gpu == "a100"


def test_what_does_not_fit_names_where_it_came_from(recipe):
    def fill(stated):
        return {"gpu": "h100", "gpus_per_node": 3}, "hardware at hand"

    with pytest.raises(RecipeError, match=r"^hardware at hand: hardware.gpus_per_node: 1 x 3 makes a world size of 3"):
        load_recipe("speedrun", fill=fill)
    path = recipe("base: speedrun.yaml\ntraining: {slots: 2}\n")
    assert "recipe.yaml:2: training.slots: is 2" in problem_of(path) and "checked for 8xh100" in problem_of(path)
    assert load_recipe(path, on="2xh100").world_size == 2
    assert "checked for" not in problem_of(recipe("base: speedrun.yaml\nmodel: {width: 640}\n"))


def test_steps_leave_alone_what_set_says() -> None:
    said = ("evaluation.every=5", "training.lr_schedule.ramp_steps=30", "optimizer.normuon.momentum.warmup_steps=7")
    spec = load_recipe("record89", said, 300)
    plain = load_recipe("record89", (), 300)
    assert spec.training.total_steps == plain.training.total_steps == 300
    assert spec.evaluation.every == 5
    data = spec.model_dump()
    assert data["training"]["lr_schedule"]["ramp_steps"] == 30
    assert data["optimizer"]["normuon"]["momentum"]["warmup_steps"] == 7
    assert data["training"]["stages"] == plain.model_dump()["training"]["stages"]
    longer = load_recipe("record89", ("training.stages.0.steps=1000",), 300)  # a larger share of the 300
    assert longer.training.total_steps == 300
    assert longer.training.stages[0].steps > plain.training.stages[0].steps


def test_too_few_steps():
    assert problem_of("speedrun", steps=3) == "--steps 3: a run of 3 steps has no room for its 4 stages"
    assert load_recipe("speedrun", steps=4).training.total_steps == 4


# --- round trips --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@example(name="x", text="\x85\u2028 \u2029\ufeff", eps=1.0, weights=[1.0], directory="Grö\u00dfe\r\n\t x: #y")
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    eps=st.floats(0, 1e12, exclude_min=True),
    weights=st.lists(st.floats(0, 1e12), min_size=1, max_size=8),
    directory=st.none()
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~$\0"), min_size=1, max_size=20),
)
def test_whatever_a_spec_holds_comes_back(tmp_path_factory, name, text, eps, weights, directory):
    data = SPEEDRUN.model_dump()
    data.update(name=name, description=text)
    data["optimizer"]["adam"]["eps"] = eps
    data["training"]["stages"][0]["token_weights"] = weights
    data["data"]["directory"] = directory
    spec = RunSpec.model_validate(data)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_spec(spec), encoding="utf-8")
    assert load_recipe(path) == spec


# --- limits -------------------------------------------------------------------------------------------------------


def test_names_of_recipes_that_no_file_can_have():
    with pytest.raises(InputError, match="File name too long"):
        load_recipe("x" * 300)


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type, list[Any]]]:
    for name, field in model.model_fields.items():
        yield from leaves(f"{path}{name}", field.annotation, list(field.metadata))


def leaves(path: str, annotation: Any, metadata: list[Any]) -> Iterator[tuple[str, type, list[Any]]]:
    """(path, type, what bounds it) of each value that is not a mapping."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [item for one in arguments[1:] for item in (one.metadata if isinstance(one, FieldInfo) else [one])]
        yield from leaves(path, arguments[0], [*metadata, *inner])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from leaves(path, argument, metadata)
    elif origin in (list, dict):
        yield path, origin, metadata
        yield from leaves(f"{path}[]", arguments[-1], [])
    elif origin is tuple:
        for argument in arguments:
            yield from leaves(f"{path}[]", argument, [])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from fields_of(annotation, f"{path}.")
    elif annotation in (int, float, str):
        yield path, annotation, metadata


def test_every_value_of_a_spec_has_a_largest_one():
    found = list(fields_of(RunSpec))
    assert len(found) > 100
    for path, kind, metadata in found:
        bounds = {name for name in ("le", "lt", "max_length") for item in metadata if hasattr(item, name)}
        if kind is str:
            assert bounds or RunSpec.model_config["str_max_length"], path
        else:
            assert bounds, f"{path}: a {kind.__name__} without a bound"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.layers=1000000000", "model.layers: must be less than or equal to 1024, found 1000000000"),
        ("model.width=1e300", "model.width: must be a whole number, found 1e+300"),
        ("watchdog.step_seconds=1e300", "watchdog.step_seconds: must be less than or equal to 100000000"),
        ("optimizer.adam.lr=1e300", "optimizer.adam.lr: must be less than or equal to 1000000000000"),
        ("data.train_files=/abs/*", "data.train_files: must be a pattern of file names"),
        ("data.train_files='**'", "data.train_files: must be a pattern of file names"),
        ("data.val_files=''", "data.val_files: "),
        ('data.directory="a\\0b"', "data.directory: holds a NUL character"),
        ("data.directory=" + "d" * 256, "data.directory: is longer than 4096 bytes, or a part of it than 255"),
        ("data.bos=50257", "data.bos: is 50257, outside the vocabulary of 50257 tokens"),
        ("training.seed=9223372036854775808", "training.seed: must be less than or equal to 9223372036854775807"),
        ("training.seed=" + "9" * 400, "training.seed: must be"),
    ],
)
def test_values_that_no_machine_has(override, problem):
    assert problem_of("speedrun", override).startswith(f"--set {override}: {problem}")


# --- directories --------------------------------------------------------------------------------------------------


def test_home_and_variables_in_directories(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("NUMBER", "3")
    spec = load_recipe("demo", ["data.directory=~/shards", "output.directory=$SCRATCH/x/${NUMBER}/runs"])
    assert (spec.data.directory, spec.output.directory) == ("/home/me/shards", "/scratch/me/x/3/runs")
    monkeypatch.delenv("SCRATCH")
    assert load_recipe("demo", [f"output.directory={spec.output.directory}"]).output == spec.output
    for text, problem in (
        ("$SCRATCH/x", "the variable SCRATCH is not set here; export it, or write out the directory"),
        ("${SCRATCH}", "the variable SCRATCH is not set here; export it, or write out the directory"),
        ("${", "has a ${ that is not the beginning of ${VARIABLE}"),
        ("~nobody-of-that-name/x", "there is no user 'nobody-of-that-name'"),
    ):
        assert f"output.directory: {problem}" in problem_of("demo", f"output.directory={text}")
