"""Ranks that were started unlike are refused, with the difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_spec

from nanogpt.data.shards import train_name
from nanogpt.errors import InputError
from nanogpt.runs.record import Rank
from nanogpt.training.agreement import Start, compare_starts, describe_start, start_differences
from nanogpt.training.devices import unlike_devices
from nanogpt.training.trainer import check_numbering, find_shards


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(make_data(tmp_path_factory.mktemp("data") / "tiny", (900, 800)).glob("*.bin"))


@pytest.fixture
def start(files: list[Path]) -> Start:
    return describe_start(tiny_spec(), files, "node1")


def test_equal_starts(start: Start, files: list[Path]) -> None:
    compare_starts([start, describe_start(tiny_spec(), files, "node2")])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"spec": tiny_spec("optimizer.adam.lr=0.02").model_dump(mode="json")}, "recipe: optimizer.adam.lr: 0.01 and"),
        ({"source_sha256": "abcd" * 16}, "code: source sha256 "),
        ({"versions": {"torch": "1.0"}}, "version of torch: "),
        ({"resumes": "step-000010.pt"}, "resumes from: the start and step-000010.pt"),
    ],
)
def test_a_difference(start: Start, change: dict[str, object], line: str) -> None:
    if "spec" in change:
        line = f"recipe: optimizer.adam.lr: {tiny_spec().optimizer.adam.lr} and 0.02"  # type: ignore[union-attr]
    others = [dataclasses.replace(start, host="node2", **change) for _ in range(2)]  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        compare_starts([start, start, *others])
    assert "rank 0 on node1 and ranks 2, 3 on node2:" in str(error.value)
    assert line in str(error.value)


def test_other_shards(start: Start, files: list[Path], tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", (900, 800))
    tail = other / train_name(2)
    content = bytearray(tail.read_bytes())
    content[-1] ^= 1  # one token is another one
    tail.write_bytes(content)
    (other / train_name(1)).unlink()
    lines = list(start_differences(start, describe_start(tiny_spec(), sorted(other.glob("*.bin")), "node2")))
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [train_name(1), train_name(2)]
    assert lines[0].endswith(" and missing")


def test_a_digest_of_the_file_is_not_held_against_one_of_samples(start: Start) -> None:
    name = train_name(1)
    hashed = dataclasses.replace(start, shards={**start.shards, name: "900 tokens, sha256 0123456789abcdef"})
    assert not list(start_differences(start, hashed))
    shorter = dataclasses.replace(start, shards={**start.shards, name: "899 tokens, sha256 0123456789abcdef"})
    assert list(start_differences(start, shorter))


def test_a_refusal_of_one_rank_is_everybodys(start: Start) -> None:
    refused = Start("node2", refusal="/data: no fineweb_train_*.bin there")
    with pytest.raises(InputError) as error:
        compare_starts([start, refused, start, refused])
    assert str(error.value) == "ranks 1, 3 on node2: /data: no fineweb_train_*.bin there"
    with pytest.raises(InputError) as error:
        compare_starts([refused, refused])
    assert str(error.value) == "/data: no fineweb_train_*.bin there"


def test_a_shard_that_is_missing_in_the_middle(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (300, 300, 300, 300))
    find_shards(tiny_spec(), data)
    (data / train_name(3)).unlink()
    with pytest.raises(InputError, match=r"fineweb_train_000003.bin: is missing between fineweb_train_000002.bin and"):
        find_shards(tiny_spec(), data)
    (data / train_name(2)).unlink()
    with pytest.raises(InputError, match=r"fineweb_train_000002.bin: and 1 more are missing between"):
        find_shards(tiny_spec(), data)
    check_numbering([Path("a.bin"), Path("b.bin")])  # names without numbers


def test_a_shard_shorter_than_its_header(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (300, 300))
    path = data / train_name(2)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=f"{train_name(2)}: the header promises 300 tokens"):
        describe_start(tiny_spec(), sorted(data.glob("*.bin")), "node1")


def ranks(*devices: str) -> list[Rank]:
    return [Rank(rank=i, local_rank=i % 4, host=f"node{i // 4}", device=device) for i, device in enumerate(devices)]


def test_gpus_of_different_kinds() -> None:
    assert unlike_devices(ranks(*["NVIDIA H100 80GB HBM3"] * 8)) is None
    mixed = unlike_devices(ranks(*["NVIDIA H200"] * 6, *["NVIDIA A100-SXM4-80GB"] * 2))
    assert mixed and "6 x NVIDIA H200, 2 x NVIDIA A100-SXM4-80GB" in mixed
    assert "the slowest, NVIDIA A100-SXM4-80GB (rank 6 on node1, 7 on node1)" in mixed
    close = unlike_devices(ranks("NVIDIA H200", "NVIDIA H100 80GB HBM3"))  # the same arithmetic, slower memory
    assert close and "the slowest, NVIDIA H100 80GB HBM3" in close
    unknown = unlike_devices(ranks("NVIDIA H200", "Someone's X1"))
    assert unknown and "The speed of Someone's X1 is unknown" in unknown
