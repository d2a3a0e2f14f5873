"""Exports as far as they can be looked at without transformers; loading them is tests/transformers."""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_specs import small_record89
from tiny_runs import make_data, tiny_spec, train
from untrained_runs import gpt2_tokens_spec, untrained_run
from upload_hub import UploadHub

from nanogpt.data.token_classes import token_classes
from nanogpt.data.tokenizer import BOS, bpe_ranks
from nanogpt.errors import InputError
from nanogpt.export.bundle import Bundle
from nanogpt.export.export import export_run
from nanogpt.export.modeling import modeling_code
from nanogpt.export.tokenizer_files import byte_letters, tokenizer_files
from nanogpt.models import MODELS
from nanogpt.recipe import load_recipe
from nanogpt.registry import kind_of, specs_of
from nanogpt.training.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ["README.md", "config.json", "merges.txt", "model.safetensors", "spec.yaml", "tokenizer.json"]
FILES += ["tokenizer_config.json", "vocab.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(
        tmp_path_factory.mktemp("untrained") / "run", gpt2_tokens_spec("record89", "runtime.dtype=bf16")
    )


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("exported") / "model").path


def test_the_files_are_whole(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == sorted([*FILES, "modeling_nanogpt.py"])
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_tensors_are_those_of_the_checkpoint(run: Path, exported: Path) -> None:
    data = (exported / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    model = load_trained_model(run).model
    names = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            entry = header.pop(f"model.{name}")
            start, end = entry["data_offsets"]
            read = torch.frombuffer(bytearray(body[start:end]), dtype=names[entry["dtype"]]).view(entry["shape"])
            assert torch.equal(read, value), name
    assert list(header) == ["__metadata__"]
    assert end == len(body)


def test_the_code_stands_by_itself() -> None:
    """Of every registered model that brings code: Python, and nothing of the package."""
    kinds = [kind_of(spec) for spec in specs_of(MODELS)]
    assert len(kinds) >= 3
    for kind in set(kinds) - {"gpt2"}:
        code = modeling_code(load_recipe(kind).model)
        compile(code, kind, "exec")
        assert not re.search(r"^\s*(from|import) nanogpt", code, re.MULTILINE)
        assert "class NanogptForCausalLM(PreTrainedModel, GenerationMixin):" in code


@pytest.mark.parametrize("recipe", ["record92", "record92-normalized-ngrams"])
def test_the_code_of_normalized_ngrams_has_their_classes(recipe: str) -> None:
    """The others' has none: they are 60 kB."""
    code = modeling_code(load_recipe(recipe).model)
    (made,) = (
        node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == "token_classes"
    )
    namespace: dict[str, Any] = {"np": np}
    exec(ast.unparse(made), namespace)
    found = namespace["token_classes"]()
    assert found.dtype == np.uint16
    assert found.tolist() == (token_classes().tolist() if recipe != "record92" else [])


def test_a_bundle_has_what_is_named_and_nothing_else() -> None:
    bundle = Bundle()
    bundle.add("nanogpt.layers.attention", "rotated_queries_keys")
    namespace: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + bundle.text(["from typing import Any"]), namespace)
    assert {"norm", "shift_still_keys", "EPS"} < namespace.keys()
    assert "remove_own_value" not in namespace
    assert namespace["norm"](torch.full((1, 4), 3.0)).tolist() == [[1.0] * 4]


def test_two_definitions_of_one_name_are_refused() -> None:
    bundle = Bundle()
    bundle.add("nanogpt.layers.norm", "EPS")
    with pytest.raises(ValueError, match="EPS is defined in"):
        bundle.add("nanogpt.models.definitions", "EPS")


def test_the_card_tells_what_the_record_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was trained; its vocabulary is let pass as GPT-2's."""
    monkeypatch.setattr("nanogpt.data.tokenizer.VOCAB_SIZE", 64)
    data, path = make_data(tmp_path / "data"), tmp_path / "run"
    result = train(tiny_spec("checkpoint={at_end: true}", f"data.directory={data}", model="gpt2"), data, path)
    made = export_run(path, tmp_path / "model", name="lab/tiny")
    card = (made.path / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    for text in (
        "# tiny\n",
        'from_pretrained("lab/tiny")',
        "| recipe | tiny-gpt2, seed 0 |",
        "| steps | 9 of 9 |",
        f"| validation loss | {result.final_val_loss:.4f} nats per token, step 9 over 256 tokens |",
        "| hardware | 1 x cpu |",
        "| `model.width` | 768 | 32 |",
        "fineweb_train_000001.bin (sha256 ",
    ):
        assert text in card
    assert "trust_remote_code" not in card and "ODC-By" not in card
    assert str(tmp_path) not in card + (made.path / "spec.yaml").read_text()
    assert "parameters" in card and f"{made.parameters:,}" in card
    assert (made.step, made.remote_code) == (9, False)


def test_merges_make_every_token() -> None:
    """Each merge joins two tokens to the next one, in the order of the ranks."""
    files = tokenizer_files(1024)
    letters = {letter: byte for byte, letter in byte_letters().items()}
    assert len(letters) == 256
    ranks, vocabulary = bpe_ranks(), json.loads(files["vocab.json"])
    assert vocabulary.pop("<|endoftext|>") == BOS
    assert {bytes(letters[c] for c in word): rank for word, rank in vocabulary.items()} == ranks
    merges = files["merges.txt"].splitlines()[1:]
    joined = [vocabulary["".join(line.split(" "))] for line in merges]
    assert joined == list(range(256, BOS))
    assert merges[:3] == ["Ġ t", "Ġ a", "h e"]


def test_what_cannot_be_exported(nanogpt: Callable[..., Any], run: Path, exported: Path, tmp_path: Path) -> None:
    other = untrained_run(tmp_path / "other", tiny_spec())
    windowed = gpt2_tokens_spec("gpt2", "model.context=64")
    for arguments, message in (
        ((run, "--out", exported), "already exists; name another directory"),
        ((other, "--out", tmp_path / "new"), "model.vocab_size is 64, but GPT-2's tokenizer has 50,257"),
        (
            (untrained_run(tmp_path / "w", windowed), "--out", tmp_path / "new"),
            "sees 32 tokens back, its context is 64",
        ),
        ((run, "--out", tmp_path / "new", "--private"), "--private: is for the repository of --push-to-hub"),
        ((run, "--out", tmp_path / "new", "--push-to-hub", "name"), "expected OWNER/NAME"),
    ):
        outcome = nanogpt("export", *arguments)
        assert outcome.code == 2, outcome
        assert message in outcome.err
    assert not (tmp_path / "new").exists()


def test_upload(
    nanogpt: Callable[..., Any], run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with UploadHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        out = tmp_path / "model"
        outcome = nanogpt("export", run, "--out", out, "--push-to-hub", "lab/tiny", "--private")
        assert outcome.code == 0, outcome.err
        assert outcome.out.strip() == f"{hub.endpoint}/lab/tiny"
        assert hub.repositories == {"lab/tiny": True}
        assert hub.tokens == {"Bearer hf_secret"}
        assert hub.files.keys() == {path.name for path in exported.iterdir()}
        for path in out.iterdir():
            assert hub.files[path.name] == path.read_bytes(), path.name


def test_an_upload_that_fails_leaves_the_export(
    nanogpt: Callable[..., Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "model"
    with UploadHub(refuse=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        outcome = nanogpt("export", run, "--out", out, "--push-to-hub", "lab/tiny")
    assert outcome.code == 1
    assert f"{hub.endpoint}: the hub refuses lab/tiny" in outcome.err
    assert f"The export is complete in {out}" in outcome.err
    assert "hf_secret" not in outcome.err
    assert (out / "model.safetensors").is_file()


def test_a_token_is_not_sent_in_the_open(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanogpt.export.hub import push

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(InputError, match="plain http, where others can read the token"):
        push(run, "lab/tiny", private=False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="there is no token"):
        push(run, "lab/tiny", private=False)


def test_record89_at_its_real_layout_is_bundled() -> None:
    """Eleven layers, as the recipe has them."""
    code = modeling_code(small_record89().model)
    assert "def gate_columns" in code and "def _plain_forward" in code
