"""The run spec: the specification's constants number by number, bounds, cross-checks, shortening."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nanogpt.gpus import GPU_NAMES
from nanogpt.recipe import load_recipe, shipped_recipes, shorten
from nanogpt.recipe_yaml import RecipeError
from nanogpt.spec import WORLD_SIZES, CosineSchedule, CrossCheckError, RunSpec

SPEEDRUN = load_recipe("speedrun")
RECORD89 = load_recipe("record89")
GPT2 = load_recipe("gpt2")


class TestTheSpecificationsConstants:
    """Typed from the specification's text, so that a recipe that drifts is noticed."""

    def test_steps_and_tokens(self):
        training = SPEEDRUN.training
        assert training.total_steps == 1555
        assert training.scheduled_steps == 1515
        assert training.total_tokens == 412_876_800
        assert training.total_tokens == 505 * 131_072 + 505 * 262_144 + 505 * 393_216 + 40 * 393_216

    def test_stages(self):
        found = [
            (
                stage.steps,
                stage.batch_tokens,
                (stage.window_blocks.short, stage.window_blocks.long),
                stage.token_weights,
                stage.lr_factor,
            )
            for stage in SPEEDRUN.training.all_stages
        ]
        assert found == [
            (505, 131_072, (1, 3), [1, 0.5, 0.25], 1.0),
            (505, 262_144, (3, 7), [1, 0.5], 1.52),
            (505, 393_216, (5, 11), [1], 1.73),
            (40, 393_216, (6, 13), [1], 1.73),
        ]

    def test_training(self):
        training = SPEEDRUN.training
        assert (training.slots, training.max_document_tokens, training.window_block) == (8, 2048, 128)
        assert (training.final_window_blocks.short, training.final_window_blocks.long) == (6, 20)
        assert training.lr_schedule.model_dump() == {
            "kind": "stage_cooldown",
            "cooldown_start": 0.45,
            "end_factor": 0.1,
            "ramp_steps": 0,
        }
        assert training.warmup is True

    def test_evaluation(self):
        assert SPEEDRUN.evaluation.model_dump() == {
            "every": 250,
            "tokens": 10_485_760,
            "micro_batch_tokens": 262_144,
            "target_loss": 3.28,
        }

    def test_model_shape(self):
        model = SPEEDRUN.model
        assert (model.vocab_size, model.padded_vocab_size) == (50_257, 50_304)
        assert (model.layers, model.width, model.heads, model.head_dim, model.mlp_expansion) == (11, 768, 6, 128, 4)
        assert model.mlp_bank_padding == 1
        assert model.attention_free_layers == [6]
        assert model.attention_layers == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
        assert model.long_window_layers == [3, 10]
        assert model.paired_layers == [0, 2, 5, 9]
        assert model.value_embed_layers == [0, 1, 8, 9, 10]
        assert (model.skip.from_layer, model.skip.to_layer, model.backout_layer) == (3, 6, 7)
        assert model.bigram_rows == 5 * 50_304 == 251_520
        assert model.bigram_multipliers == (36_313, 27_191)
        assert model.gate_inputs == 12

    def test_model_numbers(self):
        model = SPEEDRUN.model
        assert model.attention_scale == 0.1
        assert model.rotary.model_dump() == {
            "base": 1024,
            "frequencies": 32,
            "yarn_low": 1,
            "yarn_high": 32,
            "yarn_temperature": 0.2,
        }
        assert model.rotated_channels == 64
        assert model.softcap.model_dump() == {"cap": 23, "shift": 5, "scale": 7.5}
        assert (model.init_bound, model.head_init_std) == (0.5, 0.005)
        assert model.scalars.model_dump() == {
            "residual": 1.1,
            "attention_in": 0.5,
            "attention_out": 1.0,
            "bigram": 0.1,
            "smear": 0.0,
            "backout": 0.5,
            "skip": -1.5,
        }

    @pytest.mark.parametrize(
        ("label", "betas", "lr_mul", "wd_mul", "communication"),
        [
            ("scalars", (0.9, 0.99), 5, 0, "replicated"),
            ("value_embed", (0.75, 0.95), 75, 5, "sharded"),
            ("bigram_embed", (0.75, 0.95), 75, 5, "sharded"),
            ("smear_gate", (0.9, 0.99), 0.01, 0, "replicated"),
            ("skip_gate", (0.9, 0.99), 0.05, 0, "replicated"),
            ("attn_gate_bank", (0.9, 0.99), 1, 1, "replicated"),
            ("ve_gate_bank", (0.9, 0.99), 1, 1, "replicated"),
            ("x0_lambdas", (0.65, 0.95), 5, 0, "replicated"),
            ("lm_head", (0.5, 0.95), 1, 150, "sharded"),
            ("embed", (0.5, 0.95), 1, 150, "sharded"),
        ],
    )
    def test_adam_group(self, label, betas, lr_mul, wd_mul, communication):
        assert SPEEDRUN.optimizer.adam.groups[label].model_dump() == {
            "betas": betas,
            "lr_mul": lr_mul,
            "wd_mul": wd_mul,
            "communication": communication,
        }

    def test_adam(self):
        adam = SPEEDRUN.optimizer.adam
        assert (adam.lr, adam.eps, adam.weight_decay, adam.every) == (0.008, 1e-10, 0.005, 2)
        assert len(adam.groups) == 10

    def test_normuon(self):
        normuon = SPEEDRUN.optimizer.normuon
        assert (normuon.lr, normuon.beta2, normuon.weight_decay, normuon.norm_margin) == (0.023, 0.95, 1.2, 1.02)
        assert normuon.momentum.model_dump() == {"low": 0.85, "high": 0.95, "warmup_steps": 300, "cooldown_steps": 50}
        assert {label: group.model_dump() for label, group in normuon.groups.items()} == {
            "attn": {"lr_muls": [1], "communication": "sharded"},
            "mlp": {"lr_muls": [1, 2], "communication": "sharded"},
        }

    def test_polar_express(self):
        assert SPEEDRUN.optimizer.normuon.polar_express == [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ]

    def test_orders_and_split(self):
        optimizer = SPEEDRUN.optimizer
        assert " ".join(optimizer.reduce_order) == (
            "attn mlp scalars value_embed bigram_embed smear_gate skip_gate attn_gate_bank ve_gate_bank x0_lambdas"
            " lm_head embed"
        )
        assert " ".join(optimizer.update_order) == (
            "scalars smear_gate skip_gate attn_gate_bank ve_gate_bank x0_lambdas value_embed bigram_embed lm_head"
            " embed attn mlp"
        )
        split_stage = optimizer.tied_head.split_stage
        first_step = sum(stage.steps for stage in SPEEDRUN.training.all_stages[:split_stage])
        assert (split_stage, first_step) == (2, 1010)  # the split step, 1011, is the first odd one from there

    def test_data(self):
        assert SPEEDRUN.data.bos == 50_256
        assert (SPEEDRUN.data.train_files, SPEEDRUN.data.val_files) == ("fineweb_train_*.bin", "fineweb_val_*.bin")

    def test_gpt2_baseline(self):
        model, optimizer = GPT2.model, GPT2.optimizer
        assert (model.layers, model.width, model.heads, model.context) == (12, 768, 12, 1024)
        assert model.width // model.heads == 64
        assert (model.vocab_size, model.mlp_expansion) == (50_257, 4)
        assert optimizer.kind == "adamw"
        assert isinstance(GPT2.training.lr_schedule, CosineSchedule)


