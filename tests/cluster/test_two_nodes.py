"""Two nodes on one machine: network namespaces joined by a cable, each with its own host name and processes.

Needs root. What a rank of one node can learn of the other comes over the network, as on a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import Launched, children, descendants, endless_recipe
from tiny_runs import losses, make_data, python, tiny_spec, write_recipe

from nanogpt.errors import REQUEUE_EXIT_CODE
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import read_run
from nanogpt.runs.record import read_record

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(900),
]

ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = 29517
ALL_S = 150.0  # a busy machine is slow


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Node:
    """A network namespace; `prefix` runs a command in it, under the node's host name and with processes of its own."""

    def __init__(self, index: int):
        self.name = f"nanogpt-node{index}-{os.getpid()}"
        self.link = f"ng{index}p{os.getpid() % 100000}"
        self.host = f"node{index}"
        self.address = ADDRESSES[index]

    @property
    def prefix(self) -> tuple[str, ...]:
        enter = (
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        )
        return (*enter, "sh", "-c", f'hostname {self.host} && exec "$@"', "sh")

    def launch(self, directory: Path, processes: int, *arguments: object) -> Launched:
        options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}")
        return Launched(
            directory,
            processes,
            *arguments,
            options=(*options, "--rdzv-id", "two-nodes", "--local-addr", self.address),
            prefix=self.prefix,
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    for tool in ("ip", "unshare", "hostname"):
        assert shutil.which(tool), f"{tool} is missing: apt install iproute2 util-linux hostname"
    pair = (Node(0), Node(1))
    try:
        for node in pair:
            ip("netns", "add", node.name)
            hosts = Path("/etc/netns") / node.name / "hosts"  # the node's /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{n.address} {n.host}\n" for n in pair))
        ip("link", "add", pair[0].link, "type", "veth", "peer", "name", pair[1].link)
        for node in pair:
            ip("link", "set", node.link, "netns", node.name)
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.link)
            ip("-n", node.name, "link", "set", node.link, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield pair
    finally:
        for node in pair:
            subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / node.name, ignore_errors=True)


# Eight ranks need eight slots. Three short validations: before, after four steps, at the end.
EVALUATION = "evaluation={tokens: 2048, micro_batch_tokens: 256, every: 4, target_loss: null}"
SHORT_DEMO = ("training.slots=8", EVALUATION, "data.epochs=null")


