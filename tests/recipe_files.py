"""What loading a recipe says is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanogpt.recipe import load_recipe
from nanogpt.recipe_yaml import RecipeError


def problems_of(path: Path | str, *overrides: str, steps: int | None = None) -> list[str]:
    """The lines of the error that loading gives, without the directory."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, steps)
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == caught.value.problems
    return [problem.replace(f"{Path(path).parent}/", "") for problem in caught.value.problems]


def problem_of(path: Path | str, *overrides: str, steps: int | None = None) -> str:
    """The only line of the error that loading gives."""
    (problem,) = problems_of(path, *overrides, steps=steps)
    return problem
