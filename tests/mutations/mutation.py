"""What a mutation is, the files that mutations change, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

SPEEDRUN = "nanogpt/models/speedrun/model.py"
RECORD89 = "nanogpt/models/record89/model.py"
RECORD92 = "nanogpt/models/record92/model.py"
TABLE92 = "nanogpt/models/record92/spec.py"
RECIPE92 = "recipes/record92.yaml"
PULLED_TABLE = "nanogpt/optim/pulled_table.py"
PULL_LISTS = "nanogpt/optim/pull_lists.py"
TABLE_ROWS = "nanogpt/kernels/table_rows.py"
TABLE_CYCLES = "nanogpt/training/tables.py"
FP8_QKV = "nanogpt/layers/fp8_qkv.py"
PACKED_QKV = "nanogpt/kernels/packed_qkv.py"
NGRAMS = "nanogpt/models/record92/ngrams.py"
TOKEN_CLASSES = "nanogpt/data/token_classes.py"
CANDIDATES = "nanogpt/models/record92/candidates.py"
TABLE = "nanogpt/models/speedrun/spec.py"
TABLE89 = "nanogpt/models/record89/spec.py"
TABLE_GPT2 = "nanogpt/models/gpt2/spec.py"
RECORD_SPEC = "nanogpt/models/record_spec.py"
STAGE_LOSS = "nanogpt/models/stage_loss.py"
ROW_TABLE = "nanogpt/optim/row_table.py"
RATES = "nanogpt/optim/banks_and_adam_spec.py"
RECORD = "nanogpt/models/record_model.py"
GPT2 = "nanogpt/models/gpt2/model.py"
EMBEDDING = "nanogpt/layers/embedding.py"
COLUMNS = "nanogpt/layers/columns.py"
NORM = "nanogpt/layers/norm.py"
ROTARY = "nanogpt/layers/rotary.py"
ATTENTION = "nanogpt/kernels/attention_plain.py"
HEADS = "nanogpt/layers/attention.py"
PAST = "nanogpt/layers/past.py"
CONNECTIONS = "nanogpt/layers/dense_connections.py"
MIXING = "nanogpt/kernels/head_mixing.py"
FP8_HEAD = "nanogpt/kernels/fp8_head.py"
E4M3_HEAD = "nanogpt/kernels/e4m3_head.py"
FP8_MLP = "nanogpt/kernels/fp8_mlp.py"
FP8_SCALES = "nanogpt/layers/fp8_mlp.py"
PREFIXES = "nanogpt/data/prefixes.py"
RECIPE89 = "recipes/record89.yaml"
HEAD = "nanogpt/kernels/cross_entropy.py"
MLP = "nanogpt/kernels/relu_squared_mlp.py"
ADAM = "nanogpt/optim/adam.py"
ADAMW = "nanogpt/optim/adamw/optimizer.py"
NORMUON = "nanogpt/optim/normuon.py"
POLAR = "nanogpt/optim/polar_express.py"
COMMUNICATION = "nanogpt/optim/communication.py"
OPTIMIZER = "nanogpt/optim/banks_and_adam.py"
PLAN = "nanogpt/optim/step_order.py"
ANVIL = "nanogpt/optim/anvil.py"
ANVIL_RATES = "nanogpt/optim/anvil_adam/spec.py"
ANVIL_OPTIMIZER = "nanogpt/optim/anvil_adam/optimizer.py"
SCHEDULE = "nanogpt/training/schedule.py"
TRAINER = "nanogpt/training/trainer.py"
END_OF_RUN = "nanogpt/training/end_of_run.py"
SPEC_END = "nanogpt/spec_end.py"
CANONICAL_MASK = "nanogpt/data/canonical_mask.py"
RECIPE_AVERAGED = "recipes/record89-averaged.yaml"
MICRO_STEP = "nanogpt/training/micro_step.py"
ROWS = "nanogpt/kernels/row_gradients.py"
MICRO_BATCHES = "nanogpt/data/micro_batches.py"
BATCHES = "nanogpt/data/training_batches.py"
VALIDATION_BATCHES = "nanogpt/data/validation_batches.py"
DOCUMENTS = "nanogpt/data/documents_index.py"
RECIPE = "recipes/speedrun.yaml"

_TESTS: dict[str, tuple[str, ...]] = {
    TABLE: ("tests/test_spec.py", "tests/models/test_speedrun.py"),
    TABLE89: ("tests/models/test_record89.py", "tests/optim/test_record89_steps.py"),
    TABLE_GPT2: ("tests/models/test_gpt2.py",),
    RECORD_SPEC: (
        "tests/models/test_batch_extras.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    STAGE_LOSS: ("tests/training/test_schedule.py", "tests/training/test_schedule_record89.py"),
    ROW_TABLE: ("tests/training/test_micro_step.py",),
    RATES: (
        "tests/training/test_schedule.py",
        "tests/training/test_schedule_record89.py",
        "tests/optim/test_anvil_adam.py",
        "tests/optim/test_normuon_adam.py",
    ),
    SPEEDRUN: ("tests/models/test_speedrun.py",),
    RECORD89: ("tests/models/test_record89.py", "tests/optim/test_record89_steps.py"),
    RECORD92: ("tests/models/test_record92.py",),
    TABLE92: (
        "tests/models/test_record92.py",
        "tests/models/test_batch_extras.py",
        "tests/training/test_schedule_record92.py",
    ),
    RECIPE92: (
        "tests/training/test_schedule_record92.py",
        "tests/optim/test_anvil_adam.py",
        "tests/models/test_record92.py",
    ),
    PULLED_TABLE: ("tests/optim/test_pulled_table.py", "tests/distributed/test_communicator.py"),
    PULL_LISTS: ("tests/optim/test_pull_lists.py",),
    TABLE_ROWS: ("tests/kernels/test_table_rows.py::test_rows_in_plain_pytorch_against_fp64",),
    TABLE_CYCLES: ("tests/training/test_tables.py",),
    FP8_QKV: ("tests/layers/test_fp8_qkv.py",),
    PACKED_QKV: ("tests/kernels/test_packed_qkv.py::test_plain_queries_keys_and_gradients_are_the_layers",),
    NGRAMS: ("tests/models/test_ngrams.py",),
    TOKEN_CLASSES: ("tests/data/test_token_classes.py",),
    CANDIDATES: ("tests/models/test_candidates.py",),
    RECORD: (
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
        "tests/training/test_micro_step.py",
    ),
    HEADS: (
        "tests/layers/test_attention_layer.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    PAST: ("tests/training/test_sampling.py::test_the_cache_changes_nothing",),
    CONNECTIONS: ("tests/models/test_record89.py",),
    MIXING: ("tests/kernels/test_head_mixing.py", "tests/models/test_record89.py"),
    FP8_HEAD: ("tests/kernels/test_cross_entropy.py",),
    E4M3_HEAD: ("tests/kernels/test_e4m3_head.py",),
    FP8_MLP: ("tests/layers/test_fp8_mlp.py",),
    FP8_SCALES: (
        "tests/layers/test_fp8_mlp.py",
        "tests/training/test_record89_runs.py::test_updates_and_roundings_of_weights_that_are_replayed_change_nothing",
    ),
    PREFIXES: ("tests/data/test_prefixes.py",),
    GPT2: ("tests/models/test_gpt2.py",),
    EMBEDDING: (
        "tests/layers/test_embedding.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    COLUMNS: ("tests/layers/test_columns.py",),
    NORM: ("tests/layers/test_norm.py",),
    ROTARY: ("tests/layers/test_rotary.py", "tests/models/test_speedrun.py"),
    ATTENTION: ("tests/kernels/test_attention.py", "tests/models/test_speedrun.py"),
    HEAD: (
        "tests/kernels/test_cross_entropy.py",
        "tests/models/test_speedrun.py",
        "tests/models/test_record89.py",
    ),
    MLP: ("tests/models/test_speedrun.py", "tests/layers/test_fp8_mlp.py"),
    ADAM: ("tests/optim/test_adam.py", "tests/optim/test_normuon_adam.py"),
    ADAMW: ("tests/optim/test_adamw.py",),
    NORMUON: ("tests/optim/test_normuon.py", "tests/optim/test_normuon_adam.py", "tests/optim/test_anvil.py"),
    POLAR: ("tests/optim/test_polar_express.py", "tests/optim/test_normuon.py"),
    COMMUNICATION: ("tests/distributed/test_communicator.py",),
    OPTIMIZER: (
        "tests/optim/test_anvil_adam.py",
        "tests/optim/test_normuon_adam.py",
        "tests/optim/test_captured_updates.py",
    ),
    PLAN: ("tests/optim/test_anvil_adam.py", "tests/optim/test_normuon_adam.py"),
    ANVIL: ("tests/optim/test_anvil.py", "tests/optim/test_anvil_adam.py"),
    ANVIL_RATES: ("tests/optim/test_anvil_adam.py",),
    ANVIL_OPTIMIZER: ("tests/optim/test_anvil_adam.py",),
    SCHEDULE: ("tests/training/test_schedule.py", "tests/training/test_schedule_record89.py"),
    TRAINER: (
        "tests/optim/test_micro_steps.py",
        "tests/training/test_trainer.py::test_each_stage_brings_its_batch_windows_weights_and_yarn",
        "tests/training/test_trainer.py::test_each_step_is_built_once_and_ahead",
    ),
    END_OF_RUN: ("tests/training/test_tail_averages.py",),
    SPEC_END: ("tests/training/test_tail_averages.py",),
    CANONICAL_MASK: ("tests/data/test_canonical_mask.py",),
    RECIPE_AVERAGED: ("tests/training/test_end_of_run.py::test_the_shipped_recipe_trains_as_record_89",),
    MICRO_STEP: ("tests/training/test_micro_step.py", "tests/optim/test_micro_steps.py"),
    ROWS: ("tests/kernels/test_row_gradients.py", "tests/training/test_micro_step.py"),
    MICRO_BATCHES: ("tests/data/test_training_batches.py", "tests/data/test_training_extras.py"),
    BATCHES: ("tests/data/test_training_batches.py", "tests/data/test_training_extras.py"),
    VALIDATION_BATCHES: ("tests/data/test_validation_batches.py",),
    DOCUMENTS: ("tests/data/test_training_batches.py",),
    RECIPE89: (
        "tests/models/test_record89.py",
        "tests/training/test_schedule_record89.py",
        "tests/optim/test_record89_steps.py",
    ),
    RECIPE: (
        "tests/models/test_speedrun.py",
        "tests/layers",
        "tests/training/test_schedule.py",
        "tests/optim/test_normuon_adam.py",
        "tests/optim/test_polar_express.py",
    ),
}


@dataclass(frozen=True)
class Mutation:
    """One formula changed: texts of a file that each occur once, and what they become."""

    mechanism: str
    what: str
    file: str
    changes: tuple[tuple[str, str], ...]

    @property
    def tests(self) -> tuple[str, ...]:
        """The test files that must notice."""
        return _TESTS[self.file]


class Mutations(list[Mutation]):
    """Those of one subject, in the order in which they run."""

    def add(self, mechanism: str, file: str, what: str, *changes: tuple[str, str]) -> None:
        """One line of the table: mechanism, where, and what is changed."""
        self.append(Mutation(mechanism, what, file, changes))


def mutated(mutation: Mutation, root: Path) -> str:
    """The file's new text. Raises ValueError unless each old text occurs exactly once: the table follows the code."""
    text = (root / mutation.file).read_text()
    for old, new in mutation.changes:
        if text.count(old) != 1:
            raise ValueError(
                f"{mutation.mechanism}, {mutation.what}: {text.count(old)} times in {mutation.file}: {old!r}"
            )
        text = text.replace(old, new)
    if mutation.file.endswith(".py"):
        compile(text, mutation.file, "exec")
    return text
