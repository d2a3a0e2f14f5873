"""The JSON Schema of recipes."""

import json
import re

import jsonschema
import pytest
import yaml

from nanogpt.hardware import shape
from nanogpt.recipe import load_recipe, shipped_recipes
from nanogpt.recipe_schema import recipe_schema

SHIPPED = sorted(path.stem for path in shipped_recipes().glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    """Checks against the committed schema."""
    schema = json.loads((shipped_recipes() / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_schema_is_up_to_date():
    committed = (shipped_recipes() / "schema.json").read_text()
    assert json.loads(committed) == recipe_schema(), "run `make schema`"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_fit_the_schema_that_they_name(name, validator):
    text = (shipped_recipes() / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    # An editor reads YAML 1.2, where 1e-8 is a number.
    data = yaml.safe_load(re.sub(r"\b1e-", "1.0e-", text))
    validator.validate(data)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"base": "speedrun.yaml", "model": {"layers": 4}},
        {"model": {"kind": "gpt2", "context": 3}},
        {"training": {"extension": None}},
        {"training": {"extension": {"steps": 3}}},
    ],
)
def test_partial_recipes_fit_the_schema(data, validator):
    validator.validate(data)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"base": 3},
        {"trianing": {}},
        {"model": {"widht": 3}},
        {"model": {"kind": "gpt"}},
        {"model": {"kind": "gpt2", "rotary": {}}},
        {"model": {"layers": 0}},
        {"model": {"layers": "11"}},
        {"model": {"bigram_multipliers": [1]}},
        {"hardware": {"gpu": "H100"}},
        {"training": {"stages": []}},
        {"training": {"stages": [{"steps": 3}]}},
        {"training": {"stages": {"steps": 3}}},
        {"training": {"extension": {"stpes": 3}}},
        {"optimizer": {"adam": {"groups": {"embed": {"betas": [0.5, 1.0]}}}}},
        {"name": "a b"},
        {"runtime": {"compile": True}},
    ],
    ids=str,
)
def test_typical_mistakes_do_not_fit_the_schema(data, validator):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(data)


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_specs_fit_the_resolved_schema(name):
    resolved = jsonschema.Draft202012Validator(recipe_schema(resolved=True))
    data = load_recipe(name).model_dump(mode="json")
    resolved.validate(data)
    del data["training"]["seed"]
    with pytest.raises(jsonschema.ValidationError, match="seed"):
        resolved.validate(data)


@pytest.mark.parametrize("typed", ["1xcpu", "2xcpu", "4xh200", "2x4xh100"])
def test_every_type_of_hardware_can_be_typed(typed):
    assert shape(load_recipe("record89", on=typed).hardware) == typed
