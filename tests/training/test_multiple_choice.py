"""Questions with several endings, answered by their likelihood. Against lm-eval's own: tests/transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hellaswag_items import hellaswag_items, write_items
from tiny_runs import tiny_spec
from untrained_runs import gpt2_tokens_spec, untrained_run

from nanogpt.data.tokenizer import BOS, gpt2_encoding
from nanogpt.errors import InputError, RunError
from nanogpt.training.multiple_choice import Item, answer_items, answers_of, as_lines, batches, read_hellaswag
from nanogpt.training.separate_documents import separate_documents
from nanogpt.training.trained_model import load_trained_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("untrained")
    sizes = ("evaluation={every: 5, tokens: 1024, micro_batch_tokens: 256, target_loss: null}",)
    return {kind: untrained_run(home / kind, gpt2_tokens_spec(kind, *sizes)) for kind in ("gpt2", "record89")}


def test_items_are_cleaned_as_the_harness_does(tmp_path: Path) -> None:
    items = read_hellaswag(write_items(tmp_path / "items.jsonl"))
    assert len(items) == 50
    assert items[0].context == "Baking bread: A man pours flour into a bowl. He"
    assert items[1].context == "Home and Garden: How to prune roses. Choose a dry day."
    assert items[4].context == "Chess: Two girls play in a park. One of them"
    assert items[1].endings[2] == " goes home and , 12 o'clock.. Done."
    assert [item.answer for item in items[:5]] == [0, 3, 2, 1, 0]
    for item, written in zip(items, hellaswag_items(), strict=True):
        assert item.endings[item.answer].split()[0] == written["endings"][item.answer].split()[0]


def test_a_file_with_plain_contexts(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"ctx": "The sky is", "endings": ["blue", "loud"], "label": 0}\n\n')
    assert read_hellaswag(path) == [Item("The sky is", ("blue", "loud"), 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"items.jsonl:1: Expecting property name"),
        ('{"ctx": "a", "endings": ["b", "c"]}', r"items.jsonl:1: has no 'label'; expected"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', r"items.jsonl:1: has 2 endings and label 2"),
        ('{"ctx": "a", "endings": ["b", ""], "label": 0}', r"items.jsonl:1: the context or an ending is empty"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": "x"}', r"items.jsonl:1: invalid literal"),
        ('{"ctx": 3, "endings": ["b", "c"], "label": 1}', r"items.jsonl:1: .*expected"),
        ("[]", r"items.jsonl:1: .*expected"),
        ("\n", r"items.jsonl: no items"),
    ],
)
def test_what_is_no_item(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_hellaswag(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_hellaswag(tmp_path / "other.jsonl")


@torch.no_grad()
def simple_scores(run: Path, item: Item, *, bos: bool) -> list[float]:
    """Each ending by a pass of its own, from the logits after each token."""
    trained = load_trained_model(run)
    encode, model = gpt2_encoding().encode_ordinary, trained.model
    scores = []
    for ending in item.endings:
        before, tokens = encode(item.context.rstrip()), encode(f"{item.context} {ending}")
        total = 0.0
        for end in range(len(before), len(tokens)):
            history = ([BOS] if bos else []) + tokens[:end]
            batch, (start,) = separate_documents([history[-trained.longest :]], trained.spec.model, BOS, "cpu")
            last = start + len(history[-trained.longest :]) - 1
            batch.targets[last] = tokens[end]
            total -= model.token_losses(batch, trained.windows)[last].item()
        scores.append(total)
    return scores


@pytest.mark.parametrize(("kind", "bos"), [("gpt2", True), ("gpt2", False), ("record89", True)])
def test_scores_are_those_of_a_simple_computation(runs: dict[str, Path], tmp_path: Path, kind: str, bos: bool) -> None:
    """One batch holds many endings; none depends on the others, and whole documents are read where they fit."""
    items = [item for item in read_hellaswag(write_items(tmp_path / "items.jsonl")) if len(item.context) < 60][:6]
    (answers,) = answer_items([runs[kind]], items, bos=bos, device="cpu")
    for item, scores in zip(items[:2] + items[-1:], answers.scores[:2] + answers.scores[-1:], strict=True):
        assert scores.tolist() == pytest.approx(simple_scores(runs[kind], item, bos=bos), abs=2e-3)


def test_a_long_question_is_read_from_its_end(runs: dict[str, Path]) -> None:
    """32 tokens, and the last one that is scored."""
    long = Item("word " * 40 + "end", ("of it", "of that"), 0)
    (answers,) = answer_items([runs["gpt2"]], [long], device="cpu")
    tail = gpt2_encoding().decode(gpt2_encoding().encode_ordinary(long.context + " of it")[-33:-2])
    (again,) = answer_items([runs["gpt2"]], [Item(tail, long.endings, 0)], bos=False, device="cpu")
    assert answers.scores[0][0] == pytest.approx(again.scores[0][0], abs=1e-3)


def test_batches_are_filled_in_order() -> None:
    assert list(batches([3, 3, 9, 1, 1], 10)) == [[0, 1], [2], [3, 4]]
    assert list(batches([], 8)) == []


def test_accuracies_and_errors_by_hand() -> None:
    """Lengths turn the second item's answer; of four items two, three and two are right."""
    items = [Item("c", ("aa", "bbbb"), 0), Item("c", ("aa", "bbbb"), 1), *[Item("c", ("aa", "bb"), 0)] * 2]
    scores = [([-1.0, -3.0], [1, 1]), ([-2.0, -3.0], [1, 1]), ([-1.0, -2.0], [1, 3]), ([-2.0, -1.0], [1, 1])]
    answers = answers_of("run", 5, [(np.array(values), tokens) for values, tokens in scores], items)
    assert {name: right.tolist() for name, right in answers.right.items()} == {
        "accuracy": [1, 0, 1, 0],
        "characters": [1, 1, 1, 0],
        "tokens": [1, 0, 0, 0],
    }
    error = math.sqrt(4 * 0.25 / 3 / 4)
    assert as_lines([answers], items, "hellaswag")[-1] == (
        f"| run | 5 | 50.00% +- {error:.2%} | 75.00% +- 25.00% | 25.00% +- 25.00% |"
    )


