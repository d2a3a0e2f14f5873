"""Turn your own text into token shards: `prep-text`, and `prepare_text` for use from Python.

How documents become shards, so that the same input gives the same bytes everywhere:

1. Documents are taken in the order of the paths given; folders are walked depth first, names in the order of
   their characters. A document is BOS followed by the tokens of its text; what looks like a special token is text.
2. Validation takes whole documents, chosen by a hash of their text, smallest first, until it holds at least
   `val_tokens` tokens. Copies of a text stay together, so that no validation document is also trained on, and
   documents longer than `val_tokens` are taken only if the others do not suffice. With `split_by` it takes whole
   sources in the same way, by a hash of their names.
3. Both sides keep the order of 1, or with `shuffle` that of a hash of each text, so that every part of a shard is
   a sample of all inputs. Training fills one shard after another with whole documents: a shard ends before the
   document that would take it above `shard_tokens`.
4. On request, copies of a text, short documents and near-duplicates are left out first, in this order.

The number of workers, listing order and time do not matter. Tokens go to a spool first, because the choice needs the
lengths of all documents; shards are written from it, hashed as they fill, and renamed together at the
end, with the manifest `text.json` last. Memory holds 32 bytes per document, 504 more to find near-duplicates, a path
per file and a few units of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanogpt.console import human_bytes, new_table, progress
from nanogpt.data.documents import JSON_SUFFIXES, SourceFile, find_files, plan
from nanogpt.data.embedded import embedded_corpus
from nanogpt.data.encode import Encoded, Encoder, available_cores
from nanogpt.data.near_duplicates import Signatures, check_installed
from nanogpt.data.near_duplicates import near_duplicates as first_near_duplicates
from nanogpt.data.skips import Skip, Skips, as_text
from nanogpt.data.sources import SplitBy, source_key
from nanogpt.data.text_shards import (
    DROPPED,
    Keys,
    Lengths,
    Ordinals,
    Shard,
    Spool,
    assign_shards,
    check_free,
    choose_validation,
    first_copies,
    publish,
    shuffled,
    write_shards,
    writing_to,
)
from nanogpt.data.tokenizer import RANKS_SHA256
from nanogpt.errors import InputError, RunError
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Input", "Part", "Shard", "Summary", "embedded_corpus", "prepare_text"]

FULL_VALIDATION = 10_485_760 + 1  # what the full run's evaluation reads: its tokens and the last target
TRAINED_LENGTH = 2048  # tokens of a document, BOS included, that training uses; the rest is cut off
WORKER_BYTES = 8 << 20  # of text that make a worker worth starting
NAMED_SOURCES = 1000  # names of validation sources in the manifest, at most
COMPRESSION = 3  # text bytes per byte of a compressed file, roughly: only for the number of workers


@dataclass(frozen=True)
class Part:
    """One side of the split. Tokens include a BOS per document."""

    documents: int
    tokens: int
    trained_tokens: int  # among each document's first 2,048, the only ones that training uses


@dataclass(frozen=True)
class Input:
    """What one of the given paths contained."""

    path: str
    files: int
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Sources:
    """The result of a split by sources."""

    val: int
    train: int
    val_names: list[str]  # the first `NAMED_SOURCES` in the order of their characters


@dataclass(frozen=True)
class NearDuplicates:
    """How many documents nearly equal an earlier one, and how many validation documents nearly equal a training one."""

    documents: int
    val_in_train: int


@dataclass(frozen=True)
class Summary:
    """What `prepare_text` did. `skipped` is reason -> count, `skipped_examples` the first places of each."""

    directory: Path
    val: Part
    train: Part
    shards: tuple[Shard, ...]
    inputs: tuple[Input, ...]
    skipped: dict[str, int]
    skipped_examples: dict[str, list[str]]
    workers: int
    seconds: float
    sources: Sources | None  # None: split by documents
    near_duplicates: NearDuplicates | None  # None: not looked for

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text that were tokenized."""
        return sum(one.text_bytes for one in self.inputs)