# --- bounds and types ---------------------------------------------------------------------------------------------


def changed(spec: RunSpec, key: str, value: Any) -> dict[str, Any]:
    """`spec` as plain data with the value at the dotted `key` replaced."""
    data = copy.deepcopy(spec.model_dump(mode="json"))
    *parents, last = key.split(".")
    part: Any = data
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    part[int(last) if isinstance(part, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.stages.0.steps", 0),
        ("training.stages.0.steps", -5),
        ("training.stages.0.steps", 2.5),
        ("training.stages.0.steps", "505"),
        ("training.stages.0.steps", True),
        ("training.stages.0.steps", None),
        ("training.stages.0.token_weights", []),
        ("training.stages.0.token_weights", [1, -0.5]),
        ("training.stages.0.token_weights", [1] * 9),
        ("training.stages", []),
        ("training.seed", -1),
        ("training.seed", 2**63),
        ("training.slots", 513),
        ("training.warmup", 1),
        ("training.lr_schedule.cooldown_start", 1.1),
        ("training.lr_schedule.kind", "cosine"),
        ("optimizer.adam.lr", 0),
        ("optimizer.adam.lr", float("inf")),
        ("optimizer.adam.lr", float("nan")),
        ("optimizer.adam.lr", "0.008"),
        ("optimizer.adam.groups.embed.betas", [0.5, 1]),
        ("optimizer.adam.groups.embed.betas", [0.5]),
        ("optimizer.adam.groups.embed.betas", [0.5, 0.9, 0.9]),
        ("optimizer.adam.groups.embed.betas", ["0.5", 0.9]),
        ("optimizer.adam.groups.embed.communication", "local"),
        ("optimizer.normuon.polar_express", []),
        ("optimizer.normuon.polar_express", [[1, 2]]),
        ("optimizer.normuon.groups.mlp.lr_muls", []),
        ("model.bigram_rows", 1),
        ("model.bigram_rows", 2**31),
        ("model.kind", "llama"),
        ("name", ""),
        ("name", "a b"),
        ("name", "../up"),
        ("name", "x" * 101),
        ("hardware.gpu", "v100"),
        ("hardware.nodes", 0),
        ("runtime.dtype", "fp16"),
        ("runtime.compile", True),
        ("evaluation.target_loss", 0),
        ("data.bos", 65536),
        ("checkpoint.keep", 0),
    ],
)
def test_out_of_bounds_is_refused(key, value):
    with pytest.raises(ValidationError):
        RunSpec.model_validate(changed(SPEEDRUN, key, value))


