"""Tasks where the model's answer is the likeliest of several endings: HellaSwag (Zellers et al., 2019).

The rules are those of EleutherAI's lm-evaluation-harness, as in published figures: context and ending are joined
by a space and tokenized together, an ending's score is the log-probability of its tokens, and

- accuracy takes the ending with the highest score,
- normalised accuracy the one with the highest score per character (the harness's `acc_norm`),
- accuracy per token the one with the highest mean log-probability (as llm.c and build-nanogpt print).

Standard errors are over items: the standard deviation divided by sqrt(n).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.console import markdown_table, progress
from nanogpt.data.tokenizer import VOCAB_SIZE, gpt2_encoding
from nanogpt.errors import InputError, RunError
from nanogpt.files import read_regular
from nanogpt.runs.directory import RunDirectory
from nanogpt.training.separate_documents import EMPTY, separate_documents
from nanogpt.training.trained_model import TrainedModel, evaluating_implementations, find_device, load_trained_model

BATCH_TOKENS = 16384  # at most, in one forward pass
TASKS = ("hellaswag",)
MEASURES = {"accuracy": "accuracy", "characters": "normalised accuracy", "tokens": "accuracy per token"}


@dataclass(frozen=True)
class Item:
    """A context, its possible endings, and which is right."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True, eq=False)
class Answers:
    """One run's answers to n items."""

    label: str
    step: int  # of the checkpoint: steps done
    scores: tuple[npt.NDArray[np.float64], ...]  # for each item: log-probabilities of its endings, in nats
    right: dict[str, npt.NDArray[np.float64]]  # by MEASURES: (n,) 1 if the answer is right, else 0


