"""`nanogpt validate`, `show`, `schema` and `recipes`."""

import json
import re

import pytest

from nanogpt.recipe import load_recipe, shipped_recipes
from nanogpt.recipe_schema import recipe_schema, schema_text

SHIPPED = sorted(path.stem for path in shipped_recipes().glob("*.yaml"))


def test_validate_says_what_a_recipe_is(nanogpt):
    outcome = nanogpt("validate", "recipes/speedrun.yaml", "2xa100")
    assert outcome == (
        0,
        "recipes/speedrun.yaml: valid: speedrun, 1,555 steps, 412,876,800 tokens, hardware open (--on)\n"
        "2xa100: valid: speedrun-2xa100, 1,555 steps, 412,876,800 tokens, world size 2\n",
        "",
    )


def test_validate_takes_every_shipped_recipe(nanogpt):
    outcome = nanogpt("validate", *SHIPPED)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == len(SHIPPED)


def test_validate_with_overrides_and_fewer_steps(nanogpt):
    outcome = nanogpt(
        "validate", "speedrun", "--set", "training.stages.0.batch_tokens=65536", "--set", "name=mine", "--steps", "4"
    )
    tokens = 65_536 + 262_144 + 2 * 393_216
    assert outcome.out == f"speedrun: valid: mine, 4 steps, {tokens:,} tokens, hardware open (--on)\n"


def test_validate_goes_on_after_an_error_and_names_all(nanogpt, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("base: speedrun.yaml\nmodel:\n  widht: 1\nhardware: {gpus: 1}\n")
    outcome = nanogpt("validate", wrong, "8xh200", "nothing")
    assert outcome.code == 2
    assert outcome.out == "8xh200: valid: speedrun-8xh200, 1,555 steps, 412,876,800 tokens, world size 8\n"
    lines = outcome.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{wrong}:3", f"{wrong}:4", "nothing"]
    assert "did you mean width?" in lines[0]


def test_validate_for_programs(nanogpt):
    outcome = nanogpt("validate", "speedrun", "nothing", "--json")
    good, bad = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (2, "")
    assert good == {"recipe": "speedrun", "valid": True, "errors": []}
    assert not bad["valid"] and bad["errors"][0].startswith("nothing: no such recipe")


def test_validate_names_an_override_that_is_wrong_once(nanogpt):
    outcome = nanogpt("validate", "8xh100", "8xh200", "--set", "training.sede=1")
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("--set training.sede=1: training.sede: unknown key, did you mean seed?")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("flag", [[], ["--json"]], ids=["yaml", "json"])
def test_show_prints_a_recipe_that_resolves_to_the_same(nanogpt, tmp_path, name, flag):
    outcome = nanogpt("show", name, *flag)
    assert (outcome.code, outcome.err) == (0, "")
    if flag:
        json.loads(outcome.out)
    shown = tmp_path / "shown.yaml"
    shown.write_text(outcome.out)
    assert load_recipe(shown) == load_recipe(name)


def test_show_applies_overrides_and_steps(nanogpt):
    outcome = nanogpt("show", "gpt2", "--json", "--steps", "100", "--set", "training.seed=5")
    training = json.loads(outcome.out)["training"]
    assert (training["seed"], training["stages"][0]["steps"], training["lr_schedule"]["warmup_steps"]) == (5, 100, 10)


def test_what_is_looked_at_keeps_its_hardware_open_unless_it_is_said(nanogpt):
    def shown(*arguments):
        return json.loads(nanogpt("show", *arguments, "--json").out).get("hardware")

    assert shown("record89") is None
    assert shown("record89", "--set", "hardware.gpu=h200") == {"gpu": "h200"}
    assert shown("record89", "--on", "4xH200") == {"gpu": "h200", "gpus_per_node": 4, "nodes": 1}
    assert shown("8xh100", "--on", "2x2xa100", "--set", "hardware.gpu=h200") == {
        "gpu": "h200", "gpus_per_node": 2, "nodes": 2
    }  # fmt: skip
    assert shown("demo", "--on", "2xcpu") == {"gpu": "cpu", "gpus_per_node": 2, "nodes": 1}
    assert nanogpt("validate", "record89", "--on", "4xh200").out.endswith("tokens, world size 4\n")


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("h200", "--on h200: expected GPUs x type, such as 4xh200"),
        ("4xv100", "--on 4xv100: v100 is not a known type"),
        ("3xh100", "--on 3xh100: hardware.gpus_per_node: 1 x 3 makes a world size of 3"),
        ("0xh100", "--on 0xh100: hardware.gpus_per_node: must be greater than or equal to 1, found 0"),
    ],
)
def test_hardware_that_cannot_be_meant(nanogpt, on, message):
    outcome = nanogpt("validate", "record89", "--on", on)
    assert (outcome.code, outcome.out) == (2, "") and message in outcome.err


@pytest.mark.parametrize("name", ["record89-4xh200", "recipes/record89-4xh200.yaml"])
def test_a_recipe_s_name_with_hardware_in_it_says_what_to_type(nanogpt, tmp_path, name):
    for command in ("validate", "train", "warm", "preflight"):
        outcome = nanogpt(command, name)
        assert outcome.code == 2 and "nanogpt train record89 --on 4xh200" in outcome.err
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nbase: record89-fp8-backward-8xh100.yaml\n")
    outcome = nanogpt("validate", mine)
    assert outcome.err.startswith(f"{mine}:2: base: ") and "base: record89-fp8-backward.yaml" in outcome.err
    assert "--on 8xh100" in outcome.err


def test_show_of_a_wrong_recipe_prints_nothing_but_the_error(nanogpt):
    outcome = nanogpt("show", "speedrun", "--set", "training.seed=x")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == '--set training.seed=x: training.seed: must be a whole number, found "x"\n'


def test_schema_prints_the_committed_schema(nanogpt):
    assert nanogpt("schema").out == schema_text()
    assert json.loads(nanogpt("schema", "--resolved").out) == recipe_schema(resolved=True)


@pytest.mark.usefixtures("terminal_of_80")
def test_recipes_fit_a_terminal_of_80_columns(nanogpt):
    lines = nanogpt("recipes").out.splitlines()
    assert max(map(len, lines)) <= 80 and set(lines[1].strip()) == {"\u2500"}
    assert all(word in lines[0] for word in ("recipe", "hardware", "steps", "tokens", "what it is"))
    named = {line.split()[0] for line in lines if re.match(r"[\w-]+ +(any|1xcpu) ", line)}
    assert named == {name for name in SHIPPED if not re.match(r"\d+x", name)}  # whole names, not cut or wrapped


def test_recipes_lists_and_describes_all(nanogpt):
    out = nanogpt("recipes").out
    assert sorted(set(re.findall(r"[\w-]+", out)) & set(SHIPPED)) == SHIPPED
    (line,) = [line for line in out.splitlines() if line.startswith("record89 ")]
    assert line.split() == ["record89", "any", "1,285", "339", "M", *load_recipe("record89").description.split()]
    facts = {fact["recipe"]: fact for fact in json.loads(nanogpt("recipes", "--json").out)}
    assert sorted(facts) == SHIPPED
    assert facts["2x4xh100"] == {
        "recipe": "2x4xh100",
        "description": load_recipe("speedrun").description,
        "model": "speedrun",
        "hardware": "2x4xh100",
        "hardware_of": "speedrun",
        "world_size": 8,
        "steps": 1555,
        "tokens": 412_876_800,
    }
    assert facts["record89"]["hardware"] is None and facts["record89-averaged"]["hardware_of"] is None