def test_data_that_a_dump_gave_is_accepted():
    assert RunSpec.model_validate(changed(SPEEDRUN, "name", SPEEDRUN.name)) == SPEEDRUN
    assert RunSpec.model_validate(SPEEDRUN.model_dump()) == SPEEDRUN


def test_unknown_keys_are_refused_at_every_depth():
    data = SPEEDRUN.model_dump(mode="json")

    def mappings(part: Any, path: tuple = ()):
        if isinstance(part, dict):
            yield path, part
            for key, value in part.items():
                yield from mappings(value, (*path, key))
        if isinstance(part, list):
            for index, value in enumerate(part):
                yield from mappings(value, (*path, index))

    count = 0
    for path, part in mappings(data):
        if path[-1:] == ("groups",):  # labels, which the cross-checks know
            continue
        part["unknown_key"] = 1
        with pytest.raises(ValidationError, match="unknown_key"):
            RunSpec.model_validate(data)
        del part["unknown_key"]
        count += 1
    assert count > 30
    RunSpec.model_validate(data)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError):
        SPEEDRUN.training.stages[0].steps = 3


# --- cross-checks -------------------------------------------------------------------------------------------------


def problems_of(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The cross-checks' findings as (dotted path, text)."""
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(data)
    errors = [details["ctx"]["error"] for details in caught.value.errors()]
    assert all(isinstance(error, CrossCheckError) for error in errors), caught.value
    return [(".".join(map(str, path)), text) for error in errors for path, text in error.problems]


CROSS_CHECKS = [
    (SPEEDRUN, "model.width", 640, "model.width", "6 * 128"),
    (SPEEDRUN, "model.vocab_size", 50305, "model.padded_vocab_size", "50305"),
    (SPEEDRUN, "model.rotary.frequencies", 65, "model.rotary.frequencies", "130 channels"),
    (SPEEDRUN, "model.rotary.yarn_low", 32, "model.rotary.yarn_low", "yarn_high"),
    (SPEEDRUN, "model.gate_inputs", 769, "model.gate_inputs", "768"),
    (SPEEDRUN, "model.attention_free_layers", [6, 6], "model.attention_free_layers", "twice"),
    (SPEEDRUN, "model.attention_free_layers", [11], "model.attention_free_layers.0", "0..10"),
    (SPEEDRUN, "model.long_window_layers", [3, 11], "model.long_window_layers.1", "0..10"),
    (SPEEDRUN, "model.long_window_layers", [6], "model.long_window_layers.0", "no attention"),
    (SPEEDRUN, "model.value_embed_layers", [0, 6], "model.value_embed_layers.1", "no attention"),
    (SPEEDRUN, "model.paired_layers", [0, 3], "model.paired_layers.1", "long-window"),
    (SPEEDRUN, "model.skip.from_layer", 6, "model.skip", "from < to"),
    (SPEEDRUN, "model.skip.to_layer", 11, "model.skip", "from < to"),
    (SPEEDRUN, "model.backout_layer", 11, "model.backout_layer", "0..10"),
    (SPEEDRUN, "hardware.gpus_per_node", 3, "hardware.gpus_per_node", "1, 2, 4, 8"),
    (SPEEDRUN, "hardware.nodes", 2, "hardware.gpus_per_node", "16"),
    (SPEEDRUN, "training.slots", 4, "training.slots", "world size 8"),
    (SPEEDRUN, "training.stages.1.batch_tokens", 262_145, "training.stages.1.batch_tokens", "128"),
    (SPEEDRUN, "training.extension.batch_tokens", 64, "training.extension.batch_tokens", "128"),
    (SPEEDRUN, "training.stages.2.window_blocks.short", 12, "training.stages.2.window_blocks", "longer"),
    (SPEEDRUN, "evaluation.micro_batch_tokens", 1000, "evaluation.micro_batch_tokens", "16"),
    (SPEEDRUN, "evaluation.tokens", 10_000_000, "evaluation.tokens", "2097152"),
    (SPEEDRUN, "optimizer.adam.groups.embd", "embed", "optimizer.adam.groups", "embd (did you mean embed?)"),
    (SPEEDRUN, "model.mlp_bank_padding", 0, "optimizer.normuon.groups.mlp.communication", "matrices that 8 ranks"),
    (SPEEDRUN, "model.bigram_rows", 251_521, "optimizer.adam.groups.bigram_embed.communication", "has 251521"),
    (
        SPEEDRUN,
        "optimizer.adam.groups.ve_gate_bank.communication",
        "sharded",
        "optimizer.adam.groups.ve_gate_bank.communication",
        "has 5",
    ),
    (SPEEDRUN, "optimizer.reduce_order.0", "mlp", "optimizer.reduce_order", "misses attn; names twice mlp"),
    (SPEEDRUN, "optimizer.update_order.0", "scalar", "optimizer.update_order", "did you mean scalars?"),
    (SPEEDRUN, "optimizer.normuon.momentum.warmup_steps", 1506, "optimizer.normuon.momentum", "1555"),
    (SPEEDRUN, "optimizer.tied_head.split_stage", 4, "optimizer.tied_head.split_stage", "0..3"),
    (SPEEDRUN, "optimizer", GPT2.optimizer.model_dump(), "optimizer.kind", "normuon_adam"),
    (GPT2, "optimizer", SPEEDRUN.optimizer.model_dump(), "optimizer.kind", "adamw"),
    (GPT2, "model.heads", 7, "model.heads", "768"),
    (GPT2, "model.vocab_size", 60_000, "model.padded_vocab_size", "60000"),
    (GPT2, "training.stages.0.token_weights", [1.0, 0.5], "training.stages.0.token_weights", "[1.0]"),
    (GPT2, "training.lr_schedule.warmup_steps", 1001, "training.lr_schedule.warmup_steps", "1000"),
]


@pytest.mark.parametrize(("spec", "key", "value", "path", "text"), CROSS_CHECKS, ids=lambda value: str(value)[:40])
def test_values_that_do_not_fit_together(spec, key, value, path, text):
    if value == "embed":  # a copy of that group under another name
        value = spec.optimizer.adam.groups["embed"].model_dump()
    ((found_path, found_text),) = [problem for problem in problems_of(changed(spec, key, value)) if problem[0] == path]
    assert found_path == path
    assert text in found_text


def test_paired_layers_need_an_even_number_of_heads():
    data = changed(SPEEDRUN, "model.heads", 5)
    data["model"]["width"] = 640
    assert problems_of(data) == [("model.paired_layers", "needs an even number of heads, heads is 5")]


@pytest.mark.parametrize(
    ("gpu", "key", "value"),
    [
        ("cpu", "attention", "fa4"),
        ("a100", "attention", "fa4"),
        ("cpu", "attention", "fa3"),
        ("a100", "attention", "fa3"),
        ("cpu", "attention", "fa2"),
        ("cpu", "attention", "varlen"),
        ("cpu", "head_precision", "fp8"),
        ("a100", "head_precision", "fp8"),
    ],
)
def test_what_a_gpu_type_cannot_do(gpu, key, value):
    data = changed(SPEEDRUN, "hardware.gpu", gpu)
    data["runtime"][key] = value
    ((path, text),) = problems_of(data)
    assert path == f"runtime.{key}"
    assert "h100" in text and text.endswith(f"found {gpu}")
    data["hardware"]["gpu"] = "h200"
    assert getattr(RunSpec.model_validate(data).runtime, key) == value


def test_one_rank_shards_anything():
    data = changed(SPEEDRUN, "model.mlp_bank_padding", 0)
    data["hardware"]["gpus_per_node"] = 1
    assert {row.name: row.units for row in RunSpec.model_validate(data).model.parameters()}["mlp"] == 22


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("model.attention_free_layers", [5], "must be the layer that the skip enters, [6]"),
        ("model.attention_free_layers", [], "must be the layer that the skip enters, [6]"),
        ("model.value_embed_layers", [1, 2, 8, 9], "must name the last layer, 10"),
        ("model.output_gate_layers", [3], "must name the last layer, 10"),
        ("model.paired_layers", [0, 10], "must not name the last layer, 10"),
        ("model.xsa_layers", [1, 6], "is layer 6, which has no attention"),
        ("model.xsa_layers", [1, 1], "names a layer twice"),
        ("model.saved_layer", 10, "must lie between skip.to_layer 6 and the layer before the last, 9"),
        ("model.saved_layer", 5, "must lie between skip.to_layer 6"),
        ("model.gate_inputs", 11, "must be even"),
        ("model.qk_bank_padding", 3, "model.qk_bank_padding can fill up"),
        ("model.vo_bank_padding", 1, "model.vo_bank_padding can fill up"),
        ("model.mlp_fp8.square", "e4m3", "needs gradients: all; found bf16"),
    ],
)
def test_what_record89_refuses(path, value, problem):
    assert any(problem in text for _, text in problems_of(changed(RECORD89, path, value)))


