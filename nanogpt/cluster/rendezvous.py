"""Where the nodes of a run meet: the first node's address, and the job's own port.

Names are resolved outside the image, which may lack what the node's resolver needs. A name that cannot be resolved
is an error: with localhost instead, every node would wait, or train, alone.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt.cluster.outside import NOT_FOUND, ask
from nanogpt.errors import RunError

FIRST_PORT, PORTS = 10_000, 20_000  # below the kernel's ephemeral ports, which begin at 32768


@dataclass(frozen=True)
class Rendezvous:
    """Addresses of the nodes, in Slurm's order; they meet at the first."""

    addresses: list[str]
    port: int

    @property
    def endpoint(self) -> str:
        """`10.0.0.1:12345`."""
        first = self.addresses[0]
        return f"[{first}]:{self.port}" if ":" in first else f"{first}:{self.port}"


def rendezvous(nodes: Sequence[str], job_id: int) -> Rendezvous:
    """Resolve the nodes of a job with several; to be called on the first one.

    Raises:
        RunError: a node's name cannot be resolved, or leads back to this machine.
    """
    return Rendezvous(choose_addresses({node: _resolve(node) for node in nodes}), free_port(job_id))


def choose_addresses(found: dict[str, list[str]]) -> list[str]:
    """One address per node, preferably IPv4. Raises `RunError` for a node without one that the others can reach."""
    chosen = []
    for node, addresses in found.items():
        if not addresses:
            raise RunError(
                f"node {node}: its name has no address here, so the nodes cannot meet. Check `getent hosts {node}` on"
                f" {socket.gethostname()}; leave the node out (sbatch --exclude={node}), and tell the cluster's staff"
            )
        parsed = sorted((ipaddress.ip_address(address) for address in addresses), key=lambda one: one.version)
        outward = [one for one in parsed if not one.is_loopback]
        chosen.append((outward or parsed)[0])
    # A host may resolve its own name to a loopback address, which on every other node means that node itself.
    loopback = [one.is_loopback for one in chosen]
    if any(loopback) and not all(loopback):
        node = list(found)[loopback.index(True)]
        raise RunError(
            f"node {node}: its name leads to {chosen[loopback.index(True)]} on {socket.gethostname()}, where the other"
            f" nodes would find themselves. Check `getent hosts {node}` there; leave the node out (sbatch"
            f" --exclude={node}), and tell the cluster's staff"
        )
    return [str(one) for one in chosen]


def _resolve(node: str) -> list[str]:
    answer = ask("getent", "ahosts", node)
    if answer.code == NOT_FOUND:
        raise RunError("getent: not found; it is needed to resolve the names of the job's nodes")
    return list(dict.fromkeys(line.split()[0].partition("%")[0] for line in answer.out.splitlines() if line.strip()))


def free_port(job_id: int) -> int:
    """The job's port on this machine, or the next free one. Raises `RunError` if 100 are in use."""
    for offset in range(100):
        port = FIRST_PORT + (job_id + offset) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RunError(f"ports {FIRST_PORT + job_id % PORTS} and the next 99 are in use on {socket.gethostname()}")
