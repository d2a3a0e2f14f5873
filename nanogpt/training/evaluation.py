"""The validation loss of a run's newest checkpoint, recomputed by document; for two runs, on the same tokens.

- A run reads the validation stream as in training: in its recipe's micro-batches, with the windows of
  its last validation. One process, nothing compiled.
- A document is what `cu_seqlens` bounds: from its BOS up to the next BOS, its last target. One cut by the
  edge of a micro-batch counts as two, and the second does not see the first.
- A run whose last validation uses the canonical mask uses it here too, if its checkpoint is from its end.
- Losses are in nats: fp32 per token, summed in fp64.

Means are per token, so a long document weighs more. Their standard error is over documents, as the tokens of one are
not independent: see `mean_over_documents`. It is about other documents, not about other seeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanogpt.console import markdown_table, progress, say
from nanogpt.data.canonical_mask import build
from nanogpt.data.shards import Tokens
from nanogpt.data.tokenizer import VOCAB_SIZE, gpt2_encoding
from nanogpt.data.validation_batches import ValBatches, read_stream
from nanogpt.errors import InputError, RunError
from nanogpt.runs.data_files import shards_directory
from nanogpt.runs.directory import RECORD_NAME, RunDirectory
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import Data, read_record
from nanogpt.spec import RunSpec
from nanogpt.training.schedule import Schedule
from nanogpt.training.trained_model import TrainedModel, evaluating_implementations, find_device, load_trained_model
from nanogpt.training.trainer import find_files

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

TEXT_LENGTH = 50  # characters of a document to show
TEXT_TOKENS = 200  # enough for TEXT_LENGTH: a character takes up to four
SHOWN_TOKENS = 10  # tokens to show of a document in another vocabulary


@dataclass(frozen=True)
class MeanLoss:
    """A mean over tokens, in nats, and its standard error over documents; None for one document."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """One run's losses on the documents."""

    label: str
    path: Path
    step: int  # of the checkpoint: steps done
    total_steps: int
    losses: Numbers  # (D,) the sum of each document's losses, in nats
    mean: MeanLoss
    recorded: float | None  # the loss that the run itself recorded for these tokens at this step, in nats
    no_record: str  # why there is none; empty if there is
    masked: bool = False  # with the canonical mask


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One or two runs on the same D documents of the validation stream."""

    runs: tuple[EvaluatedRun, ...]
    stream: Tokens  # (N + 1,) uint16: N inputs, and the last one's target
    positions: Counts  # (D,) the first token of each document, in the stream
    tokens: Counts  # (D,) of each document; N in all
    bos: int
    vocab_size: int

    @property
    def total(self) -> int:
        """Tokens evaluated, N."""
        return int(self.tokens.sum())

    @property
    def excess(self) -> Numbers:
        """(D,) nats: (loss per token - mean) * tokens / N of each document in the first run; they sum to 0."""
        first = self.runs[0]
        return (first.losses - first.mean.value * self.tokens) / self.total

    @property
    def contributions(self) -> Numbers:
        """(D,) nats: each document's part of the difference of the means, second run - first, to which they sum."""
        first, second = self.runs
        return (second.losses - first.losses) / self.total

    @property
    def difference(self) -> MeanLoss:
        """The second run's mean - the first's; the standard error is paired by document."""
        first, second = self.runs
        return mean_over_documents(second.losses - first.losses, self.tokens)


def mean_over_documents(losses: Numbers, tokens: Counts) -> MeanLoss:
    """The mean per token of D documents with `losses` (D,), each a sum in nats, and `tokens` (D,).

    With s and n the loss and the tokens of a document, the mean is the ratio R = sum(s) / sum(n). Both vary from
    document to document; the standard error is that of a ratio:

        sqrt(D / (D - 1) * sum((s - R n)^2)) / sum(n)
    """
    count, total = len(losses), int(tokens.sum())
    mean = float(losses.sum()) / total
    if count == 1:
        return MeanLoss(mean, None)
    squares = float(np.square(losses - mean * tokens).sum())
    return MeanLoss(mean, math.sqrt(count / (count - 1) * squares) / total)


