"""sif-diff on directories: names, types, modes, times and contents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanogpt.image.tree import differences, main, tree_entries


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        root = tmp_path / name
        (root / "etc").mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root\n")
        (root / "run.sh").write_text("#!/bin/sh\n")
        (root / "link").symlink_to("run.sh")
        for path in (root / "etc" / "passwd", root / "run.sh", root / "etc"):
            os.utime(path, (1_000_000, 1_000_000))
        os.utime(root / "link", (1_000_000, 1_000_000), follow_symlinks=False)
    return tmp_path / "a", tmp_path / "b"


def lines(a: Path, b: Path) -> list[str]:
    return [difference.line() for difference in differences(tree_entries(a), tree_entries(b))]


def test_equal_trees(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = trees
    assert lines(a, b) == []
    assert main([str(a), str(b)]) == 0
    assert "4 and 4 files" in capsys.readouterr().out


def test_each_kind_of_difference_is_named(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = trees
    (b / "etc" / "passwd").write_text("toor\n")
    os.utime(b / "etc" / "passwd", (1_000_000, 1_000_000))
    assert lines(a, b) == ["etc/passwd: content"]
    os.utime(b / "etc" / "passwd", (1_000_001, 1_000_001))
    assert lines(a, b) == ["etc/passwd: time 1000000, 1000001; content"]
    (b / "run.sh").chmod(0o755)
    (b / "link").unlink()
    (b / "link").symlink_to("etc")
    os.utime(b / "link", (1_000_000, 1_000_000), follow_symlinks=False)
    (b / "new").write_text("")
    assert lines(a, b)[1:] == ["link: target run.sh, etc", "new: only in B", "run.sh: mode 644, 755"]
    assert lines(b, a)[2] == "new: only in A"
    assert main([str(a), str(b)]) == 1
    assert "4 differ" in capsys.readouterr().out


def test_a_file_in_place_of_a_directory(trees: tuple[Path, Path]) -> None:
    a, b = trees
    (b / "etc" / "passwd").unlink()
    (b / "etc").rmdir()
    (b / "etc").write_text("")
    found = lines(a, b)
    assert found[0].startswith("etc: directory, file")
    assert found[1] == "etc/passwd: only in A"


def test_wrong_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a.sif"), str(tmp_path / "b.sif")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["", ""]) == 2
    assert "make sif-diff A=old.sif B=new.sif" in capsys.readouterr().err
