"""The model card: what record.json knows about a run, for people who find its model on a hub."""

from __future__ import annotations

import json

from nanogpt import __version__
from nanogpt.console import markdown_table
from nanogpt.data.official import SHA256
from nanogpt.runs.loaded import IDENTITY_KEYS
from nanogpt.runs.record import Record
from nanogpt.runs.reference import under
from nanogpt.spec import RunSpec

FINEWEB = "HuggingFaceFW/fineweb"
SPEEDRUN = "https://github.com/KellerJordan/modded-nanogpt"


def model_card(
    spec: RunSpec, record: Record | None, *, step: int, parameters: int, remote_code: bool, name: str | None
) -> str:
    """README.md. step: steps made; name: the repository's on the hub, if it is known."""
    train = record.data.train if record and record.data else []
    fineweb = bool(train) and all(file.sha256 is not None and file.sha256 == SHA256.get(file.name) for file in train)
    head = {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nanogpt-speedrun", spec.model.kind],
        **({"language": "en", "datasets": [FINEWEB]} if fineweb else {}),
    }
    trust = ", trust_remote_code=True" if remote_code else ""
    where = name or "DIRECTORY"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        "",
        f"# {name.rpartition('/')[2] if name else spec.name}",
        "",
        f"A language model of {parameters:,} parameters, trained by nanogpt-speedrun {__version__}, model"
        f" `{spec.model.kind}`: a run in the manner of the [NanoGPT speedrun]({SPEEDRUN}). It continues text; it"
        " does not follow instructions, and nothing was done to make what it says true or kind.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{where}"{trust})',
        'tokens = tokenizer("<|endoftext|>The moon is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50, do_sample=True, top_k=50)[0]))",
        "```",
        "",
        f"Every document it was trained on began with `<|endoftext|>` (token {spec.data.bos}): begin with it too.",
        *(
            [
                "`trust_remote_code` runs modeling_nanogpt.py from this directory, which is the training code's own"
                " forward pass. For each token that it writes, it reads the whole text again."
            ]
            if remote_code
            else []
        ),
        f"The logits have {spec.model.padded_vocab_size:,} columns, of which the last"
        f" {spec.model.padded_vocab_size - spec.model.vocab_size:,} are not tokens.",
        "",
        "## The run",
        "",
        *markdown_table(("", ""), _facts(spec, record, step)),
        "",
    ]
    differences = [d for d in record.spec_differences if not under(d.key, IDENTITY_KEYS)] if record else []
    if record and differences:
        lines += [f"Changes from the recipe `{record.base_recipe}`:", ""]
        lines += markdown_table(
            ("key", record.base_recipe, "here"),
            ((f"`{d.key}`", _cell(d.base), _cell(d.run)) for d in differences),
        )
        lines.append("")
    lines += [
        "spec.yaml in this directory is the whole recipe; it trains the model again, up to rounding:",
        "",
        "    nanogpt launch spec.yaml",
        "",
        "## Licence",
        "",
        "Code and weights: MIT."
        + (
            f" Data: [FineWeb](https://huggingface.co/datasets/{FINEWEB}), ODC-By 1.0, and Common Crawl's terms of use."
            if fineweb
            else " The training data is under its owner's terms."
        ),
    ]
    return "\n".join(lines) + "\n"


def _facts(spec: RunSpec, record: Record | None, step: int) -> list[tuple[str, str]]:
    training = spec.training
    facts = [("recipe", f"{spec.name}, seed {training.seed}"), ("steps", f"{step:,} of {training.total_steps:,}")]
    if record is None:
        return [*facts, ("record", "the run has none: nothing more is known about it")]
    data, code = record.data, record.code
    if record.val_loss is not None:
        tokens = f" over {data.val_tokens:,} tokens" if data else ""
        facts.append(
            ("validation loss", f"{record.val_loss:.4f} nats per token, step {record.val_loss_step:,}{tokens}")
        )
    devices = record.hardware.devices
    shards = [f"{file.name} (sha256 {(file.sha256 or 'not known')[:12]})" for file in data.train] if data else []
    commit = f"commit {code.commit or 'not known'}{', with changes' if code.clean is False else ''}"
    facts += [
        ("training tokens", f"{record.tokens:,}"),
        ("training time", f"{record.train_seconds:.1f} s"),
        ("hardware", ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)) or "not known"),
        ("training data", ", ".join(shards) or "not known"),
        ("code", f"{commit}, source sha256 {code.source_sha256}"),
        ("software", ", ".join(f"{name} {version}" for name, version in record.versions.items() if version)),
        ("date", f"{record.ended or record.updated:%Y-%m-%d}"),
    ]
    return [(name, _cell(value)) for name, value in facts]


def _cell(value: object) -> str:
    """One line in a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
