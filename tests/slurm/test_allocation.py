"""What Slurm gave against what the recipe needs, and where the nodes meet."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import pytest
from recorded import NO_GPU, ONE_NODE, TWO_NODES, UNLIKE_NODES, program

from nanogpt.cluster.allocation import Allocation, parse_gpus, read_allocation
from nanogpt.cluster.rendezvous import FIRST_PORT, choose_addresses, free_port, rendezvous
from nanogpt.cluster.request import job_request
from nanogpt.errors import RunError
from nanogpt.gpus import same_type
from nanogpt.recipe import load_recipe


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory at the front of PATH for programs."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def test_gpus_by_node_and_type(slurm: Path) -> None:
    program(slurm, "scontrol", {"node[07,09]": "node07\nnode09\n"})
    assert parse_gpus(ONE_NODE) == {"n1": Counter(h200=2)}
    assert parse_gpus(TWO_NODES) == {"node07": Counter(h100=4), "node09": Counter(h100=4)}
    assert parse_gpus(UNLIKE_NODES) == {"a1": Counter({"a100_80gb": 2, "h100": 2}), "a2": Counter({"": 4})}
    assert parse_gpus(NO_GPU) == {"n1": Counter()}


def test_an_allocation_is_read_from_the_job(slurm: Path) -> None:
    program(slurm, "scontrol", {"show hostnames": "n1\n", "show job --details 7": ONE_NODE})
    allocation = read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"})
    assert allocation == Allocation("7", ["n1"], {"n1": Counter(h200=2)})
    assert allocation.described() == "1 node (n1) with 2 x h200"


def misfits(recipe: str, nodes: list[str], **gpus: dict[str, int]) -> list[str]:
    counts = {node: Counter(found) for node, found in gpus.items()}
    return Allocation("1", nodes, counts).misfits(job_request(load_recipe(recipe)))


def test_what_fits_and_what_does_not() -> None:
    assert misfits("8xh200", ["n1"], n1={"h200": 8}) == []
    assert misfits("8xh200", ["n1"], n1={"": 8}) == []  # a site without types: preflight asks the driver
    assert misfits("8xh100", ["n1"], n1={"nvidia_h100_80gb_hbm3": 8}) == []
    assert misfits("demo", ["n1"], n1={"h200": 8}) == []
    assert misfits("8xh200", ["n1"], n1={"h200": 4}) == ["8 GPUs per node needed, 4 allocated on n1"]
    assert misfits("4xh200", ["n1"], n1={"h200": 8}) == ["4 GPUs per node needed, 8 allocated on n1"]
    assert misfits("8xh100", ["n1"], n1={"h200": 8}) == ["GPUs of type h100 needed, h200 allocated on n1"]
    assert misfits("8xh100", ["n1"]) == ["8 GPUs per node needed, 0 allocated on n1"]
    assert misfits("2x4xh100", ["n1"], n1={"h100": 4}) == ["2 nodes needed, 1 allocated"]
    assert misfits("2x4xh100", ["n1", "n2"], n1={"h100": 4}, n2={"h100": 2, "a100": 2}) == [
        "GPUs of type h100 needed, a100 allocated on n2"
    ]


def test_names_of_a_gpu_type() -> None:
    for name in ("NVIDIA H100 80GB HBM3", "h100", "h100-sxm", "nvidia_h100_nvl", "H100-PCIe"):
        assert same_type(name, "h100")
    for name in ("NVIDIA GH200 480GB", "h1000", "NVIDIA A100-SXM4-80GB", ""):
        assert not same_type(name, "h100")
    assert same_type("NVIDIA A100-SXM4-80GB", "a100")


# --- where nodes meet -------------------------------------------------------------------------------------------


def test_nodes_meet_at_the_first_one_s_address(slurm: Path) -> None:
    answers = {
        "ahosts n1": "fe80::1%eth0 STREAM n1\n10.1.0.1 STREAM n1\n10.1.0.1 DGRAM\n127.0.1.1 STREAM\n",
        "ahosts n2": "fd00::2 STREAM n2\n10.1.0.2 STREAM\n",
    }
    program(slurm, "getent", answers)
    meeting = rendezvous(["n1", "n2"], 123)
    assert meeting.addresses == ["10.1.0.1", "10.1.0.2"]
    assert meeting.endpoint == f"10.1.0.1:{meeting.port}"
    assert choose_addresses({"n1": ["fd00::1"], "n2": ["fd00::2"]}) == ["fd00::1", "fd00::2"]


def test_a_host_that_cannot_be_resolved_is_an_error(slurm: Path) -> None:
    program(slurm, "getent", {"ahosts n1": "10.1.0.1 STREAM n1\n"}, code=0)
    with pytest.raises(RunError, match="node n2: its name has no address"):
        rendezvous(["n1", "n2"], 123)


def test_a_name_that_leads_home_is_an_error() -> None:
    with pytest.raises(RunError, match=r"node n1: its name leads to 127\.0\.1\.1"):
        choose_addresses({"n1": ["127.0.1.1"], "n2": ["10.1.0.2"]})
    assert choose_addresses({"n1": ["127.0.0.1"], "n2": ["127.0.0.1"]}) == ["127.0.0.1"] * 2  # one machine


def test_ports_come_from_the_job_and_step_aside() -> None:
    ports = {free_port(job) for job in range(50_000, 50_020)}
    assert len(ports) > 10  # some may be taken, and the next one is used twice
    port = free_port(9_000_123)
    assert FIRST_PORT <= port < 32_768
    with socket.socket() as taken:
        taken.bind(("", port))
        assert free_port(9_000_123) != port
