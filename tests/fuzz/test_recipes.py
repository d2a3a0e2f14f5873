"""Mutated recipes and overrides: refused with a message, or valid through and through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mutated import VALUES, examples, mutated_bytes, mutated_text, refused_or_done

from nanogpt.cluster.preflight import checkpoint_bytes
from nanogpt.cluster.request import job_request
from nanogpt.recipe import dump_spec, load_recipe, shipped_recipes, shorten
from nanogpt.spec import CrossCheckError, RunSpec
from nanogpt.training.schedule import Schedule

RECIPES = ("demo", "gpt2", "speedrun", "record89")
RESOLVED = {name: load_recipe(name) for name in RECIPES}


def use(spec: RunSpec, path: Path) -> None:
    """What is done with a valid spec before a machine is asked for."""
    path.write_text(dump_spec(spec), encoding="utf-8")
    assert load_recipe(path) == spec
    job_request(spec)
    checkpoint_bytes(spec)
    if spec.training.total_steps < 10_000:
        schedule = Schedule(spec)
        for step in {0, spec.training.total_steps // 2, spec.training.total_steps - 1}:
            schedule.at(step)
    try:
        shorten(spec, 7)
    except CrossCheckError as error:
        assert "has no room" in str(error)


def test_recipes(tmp_path: Path, fuzz: int) -> None:
    valid = 0
    for chance in examples(100 * fuzz, "recipes"):
        name = chance.choice(RECIPES)
        if chance.random() < 0.5:
            text = (shipped_recipes() / f"{name}.yaml").read_text()
        else:
            text = dump_spec(RESOLVED[name])
        path = tmp_path / "recipe.yaml"
        path.write_bytes(mutated_text(text, chance))
        spec = refused_or_done(lambda path=path: load_recipe(path))
        if spec is not None:
            valid += 1
            use(spec, tmp_path / "again.yaml")
    assert valid > 5  # the mutations leave something to use


def test_any_bytes(tmp_path: Path, fuzz: int) -> None:
    text = (shipped_recipes() / "demo.yaml").read_bytes()
    for chance in examples(60 * fuzz, "bytes"):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(mutated_bytes(text if chance.random() < 0.8 else chance.randbytes(200), chance))
        refused_or_done(lambda path=path: load_recipe(path))


def paths(data: Any, path: tuple[str, ...] = ()) -> list[str]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [".".join(path)] * bool(path) + [p for key, value in items for p in paths(value, (*path, str(key)))]


def test_every_key_with_values_that_nobody_means(tmp_path: Path, fuzz: int) -> None:
    for chance in examples(120 * fuzz, "overrides"):
        name = chance.choice(RECIPES)
        keys = paths(RESOLVED[name].model_dump(mode="json"))
        overrides = [override(chance.choice(keys), chance) for _ in range(chance.choice((1, 1, 2)))]
        spec = refused_or_done(lambda name=name, overrides=overrides: load_recipe(name, overrides))
        if spec is not None:
            use(spec, tmp_path / "again.yaml")


def override(key: str, chance: random.Random) -> str:
    if chance.random() < 0.1:
        key = chance.choice((key + ".x", key + ".0", key[:-1], "x", "", ".", key.rpartition(".")[0]))
    return f"{key}={json.dumps(chance.choice((*VALUES, 16, 64, 1024, 1e-9)))}"


@pytest.mark.parametrize("steps", [0, -1, 1, 10**18])
def test_any_number_of_steps(steps: int) -> None:
    for name in RECIPES:
        refused_or_done(lambda name=name: load_recipe(name, steps=steps))