def test_two_nodes_of_four_processes_give_the_losses_of_one(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepared = python("-c", f"from nanogpt.cli.demo import prepare_data; from pathlib import Path;"
                            f" prepare_data(Path({str(data)!r}), 16384)")  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    arguments = ("demo", "--steps", "8", "--data", str(data), *(w for s in SHORT_DEMO for w in ("--set", s)))
    alone = python("-m", "nanogpt", "train", *arguments, "--out", str(tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    (one,) = (tmp_path / "one").iterdir()

    eight = (
        "--set",
        "hardware.gpus_per_node=4",
        "--set",
        "hardware.nodes=2",
        "--set",
        "runtime.row_gradients=sparse",
    )
    with (
        nodes[0].launch(tmp_path / "node0", 4, *arguments, *eight, "--out", tmp_path / "two") as first,
        nodes[1].launch(tmp_path / "node1", 4, *arguments, *eight, "--out", tmp_path / "two") as second,
    ):
        assert (first.end(), second.end()) == (0, 0), first.output + second.output
    (two,) = (tmp_path / "two").iterdir()
    record = read_record(two)
    assert (record.state, record.hardware.world_size, record.hardware.hosts) == ("finished", 8, ["node0", "node1"])
    for found, expected in zip(losses(two), losses(one), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
    assert RunDirectory.open(two).spec().world_size == 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,))


@pytest.fixture
def pair(nodes: tuple[Node, Node], data: Path, tmp_path: Path) -> Iterator[tuple[Launched, Launched]]:
    """An endless run of one rank on each node."""
    recipe = endless_recipe(tmp_path / "endless.yaml", 1, "hardware.nodes=2")
    arguments = (recipe, "--data", data, "--out", tmp_path / "runs")
    with (
        nodes[0].launch(tmp_path / "node0", 1, *arguments) as first,
        nodes[1].launch(tmp_path / "node1", 1, *arguments) as second,
    ):
        for launched in (first, second):
            launched.runs = tmp_path / "runs"
            launched.wait_for_step(5)
        yield first, second


@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_whose_only_rank_is_stopped(pair: tuple[Launched, Launched], victim: int) -> None:
    """The other node says so and ends; the stopped process, with no rank beside it, is killed by its launcher."""
    os.kill(pair[victim].seen[victim], signal.SIGSTOP)
    codes = [launched.end(ALL_S) for launched in pair]
    assert codes == [1, 1], pair[0].output + pair[1].output
    other = pair[1 - victim]
    assert f"rank {victim} on node{victim} (process " in other.output
    assert " has been silent for 20 s in step " in other.output
    assert "has been stopped for " in pair[victim].output
    assert " in step " in other.log.rpartition("run failed: ")[2]


def test_a_killed_launcher_takes_its_ranks_along_and_ends_the_other_node(pair: tuple[Launched, Launched]) -> None:
    """The first node's, which hosts the rendezvous."""
    (launcher,) = {pid for pid in descendants(pair[0].process.pid) if pair[0].seen[0] in children(pid)}
    os.kill(launcher, signal.SIGKILL)
    pair[0].end(ALL_S)
    assert pair[1].end(ALL_S) == 1, pair[1].output


def test_usr1_to_the_launcher_of_one_node_stops_both(pair: tuple[Launched, Launched]) -> None:
    (launcher,) = {pid for pid in descendants(pair[1].process.pid) if pair[1].seen[1] in children(pid)}
    os.kill(launcher, signal.SIGUSR1)
    codes = [launched.end() for launched in pair]
    assert codes == [REQUEUE_EXIT_CODE] * 2, pair[0].output + pair[1].output
    run = read_run(pair[0].run)
    assert run.state == "interrupted"
    assert run.checkpoints[-1]["step"] == run.last["step"]
    assert "SIGUSR1 to the launcher on node1: the run stopped after step " in pair[0].output


def test_unlike_recipes_and_data(nodes: tuple[Node, Node], data: Path, tmp_path: Path) -> None:
    """Both nodes refuse, with the difference; nothing is left in the directory of runs."""
    other_data = make_data(tmp_path / "other", (200_000,), val_tokens=601)
    recipes = [
        write_recipe(tmp_path / f"{name}.yaml", tiny_spec("hardware.nodes=2", *more))
        for name, more in (("one", ()), ("other", ("optimizer.adam.lr=0.0123",)))
    ]
    with (
        nodes[0].launch(tmp_path / "node0", 1, recipes[0], "--data", data, "--out", tmp_path / "runs") as first,
        nodes[1].launch(tmp_path / "node1", 1, recipes[1], "--data", other_data, "--out", tmp_path / "runs") as second,
    ):
        assert [first.end(), second.end()] == [2, 2], first.output + second.output
    for launched in (first, second):
        assert "rank 0 on node0 and rank 1 on node1:" in launched.output
        assert launched.output.count("recipe: optimizer.adam.lr: ") == 1
        assert "data: fineweb_val_000000.bin: 600 tokens" in launched.output
    assert not (tmp_path / "runs").exists()


def test_shards_that_one_node_has_not(nodes: tuple[Node, Node], data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec("hardware.nodes=2"))
    (tmp_path / "empty").mkdir()
    with (
        nodes[0].launch(tmp_path / "node0", 1, recipe, "--data", data, "--out", tmp_path / "runs") as first,
        nodes[1].launch(tmp_path / "node1", 1, recipe, "--data", tmp_path / "empty") as second,
    ):
        assert [first.end(), second.end()] == [2, 2], first.output + second.output
    for launched in (first, second):
        assert f"rank 1 on node1: {tmp_path / 'empty'}: no fineweb_train_*.bin there" in launched.output
    assert not (tmp_path / "runs").exists()
