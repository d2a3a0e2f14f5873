"""A model by copying a folder, and in it a gate with a learning rate of its own: docs/adding.md's diff as it stands.

The package is copied, record 89's folder in it becomes a new kind, and a process of its own imports the copy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
from tiny_runs import FIRST_WITH_PREFIX, make_data, python

from nanogpt.runs.provenance import package_directory

ROOT = Path(__file__).parents[2]
LR_MUL = 0.3  # what the diff says

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from small_specs import batch_of, randomize, relative_error, small_record89
from tiny_runs import losses, tiny_spec, train
from nanogpt.models.definitions import start_frequencies
from nanogpt.models.gated.definition import DenseGated
from nanogpt.models.language_model import Windows, make_model

spec = small_record89(overrides=["model.kind=gated"]).model
model = make_model(spec, dtype=torch.float64, max_tokens=16)
model.draw_parameters(torch.Generator().manual_seed(0))
randomize(model)
parameters = {name: p.detach() for name, p in model.named_parameters()}
dense = DenseGated(parameters, model.bigram_signs.double(), [-1] * 64, start_frequencies(4), 0.1, dc_window=5)
tokens = torch.arange(16) * 7 % 61
batch = batch_of(spec, tokens, tokens, torch.tensor([0, 16], dtype=torch.int32), 16)
with torch.no_grad():
    error = relative_error(model(batch, Windows(3, 7)), dense.hidden(tokens.tolist(), [0] * 16, 3, 7))

data, run = map(Path, sys.argv[1:])
spec = tiny_spec("model.kind=gated", "checkpoint={every: 2, keep: 9}", model="record89")
train(spec, data, run)

def weights(step, name):
    return torch.load(run / f"checkpoints/step-{step:06d}.pt", weights_only=False)["model"][name]

first = {name: weights(2, name) for name in ("attn_gate_bank", "ve_gate_bank")}
print(json.dumps({
    "error": error,
    "first": {name: values[values != 0].abs().tolist() for name, values in first.items()},
    "later": (weights(10, "attn_gate_bank") - first["attn_gate_bank"]).abs().max().item(),
    "lr": spec.optimizer.adam.lr,
    "losses": losses(run)[1],
}))
"""


def changes() -> dict[Path, list[str]]:
    """The lines of the diff in docs/adding.md, by file."""
    found = re.search(r"```diff\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
    assert found
    parts = (part.splitlines() for part in found[1].split("--- ")[1:])
    return {Path(name): lines for name, *lines in parts}


def replace_once(file: Path, old: str, new: str) -> None:
    """Put `new` where `old` is, which is there once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
    file.write_text(text.replace(old, new))


def renamed(text: str) -> str:
    """`text` about the kind `gated`."""
    return text.replace("record89", "gated").replace("Record89", "Gated")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Where the copied package is, with the kind `gated`."""
    root = tmp_path / "copy"
    package = Path(shutil.copytree(package_directory(), root / "nanogpt", ignore=shutil.ignore_patterns("__pycache__")))
    shutil.copytree(ROOT / "recipes", root / "recipes")
    folder = Path(shutil.copytree(package / "models/record89", package / "models/gated"))
    for name, lines in changes().items():
        for hunk in "\n".join(lines).split("@@\n")[1:]:
            kept = {mark: [line[1:] for line in hunk.splitlines() if line[:1] in (" ", mark)] for mark in "-+"}
            replace_once(folder / name.name, "\n".join(kept["-"]) + "\n", "\n".join(kept["+"]) + "\n")
    for file in folder.glob("*.py"):
        file.write_text(renamed(file.read_text()))
    registry = package / "models/__init__.py"
    (old,) = (line for line in registry.read_text().splitlines(keepends=True) if "nanogpt.models.record89" in line)
    replace_once(registry, old, old + renamed(old))
    recipe = (root / "recipes/record89.yaml").read_text()
    (root / "recipes/gated.yaml").write_text(recipe.replace("kind: record89", "kind: gated"))
    return root


def test_the_diff_is_as_small_as_contributing_says():
    text, diff = (ROOT / "docs/adding.md").read_text(), changes()
    lines = [line for part in diff.values() for line in part]
    added, removed = (sum(line.startswith(mark) for line in lines) for mark in "+-")
    assert f"{len(diff)} files, +{added} -{removed}" in text
    assert (len(diff), added, removed) == (3, 5, 1)


def test_the_gate_of_a_new_kind_is_trained_with_its_own_rate(copy: Path, tmp_path: Path):
    data = make_data(tmp_path / "data", first_token=FIRST_WITH_PREFIX)
    path = os.pathsep.join([str(copy), str(ROOT / "tests")])
    ran = python("-c", SCRIPT, str(data), str(tmp_path / "run"), cwd=tmp_path, PYTHONPATH=path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])

    assert found["error"] < 1e-6  # against the definition, with its line of the diff
    # Adam's first update of a number is as long as its learning rate, whatever the gradient, unless that is tiny.
    for name, lr_mul in (("attn_gate_bank", LR_MUL), ("ve_gate_bank", 1.0)):
        first = found["first"][name]
        assert len(first) > 40, name
        assert statistics.median(first) == pytest.approx(lr_mul * found["lr"], rel=1e-3), name
        assert max(first) == pytest.approx(lr_mul * found["lr"], rel=1e-3), name
    assert found["later"] > 0.1 * LR_MUL * found["lr"]
    losses = list(found["losses"].values())
    assert losses[-1] < losses[0] - 0.1
