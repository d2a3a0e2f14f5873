"""Names that the documents give as ours exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("nanogpt/**/*.py"), *ROOT.glob("recipes/*.yaml")]
DOCUMENTS = [
    ROOT / "docs/glossary.md",
    *(ROOT / f"nanogpt/models/{kind}/README.md" for kind in ("speedrun", "record89", "gpt2")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_names_that_are_ours_exist(document: Path):
    words = set(re.findall(r"\w+", " ".join(file.read_text() for file in SOURCES)))
    tables = [
        table for table in document.read_text().split("\n\n") if re.match(r"\| (upstream|GPT-2's).*\| here \|", table)
    ]
    ours = [
        name
        for table in tables
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(.*?)`", row.split(" | ")[1])
    ]
    assert len(ours) > 4
    missing = {name: lost for name in ours if (lost := set(re.findall(r"[A-Za-z_]\w+", name)) - words - {"py"})}
    assert not missing
