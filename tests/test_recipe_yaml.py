"""A recipe as text: YAML's traps, hostile text, limits."""

import itertools
import time

import pytest
import yaml
from recipe_files import problem_of, problems_of

from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.recipe_yaml import MAX_BYTES, RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-10", 1e-10), ("1E3", 1e3), ("1.5e+2", 150.0), (".5", 0.5), ("5.", 5.0), ("7", 7.0), ("+2", 2.0), ("010", 10)],
)
def test_numbers(text, value, recipe):
    spec = load_recipe(recipe(f"base: speedrun.yaml\noptimizer: {{adam: {{eps: {text}}}}}\n"))
    assert spec.optimizer.adam.eps == value
    assert load_recipe("speedrun", [f"optimizer.adam.eps={text}"]) == spec


@pytest.mark.parametrize("text", ["1e7", "0x10", "1:30", "10M", "'8'", "8.0", "yes", "~", ""])
def test_what_is_no_whole_number(text, recipe):
    problem = problem_of(recipe(f"base: speedrun.yaml\ntraining:\n  slots: {text}\n"))
    assert problem.startswith("recipe.yaml:3: training.slots: must be a whole number, found ")


@pytest.mark.parametrize("text", ["on", "off", "auto"])
def test_on_and_off_are_words(text):
    assert load_recipe("speedrun", [f"runtime.compile={text}"]).runtime.compile == text


@pytest.mark.parametrize("text", ["on", "yes", "1", "'true'"])
def test_only_true_and_false_are_truths(text):
    problem = problem_of("speedrun", f"training.warmup={text}")
    assert "training.warmup: must be true or false, found" in problem


@pytest.mark.parametrize("name", ["2026-01-01", "1e5x", "on", "no", "'7'", "'1e5'", "'null'", "'0x1F'", "'12_000'"])
def test_names_stay_text_through_a_round_trip(name, recipe):
    spec = load_recipe("speedrun", [f"name={name}"])
    assert spec.name == name.strip("'")
    assert load_recipe(recipe(dump_spec(spec))) == spec
    assert yaml.safe_load(dump_spec(spec))["name"] == spec.name, "readers of YAML 1.1 must see the same"


def test_anchors_and_aliases(recipe):
    spec = load_recipe(
        recipe(
            "base: speedrun.yaml\n"
            "training:\n"
            "  extension: &last {steps: 400, batch_tokens: 393216, window_blocks: {short: 6, long: 13},"
            " token_weights: [1], lr_factor: 1.73}\n"
            "  stages: [*last, *last, *last]\n"
        ),
        ["training.stages.0.steps=1"],
    )
    assert [stage.steps for stage in spec.training.all_stages] == [1, 400, 400, 400]


DUPLICATES = "base: speedrun.yaml\nname: a\nmodel:\n  width: 768\n  width: 640\nname: b\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["recipe.yaml:1: a recipe is a mapping of keys to values, found nothing"]),
        ("# only a comment\n", ["recipe.yaml:1: a recipe is a mapping of keys to values, found nothing"]),
        ("- a\n", ["recipe.yaml:1: a recipe is a mapping of keys to values, found a list"]),
        ("speedrun\n", ["recipe.yaml:1: a recipe is a mapping of keys to values, found the value 'speedrun'"]),
        (
            DUPLICATES,
            [
                "recipe.yaml:5: model.width: appears twice in this mapping, first at recipe.yaml:4",
                "recipe.yaml:6: name: appears twice in this mapping, first at recipe.yaml:2",
            ],
        ),
        (
            "name: x\nmodel: {<<: {kind: gpt2}}\n",
            ["recipe.yaml:2: model.<<: merge keys are not supported; repeat the keys, or inherit by `base:`"],
        ),
        ("name: x\n? [a, b]\n: 1\n", ["recipe.yaml:2: a key must be a plain word, found a sequence"]),
        (
            "name: x\nmodel:\n\tkind: gpt2\n",
            ["recipe.yaml:3: not valid YAML: found character '\\t' that cannot start any token"],
        ),
        ("name: 'x\n", ["recipe.yaml:2: not valid YAML: found unexpected end of stream"]),
        ("name: *x\n", ["recipe.yaml:1: not valid YAML: found undefined alias 'x'"]),
        ("a: 1\n---\nb: 2\n", ["recipe.yaml:2: not valid YAML: but found another document"]),
        ("a: 1\nname: x\0\n", ["recipe.yaml:2: not valid YAML: contains the control character '\\x00'"]),
        (
            "a: 1\nname: !!int x\n",
            ["recipe.yaml:2: name: cannot be read as int: invalid literal for int() with base 10: 'x'"],
        ),
        (b"name: \xff\xfe\n", ["recipe.yaml: is not UTF-8 text: invalid start byte at byte 6"]),
    ],
)
def test_what_is_no_recipe(text, problems, recipe):
    assert problems_of(recipe(text)) == problems


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{before}'] * 10)}]\n" for before, key in itertools.pairwise("abcdef")
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: !!python/name:os.getcwd ''\n", "recipe.yaml:1: not valid YAML: could not determine"),
        ("\nname: !mine x\n", "recipe.yaml:2: not valid YAML: could not determine a constructor for the tag '!mine'"),
        ("a: &a {b: *a}\n", "recipe.yaml: nested more than 40 deep; does an alias contain itself?"),
        ("a: &a [*a]\n", "recipe.yaml: nested more than 40 deep; does an alias contain itself?"),
        ("[" * 2000, "recipe.yaml: nested more than 40 deep"),
        (LAUGHS, "recipe.yaml: more than 10,000 values"),
        ("training:\n  seed: " + "9" * 5000, "recipe.yaml:2: training.seed: "),
    ],
    ids=["python", "tag", "circle", "list-circle", "deep", "billion-laughs", "digits"],
)
def test_hostile_yaml_is_an_error_like_any_other(text, problem, recipe):
    assert problem_of(recipe(text)).startswith(problem)


def test_a_byte_order_mark_does_no_harm(recipe):
    assert load_recipe(recipe(b"\xef\xbb\xbfbase: speedrun.yaml\r\nname: windows\r\n")).name == "windows"


def test_a_file_that_cannot_be_read(recipe, monkeypatch):
    path = recipe("name: x\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nanogpt.recipe.open_regular", refuse)  # a real mode would not stop root
    assert problem_of(path) == "recipe.yaml: cannot be read: Permission denied"


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("#" * (MAX_BYTES + 1), "recipe.yaml: is larger than 262,144 bytes, the limit of a recipe"),
        ("name: [" + "1," * 10_001 + "]", "recipe.yaml: more than 10,000 values"),
        ("? " + "k" * 201 + "\n: 1\n", "recipe.yaml:1: a key of 201 characters, at most 200 allowed: kkk"),
        ("base: " + "b" * 300 + ".yaml\n", "recipe.yaml:1: base: "),
    ],
    ids=["bytes", "values", "key", "base"],
)
def test_a_recipe_has_limits_and_says_which(text, problem, recipe):
    began = time.process_time()
    assert problem_of(recipe(text)).startswith(problem)
    assert time.process_time() - began < 20  # of minutes


def test_an_endless_chain_of_bases_ends(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    assert "more than 20 recipes inherit from one another" in problem_of(tmp_path / "0.yaml")


def test_many_problems_are_not_all_told(recipe):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe("base: demo.yaml\n" + "".join(f"key{n}: 1\n" for n in range(100))))
    told = str(caught.value).splitlines()
    assert len(told) == 41 and told[-1] == "and 60 more problems"
