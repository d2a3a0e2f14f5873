"""What Slurm gave a job, and whether a recipe fits it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nanogpt.cluster.job_runs import job_name_for_slurm
from nanogpt.cluster.outside import ask_or_fail
from nanogpt.cluster.request import JobRequest
from nanogpt.environment import value_of
from nanogpt.gpus import same_type

_NODE_LINE = re.compile(r"^ *Nodes=(\S+) .*?\bGRES=(\S*)", re.MULTILINE)
_GPUS = re.compile(r"gpu(?::(?P<type>[^:,()]+))??:(?P<count>\d+)(?=[,(]|$)")


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, in Slurm's order, and the GPUs on each."""

    job_id: str
    nodes: list[str]
    # The number of GPUs by Slurm's name for the type ("" if it has none); an entry for each node, as far as known.
    gpus: dict[str, Counter[str]] = field(default_factory=dict)

    def described(self) -> str:
        """`2 nodes (n1, n2) with 4 x h100 each`."""
        count = f"{len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''} ({', '.join(self.nodes)})"
        kinds = list(dict.fromkeys(_gpus_text(self.gpus.get(node, Counter())) for node in self.nodes))
        if len(kinds) == 1:
            return f"{count} with {kinds[0]}{' each' if len(self.nodes) > 1 else ''}"
        return f"{count} with {'; '.join(kinds)}"

    def misfits(self, request: JobRequest) -> list[str]:
        """What the recipe needs and the allocation lacks, one line each; empty if it fits."""
        lines = []
        if len(self.nodes) != request.nodes:
            lines.append(f"{request.nodes} node{'s' if request.nodes != 1 else ''} needed, {len(self.nodes)} allocated")
        if not request.gpus_per_node:
            return lines
        for node in self.nodes:
            gpus = self.gpus.get(node, Counter())
            if gpus.total() != request.gpus_per_node:
                lines.append(f"{request.gpus_per_node} GPUs per node needed, {gpus.total()} allocated on {node}")
            wrong = [kind for kind in gpus if kind and not same_type(kind, request.gpu)]
            if wrong:
                lines.append(f"GPUs of type {request.gpu} needed, {', '.join(wrong)} allocated on {node}")
        return list(dict.fromkeys(lines))


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """The allocation of the job that `environ` (SLURM_*) belongs to.

    Raises:
        RunError: Slurm does not answer.
    """
    job = job_name_for_slurm(environ)
    nodes = host_names(value_of("SLURM_JOB_NODELIST", environ))
    return Allocation(job, nodes, parse_gpus(ask_or_fail("scontrol", "show", "job", "--details", job)))


def host_names(node_list: str) -> list[str]:
    """`n[1-2]` -> n1, n2, in Slurm's order. Raises `RunError` if Slurm does not answer."""
    return ask_or_fail("scontrol", "show", "hostnames", node_list).split()


def parse_gpus(text: str) -> dict[str, Counter[str]]:
    """GPUs by node and type, from `scontrol show job --details`.

    Lines such as `Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES=gpu:h200:4(IDX:0-3)`; a site may have no types: `gpu:4(IDX:0-3)`.
    """
    found: dict[str, Counter[str]] = {}
    for names, gres in _NODE_LINE.findall(text):
        for node in _expand(names):
            counts = found.setdefault(node, Counter())
            for match in _GPUS.finditer(gres):
                counts[match["type"] or ""] += int(match["count"])
    return found


def _expand(names: str) -> list[str]:
    return host_names(names) if "[" in names or "," in names else [names]


def _gpus_text(gpus: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind or 'GPU'}" for kind, count in gpus.items() if count) or "no GPU"
