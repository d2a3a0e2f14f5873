"""slurm/run.sh and its siblings on a real Slurm of two nodes, in the real image, as an ordinary user.

The nodes are this machine twice, and their GPUs are fake: runs are for the CPU, and what needs a GPU is refused first.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from conftest import Run, home_of_user  # type: ignore[import-not-found]
from slurm_cluster import Cluster, make_cluster  # type: ignore[import-not-found]

from nanogpt.runs.listing import run_row
from nanogpt.runs.metrics import read_run

TOLERANCE = 1e-5  # relative, in fp32: sums in another order
STEPS = "--steps=12"
LONG = "--steps=80"  # continues for seconds, on a fast machine too, after it is seen at work
ENDLESS = "--steps=100000"
SECONDS_TO_REFUSE = 120  # on a busy machine

# A busy machine is slow, and the first test may wait for an image to be built.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster(as_user: Run, user_checkout: Path, sif: Path) -> Cluster:
    return make_cluster(as_user, user_checkout, sif, home_of_user(), "jobs")


@pytest.fixture(scope="module")
def data(cluster: Cluster) -> Path:
    """Shards of the embedded prose, made by a job."""
    job = cluster.submit("sbatch", cluster.scripts / "prep.sh", "text", "--embedded", "--dir", "data")
    cluster.wait(job).succeeded()
    return cluster.work / "data"


@pytest.fixture(scope="module")
def single(cluster: Cluster, data: Path) -> Path:
    """The tiny run on one process, never interrupted, submitted by sbatch with the script's own resources."""
    script = cluster.scripts / "run.sh"
    job = cluster.submit("sbatch", script, "tiny.yaml", STEPS, "--data=data", NANOGPT_STAGE=str(cluster.work / "disk"))
    ended = cluster.wait(job).succeeded()
    assert "staged image" in ended.log and "staged shards" in ended.log
    return cluster.only_run(job)


def losses(path: Path) -> list[float]:
    """Training and validation losses in their order."""
    run = read_run(path)
    return [record["train_loss"] for record in run.steps] + [record["val_loss"] for record in run.evaluations]


def assert_same_losses(path: Path, other: Path) -> None:
    found, expected = losses(path), losses(other)
    assert len(found) == len(expected) > 12
    assert found == pytest.approx(expected, rel=TOLERANCE)


# --- runs -------------------------------------------------------------------------------------------------------


def test_prep_is_a_job(cluster: Cluster, data: Path) -> None:
    assert {path.name for path in data.glob("*.bin")} == {"fineweb_train_000001.bin", "fineweb_val_000000.bin"}
    (log,) = (cluster.work / "logs").glob("nanogpt-prep-*.out")
    assert "MB of text" in log.read_text()


def test_sbatch_runs_to_a_record(cluster: Cluster, single: Path) -> None:
    record = cluster.record(single)
    assert (record["state"], record["steps"]) == ("finished", 12)
    start = record["starts"][-1]
    assert start["slurm"]["job_name"] == "nanogpt" and start["slurm"]["node_list"] in ("n1", "n2")
    assert record["container"]["image"].endswith(cluster.sif.name)
    assert len(record["container"]["sha256"]) == 64
    assert (single / "checkpoints" / "step-000012.pt").exists()


def test_run_sh_submits_what_the_recipe_needs(cluster: Cluster, single: Path) -> None:
    stage = {"NANOGPT_STAGE": str(cluster.work / "disk")}
    script = cluster.scripts / "run.sh"
    shown = cluster.run(script, "--dry-run", "tiny.yaml", STEPS, "--data=data", "--", "--comment=x", **stage)
    assert shown.returncode == 0, shown.stderr
    for option in ("--gres=none", "--nodes=1", "--cpus-per-task=2", "--output=logs/%x-%j.out", "--comment=x"):
        assert option in shown.stdout
    done = cluster.run(script, "tiny.yaml", STEPS, "--data=data", "--", "--comment=x", **stage)
    assert done.stdout.splitlines()[0] == shown.stdout.strip()
    job = done.stdout.split()[-1]
    ended = cluster.wait(job).succeeded()
    assert (cluster.work / "logs" / f"tiny-{job}.out").exists()
    assert "staged image: there already, identical" in ended.log
    assert "staged shards: there already, identical" in ended.log
    assert_same_losses(cluster.only_run(job), single)


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_nodes_train_as_one_process(cluster: Cluster, single: Path, ranks: int) -> None:
    shape = (f"--set=hardware.gpus_per_node={ranks}", "--set=hardware.nodes=2")
    job = cluster.submit(cluster.scripts / "run.sh", "tiny.yaml", *shape, STEPS, "--data=data")
    ended = cluster.wait(job).succeeded()
    run = cluster.only_run(job)
    record = cluster.record(run)
    assert record["hardware"]["world_size"] == 2 * ranks
    assert record["starts"][0]["slurm"]["node_list"] == "n[1-2]"
    assert all(f"preflight on {node}: 5 passed, 0 warnings, 0 failed" in ended.log for node in ("n1", "n2"))
    assert ended.log.count("Run directory:") == 2  # by one process of them, at start and end
    assert_same_losses(run, single)