def test_8_bit_mlps_are_for_record89_and_not_for_every_gpu():
    assert problems_of(changed(SPEEDRUN, "runtime.mlp_precision", "fp8")) == [
        ("runtime.mlp_precision", "is fp8, which the MLP of a speedrun model cannot do")
    ]
    data = changed(RECORD89, "runtime.mlp_precision", "fp8")
    for gpu in ("h100", "h200", "cpu"):
        data["hardware"]["gpu"] = gpu
        assert RunSpec.model_validate(data).runtime.mlp_precision == "fp8"
    data["hardware"]["gpu"] = "a100"
    assert [path for path, _ in problems_of(data)] == ["runtime.mlp_precision"]


@pytest.mark.parametrize("spec", [SPEEDRUN, RECORD89, GPT2])
def test_a_model_without_a_sampled_softmax_refuses_candidates(spec):
    problem = f"is 1000, the softmax of a {spec.model.kind} model is over all classes: null"
    data = changed(spec, "training.stages.0.candidates", 1000)
    assert problems_of(data) == [("training.stages.0.candidates", problem)]


def test_candidates_are_classes(monkeypatch):
    monkeypatch.setattr(type(RECORD89.model), "sampled_softmax", True)
    for count in (1, 10_240, 50_304):
        data = changed(RECORD89, "training.stages.0.candidates", count)
        assert RunSpec.model_validate(data).training.stages[0].terms == (3, True, count)
    problem = "is 50305, but there are 50304 classes (model.padded_vocab_size)"
    data = changed(RECORD89, "training.stages.1.candidates", 50_305)
    assert problems_of(data) == [("training.stages.1.candidates", problem)]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"first": 0.25}, "last: is missing"),
        ({"levels": [0.2, -1]}, "levels.1: must be greater than or equal to 0, found -1"),
        ({"levels": []}, "levels: must have at least 1 item"),
        ({"levels": [0.2], "last": 0}, "last: unknown key"),
        ({"level": [0.2]}, "level: unknown key, did you mean levels?; allowed keys: first, last, levels"),
        (0.25, "prefix_weight: must be a mapping, found 0.25"),
    ],
)
def test_a_prefix_weight_of_neither_form(value, problem):
    with pytest.raises(RecipeError) as caught:
        load_recipe("record89", [f"training.stages.0.prefix_weight={json.dumps(value)}"])
    assert any(problem in line for line in caught.value.problems)


