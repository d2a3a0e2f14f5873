"""Mutated shards and what stands beside them: refused with a message, by whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutated import examples, mutated_bytes, mutated_data, refused_or_done
from tiny_runs import BOS, VOCABULARY, make_data, tiny_spec

from nanogpt.cli.demo import data_state
from nanogpt.cluster.preflight import check_shards
from nanogpt.data.manifest import MANIFEST, file_sha256, verify_directory
from nanogpt.data.shards import check_shard_tokens, read_count, train_name, val_name
from nanogpt.data.text_shards import MANIFEST as TEXT_MANIFEST
from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.data.validation_batches import ValBatches
from nanogpt.runs.data_files import describe_shards
from nanogpt.runs.unigram import unigram_cross_entropy

SPEC = tiny_spec()


def use(directory: Path) -> None:
    """Every reader of a directory of shards, each of which may refuse."""
    train, val = sorted(directory.glob("fineweb_train_*.bin")), sorted(directory.glob("fineweb_val_*.bin"))
    readers: tuple[Callable[[], Any], ...] = (
        lambda: [check_shard_tokens(path, VOCABULARY, BOS) for path in train],
        lambda: steps(train),
        lambda: list(ValBatches(val, tokens=256, micro_batch_tokens=64, bos=BOS, slots=4, vocab_size=VOCABULARY)),
        lambda: unigram_cross_entropy(train, val, 256, VOCABULARY),
        lambda: verify_directory(directory, rehash=True),
        lambda: check_shards(SPEC, directory),
        lambda: describe_shards([*train, *val]),
        lambda: data_state(directory, 256),
    )
    for reader in readers:
        refused_or_done(reader)


def steps(files: list[Path]) -> None:
    with TrainBatches(files, slots=4, bos=BOS, vocab_size=VOCABULARY) as batches:
        for _ in range(20):
            for batch in batches.next_step(StepRequest(256, 48)):
                assert int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < VOCABULARY
                assert int(batch.targets.min()) >= 0 and int(batch.targets.max()) < VOCABULARY


def test_shards(tmp_path: Path, fuzz: int) -> None:
    data = make_data(tmp_path / "data", (1500, 1500))
    whole = {path.name: path.read_bytes() for path in data.iterdir()}
    for chance in examples(60 * fuzz, "shards"):
        name = chance.choice(sorted(whole))
        near_header = chance.random() < 0.4
        head, rest = whole[name][:16], whole[name][16:]
        (data / name).write_bytes(
            mutated_bytes(head, chance) + rest if near_header else mutated_bytes(whole[name], chance)
        )
        use(data)
        (data / name).write_bytes(whole[name])


@pytest.mark.parametrize("name", [MANIFEST, TEXT_MANIFEST])
def test_manifests(tmp_path: Path, fuzz: int, name: str) -> None:
    data = make_data(tmp_path / "data", (1500,))
    shards = [data / train_name(1), data / val_name()]
    known = {
        MANIFEST: {"format": 1, "repository": "x/y", "shards": {path.name: hub_entry(path) for path in shards}},
        TEXT_MANIFEST: {
            "inputs": [{"path": "embedded"}],
            "settings": {"val_tokens": 256},
            "tokenizer": {"sha256": "0" * 64},
            "shards": [{"name": p.name, "tokens": read_count(p), "sha256": file_sha256(p)} for p in shards],
        },
    }[name]
    for chance in examples(60 * fuzz, name):
        changed = json.dumps(mutated_data(known, chance)).encode()
        (data / name).write_bytes(mutated_bytes(changed, chance) if chance.random() < 0.3 else changed)
        use(data)
    for hostile in (
        b"[" * 100_000,
        b'{"shards":' * 5000,
        b'{"shards": [{"name": "x", "tokens": 1e999, "sha256": "x"}]}',
    ):
        (data / name).write_bytes(hostile)
        use(data)


def hub_entry(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "sha256": file_sha256(path),
        "bytes": status.st_size,
        "tokens": read_count(path),
        "mtime_ns": status.st_mtime_ns,
        "revision": "0" * 40,
    }


def test_positions_of_other_data(tmp_path: Path, fuzz: int) -> None:
    data = make_data(tmp_path / "data", (1500, 1500))
    files = sorted(data.glob("fineweb_train_*.bin"))
    with TrainBatches(files, slots=4, bos=BOS) as batches:
        request = StepRequest(256, 48)
        batches.next_step(request)
        state = batches.state_dict()
        for chance in examples(60 * fuzz, "positions"):
            changed = mutated_data(state, chance)
            refused_or_done(lambda changed=changed: (batches.load_state_dict(changed), batches.next_step(request)))
