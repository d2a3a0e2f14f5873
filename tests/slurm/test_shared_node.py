"""What another user of a node leaves under our names is neither run nor read; played by processes of two users."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_user import ME, OTHER, as_me, as_other, needs_root, shared_place

from nanogpt.cluster.staging import check_staged, stage, staged_data, staged_image
from nanogpt.errors import InputError
from nanogpt.private_directories import open_private

pytestmark = needs_root
OURS = b"our image"
THEIRS = b"not ours!"  # as long


@pytest.fixture
def node() -> Iterator[Path]:
    """A node's /tmp, with a shared file system beside it."""
    with shared_place() as place:
        (place / "shared" / "data").mkdir(parents=True)
        (place / "shared" / "nanogpt.sif").write_bytes(OURS)
        (place / "shared" / "data" / "fineweb_val_000000.bin").write_bytes(b"tokens")
        yield place


def copies(node: Path) -> tuple[Path, Path]:
    """Where the user ME's image and shards go."""
    shared = node / "shared"
    mine, root = node / f"nanogpt-{ME}", node / "nanogpt-0"
    image, data = staged_image(node, shared / "nanogpt.sif"), staged_data(node, shared / "data")
    return mine / image.relative_to(root), mine / data.relative_to(root)


def stage_all(node: Path) -> str:
    shared = node / "shared"
    shards = list((shared / "data").iterdir())
    return as_me(lambda: stage(node, image=shared / "nanogpt.sif", shards=shards))


def test_copies_are_mine_alone(node: Path) -> None:
    assert stage_all(node) == "done"
    image, data = copies(node)
    assert image.read_bytes() == OURS and (data / "fineweb_val_000000.bin").read_bytes() == b"tokens"
    for path in (image.parent.parent, image.parent, data.parent, data):
        status = path.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (ME, 0o700)
    assert as_me(lambda: check_staged(node, data)) == "done"


PLANTED = {
    "a directory": 'mkdir -m 777 "$1"',
    "a directory with an image of equal size and time": (
        'mkdir -p -m 777 "$1" && mkdir -m 777 "${2%/*}" && printf "not ours!" > "$2" && touch -r "$3" "$2"'
    ),
    "a link to a directory of theirs": 'mkdir -m 777 "$1.elsewhere" && ln -s "$1.elsewhere" "$1"',
    "a file": ': > "$1"',
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_another_user_has_made_before_is_refused(node: Path, kind: str) -> None:
    image, data = copies(node)
    mine = node / f"nanogpt-{ME}"
    as_other(PLANTED[kind], mine, image, node / "shared" / "nanogpt.sif")
    said = stage_all(node)
    assert said.startswith(f"InputError: NANOGPT_STAGE: {mine}: ") and f"user {OTHER}" in said, said
    assert "Name a directory of your own" in said and "unset NANOGPT_STAGE" in said
    assert not mine.is_symlink() or not list(mine.iterdir())  # nothing was written through it
    assert "NANOGPT_STAGE" in as_me(lambda: check_staged(node, data))


def test_what_is_exchanged_after_the_copy_is_refused(node: Path) -> None:
    """As if the directory had been cleaned away between copy and use, and made by somebody else."""
    assert stage_all(node) == "done"
    image, data = copies(node)
    shutil.rmtree(node / f"nanogpt-{ME}")
    as_other('mkdir -p "$1" && mkdir -p "$2"', image.parent, data)
    assert f"belongs to user {OTHER}" in as_me(lambda: check_staged(node, data))
    shutil.rmtree(node / f"nanogpt-{ME}")
    assert "the copies are gone" in as_me(lambda: check_staged(node, data))


def test_an_own_directory_that_others_may_write_to_is_refused(node: Path) -> None:
    assert stage_all(node) == "done"
    image, _ = copies(node)
    image.parent.chmod(0o770)
    said = stage_all(node)
    assert f"{image.parent}: others may write to it (mode 0770)" in said and "chmod go-w" in said


def test_equal_size_and_time_are_not_equal_content(node: Path) -> None:
    assert stage_all(node) == "done"
    image, _ = copies(node)
    times = image.stat().st_mtime_ns
    image.write_bytes(THEIRS)
    os.utime(image, ns=(times, times))
    assert stage_all(node) == "done"
    assert image.read_bytes() == OURS


def test_a_place_in_which_others_can_rename_is_refused(node: Path) -> None:
    node.chmod(0o777)
    said = stage_all(node)
    assert said.startswith("InputError") and "others can replace its contents (mode 0777, without a sticky bit)" in said
    node.chmod(0o1777)
    as_other('mkdir -m 1777 "$1"', node / "theirs")
    shared = node / "shared"
    said = as_me(lambda: stage(node / "theirs", image=shared / "nanogpt.sif", shards=[]))
    assert f"{node / 'theirs'}: belongs to user {OTHER}, who can replace its contents" in said


def test_a_part_that_is_a_link_of_my_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="mine: is a link, of user root; expected a directory"):
        open_private(tmp_path, ["mine", "inner"])
    assert not list((tmp_path / "elsewhere").iterdir())