def evaluate_runs(
    run_directories: Sequence[Path],
    *,
    data_directory: Path | None = None,
    tokens: int | None = None,
    device: str | None = None,
) -> Evaluation:
    """Evaluate the newest checkpoints of one or two runs on the first tokens of the validation stream.

    Args:
        run_directories: the runs.
        data_directory: of the validation shards; None: where the first run read them, according to its record, if that
            still exists, else where `nanogpt train` would find them.
        tokens: to evaluate; None: evaluation.tokens of the first run's recipe.
        device: cpu or cuda; None: a GPU if there is one.

    Raises:
        InputError: no run, no checkpoint, no shards or too few tokens; tokens do not fill micro-batches; runs or
            shards have different vocabularies; no GPU.
        RunError: a loss is not finite.
    """
    specs = [RunDirectory.open(path).spec() for path in run_directories]
    first = specs[0]
    for path, spec in zip(run_directories[1:], specs[1:], strict=True):
        _check_same_tokens(run_directories[0], first, path, spec)
    count = first.evaluation.tokens if tokens is None else tokens
    _check_count(count, specs)
    place = find_device(device)
    recorded = [_recorded_data(RunDirectory.open(path)) for path in run_directories]
    files = find_files(data_directory or shards_directory(first, recorded[0]), first.data.val_files)
    stream = read_stream(files, count + 1, first.model.vocab_size)
    trained = [
        load_trained_model(path, device=place, implementations=evaluating_implementations(spec, place))
        for path, spec in zip(run_directories, specs, strict=True)
    ]
    names = [one.run.path.resolve().name for one in trained]
    labels = names if len(set(names)) == len(names) else [str(one.run.path) for one in trained]

    read = [_token_losses(one, label, files, count, place) for one, label in zip(trained, labels, strict=True)]
    # Two runs may cut documents in different places.
    positions = np.unique(np.concatenate([starts for _, starts in read]))
    sizes = np.diff(positions, append=count)
    runs = []
    for one, label, data, (losses, _) in zip(trained, labels, recorded, read, strict=True):
        sums = np.add.reduceat(losses, positions)
        loss, no_record = _recorded_loss(one, data, count, stream)
        total_steps = one.spec.training.total_steps
        mean = mean_over_documents(sums, sizes)
        runs.append(EvaluatedRun(label, one.run.path, one.step, total_steps, sums, mean, loss, no_record, one.masked))
    return Evaluation(tuple(runs), stream, positions, sizes, first.data.bos, first.model.vocab_size)


def _check_same_tokens(path: Path, spec: RunSpec, other_path: Path, other: RunSpec) -> None:
    for what, ours, theirs in (
        ("model.vocab_size", spec.model.vocab_size, other.model.vocab_size),
        ("data.bos", spec.data.bos, other.data.bos),
    ):
        if ours != theirs:
            raise InputError(
                f"{other_path}: {what} is {theirs}, that of {path} is {ours}: the two cannot read the same tokens."
                " Compare runs with one tokenizer"
            )


def _check_count(count: int, specs: Sequence[RunSpec]) -> None:
    sizes = [spec.evaluation.micro_batch_tokens for spec in specs]
    unit = math.lcm(*sizes)
    if count < 1 or count % unit:
        of = " and ".join(f"{size:,}" for size in dict.fromkeys(sizes))
        raise InputError(
            f"--tokens: {count:,} tokens do not fill micro-batches of {of} (evaluation.micro_batch_tokens); name a"
            f" multiple of {unit:,}, such as {max(count // unit, 1) * unit}"
        )


