"""The table of parameters: models are made from it, and refuse what is not in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nanogpt.models import MODELS
from nanogpt.models.language_model import LanguageModel, check_table, make_model
from nanogpt.optim import OPTIMIZERS
from nanogpt.parameters import Adam, NorMuon
from nanogpt.recipe import load_recipe
from nanogpt.registry import kind_of, specs_of
from nanogpt.runs.provenance import package_directory

KINDS = [kind_of(spec) for spec in specs_of(MODELS)]


def full_model(recipe: str) -> LanguageModel:
    spec = load_recipe(recipe).model
    with torch.device("meta"):
        return make_model(spec, dtype=torch.bfloat16, max_tokens=16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_parameters_of_its_table(kind: str):
    model = full_model(kind)
    check_table(model)
    for row in model.rows:
        parameter = model.get_parameter(row.name)
        assert tuple(parameter.shape) == row.shape
        assert parameter.dtype == (torch.float32 if row.dtype == "fp32" else torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_row_is_refused(kind: str):
    model = make_model(load_recipe(kind).model, dtype=torch.float32, max_tokens=16)
    model.forgotten = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="the parameter forgotten has no row in the table"):
        model.draw_parameters(torch.Generator())


def test_a_row_without_a_parameter_is_refused():
    model = full_model("record89")
    del model.smear_gate
    with pytest.raises(ValueError, match="the table's row smear_gate has no parameter"):
        check_table(model)


def test_another_shape_than_the_rows_is_refused():
    model = full_model("record89")
    model.smear_gate = nn.Parameter(torch.zeros(1, 5, device="meta"))
    with pytest.raises(ValueError, match=r"smear_gate is \(1, 5\), its row says \(1, 12\)"):
        check_table(model)


@pytest.mark.parametrize("recipe", ["speedrun", "record89", "demo"])
def test_a_recipe_shows_what_its_table_says(recipe: str):
    spec = load_recipe(recipe)
    optimizer, rows = spec.optimizer, spec.model.parameters()
    assert optimizer.reduce_order == [row.name for row in rows]
    for row in rows:
        if isinstance(row.train, Adam):
            group = optimizer.adam.groups[row.name]
            assert (group.betas, group.lr_mul, group.wd_mul) == (row.train.betas, row.train.lr_mul, row.train.wd_mul)
        else:
            assert isinstance(row.train, NorMuon)
            group = optimizer.normuon.groups[row.name]
            assert tuple(group.lr_muls) == row.train.lr_muls
        assert group.communication == ("sharded" if row.train.sharded else "replicated")


def test_a_recipe_changes_one_number_of_the_table():
    groups = load_recipe("record89", ["optimizer.adam.groups.smear_gate.lr_mul=0.5"]).optimizer.adam.groups
    plain = load_recipe("record89").optimizer.adam.groups
    assert groups["smear_gate"].lr_mul == 0.5 != plain["smear_gate"].lr_mul
    assert groups["smear_gate"].betas == plain["smear_gate"].betas
    assert {name: group for name, group in groups.items() if name != "smear_gate"} == {
        name: group for name, group in plain.items() if name != "smear_gate"
    }


def test_nobody_else_names_a_model_or_an_optimizer():
    """Only its folder and the registry do; recipes, tests and docs are outside the package."""
    package = package_directory()
    specs = [*specs_of(MODELS), *specs_of(OPTIMIZERS)]
    kinds = {kind_of(spec) for spec in specs}
    homes = {kind_of(spec): Path(*spec.__module__.split(".")[1:-1]) for spec in specs}
    classes = {spec.__name__.removesuffix("Spec").removesuffix("Model"): kind_of(spec) for spec in specs}
    found = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package)
        if place in (Path("models/__init__.py"), Path("optim/__init__.py")):
            continue
        tree = ast.parse(file.read_bytes())
        docstrings = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                text = node.value
            elif isinstance(node, ast.Name):
                text = node.id
            elif isinstance(node, ast.Attribute):
                text = node.attr
            elif isinstance(node, ast.ImportFrom):
                text = " ".join([node.module or "", *(alias.name for alias in node.names)])
            words = set(re.split(r"[.:/ ]", text.removesuffix(".yaml"))) if "." in text else {text}
            named = kinds & words - ({"gpt2"} if place.parent == Path("data") else set())  # GPT-2's tokenizer
            named |= {kind for name, kind in classes.items() if re.search(rf"\b{name}(Model)?(Spec|Rates)?\b", text)}
            found += [f"{place}:{node.lineno}: {kind}" for kind in named if homes[kind] not in place.parents]
    assert found == []
