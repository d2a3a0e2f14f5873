"""A run of several processes beside other users of its node, and other states of a node that a run has to bear."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from launched import Launched, endless_recipe, read
from tiny_runs import make_data, tiny_spec, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,))


def listens_at(pid: int) -> Iterator[tuple[str, int]]:
    """Address (hexadecimal, as the kernel writes it) and port of each TCP socket at which the process listens."""
    sockets = {re.sub(r"\D", "", str(file.readlink())) for file in Path(f"/proc/{pid}/fd").iterdir()}
    for table in ("tcp", "tcp6"):
        for line in read(f"/proc/{pid}/net/{table}").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                address, _, port = fields[1].partition(":")
                yield address, int(port, 16)


class Bomb:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_another_user_can_run_nothing(data: Path, tmp_path: Path) -> None:
    """Who can reach a port of the run writes pickles wherever something is kept, and the run continues."""
    recipe = endless_recipe(tmp_path / "endless.yaml", 2)
    bomb = pickle.dumps(Bomb(tmp_path / "marker"))
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        everybody = (launched.process.pid, *launched.seen.values())
        found = [socket for pid in everybody for socket in listens_at(pid)]
        assert {address for address, _ in found} <= set(LOOPBACK), found
        (port,) = (port for _, port in listens_at(launched.process.pid))
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        keys = store.list_keys()
        assert any("beat/0" in key for key in keys), keys
        for _ in range(20):
            for key in (*keys, "torch.rendezvous.none", "/torch.rendezvous.none"):
                store.set(key, bomb)
            time.sleep(0.1)
        done = launched.log.count("\nstep:")
        launched.wait_for("more steps", lambda: launched.log.count("\nstep:") > done + 5)
        launched.process.terminate()
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
    assert not (tmp_path / "marker").exists()


def test_a_job_that_is_suspended_as_a_whole_goes_on(data: Path, tmp_path: Path) -> None:
    """For longer than any of its limits."""
    limits = "watchdog={silence_seconds: 20, step_seconds: 20, phase_seconds: 120}"
    recipe = endless_recipe(tmp_path / "endless.yaml", 2, limits)
    with Launched(tmp_path / "run", 2, recipe, "--data", data) as launched:
        launched.wait_for_step(5)
        everybody = (*launched.seen.values(), launched.process.pid)
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(24)
        done = launched.log.count("\nstep:")
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
        launched.wait_for("more steps", lambda: launched.log.count("\nstep:") > done + 5)
        launched.process.send_signal(signal.SIGUSR1)
        assert launched.end() == REQUEUE_EXIT_CODE, launched.output
        assert launched.output.count("SIGUSR1 to the launcher") == 2  # asked for, and done


@pytest.mark.skipif(os.geteuid() != 0, reason="a host name of its own needs root")
def test_a_node_that_cannot_resolve_its_own_name(data: Path, tmp_path: Path) -> None:
    """It runs, and leaves nothing."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec("hardware.gpus_per_node=2"))
    named = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp")}
    with Launched(tmp_path / "run", 2, recipe, "--data", data, prefix=named, environment=environment) as launched:
        assert launched.end() == 0, launched.output
    left = {path.name for path in (tmp_path / "tmp").iterdir()}
    assert {name for name in left if not name.startswith("torchinductor_")} == set()  # torch's import makes that one