def _token_losses(
    trained: TrainedModel, label: str, files: Sequence[Path], count: int, device: torch.device
) -> tuple[Numbers, Counts]:
    """(N,) the loss of each token in nats, and (documents,) where documents begin; shows how far it is."""
    spec = trained.spec
    size = spec.evaluation.micro_batch_tokens
    extras = spec.model.batch_extras
    batches = ValBatches(
        files, tokens=count, micro_batch_tokens=size, slots=1, bos=spec.data.bos, device=device, extras=extras
    )
    losses = np.empty(count)
    starts = []
    masked = {"mask": _mask(spec.model.padded_vocab_size, device)} if trained.masked else {}
    with progress(f"{label}: micro-batches", len(batches)) as advance:
        for first, batch in zip(range(0, count, size), batches, strict=True):
            losses[first : first + size] = trained.model.token_losses(batch, trained.windows, **masked).cpu().numpy()
            starts.append(first + np.unique(batch.cu_seqlens.cpu().numpy())[:-1].astype(np.int64))
            advance(1)
    if not np.isfinite(losses).all():
        raise RunError(f"{trained.run.path}: the checkpoint of step {trained.step} gives losses that are not finite")
    return losses, np.concatenate(starts)


def _mask(rows: int, device: torch.device) -> torch.Tensor:
    mask = np.zeros((rows, rows // 8), dtype=np.uint8)
    build(mask)
    return torch.from_numpy(mask).to(device)


def _recorded_loss(trained: TrainedModel, data: Data | None, count: int, stream: Tokens) -> tuple[float | None, str]:
    """The loss that the run recorded for these tokens at the checkpoint's step, in nats; or None, and why."""
    spec, run, step = trained.spec, trained.run, trained.step
    if count != spec.evaluation.tokens:
        return None, f"its own validations are of {spec.evaluation.tokens:,} tokens"
    if not run.metrics_path.is_file():
        return None, f"it has no {run.metrics_path.name}"
    found = [record.get("val_loss") for record in read_run(run.path).evaluations if record["step"] == step]
    if not found or found[0] is None:
        return None, f"it has no validation loss of step {step:,}"
    schedule = Schedule(spec)
    if step < schedule.total_steps and schedule.at(step).windows != trained.windows:
        return None, f"its validation of step {step:,} used the next stage's windows, not the checkpoint's"
    recorded_stream = None if data is None else data.val_stream_sha256
    if recorded_stream not in (None, hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest()):
        return None, "its record is for other validation tokens"
    return float(found[0]), ""


def _recorded_data(run: RunDirectory) -> Data | None:
    """What the run's record says about its shards, if anything."""
    if not (run.path / RECORD_NAME).exists():
        return None
    try:
        return read_record(run.path).data
    except InputError as error:
        say(f"{error}; continuing without the record")
        return None


# --- output ---


def as_lines(evaluation: Evaluation, documents: int) -> list[str]:
    """Means and standard errors, then the `documents` documents that weigh most on the mean, or on the difference."""
    runs = evaluation.runs
    lines = [
        f"{evaluation.total:,} validation tokens, {len(evaluation.tokens):,} documents. Losses in nats per token",
        "",
    ]
    lines += markdown_table(
        ("run", "step", "loss", "standard error", "recorded by the run", "loss - recorded"), map(_run_row, runs)
    )
    unknown = [f"{run.label}: no recorded loss to compare with: {run.no_record}" for run in runs if run.no_record]
    masked = [f"{run.label}: with the canonical mask, as its last validation" for run in runs if run.masked]
    notes = [*masked, *unknown]
    lines += [*([""] if notes else []), *notes]
    if len(runs) == 2:
        difference = evaluation.difference
        lines += [
            "",
            f"{runs[1].label} - {runs[0].label}: {difference.value:+.6f}, standard error"
            f" {_error(difference)} (document by document)",
        ]
    if documents:
        lines += ["", *_documents(evaluation, documents)]
    return lines


def _run_row(run: EvaluatedRun) -> list[str]:
    row = [run.label, f"{run.step:,} of {run.total_steps:,}", f"{run.mean.value:.6f}", _error(run.mean)]
    if run.recorded is None:
        return [*row, "-", "-"]
    return [*row, f"{run.recorded:.6f}", f"{run.mean.value - run.recorded:+.1e}"]


def _error(mean: MeanLoss) -> str:
    return "-" if mean.standard_error is None else f"{mean.standard_error:.6f}"


def _documents(evaluation: Evaluation, count: int) -> list[str]:
    """A title, and the table of the documents that matter most."""
    positions, tokens = evaluation.positions, evaluation.tokens
    losses = [run.losses / tokens for run in evaluation.runs]
    head: tuple[str, ...]
    figures: list[tuple[str, ...]]
    if len(evaluation.runs) == 1:
        excess, sums = evaluation.excess, evaluation.runs[0].losses
        order = np.argsort(-excess, kind="stable")[:count]
        title = "Documents that weigh most on the mean; excess = (loss - mean) * tokens / all tokens:"
        head = ("position", "tokens", "loss", "excess", "share of the mean", "text")
        figures = [(f"{losses[0][d]:.4f}", f"{excess[d]:+.6f}", f"{sums[d] / sums.sum():.3%}") for d in order]
    else:
        parts = evaluation.contributions
        order = np.argsort(-np.abs(parts), kind="stable")[:count]
        title = "Documents that contribute most to the difference, which all contributions add up to:"
        head = ("position", "tokens", *(f"loss of {run.label}" for run in evaluation.runs), "contribution", "text")
        figures = [(*(f"{loss[d]:.4f}" for loss in losses), f"{parts[d]:+.6f}") for d in order]
    rows = (
        (f"{positions[d]:,}", f"{tokens[d]:,}", *cells, beginning(evaluation, d))
        for d, cells in zip(order, figures, strict=True)
    )
    return [title, "", *markdown_table(head, rows)]


def beginning(evaluation: Evaluation, document: int) -> str:
    """How the document begins, on one line for a table: its text without BOS if the vocabulary is GPT-2's,
    else its first token numbers. `...` marks the continuation of a cut document.
    """
    start = int(evaluation.positions[document])
    end = start + int(evaluation.tokens[document])
    whole = int(evaluation.stream[start]) == evaluation.bos
    tokens = evaluation.stream[start + whole : end].tolist()
    if evaluation.vocab_size == VOCAB_SIZE:
        text = visible(gpt2_encoding().decode(tokens[:TEXT_TOKENS])[:TEXT_LENGTH])
    else:
        text = " ".join(map(str, tokens[:SHOWN_TOKENS]))
    return text if whole else f"... {text}"


def visible(text: str) -> str:
    r"""The text with what a terminal does not print, or takes for a command, as Python writes it: `\n`, `\x1b`.

    A table's bars become `\|`.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown).replace("|", r"\|")


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything as JSON data; losses in nats per token, those of a document in the order of the runs.

    - tokens: evaluated
    - runs: run, path, step, total_steps, loss, standard_error, recorded_loss (null: none of these tokens),
      canonical_mask (whether it was evaluated with one)
    - difference: loss and standard_error, second run - first; null for one run
    - documents: position, tokens, losses of each, in the stream's order
    """
    losses = np.stack([run.losses / evaluation.tokens for run in evaluation.runs], axis=1)
    difference = evaluation.difference if len(evaluation.runs) == 2 else None
    return {
        "tokens": evaluation.total,
        "runs": [
            {
                "run": run.label,
                "path": str(run.path),
                "step": run.step,
                "total_steps": run.total_steps,
                **_mean_json(run.mean),
                "recorded_loss": run.recorded,
                "canonical_mask": run.masked,
            }
            for run in evaluation.runs
        ],
        "difference": None if difference is None else _mean_json(difference),
        "documents": [
            {"position": position, "tokens": tokens, "losses": values}
            for position, tokens, values in zip(
                evaluation.positions.tolist(), evaluation.tokens.tolist(), losses.tolist(), strict=True
            )
        ],
    }


def _mean_json(mean: MeanLoss) -> dict[str, float | None]:
    return {"loss": mean.value, "standard_error": mean.standard_error}