def test_the_command(nanogpt: Callable[..., Any], runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()[:8]))
    out = tmp_path / "out.json"
    outcome = nanogpt("evaluate", *runs.values(), "--task", "hellaswag", "--items", path, "--out", out)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "hellaswag, 8 items; +- standard error"
    assert [line.split()[0] for line in lines[-3:]] == ["gpt2", "record89", "difference"]
    report = json.loads(out.read_text())
    assert [one["run"] for one in report["runs"]] == ["gpt2", "record89"]
    right = [
        max(range(4), key=answer["log_probabilities"][1].__getitem__) == answer["label"] for answer in report["answers"]
    ]
    assert report["runs"][1]["accuracy"]["mean"] == sum(right) / 8


def test_what_is_refused(nanogpt: Callable[..., Any], runs: dict[str, Path], tmp_path: Path) -> None:
    items, run = write_items(tmp_path / "items.jsonl"), runs["gpt2"]
    other = untrained_run(tmp_path / "other", tiny_spec())
    for arguments, message in (
        ((run, "--task", "mmlu", "--items", items), "--task: found 'mmlu', expected hellaswag"),
        ((run, "--task", "hellaswag"), "--items: is missing"),
        ((run, "--items", items), "are for --task, which is not given"),
        ((run, "--no-bos"), "are for --task, which is not given"),
        ((run, "--task", "hellaswag", "--items", items, "--tokens", 64), "are for validation losses"),
        ((other, "--task", "hellaswag", "--items", items), "only models with GPT-2's 50,257 tokens can score texts"),
    ):
        outcome = nanogpt("evaluate", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err


def test_scores_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained_run(tmp_path / "run", gpt2_tokens_spec("gpt2"))
    monkeypatch.setattr(
        "nanogpt.models.gpt2.model.Gpt2.token_losses", lambda _, batch, __: torch.full((len(batch.inputs),), torch.nan)
    )
    with pytest.raises(RunError, match="gives scores that are not finite"):
        answer_items([run], [Item("a", ("b", "c"), 0)], device="cpu")
