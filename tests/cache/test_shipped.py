"""Compiled code that an image brings along: only what this very installation has made."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanogpt.cache.compile_cache import file_name
from nanogpt.cache.key import installation_key, key_sha256
from nanogpt.cache.pack import Pack, write_pack
from nanogpt.cache.shipped import ship
from nanogpt.errors import InputError

INSTALLATION = {"torch": ["2.11.0", "abc", "13.0"], "source": "1234", "prefix": "/opt/venv"}
KEY = {**INSTALLATION, "device": ["NVIDIA H200", "9.0", 132], "spec": {"model": "made"}}


def made(directory: Path, key: dict[str, object]) -> Path:
    """A cache file with one graph in it, under a name of the user's."""
    root = directory / "code"
    (root / "inductor").mkdir(parents=True, exist_ok=True)
    (root / "inductor" / "a").write_text("graph")
    path = directory / "from" / "any-name.compiled"
    write_pack(path, root, key=key, key_sha256=key_sha256(key), recipe="made")
    return path


def test_a_file_of_the_installation_is_found_under_its_key_s_name(tmp_path: Path) -> None:
    path = made(tmp_path, KEY)
    [shipped] = ship(path.parent, tmp_path / "to", INSTALLATION)
    assert shipped.name == file_name(KEY) and shipped.name.startswith("h200-torch2.11.0-")
    assert shipped.read_bytes() == path.read_bytes() and shipped.stat().st_mode & 0o777 == 0o644
    assert Pack(shipped).header.key == KEY
    assert ship(tmp_path / "code", tmp_path / "none", INSTALLATION) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "differs"), [({"source": "5678"}, "source"), ({"prefix": "/home/me/venv"}, "prefix")]
)
def test_a_file_of_another_installation_is_refused(tmp_path: Path, change: dict[str, str], differs: str) -> None:
    path = made(tmp_path, KEY | change)
    with pytest.raises(InputError, match=rf"any-name\.compiled: made for other code: differs in {differs}\. Build"):
        ship(path.parent, tmp_path / "to", INSTALLATION)


def test_a_damaged_file_and_one_that_others_may_write_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path, KEY)
    path.chmod(0o666)
    with pytest.raises(InputError, match="others may write it"):
        ship(path.parent, tmp_path / "to", INSTALLATION)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        ship(path.parent, tmp_path / "to", INSTALLATION)


def test_this_installation_has_its_key() -> None:
    assert {"torch", "source", "prefix", "packages", "python"} <= installation_key().keys()
