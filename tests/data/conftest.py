"""Fixtures of the FineWeb tests: a hub on loopback, a directory, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from prep_runs import Here, Prep

from nanogpt.data import official
from nanogpt.data.fineweb import download


@pytest.fixture(autouse=True)
def nothing_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub of the tests has other shards than those whose sha256 the package knows."""
    monkeypatch.setattr(official, "SHA256", {})


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def filled(hub: HubServer, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three training shards, downloaded in this process."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert {one.state for one in download(data, chunks=3)} == {"downloaded"}
    hub.seen.clear()
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def prep(hub: HubServer, data: Path) -> Prep:
    return Prep(hub, data)


@pytest.fixture
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(hub, monkeypatch, capsys)
