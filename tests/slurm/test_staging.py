"""Copies on a node's own disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nanogpt.cluster.staging import stage, staged_data, staged_image
from nanogpt.errors import InputError, RunError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with an image, and shards below."""
    shards = tmp_path / "shared" / "data"
    shards.mkdir(parents=True)
    (tmp_path / "shared" / "nanogpt.sif").write_bytes(b"image")
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin", "manifest.json"):
        (shards / name).write_bytes(name.encode())
        os.utime(shards / name, ns=(10**18, 10**18 + 1))
    return tmp_path / "shared"


def copy(disk: Path, source: Path) -> None:
    data = source / "data"
    stage(disk, image=source / "nanogpt.sif", shards=sorted(data.glob("*.bin")), manifests=[data / "manifest.json"])


def test_files_are_copied_once_and_again_when_they_change(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    copy(disk, source)
    said = capsys.readouterr().err
    assert said.count("staged ") == 2 and " in 0." in said and "identical" not in said
    image, shards = staged_image(disk, source / "nanogpt.sif"), staged_data(disk, source / "data")
    assert image.read_bytes() == b"image"
    assert {path.name for path in shards.glob("[!.]*")} == {path.name for path in (source / "data").iterdir()}
    assert (shards / "manifest.json").stat().st_mtime_ns == 10**18 + 1  # prep-fineweb's manifest goes by the times

    copy(disk, source)
    assert capsys.readouterr().err.count("there already, identical") == 2

    (source / "nanogpt.sif").write_bytes(b"a new image")
    copy(disk, source)
    said = capsys.readouterr().err
    assert "staged image: 11 B" in said and "staged shards: there already, identical" in said
    assert image.read_bytes() == b"a new image"


def test_a_copy_that_was_cut_off_is_no_copy(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    copy(disk, source)
    image = staged_image(disk, source / "nanogpt.sif")
    image.write_bytes(b"ima")
    copy(disk, source)
    assert image.read_bytes() == b"image"
    assert not list(image.parent.glob("*.partial"))


def test_two_data_directories_do_not_mix(source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    assert staged_data(tmp_path, source / "data") != staged_data(tmp_path, other / "data")


def test_a_disk_that_cannot_take_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="NANOGPT_STAGE"):
        copy(tmp_path / "file", source)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3))
    with pytest.raises(RunError, match="3 B free, but copies need 5 B"):
        copy(tmp_path / "disk", source)
