"""Where the ranks of a run meet: torch's TCPStore, served by the first node's launcher.

The members of a run are settled before it starts, so a meeting is just an address, a port and numbers. Nothing from
the network is unpickled. The store listens on one address: loopback on one node, the first node's on
several. It outlives every rank, and has no password: see docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanogpt.errors import InputError, RunError

if TYPE_CHECKING:
    from torch.distributed import Store

LOOPBACK = "127.0.0.1"
JOIN_S = 600.0  # for all nodes to arrive
LEAVE_S = 30.0  # for the other nodes' launchers to end before the store does
STORE_TIMEOUT_S = 10.0
_POLL_S = 0.2
_BACKLOG = 1024


class Cancelled(Exception):
    """A signal arrived before all nodes did."""


@dataclass(frozen=True)
class Meeting:
    """What a launcher knows of the run.

    Attributes:
        nodes: how many.
        processes: ranks on each of them.
        host: name or address of the first node; None: this node, alone.
        port: there; 0: any, for one node.
        node: this one's number; None: 0 at `host`, else in order of arrival.
        is_first: whether the store is here; None: if `node` is 0 or `host` is an address of this node.
        local_address: where the first node's store listens, if not at `host`.
        run_id: keeps out nodes of other runs.
        join_s: how long to wait for all nodes.
    """

    nodes: int = 1
    processes: int = 1
    host: str | None = None
    port: int = 0
    node: int | None = None
    is_first: bool | None = None
    local_address: str | None = None
    run_id: str = "none"
    join_s: float = JOIN_S


class Place:
    """This node's place in a meeting."""

    def __init__(self, meeting: Meeting, node: int, address: str, port: int):
        self.meeting = meeting
        self.node = node
        self.address = address
        self.port = port
        self._listener: socket.socket | None = None
        self._store: Store | None = None

    def environment(self, local_rank: int) -> dict[str, str]:
        """The variables for torch's programs, the same as torchrun's."""
        meeting = self.meeting
        return {
            "RANK": str(self.node * meeting.processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(self.node),
            "WORLD_SIZE": str(meeting.nodes * meeting.processes),
            "LOCAL_WORLD_SIZE": str(meeting.processes),
            "GROUP_WORLD_SIZE": str(meeting.nodes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already: rank 0 need not make one
        }

    def serve(self) -> None:
        """Serve the ranks of a single node. They may have started earlier, and wait until now."""
        if self._listener is not None and self.meeting.processes > 1:
            self._store = serve(self._listener)
            self._listener = None

    def _leave(self, hurried: Callable[[], bool]) -> None:
        """Say that this node's ranks have ended; the first node waits for the others, which may still need it."""
        if self._listener is not None:
            self._listener.close()
        if self.meeting.nodes == 1 or self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the first node's launcher is gone
            self._store.set(f"left/{self.node}", "")
            until = time.monotonic() + LEAVE_S
            others = [f"left/{node}" for node in range(self.meeting.nodes)]
            while self.node == 0 and not self._store.check(others) and time.monotonic() < until and not hurried():
                time.sleep(_POLL_S)


@contextmanager
def meet(meeting: Meeting, cancelled: Callable[[], bool], hurried: Callable[[], bool]) -> Iterator[Place]:
    """Take this node's place; of several nodes, wait for the others.

    Args:
        meeting: the run.
        cancelled: polled while waiting for the others to arrive.
        hurried: polled while waiting for them to end.

    Raises:
        InputError: `host` is not an address, or not one that the other nodes can reach, or the nodes do not match.
        RunError: the port is in use, or nodes do not arrive.
        Cancelled: `cancelled` said so.
    """
    if meeting.nodes == 1:
        host = meeting.local_address or meeting.host or LOOPBACK
        listener = _listen(_resolve(host)[0], meeting.port)
        place = Place(meeting, 0, *listener.getsockname()[:2])
        place._listener = listener
    else:
        place = _join(meeting, time.monotonic() + meeting.join_s, cancelled)
    try:
        yield place
    finally:
        place._leave(hurried)


def serve(listener: socket.socket) -> Store:
    """A store that serves `listener`, which it takes over. Raises `RunError`."""
    from torch.distributed import TCPStore

    address, port = listener.getsockname()[:2]
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            timeout=datetime.timedelta(seconds=STORE_TIMEOUT_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    except RuntimeError as error:
        raise RunError(f"the store at {address} port {port} does not answer: {error}") from error


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens on this address alone; port 0: any. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


# --- several nodes --------------------------------------------------------------------------------------------------


def _join(meeting: Meeting, until: float, cancelled: Callable[[], bool]) -> Place:
    assert meeting.host is not None
    first = _open_on_first(meeting)
    if first is None:
        address, store = _connect(meeting, until, cancelled)
    else:
        address, store = first.getsockname()[0], serve(first)
    from torch.distributed import PrefixStore

    store = PrefixStore(f"nanogpt-launch/{meeting.run_id}", store)
    try:
        node = meeting.node
        if node is None:
            node = 0 if first is not None else store.add("came", 1)
        if node >= meeting.nodes or store.add(f"claimed/{node}", 1) > 1:
            raise InputError(
                f"nanogpt launch: {_endpoint(meeting)} has {meeting.nodes} nodes (--nnodes), and another node {node}"
                f" already; give each launcher its own --node-rank, or none, and each run its own --rdzv-id"
            )
        store.set(f"processes/{node}", str(meeting.processes))
        keys = [f"processes/{other}" for other in range(meeting.nodes)]
        while missing := [key for key in keys if not store.check([key])]:
            if cancelled():
                raise Cancelled
            if time.monotonic() > until:
                numbers = ", ".join(key.rpartition("/")[2] for key in missing)
                raise RunError(
                    f"nanogpt launch on {socket.gethostname()}: of {meeting.nodes} nodes {len(missing)} did not come"
                    f" to {_endpoint(meeting)} within {meeting.join_s:g} s: {numbers}. Was it started there, with the"
                    " same --nnodes, --rdzv-endpoint and --rdzv-id?"
                )
            time.sleep(_POLL_S)
        for other, key in enumerate(keys):
            if (count := bytes(store.get(key)).decode(errors="replace")[:9]) != str(meeting.processes):
                raise InputError(
                    f"nanogpt launch: node {other} has --nproc-per-node {count!r}, node {node} {meeting.processes}; all"
                    " need the same"
                )
    except RuntimeError as error:  # torch's DistError is one
        raise RunError(f"nanogpt launch on {socket.gethostname()}: {_endpoint(meeting)}: {error}") from error
    place = Place(meeting, node, address, meeting.port)
    place._store = store
    return place


def _open_on_first(meeting: Meeting) -> socket.socket | None:
    """The socket where the nodes meet; None: it belongs on another node, or another launcher here has it."""
    assert meeting.host is not None
    told = meeting.is_first if meeting.is_first is not None else None if meeting.node is None else meeting.node == 0
    if told is False:
        return None
    addresses = _resolve(meeting.host)
    mine = [address for address in addresses if _is_mine(address)]
    if not mine:
        if told:
            raise InputError(
                f"nanogpt launch: {meeting.host} ({', '.join(addresses)}) is not an address of {socket.gethostname()},"
                " which should be the first node; name the first node's address in --rdzv-endpoint"
            )
        return None
    outward = [address for address in mine if not ipaddress.ip_address(address).is_loopback]
    chosen = meeting.local_address or (outward or mine)[0]
    if meeting.local_address is None and not outward and not _means_loopback(meeting.host):
        raise InputError(
            f"nanogpt launch: {meeting.host} leads to {chosen} on {socket.gethostname()}, where the other nodes would"
            " find themselves; give its address in the cluster's network with --rdzv-endpoint or --local-addr"
        )
    if told:
        return _listen(chosen, meeting.port)
    try:
        return listen(chosen, meeting.port)
    except OSError:
        return None


def _connect(meeting: Meeting, until: float, cancelled: Callable[[], bool]) -> tuple[str, Store]:
    assert meeting.host is not None
    _resolve(meeting.host)
    while True:
        if cancelled():
            raise Cancelled
        try:
            with socket.create_connection((meeting.host, meeting.port), timeout=STORE_TIMEOUT_S) as probe:
                address = probe.getpeername()[0]
            from torch.distributed import TCPStore

            timeout = datetime.timedelta(seconds=STORE_TIMEOUT_S)
            return address, TCPStore(address, meeting.port, is_master=False, wait_for_workers=False, timeout=timeout)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > until:
                raise RunError(
                    f"nanogpt launch on {socket.gethostname()}: no launcher answers at {_endpoint(meeting)} within"
                    f" {meeting.join_s:g} s ({error}). Was it started on the first node, is its name right, is the port"
                    " open between the nodes?"
                ) from error
            time.sleep(_POLL_S)


# --- addresses ------------------------------------------------------------------------------------------------------


def _listen(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port)
    except OSError as error:
        raise RunError(
            f"nanogpt launch on {socket.gethostname()}: cannot listen at {address} port {port}: {error.strerror}"
        ) from error


def _resolve(host: str) -> list[str]:
    """Addresses, IPv4 first. Raises `InputError`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"nanogpt launch: {host}: {error} (on {socket.gethostname()}); name the first node's address in"
            " --rdzv-endpoint"
        ) from error
    addresses = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return sorted(addresses, key=lambda address: ":" in address)


def _is_mine(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _means_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _endpoint(meeting: Meeting) -> str:
    host = f"[{meeting.host}]" if ":" in (meeting.host or "") else meeting.host
    return f"{host}:{meeting.port}"
