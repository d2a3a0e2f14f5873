"""Settings and fixtures of all tests."""

import functools
import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest

if TYPE_CHECKING:
    from made_nvml import MadeNvml

# Before anything imports torch: side by side, pytest-xdist's workers share the cores instead of fighting for them.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

# What a user's shell may hold and would change a test's outcome.
for _name in [name for name in os.environ if re.match("NANOGPT_(?!TEST_)", name)] + ["FINEWEB_CHUNKS"]:
    os.environ.pop(_name, None)

hypothesis.settings.register_profile("nanogpt", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("nanogpt")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the fuzzers of bad input search."""
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="N times as many examples of bad input")


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> int:
    """The multiplier of a fuzzer's number of examples, 1 by default."""
    return max(1, request.config.getoption("--fuzz"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def silent_slurm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slurm's commands as on a machine whose controller is down, but without the minute that those wait for it."""
    directory = tmp_path_factory.mktemp("silent_slurm")
    for name in ("squeue", "sacct", "sinfo", "scontrol", "sbatch", "srun", "scancel"):
        path = directory / name
        path.write_text(f"#!/bin/sh\necho '{name}: error: Unable to contact slurm controller' >&2\nexit 1\n")
        path.chmod(0o755)
    return directory


@pytest.fixture(scope="module", autouse=True)
def slurm_of_machine(silent_slurm: Path) -> Iterator[None]:
    """Keep the tests from a Slurm that the machine happens to have; those of tests/cluster ask the real one."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PATH", f"{silent_slurm}:{os.environ['PATH']}")
        yield


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def terminal_of_80(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are printed as on a terminal of 80 columns, without colours."""
    from nanogpt.terminal import rich_console

    wide = functools.partial(rich_console, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("nanogpt.console.rich_console", wide)


@pytest.fixture
def nanogpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`nanogpt("show", "speedrun")` runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        from nanogpt.cli.main import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        gc.unfreeze()  # this process goes on: see nanogpt/garbage.py
        gc.enable()
        captured = capsys.readouterr()
        return Outcome(exit_info.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> "MadeNvml":
    """The driver's answers, as the test makes them."""
    from made_nvml import MadeNvml

    return MadeNvml(monkeypatch)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, to the end of the module: with tiny tensors, hand-shakes cost more than they save."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe("name: x")` writes tmp_path/recipe.yaml and returns its path."""

    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write
