"""Exports loaded by Hugging Face transformers, in an environment without nanogpt, against the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hellaswag_items import write_items
from others import TEXTS
from untrained_runs import KINDS, gpt2_tokens_spec, untrained_run

from nanogpt.data.tokenizer import BOS, gpt2_encoding
from nanogpt.export.export import export_run
from nanogpt.kernels.cross_entropy import softcap
from nanogpt.training.multiple_choice import answer_items, mean_and_error, read_hellaswag
from nanogpt.training.separate_documents import separate_documents
from nanogpt.training.trained_model import TrainedModel, load_trained_model


@torch.no_grad()
def own_logits(trained: TrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(T, padded vocabulary) fp32 after each token of one document."""
    spec, model = trained.spec.model, cast(Any, trained.model)
    batch, (start,) = separate_documents([tokens.tolist()], spec, BOS, "cpu")
    x = model(batch, trained.windows)[start : start + len(tokens)]
    if spec.kind == "gpt2":
        return (x @ model.embed.weight.mT).float()
    return softcap(x @ model.lm_head, spec.softcap.cap, spec.softcap.shift, spec.softcap.scale)


@pytest.mark.parametrize(
    ("kind", "dtype", "option"),
    [
        *((kind, "fp32", "") for kind in KINDS),
        ("record89", "bf16", ""),
        ("record92", "fp32", "model.normalized_ngrams=true"),
    ],
)
def test_logits_are_ours(others: Any, tmp_path: Path, kind: str, dtype: str, option: str) -> None:
    run = untrained_run(tmp_path / "run", gpt2_tokens_spec(kind, f"runtime.dtype={dtype}", *option.split()))
    made = export_run(run, tmp_path / "model")
    told = others("logits", made.path, "auto", tmp_path / "logits.pt")
    assert (told["class"], told["parameters"]) == (
        "GPT2LMHeadModel" if kind == "gpt2" else "NanogptForCausalLM",
        made.parameters,
    )
    for text, (tokens, decoded) in zip(TEXTS, told["texts"], strict=True):
        assert (tokens, decoded) == (gpt2_encoding().encode_ordinary(text), text)

    trained, read = load_trained_model(run), torch.load(tmp_path / "logits.pt")
    ours = [own_logits(trained, row) for row in read["tokens"]]
    bound = 1e-5 * max(1.0, ours[0].abs().max().item()) if dtype == "fp32" else 0.15  # bf16's step at 16 is 0.0625
    for row, own in enumerate(ours):
        assert own.std(0).mean() > 0.1  # the tokens before matter
        assert (read["logits"][row] - own).abs().max() < bound
        for padded in read["padded"] if kind != "gpt2" else ():  # GPT-2's own has positions of the padded row
            assert (padded[row] - own[: len(padded[row])]).abs().max() < bound
    assert told["dtypes"] == ["torch.float32"] if dtype == "fp32" else ["torch.bfloat16", "torch.float32"]
    targets = torch.nn.functional.cross_entropy(torch.cat([own[:-1] for own in ours]), read["tokens"][:, 1:].flatten())
    assert told["loss"] == pytest.approx(targets.item(), abs=1e-5 if dtype == "fp32" else 0.02)
    if dtype == "fp32":
        written = read["tokens"][0, :8].tolist()
        while len(written) < read["written"].shape[1]:
            written.append(int(own_logits(trained, torch.tensor(written))[-1].argmax()))
        assert read["written"][0].tolist() == written


def test_the_safetensors_package_reads_the_file(others: Any, tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run", gpt2_tokens_spec("gpt2"))
    read = others("tensors", export_run(run, tmp_path / "model").path)
    assert read["transformer.h.1.mlp.c_fc.weight"] == [[32, 128], "torch.float32"]
    assert len(read) == 2 + 2 * 12 + 2


@pytest.mark.parametrize("bos", [True, False])
def test_hellaswag_is_scored_as_lm_eval_scores_it(others: Any, tmp_path: Path, bos: bool) -> None:
    context = ("model.context=128", "training.max_document_tokens=128", "training.window_block=128")
    sizes = ("evaluation={every: 4, tokens: 1024, micro_batch_tokens: 256, target_loss: null}",)
    run = untrained_run(tmp_path / "run", gpt2_tokens_spec("gpt2", *context, *sizes))
    made, path = export_run(run, tmp_path / "model"), write_items(tmp_path / "items.jsonl")
    theirs = others("hellaswag", made.path, path, "bos" if bos else "none")
    (ours,) = answer_items([run], read_hellaswag(path), bos=bos, device="cpu")
    assert len(ours.scores) == len(theirs["log_probabilities"]) == 50
    for own, their in zip(ours.scores, theirs["log_probabilities"], strict=True):
        assert own.tolist() == pytest.approx(their, rel=1e-5)
    for name, measure in (("acc", "accuracy"), ("acc_norm", "characters")):
        mean, error = mean_and_error(ours.right[measure])
        assert mean == pytest.approx(theirs[name]) and error == pytest.approx(theirs[f"{name}_stderr"])
    assert 0 < theirs["acc"] < 1 and theirs["acc"] != theirs["acc_norm"]
