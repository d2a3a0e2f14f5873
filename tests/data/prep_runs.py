"""Running prep-fineweb in tests: as a process of its own, or here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer

from nanogpt.cli.prep import fineweb_main
from nanogpt.data.shards import train_name, val_name

PINNED = [sys.executable, "-c", "from nanogpt.cli.prep import fineweb_main; fineweb_main()"]
# The hub of the tests has other shards than those whose sha256 the package knows.
COMMAND = [*PINNED[:2], f"from nanogpt.data import official; official.SHA256.clear(); {PINNED[2]}"]
ONE, TWO, THREE = (train_name(index) for index in (1, 2, 3))
VAL = val_name(0)
SHARD_BYTES = 1024 + 2 * 50_000


class Prep:
    """Starts the command with a clean environment."""

    def __init__(self, hub: HubServer | None, data: Path) -> None:
        self.data = data
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(data.parent),
            "HF_HOME": str(data.parent / "hf"),
            "COLUMNS": "200",
            "TERM": "dumb",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
        }
        if hub is not None:
            self.env["HF_ENDPOINT"] = hub.endpoint

    def start(self, *flags: str, chunks: int | None = 1, command: list[str] = COMMAND, **more: object) -> Run:
        arguments = [*command, "--dir", str(self.data), *flags]
        if chunks is not None:
            arguments += ["--chunks", str(chunks)]
        return Run(arguments, self.env, **more)

    def run(self, *flags: str, chunks: int | None = 1, **more: object) -> Run:
        return self.start(*flags, chunks=chunks, **more).wait()

    def partial(self, name: str) -> Path:
        return partial(self.data, name)

    def until_partial(self, name: str, size: int) -> None:
        until(lambda: self.partial(name).exists() and self.partial(name).stat().st_size >= size)


class Ended:
    """What an ended run has left: exit code, output and errors."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def states(self) -> dict[str, str]:
        """State by file, from the table."""
        rows = [line.split() for line in self.out.splitlines()]
        return {row[0]: row[2] for row in rows if row[0].endswith(".bin")}


class Run(Ended):
    """A process, and after `wait` its exit code, output, errors and duration."""

    def __init__(self, arguments: list[str], env: dict[str, str], **more: object) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
        )

    def wait(self) -> Run:
        self.out, self.err = self.process.communicate(timeout=200)
        self.code = self.process.returncode
        self.seconds = time.monotonic() - self.began
        assert "Traceback" not in self.err, self.err
        return self


class Here:
    """The command in this process, for tests in which a process of its own would only take longer."""

    def __init__(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.hub, self.monkeypatch, self.capsys = hub, monkeypatch, capsys

    def run(self, data: Path, *flags: str, chunks: int = 1) -> Ended:
        with self.monkeypatch.context() as patch:
            patch.setenv("HF_ENDPOINT", self.hub.endpoint)
            patch.setattr("sys.argv", ["prep-fineweb", "--dir", str(data), "--chunks", str(chunks), *flags])
            with pytest.raises(SystemExit) as ended:
                fineweb_main()
        out, err = self.capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)


def partial(data: Path, name: str) -> Path:
    return data / ".prep-fineweb" / f"{name}.partial"


def until(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def whole(hub: HubServer, data: Path, *names: str) -> bool:
    return all((data / name).read_bytes() == hub.files[name] for name in names)
