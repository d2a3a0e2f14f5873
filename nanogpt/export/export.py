"""A run's newest checkpoint as a directory that Hugging Face transformers loads.

model.safetensors in the run's dtypes, config.json, GPT-2's tokenizer, README.md (the model card) and spec.yaml. A model
that transformers has itself is written as its own; any other comes with its code, see `nanogpt.export.modeling`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt.data import tokenizer
from nanogpt.errors import InputError
from nanogpt.export.card import model_card
from nanogpt.export.modeling import CLASSES, FILE, modeling_code
from nanogpt.export.safetensors import write_tensors
from nanogpt.export.tokenizer_files import tokenizer_files
from nanogpt.layers.rotary import Rotary
from nanogpt.recipe import publishable_spec
from nanogpt.runs.directory import RECORD_NAME, SPEC_NAME, refuse_existing, whole_directory
from nanogpt.runs.record import read_record
from nanogpt.training.trained_model import TrainedModel, load_trained_model


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    step: int  # steps that the model has made
    parameters: int
    remote_code: bool


def export_run(run_directory: Path, out: Path, *, name: str | None = None) -> Exported:
    """Write the newest checkpoint of a run to the directory `out`, whole or not at all.

    name: OWNER/NAME on the hub, for the model card.

    Raises:
        InputError: no run or checkpoint there, `out` exists, the run's tokenizer is not GPT-2's, or the model is one
            whose windows transformers' own cannot have.
        RunError: it cannot be written.
    """
    refuse_existing(out)
    trained = load_trained_model(run_directory)
    spec = trained.spec
    if spec.model.vocab_size != tokenizer.VOCAB_SIZE:
        raise InputError(
            f"{trained.run.path}: model.vocab_size is {spec.model.vocab_size}, but GPT-2's tokenizer has"
            f" {tokenizer.VOCAB_SIZE:,} tokens: the model was trained on other tokens, and an export needs their names"
        )
    record = read_record(trained.run.path) if (trained.run.path / RECORD_NAME).exists() else None
    config, tensors, code = transformers_form(trained)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    files = {
        "config.json": json.dumps(config, indent=1) + "\n",
        "README.md": model_card(
            spec, record, step=trained.step, parameters=parameters, remote_code=code is not None, name=name
        ),
        SPEC_NAME: publishable_spec(spec),
        **tokenizer_files(spec.training.max_document_tokens),
        **({FILE: code} if code else {}),
    }
    with whole_directory(out, "export") as partial:
        for file, text in files.items():
            (partial / file).write_text(text, "utf-8")
        write_tensors(partial / "model.safetensors", tensors)
    return Exported(out, trained.step, parameters, code is not None)


def transformers_form(trained: TrainedModel) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """config.json, the tensors by name, and the model's code (None: transformers has it).

    Raises InputError as `LanguageModel.as_transformers` does.
    """
    spec, model = trained.spec, trained.model
    ends = {"bos_token_id": spec.data.bos, "eos_token_id": spec.data.bos}
    own = model.as_transformers(trained.windows)
    if own is not None:
        dtype = next(iter(own.tensors.values())).dtype
        return {**own.config, **ends, "dtype": str(dtype).removeprefix("torch.")}, own.tensors, None
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, table in model.tables.items():
        touched = table.last_update.nonzero().flatten()
        rows = touched if len(touched) else touched.new_zeros(1)
        state |= {f"table_{name}": table.values[rows], f"table_{name}_rows": rows}
    parameters = dict(model.named_parameters())
    config = {
        "architectures": [CLASSES["AutoModelForCausalLM"]],
        "model_type": "nanogpt_record",
        "auto_map": {auto: f"{FILE.removesuffix('.py')}.{name}" for auto, name in CLASSES.items()},
        "vocab_size": spec.model.padded_vocab_size,
        "hidden_size": spec.model.width,
        "num_hidden_layers": spec.model.layers,
        "num_attention_heads": spec.model.heads,
        "max_position_embeddings": spec.training.max_document_tokens,
        "tie_word_embeddings": False,
        "use_cache": False,
        "dtype": str(model.get_parameter("embed").dtype).removeprefix("torch."),
        **ends,
        "spec": spec.model.model_dump(mode="json"),
        "rotary": {name: part.get_extra_state() for name, part in model.named_children() if isinstance(part, Rotary)},
        "windows": {"short": trained.windows.short, "long": trained.windows.long},
        "tensors": {
            name: [list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in state.items()
        },
        "buffers": [name for name in state if name not in parameters],
        "numberings": {name: [*value.items()] for name, value in vars(model).items() if _is_numbering(value)},
        "tables": [*model.tables],
    }
    return config, {f"model.{name}": value for name, value in state.items()}, modeling_code(spec.model)


def _is_numbering(value: object) -> bool:
    """Whether it says which entry of a bank or table belongs to which layer: numbers by number."""
    return isinstance(value, dict) and bool(value) and all(isinstance(n, int) for pair in value.items() for n in pair)