def prepare_text(
    paths: Sequence[str | Path],
    directory: str | Path,
    *,
    val_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    document_tokens: int | None = None,
    min_tokens: int | None = None,
    unique: bool = False,
    shuffle: bool = False,
    field: str = "text",
    suffixes: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    keep_damaged: bool = False,
    split_by: str = "document",
    near_duplicates: Literal["count", "drop"] | None = None,
    quiet: bool = False,
) -> Summary:
    """Tokenize `paths` into validation and training shards in `directory`.

    Args:
        paths: text files, JSON lines, Parquet files, and folders of them; see `nanogpt.data.documents`.
        directory: created if missing. It must hold no shards, unless `force`.
        val_tokens: the least number of validation tokens; if None, a tenth of all, at most 10,485,761.
        shard_tokens: the most tokens in a training shard; only a longer document makes a longer shard.
        document_tokens: cut longer documents into several of at most this many tokens, BOS included, all on one
            side of the split. None leaves documents whole.
        min_tokens: leave out documents of fewer tokens, BOS included, after that cut.
        unique: leave out copies of an earlier text.
        shuffle: order documents by a hash of their text, not as they come.
        field: the field or column of a record that holds its text.
        suffixes: further suffixes of plain text, such as ".log".
        workers: processes; if None, as many as there are cores, or fewer for little text.
        force: replace all shards in `directory` once the new ones are complete.
        keep_damaged: make shards of what can be read, even if some files in `paths` cannot. Damaged files found
            in a folder are always left out and counted.
        split_by: what goes to one side as a whole, see `nanogpt.data.sources.SplitBy`.
        near_duplicates: count documents that are nearly equal, or leave out all but the first; see
            `nanogpt.data.near_duplicates`.
        quiet: show no progress.

    Raises:
        InputError: a path, a flag or the input as a whole is wrong; `directory` holds shards already.
        RunError: writing failed, a file changed while it was read, or a file in `paths` could not be read whole.
    """
    start = time.perf_counter()
    directory = Path(directory)
    for name, value, least in (
        ("--val-tokens", val_tokens, 1),
        ("--shard-tokens", shard_tokens, 1),
        ("--document-tokens", document_tokens, 2),
        ("--min-tokens", min_tokens, 2),
        ("--workers", workers, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} {value}: expected at least {least}")
    if min_tokens is not None and document_tokens is not None and min_tokens > document_tokens:
        raise InputError(
            f"--min-tokens {min_tokens}: nothing is left, since --document-tokens {document_tokens} cuts all documents"
            " shorter; give a smaller number"
        )
    if not paths:
        raise InputError("no input: give files or folders, or --embedded for the prose that ships with the package")
    split = SplitBy.parse(split_by)
    if near_duplicates is not None:
        check_installed()
    check_free(directory, force)
    found, planned, read = Skips(), Skips(), Skips()  # separate, so that their order does not depend on the workers
    files = find_files(paths, found, suffixes=suffixes, exclude=directory, split_by=split)
    files_given = {file.input for file in files if file.explicit}
    if workers is None:
        workers = max(1, min(available_cores(), _text_estimate(files) // WORKER_BYTES))

    with (
        writing_to(directory, force) as staging,
        Encoder(workers, document_tokens, near_duplicates is not None) as encoder,
    ):
        spool = Spool(staging)
        tally = _Tally(len(paths))
        textless: dict[int, Skip] = {}  # of the files that the user named, the first record without the field
        with _bytes_done(sum(file.size for file in files), quiet) as advance:
            for encoded in encoder.encode(plan(files, field, planned, split.field)):
                spool.write(encoded.tokens)
                tally.add(encoded)
                for skip in encoded.skipped:
                    named = encoded.input in files_given
                    read.add(skip.reason, skip.place, note=skip.note, named=named)
                    if named and skip.reason.startswith("no text in "):
                        textless.setdefault(encoded.input, skip)
                advance(encoded.done)
        spool.rewind()
        if not keep_damaged:
            _check_whole(Skips.joined(found, planned, read))
            for index, skip in sorted(textless.items()):
                if not tally.documents_of(index):
                    raise InputError(
                        f"{as_text(skip.place)}: {skip.reason}, nor in any other record of the file; {skip.note};"
                        " choose one with --field"
                    )
        lengths, keys, ordinals = tally.documents()
        kept = np.ones(lengths.size, dtype=bool)
        left = Skips()
        if unique and lengths.size:
            kept = first_copies(keys, ordinals)
            left.add("copy of a text before it", "", count=int((~kept).sum()))
        if min_tokens is not None:
            short = kept & (lengths < min_tokens)
            kept &= ~short
            left.add(f"shorter than {min_tokens} tokens", "", count=int(short.sum()))
        first = np.arange(lengths.size)  # of each document's near-duplicates
        if near_duplicates is not None and kept.any():
            first[kept] = np.flatnonzero(kept)[first_near_duplicates(tally.signatures()[kept])]
            near = kept & (first != np.arange(lengths.size))
            if near_duplicates == "drop":
                kept &= ~near
                left.add("near-duplicate of a document before it", "", count=int(near.sum()))
        skips = Skips.joined(found, planned, read, left)
        if not kept.any():
            left_out = (
                ", ".join(
                    f"{count} {reason}" + (f", first {skips.examples[reason][0]}" if skips.examples[reason] else "")
                    for reason, count in skips.counts.items()
                )
                or "nothing"
            )
            names = " ".join(as_text(str(path)) for path in paths)
            raise InputError(f"no documents in {names}; left out: {left_out}")
        if val_tokens is None:
            val_tokens = max(1, min(FULL_VALIDATION, int(lengths[kept].sum()) // 10))
        is_val = np.zeros(lengths.size, dtype=bool)
        of_sources = split.kind != "document"
        split_keys, source_names = tally.sources() if of_sources else (keys, {})
        is_val[kept] = choose_validation(lengths[kept], split_keys[kept], val_tokens, of_sources=of_sources)
        is_train = kept & ~is_val
        order = shuffled(keys, ordinals) if shuffle else None
        train = np.flatnonzero(is_train) if order is None else order[is_train[order]]
        targets = assign_shards(lengths, train, shard_tokens)
        targets[~kept] = DROPPED
        shards = write_shards(staging, spool, lengths, targets, order)
        spool.close()
        summary = Summary(
            directory=directory,
            val=_part(lengths[is_val]),
            train=_part(lengths[is_train]),
            shards=shards,
            inputs=tally.inputs(paths, files),
            skipped=skips.counts,
            skipped_examples=skips.examples,
            workers=workers,
            seconds=time.perf_counter() - start,
            sources=_sources(split_keys[is_val], split_keys[is_train], source_names) if of_sources else None,
            near_duplicates=None
            if near_duplicates is None
            else NearDuplicates(int(near.sum()), int(np.isin(first[is_val], first[is_train]).sum())),
        )
        settings = {
            "val_tokens": val_tokens,
            "shard_tokens": shard_tokens,
            "document_tokens": document_tokens,
            "min_tokens": min_tokens,
            "unique": unique,
            "shuffle": shuffle,
            "field": field,
            "suffixes": list(suffixes),
            "keep_damaged": keep_damaged,
            "split_by": split_by,
            "near_duplicates": near_duplicates,
        }
        publish(staging, directory, shards, _manifest(summary, settings))
    return summary


def _check_whole(skips: Skips) -> None:
    """Raise `RunError` if something that the user named could not be read."""
    if not skips.losses:
        return
    more = skips.losses - len(skips.first_losses)
    lines = [*skips.first_losses, *([f"... and {more} more"] if more else [])]
    raise RunError(
        "not everything that you named could be read, so nothing is written:\n  "
        + "\n  ".join(lines)
        + "\nrepair these files, leave them out, or make shards of what can be read with --keep-damaged"
    )


def _text_estimate(files: Sequence[SourceFile]) -> int:
    """About how many bytes of text the files hold, from their sizes and suffixes."""
    return sum(
        f.size * (1 if f.kind == "text" or f.path.lower().endswith(JSON_SUFFIXES) else COMPRESSION) for f in files
    )


@contextmanager
def _bytes_done(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    if quiet:
        yield lambda count: None
        return
    with progress("Tokenizing", total, bytes_unit=True) as advance:
        yield advance


class _Tally:
    """Gathers the lengths and keys of all documents, and the sums of each input."""

    def __init__(self, inputs: int) -> None:
        self._lengths: list[Lengths] = []
        self._keys: list[Keys] = []
        self._ordinals: list[Ordinals] = []
        self._sources: list[Ordinals] = []
        self._names: dict[str, int] = {}
        self._signatures: list[Signatures] = []
        self._sums = np.zeros((inputs, 3), dtype=np.int64)  # documents, tokens, text bytes

    def add(self, encoded: Encoded) -> None:
        if encoded.continued:
            self._lengths[-1][-1] += encoded.lengths[0]
        else:
            self._lengths.append(encoded.lengths)
            self._keys.append(encoded.keys)
            self._ordinals.append(encoded.ordinals)
            found = [self._names.setdefault(name, len(self._names)) for name in encoded.sources]
            self._sources.append(np.array(found, dtype=np.int64))
            if encoded.signatures is not None:
                self._signatures.append(encoded.signatures)
        documents = 0 if encoded.continued else encoded.lengths.size
        self._sums[encoded.input] += (documents, encoded.tokens.size, encoded.text_bytes)

    def documents_of(self, index: int) -> int:
        return int(self._sums[index, 0])

    def documents(self) -> tuple[Lengths, Keys, Ordinals]:
        none = np.empty(0, dtype=np.int64)
        keys = np.concatenate([none.astype(np.uint64), *self._keys])
        return np.concatenate([none, *self._lengths]), keys, np.concatenate([none, *self._ordinals])

    def signatures(self) -> Signatures:
        """(documents, minima); there is at least one document."""
        return np.concatenate(self._signatures)

    def sources(self) -> tuple[Keys, dict[int, str]]:
        """The key of each document's source, (documents,), and the names by key."""
        keys = np.array([source_key(name) for name in self._names], dtype=np.uint64)
        return keys[np.concatenate(self._sources)], dict(zip(keys.tolist(), self._names, strict=True))

    def inputs(self, paths: Sequence[str | Path], files: Sequence[SourceFile]) -> tuple[Input, ...]:
        held = np.bincount([file.input for file in files], minlength=len(paths))
        return tuple(
            Input(_shown(path), int(held[index]), *self._sums[index].tolist()) for index, path in enumerate(paths)
        )


def _shown(path: str | Path) -> str:
    """A path for the manifest, where the embedded corpus is named the same on every machine."""
    return "embedded" if Path(path) == embedded_corpus() else as_text(str(path))


def _part(lengths: Lengths) -> Part:
    return Part(int(lengths.size), int(lengths.sum()), int(np.minimum(lengths, TRAINED_LENGTH).sum()))


def _sources(val: Keys, train: Keys, names: dict[int, str]) -> Sources:
    val, train = np.unique(val), np.unique(train)
    return Sources(val.size, train.size, sorted(as_text(names[key]) for key in val.tolist())[:NAMED_SOURCES])


def _manifest(summary: Summary, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of `text.json`: only what follows from input and settings, so that it, too, can be compared."""
    return {
        "format": 1,
        "settings": settings,
        "tokenizer": {"name": "gpt2", "sha256": RANKS_SHA256},
        "inputs": [asdict(one) for one in summary.inputs],
        "val": asdict(summary.val),
        "train": asdict(summary.train),
        "sources": asdict(summary.sources) if summary.sources else None,
        "near_duplicates": asdict(summary.near_duplicates) if summary.near_duplicates else None,
        "shards": [asdict(shard) for shard in summary.shards],
        "skipped": {
            reason: {"count": count, "first": summary.skipped_examples[reason]}
            for reason, count in summary.skipped.items()
        },
    }


def summary_tables(summary: Summary) -> list[RenderableType]:
    """What a user sees at the end, for `print_table`: both sides, each input, what was left out, and the speed."""
    from rich.text import Text

    val, train = summary.val, summary.train
    sides = new_table("", "documents", "tokens", "trained on", "shards")
    sides.add_row("validation", f"{val.documents:,}", f"{val.tokens:,}", "", "1")
    trained, shards = f"{train.trained_tokens:,}", str(len(summary.shards) - 1)
    sides.add_row("training", f"{train.documents:,}", f"{train.tokens:,}", trained, shards)
    inputs = new_table("input", "files", "documents", "tokens", "text", wrap=("input",))
    for one in summary.inputs:
        counts = (f"{count:,}" for count in (one.files, one.documents, one.tokens))
        inputs.add_row(Text(printable(one.path)), *counts, human_bytes(one.text_bytes))
    blocks: list[RenderableType] = [sides, inputs]
    if summary.skipped:
        left_out = new_table("left out", "count", "first", wrap=("left out", "first"))
        for why, count in summary.skipped.items():
            first = Text(printable((summary.skipped_examples[why] or [""])[0]))
            left_out.add_row(Text(printable(why)), f"{count:,}", first)
        blocks.append(left_out)
    notes = []
    if summary.sources:
        notes.append(f"Whole sources: {summary.sources.val:,} for validation, {summary.sources.train:,} for training.")
    if summary.near_duplicates:
        notes.append(
            f"Near-duplicates of an earlier document: {summary.near_duplicates.documents:,}."
            f" Validation documents with one in training: {summary.near_duplicates.val_in_train:,}."
        )
    if train.trained_tokens < train.tokens // 2:
        notes.append(
            f"Training uses the first {TRAINED_LENGTH} tokens of a document, but most of this text lies beyond them."
            f" --document-tokens {TRAINED_LENGTH} cuts documents there, so that all of it is used."
        )
    speed = human_bytes(summary.text_bytes / max(summary.seconds, 1e-9))
    notes.append(
        f"{summary.directory}: {human_bytes(summary.text_bytes)} of text in {summary.seconds:.1f} s"
        f" ({speed}/s, workers: {summary.workers})"
    )
    blocks += [Text(printable(note)) for note in notes]
    return [part for block in blocks for part in (block, "")][:-1]