def read_hellaswag(path: Path) -> list[Item]:
    """The items of a JSON-lines file in HellaSwag's format: ctx_a, ctx_b and activity_label, or ctx; endings; label.

    Raises InputError with file and line for what is not an item.
    """
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--items: {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    items = [_item(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise InputError(f"--items: {path}: no items; expected a line of JSON for each")
    return items


def _item(line: str, place: str) -> Item:
    wanted = 'expected {"ctx": TEXT, "endings": [TEXT, ...], "label": NUMBER} as HellaSwag has it'
    try:
        value = json.loads(line)
        endings = tuple(_cleaned(ending) for ending in value["endings"])
        context = value["ctx"] if "ctx_a" not in value else f"{value['ctx_a']} {value['ctx_b'].capitalize()}"
        if "activity_label" in value:
            context = f"{value['activity_label']}: {context}"
        item = Item(_cleaned(context), endings, int(value["label"]))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{place}: {error}; {wanted}") from None
    except KeyError as error:
        raise InputError(f"{place}: has no {error}; {wanted}") from None
    if len(endings) < 2 or not 0 <= item.answer < len(endings):
        raise InputError(f"{place}: has {len(endings)} endings and label {item.answer}; {wanted}")
    if not item.context or not all(endings):
        raise InputError(f"{place}: the context or an ending is empty; {wanted}")
    return item


def _cleaned(text: str) -> str:
    """Without the markup that WikiHow's pages left in HellaSwag, as in the harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def answer_items(
    run_directories: Sequence[Path], items: Sequence[Item], *, bos: bool = True, device: str | None = None
) -> list[Answers]:
    """The answers of the newest checkpoints of runs. bos: begin each document with BOS, as in training.

    Raises:
        InputError: no run or checkpoint, a run with a tokenizer other than GPT-2's, or no GPU.
        RunError: a score that is not finite.
    """
    place, answers = find_device(device), []
    for path in run_directories:
        spec = RunDirectory.open(path).spec()
        if spec.model.vocab_size != VOCAB_SIZE:
            raise InputError(
                f"{path}: model.vocab_size is {spec.model.vocab_size}; only models with GPT-2's"
                f" {VOCAB_SIZE:,} tokens can score texts"
            )
        trained = load_trained_model(path, device=place, implementations=evaluating_implementations(spec, place))
        scores = _scores(trained, items, bos=bos, device=place)
        answers.append(answers_of(trained.run.path.resolve().name, trained.step, scores, items))
    return answers


def answers_of(
    label: str, step: int, scores: Sequence[tuple[npt.NDArray[np.float64], list[int]]], items: Sequence[Item]
) -> Answers:
    """scores: for each item, the log-probabilities of its endings, and how many tokens each has."""
    right: dict[str, list[float]] = {name: [] for name in MEASURES}
    for (values, tokens), item in zip(scores, items, strict=True):
        lengths = {"accuracy": [1], "characters": [len(ending) for ending in item.endings], "tokens": tokens}
        for name, length in lengths.items():
            right[name].append(float(np.argmax(values / np.array(length)) == item.answer))
    return Answers(label, step, tuple(values for values, _ in scores), {k: np.array(v) for k, v in right.items()})


def _scores(
    trained: TrainedModel, items: Sequence[Item], *, bos: bool, device: Any
) -> list[tuple[npt.NDArray[np.float64], list[int]]]:
    """For each item, the log-probabilities of its endings, and how many tokens each has."""
    spec, encoding = trained.spec, gpt2_encoding()
    documents, scored = [], []
    for item in items:
        before = len(encoding.encode_ordinary(item.context.rstrip()))  # a space at its end belongs to the ending
        for ending in item.endings:
            tokens = encoding.encode_ordinary(f"{item.context} {ending}")
            scored.append(len(tokens) - before)
            document = [spec.data.bos, *tokens] if bos else tokens
            documents.append(document[-trained.longest - 1 :])
    sums = np.empty(len(documents))
    with progress(f"{trained.run.path.resolve().name}: endings", len(documents)) as advance:
        for chosen in batches([len(d) for d in documents], min(BATCH_TOKENS, trained.longest_stream)):
            inputs = [documents[index][:-1] for index in chosen]
            batch, starts = separate_documents(inputs, spec.model, spec.data.bos, device)
            last = [start + len(document) - 1 for start, document in zip(starts, inputs, strict=True)]
            batch.targets[last] = batch.targets.new_tensor([documents[index][-1] for index in chosen])
            losses = trained.model.token_losses(batch, trained.windows).double().cpu().numpy()
            for index, start, end in zip(chosen, starts, last, strict=True):
                sums[index] = -losses[max(start, end + 1 - scored[index]) : end + 1].sum()
            advance(len(chosen))
    if not np.isfinite(sums).all():
        raise RunError(f"{trained.run.path}: the checkpoint of step {trained.step} gives scores that are not finite")
    results, first = [], 0
    for item in items:
        last_one = first + len(item.endings)
        results.append((sums[first:last_one], scored[first:last_one]))
        first = last_one
    return results


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of documents in order, together at most `limit` tokens including separators, or a single one."""
    chosen: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if chosen and total + length + EMPTY > limit:
            yield chosen
            chosen, total = [], 0
        chosen.append(index)
        total += length + EMPTY
    if chosen:
        yield chosen


# --- what to tell ---


def mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """The mean of n numbers and its standard error; None for one."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def as_lines(answers: Sequence[Answers], items: Sequence[Item], task: str) -> list[str]:
    """Accuracies and standard errors of each run; for two, also of their difference, item by item."""
    rows = [[one.label, f"{one.step:,}", *(_percent(one.right[name]) for name in MEASURES)] for one in answers]
    if len(answers) == 2:
        first, second = answers
        rows.append(["difference", "", *(_percent(second.right[name] - first.right[name], "+") for name in MEASURES)])
    head = ("run", "step", *MEASURES.values())
    return [f"{task}, {len(items):,} items; +- standard error", "", *markdown_table(head, rows)]


def _percent(values: npt.NDArray[np.float64], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2%}" + ("" if error is None else f" +- {error:.2%}")


def as_json(answers: Sequence[Answers], items: Sequence[Item], task: str) -> dict[str, Any]:
    """Everything as JSON data.

    - task, items (how many)
    - runs: run, step, and by measure the mean and its standard_error (null for one item)
    - answers: for each item its label, and by run the log-probabilities of the endings in nats
    """
    runs = []
    for one in answers:
        measures = {}
        for name, title in MEASURES.items():
            mean, error = mean_and_error(one.right[name])
            measures[title.replace(" ", "_")] = {"mean": mean, "standard_error": error}
        runs.append({"run": one.label, "step": one.step, **measures})
    scores = [[one.scores[index].tolist() for one in answers] for index in range(len(items))]
    return {
        "task": task,
        "items": len(items),
        "runs": runs,
        "answers": [{"label": i.answer, "log_probabilities": s} for i, s in zip(items, scores, strict=True)],
    }
