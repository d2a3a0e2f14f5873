"""The image's list of contents against CycloneDX's own schema."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


@pytest.fixture(scope="module")
def bill_of_materials() -> ModuleType:
    path = Path(__file__).parents[2] / "containers" / "bill_of_materials.py"
    spec = importlib.util.spec_from_file_location("bill_of_materials", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_cyclonedx_and_the_same_each_time(
    bill_of_materials: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version, licence in (("B_one", "1.0", "MIT OR Apache-2.0"), ("a-two", "2.0+cpu", "")):
        directory = tmp_path / f"{name}-{version}.dist-info"
        directory.mkdir()
        expression = f"License-Expression: {licence}\n" if licence else ""
        (directory / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{expression}")
    dpkg = tmp_path / "dpkg-query"
    dpkg.write_text("#!/bin/sh\nprintf 'libc6:amd64\\t2.41-12\\tamd64\\ngcc\\t4:14.2.0-1\\tamd64\\n'\n")
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    components = [*bill_of_materials.debian_packages(), *bill_of_materials.python_packages([str(tmp_path)])]
    facts = ("nanogpt-sif", "0.1.0", "c" * 40, "2026-11-29T10:00:00Z", b"lock")
    text = bill_of_materials.bill(*facts, components)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert bill_of_materials.bill(*facts, components[::-1]) == text
    assert [part["purl"] for part in components if part["name"] in ("libc6", "b-one")] == [
        "pkg:deb/debian/libc6@2.41-12?arch=amd64",
        "pkg:pypi/b-one@1.0",
    ]
    broken = text.replace('"library"', '"libary"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None