def test_an_array_is_runs_of_their_own(cluster: Cluster, single: Path) -> None:
    job = cluster.submit(cluster.scripts / "run.sh", "--runs=3%2", "tiny.yaml", "--steps=4", "--data=data")
    assert cluster.show(job)["ArrayTaskThrottle"] == "2"
    tasks = [f"{job}_{index}" for index in range(3)]
    for task in tasks:
        cluster.wait(task).succeeded()
    records = [cluster.record(path) for path in cluster.runs(job)]
    assert sorted(record["seed"] for record in records) == [0, 1, 2]
    assert {record["state"] for record in records} == {"finished"}
    assert len({record["val_loss"] for record in records}) == 3
    assert all((cluster.work / "logs" / f"tiny-{task}.out").exists() for task in tasks)


# --- refusals ---------------------------------------------------------------------------------------------------


def refused(cluster: Cluster, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The log of a job that ends with exit code 2, quickly."""
    ended = cluster.wait(cluster.submit("sbatch", *command, cwd=cwd, **environment))
    assert (ended.state, ended.exit_code) == ("FAILED", 2), ended.log
    assert ended.seconds <= SECONDS_TO_REFUSE
    print(f"refused after {ended.seconds} s in the job: {ended.log.strip()}")
    return ended.log


def test_a_wrong_number_of_gpus_is_refused_with_the_right_command(cluster: Cluster) -> None:
    log = refused(cluster, "--gres=gpu:h200:2", cluster.scripts / "run.sh", "recipes/8xh200.yaml")
    assert "8 GPUs per node needed, 2 allocated on n" in log
    assert "--gres=gpu:h200:8" in log and "--cpus-per-task=64" in log


def test_a_wrong_type_of_gpu_is_refused(cluster: Cluster) -> None:
    log = refused(cluster, cluster.scripts / "run.sh", "recipes/8xh100.yaml")
    assert "GPUs of type h100 needed, h200 allocated on n" in log
    assert "--gres=gpu:h100:8" in log


def test_a_wrong_number_of_nodes_is_refused(cluster: Cluster) -> None:
    log = refused(cluster, "--nodes=2", cluster.scripts / "run.sh", "recipes/8xh200.yaml")
    assert "1 node needed, 2 allocated" in log


def test_a_missing_image_is_refused(cluster: Cluster) -> None:
    log = refused(cluster, cluster.scripts / "run.sh", "tiny.yaml", NANOGPT_SIF="/nowhere/nanogpt.sif")
    assert "there is no image /nowhere/nanogpt.sif" in log and "make sif" in log
    done = cluster.run(cluster.scripts / "run.sh", "tiny.yaml", NANOGPT_SIF="/nowhere/nanogpt.sif")
    assert done.returncode == 2 and "make sif" in done.stderr


def test_missing_and_corrupt_shards_are_refused(cluster: Cluster, data: Path) -> None:
    script = cluster.scripts / "run.sh"
    log = refused(cluster, script, "tiny.yaml", STEPS, "--data=nowhere")
    assert "nowhere: no such directory" in log and "prep-fineweb" in log

    copy = cluster.work / "corrupt"
    cluster.run("cp", "-r", data, copy)
    cluster.run("truncate", "--size=-2", copy / "fineweb_train_000001.bin")
    log = refused(cluster, script, "tiny.yaml", STEPS, f"--data={copy}")
    assert "fineweb_train_000001.bin: corrupt: the header promises" in log
    cluster.run("mv", copy / "fineweb_train_000001.bin", copy / "fineweb_train_000003.bin")
    cluster.run("cp", data / "fineweb_train_000001.bin", copy)
    log = refused(cluster, script, "tiny.yaml", STEPS, f"--data={copy}")
    assert "fineweb_train_000002.bin: missing" in log


def test_output_that_cannot_be_written_is_refused(cluster: Cluster, data: Path) -> None:
    log = refused(cluster, cluster.scripts / "run.sh", "tiny.yaml", STEPS, "--data=data", "--out=/proc/runs")
    assert "/proc/runs: cannot be written" in log and "NANOGPT_RUNS" in log


def test_an_invalid_recipe_is_refused_before_anything_is_queued(cluster: Cluster, data: Path) -> None:
    queue = ("squeue", "--states=all", "--noheader", "--format=%A")
    before = set(cluster.run(*queue).stdout.split())
    began = time.monotonic()
    done = cluster.run(cluster.scripts / "run.sh", "tiny.yaml", "--set=training.slts=8", "--data=data")
    print(f"refused after {time.monotonic() - began:.1f} s: {done.stderr.strip()}")
    assert done.returncode == 2 and "slots" in done.stderr
    assert time.monotonic() - began < SECONDS_TO_REFUSE
    assert set(cluster.run(*queue).stdout.split()) <= before
    refused(cluster, cluster.scripts / "run.sh", "tiny.yaml", "--set=training.slts=8")  # by sbatch: in the job


# --- interruptions ----------------------------------------------------------------------------------------------


def job_at_work(cluster: Cluster, steps: str) -> str:
    """A job that has written a checkpoint on its way, after 10 steps."""
    job = cluster.submit(cluster.scripts / "run.sh", "tiny.yaml", steps, "--data=data")
    cluster.wait_until("steps", lambda: cluster.steps(job) > 10)
    return job


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, single: Path) -> Path:
    job = cluster.submit(cluster.scripts / "run.sh", "tiny.yaml", LONG, "--data=data")
    cluster.wait(job).succeeded()
    return cluster.only_run(job)


def test_a_requeued_job_goes_on(cluster: Cluster, uninterrupted: Path) -> None:
    job = job_at_work(cluster, LONG)
    cluster.run("scontrol", "requeue", job)
    cluster.start_again(job)
    ended = cluster.wait(job).succeeded()
    run = cluster.only_run(job)
    record = cluster.record(run)
    # Slurm signals the image's squashfuse too: the checkpoint of this moment is not sure, an earlier one is.
    first, second = record["starts"]
    assert first["state"] in ("interrupted", "killed", "failed") and second["state"] == "finished"
    assert second["resumed_at"] >= 10
    assert "restart 1 of the job: continuing with" in ended.log
    assert_same_losses(run, uninterrupted)


def test_before_the_time_limit_a_run_writes_its_checkpoint_and_is_requeued(
    cluster: Cluster, uninterrupted: Path
) -> None:
    job = job_at_work(cluster, LONG)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does by --signal=B:USR1@120
    cluster.start_again(job)
    ended = cluster.wait(job).succeeded()
    assert "time is nearly up" in ended.log and f"requeued: job {job}" in ended.log
    run = cluster.only_run(job)
    record = cluster.record(run)
    assert [start["state"] for start in record["starts"]] == ["interrupted", "finished"]
    assert "SIGUSR1" in record["starts"][0]["reason"]
    assert_same_losses(run, uninterrupted)


def test_status_watch_and_cancel(cluster: Cluster, data: Path) -> None:
    job = job_at_work(cluster, ENDLESS)
    script = cluster.scripts / "nanogpt.sh"
    (row,) = [row for row in json.loads(cluster.run(script, "status", "--json").stdout) if row["id"] == job]
    assert row["state"] == "RUNNING" and row["run"]["steps"] >= 1 and row["run"]["total_steps"] == 100_000
    assert row["train_loss"] > 3 and row["run"]["val_loss"] > 3
    table = cluster.run(script, "status")
    assert re.search(rf"^ *{job} ", table.stdout, re.MULTILINE) and "/100,000" in table.stdout
    assert "sacct is not configured here" in table.stderr

    done = cluster.run(script, "cancel", job)
    assert done.returncode == 0, done.stderr
    assert f"{job}: cancelled" in done.stdout
    assert cluster.processes_of(job) == []
    assert cluster.show(job)["JobState"] == "CANCELLED"
    assert run_row(cluster.only_run(job)).state in ("interrupted", "killed", "failed")

    watched = cluster.run(script, "watch", job)
    assert watched.returncode == 0 and f"{job} cancelled" in watched.stdout


@pytest.mark.skipif("CLUSTER_TEST_SIF" in os.environ, reason="that image was not built here")
def test_the_image_is_built_in_a_job(cluster: Cluster, sif: Path) -> None:
    """Slurm runs a copy of the script, which finds the checkout; there the image is as it should be already."""
    flavour = os.environ.get("CLUSTER_TEST_FLAVOUR", "cpu")
    arguments = (f"FLAVOUR={flavour}", "BASE=tree", f"OUT={sif}")
    job = cluster.submit("sbatch", cluster.scripts / "build_sif.sh", *arguments)
    assert "nothing that goes into it has changed" in cluster.wait(job).succeeded().log