def test_gpt2_predicts_no_prefixes():
    data = changed(GPT2, "training.stages.0.prefix_weight", {"first": 0.1, "last": 0.0})
    assert problems_of(data) == [("training.stages.0.prefix_weight", "is set, gpt2 predicts the next token only: null")]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_hardware_recipes_take_record89_as_base(tmp_path, world_size):
    (tmp_path / "record89.yaml").write_text((shipped_recipes() / "record89.yaml").read_text())
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: record89.yaml\nname: mine\nhardware: {{gpu: h200, gpus_per_node: {world_size}}}\n")
    spec = load_recipe(recipe)
    assert (spec.model.kind, spec.world_size, spec.training.total_steps) == ("record89", world_size, 1285)
    assert load_recipe(recipe, steps=300).training.total_steps == 300


def test_several_problems_come_together():
    data = changed(SPEEDRUN, "hardware.gpus_per_node", 5)
    data["model"]["width"] = 700
    data["optimizer"]["tied_head"]["split_stage"] = 9
    assert [path for path, _ in problems_of(data)] == [
        "model.width",
        "hardware.gpus_per_node",
        "optimizer.tied_head.split_stage",
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_every_world_size_and_gpu_type(gpu, world_size):
    data = changed(SPEEDRUN, "hardware", {"gpu": gpu, "gpus_per_node": world_size})
    spec = RunSpec.model_validate(data)
    assert spec.world_size == world_size
    assert spec.accumulation_steps == 8 // world_size


def test_nodes_count_into_the_world_size():
    spec = RunSpec.model_validate(changed(SPEEDRUN, "hardware", {"gpu": "a100", "gpus_per_node": 4, "nodes": 2}))
    assert (spec.world_size, spec.accumulation_steps) == (8, 1)


# --- shortening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEEDRUN, GPT2], ids=["speedrun", "gpt2"])
@given(data=st.data())
def test_a_shortened_run_keeps_its_proportions(spec, data):
    stages = spec.training.all_stages
    total = data.draw(st.integers(len(stages), 3000))
    short = shorten(spec, total)
    lengths = [stage.steps for stage in short.training.all_stages]
    assert sum(lengths) == short.training.total_steps == total
    assert min(lengths) >= 1
    if total > 200:
        for stage, length in zip(stages, lengths, strict=True):
            assert abs(length - stage.steps * total / spec.training.total_steps) <= 1
    assert short.evaluation.every >= 1
    if spec is SPEEDRUN:
        momentum = short.optimizer.normuon.momentum
        assert momentum.warmup_steps + momentum.cooldown_steps <= total
    # Nothing else changes.
    kept = short.model_dump()
    kept["training"], kept["evaluation"], kept["optimizer"] = None, None, None
    original = spec.model_dump()
    original["training"], original["evaluation"], original["optimizer"] = None, None, None
    assert kept == original


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    warmup=st.integers(0, 100),
    total=st.integers(1, 400),
)
def test_any_stages_can_be_shortened(steps, warmup, total):
    old_total = sum(steps)
    data = SPEEDRUN.model_dump()
    stage = data["training"]["stages"][0]
    data["training"]["stages"] = [{**stage, "steps": count} for count in steps]
    data["training"]["extension"] = None
    data["optimizer"]["tied_head"]["split_stage"] = 0
    warmup = min(warmup, old_total)
    data["optimizer"]["normuon"]["momentum"].update(warmup_steps=warmup, cooldown_steps=old_total - warmup)
    spec = RunSpec.model_validate(data)
    if total < len(steps):
        with pytest.raises(CrossCheckError, match=f"{len(steps)} stages"):
            shorten(spec, total)
        return
    lengths = [stage.steps for stage in shorten(spec, total).training.stages]
    assert sum(lengths) == total
    assert min(lengths) >= 1


def test_rounding_never_makes_momentum_outlast_the_run():
    data = SPEEDRUN.model_dump()
    stage = data["training"]["stages"][0]
    data["training"].update(stages=[{**stage, "steps": 100}], extension=None)
    data["optimizer"]["tied_head"]["split_stage"] = 0
    data["optimizer"]["normuon"]["momentum"].update(warmup_steps=50, cooldown_steps=50)
    momentum = shorten(RunSpec.model_validate(data), 3).optimizer.normuon.momentum  # 1.5 and 1.5 steps
    assert (momentum.warmup_steps, momentum.cooldown_steps) == (2, 1)


def test_shortening_to_the_same_length_changes_nothing():
    assert shorten(SPEEDRUN, 1555) == SPEEDRUN
    assert shorten(GPT2, 1000) == GPT2


def test_shortening_scales_what_counts_steps():
    short = shorten(SPEEDRUN, 311)  # a fifth
    assert [stage.steps for stage in short.training.all_stages] == [101, 101, 101, 8]
    assert short.evaluation.every == 50
    assert short.optimizer.normuon.momentum.warmup_steps == 60
    assert short.optimizer.normuon.momentum.cooldown_steps == 10
    assert shorten(GPT2, 100).training.lr_schedule.warmup_steps == 10
