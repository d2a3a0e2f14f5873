"""Where launchers meet: real launchers on one machine, as many as there are nodes, with ranks of a few lines."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from test_launcher import SLEEPS, Alone, ended

from nanogpt.cluster.rendezvous import free_port
from nanogpt.errors import REQUEUE_EXIT_CODE, InputError, RunError
from nanogpt.launch.meeting import Meeting, listen, meet

NAMES = ("GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR")
SAYS = f"import os, sys; sys.stdout.write(' '.join(['place', *(os.environ[n] for n in {NAMES})]) + '\\n')"  # one write


def nodes(place: Path, code: str, *options: tuple[str, ...], processes: tuple[int, ...] = (1, 1)) -> list[Alone]:
    port = free_port(hash(place))
    made = []
    for index, (own, count) in enumerate(zip(options, processes, strict=True)):
        (directory := place / str(index)).mkdir()
        several = ("--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", *own)
        made.append(Alone(directory, code, *several, processes=count, alone=False))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [False, True])
def test_nodes_find_their_numbers(tmp_path: Path, numbered: bool) -> None:
    options = (("--node-rank=1",), ("--node-rank=0",)) if numbered else ((), ("--rdzv-backend=c10d",))
    first, second = nodes(tmp_path, SAYS, *options, processes=(2, 2))
    with ended(first), ended(second):
        assert (first.end(), second.end()) == (0, 0), first.output + second.output
    lines = sorted((first.output + second.output).splitlines())
    assert lines == [f"place {rank // 2} {rank} 4 127.0.0.1" for rank in range(4)]
    if numbered:
        assert "place 0 0 " in second.output
    assert first.left == second.left == set()


@pytest.mark.slow
def test_unlike_numbers_of_processes_are_refused(tmp_path: Path) -> None:
    first, second = nodes(tmp_path, SLEEPS, ("--node-rank=0",), ("--node-rank=1",), processes=(1, 2))
    with ended(first), ended(second):
        codes = {first.end(), second.end()}
        assert 0 not in codes and 2 in codes
    assert "--nproc-per-node '2', node 0 1; all need the same" in first.output + second.output
    assert "Traceback" not in first.output + second.output


def test_a_node_that_does_not_come(tmp_path: Path) -> None:
    (alone,) = nodes(tmp_path, SLEEPS, ("--rdzv-conf=join_timeout=1",), processes=(1,))
    with ended(alone):
        assert alone.end() == 1
    assert "of 2 nodes 1 did not come to 127.0.0.1:" in alone.output and "within 1 s: 1. " in alone.output


def test_a_first_node_that_does_not_come(tmp_path: Path) -> None:
    (alone,) = nodes(tmp_path, SLEEPS, ("--node-rank=1", "--rdzv-conf=join_timeout=1"), processes=(1,))
    with ended(alone):
        assert alone.end() == 1
    assert "no launcher answers at 127.0.0.1:" in alone.output


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    (alone,) = nodes(tmp_path, SLEEPS, ("--node-rank=1",), processes=(1,))
    with ended(alone):
        alone.until(lambda: alone.left)
        alone.process.terminate()
        assert alone.end() == REQUEUE_EXIT_CODE
    assert f"SIGTERM to the launcher on {socket.gethostname()}: stopped before all nodes arrived" in alone.output
    assert alone.left == set()


def never() -> bool:
    return False


def test_one_node_listens_at_loopback_alone() -> None:
    with meet(Meeting(processes=2), never, never) as place:
        assert place._listener is not None
        assert place._listener.getsockname() == ("127.0.0.1", place.port)


@pytest.mark.parametrize(
    ("meeting", "error", "words"),
    [
        (Meeting(2, 1, "no-such-host.invalid", 29500), InputError, "no-such-host.invalid: "),
        (Meeting(2, 1, "192.0.2.1", 29500, node=0), InputError, r"192\.0\.2\.1 .* is not an address of "),
        (Meeting(1, 1, "192.0.2.1", 29500), RunError, r"cannot listen at 192\.0\.2\.1 port 29500: "),
    ],
)
def test_addresses_that_cannot_be(meeting: Meeting, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words), meet(meeting, never, never):
        pass


def test_a_name_that_leads_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /etc/hosts has 127.0.1.1 for the node's own name."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    refused = pytest.raises(InputError, match=r"node0 leads to 127\.0\.1\.1 .* or --local-addr")
    with refused, meet(Meeting(2, 1, "node0", 29500), never, never):
        pass


def test_a_port_in_use() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        refused = pytest.raises(RunError, match=f"cannot listen at 127.0.0.1 port {port}: ")
        with refused, meet(Meeting(2, 1, "127.0.0.1", port, node=0), never, never):
            pass
