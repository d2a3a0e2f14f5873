"""A node of a job is lost, as when it loses its power: the job continues without it, from its last checkpoint.

In a partition of its own, so that no other test's jobs are on the nodes. Needs root, whose processes Slurm's are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import Run, home_of_user  # type: ignore[import-not-found]
from launched import descendants, read
from slurm_cluster import Cluster, make_cluster  # type: ignore[import-not-found]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a node of Slurm's is root's"),
    pytest.mark.timeout(1800),
]

VICTIM = "n4"
LONG = "--steps=80"  # more than anybody makes in the second after the tenth


@pytest.fixture
def cluster(as_user: Run, user_checkout: Path, sif: Path) -> Iterator[Cluster]:
    yield make_cluster(as_user, user_checkout, sif, home_of_user(), "lost")
    subprocess.run(["slurmd", "-N", VICTIM], check=False, capture_output=True)
    subprocess.run(["scontrol", "update", f"NodeName={VICTIM}", "State=RESUME"], check=False, capture_output=True)


def lose(node: str, job: str) -> None:
    """Kill what runs on the node for the job: Slurm's daemon first, then the job's step with all that it started."""
    found = subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{job}\."], check=True, capture_output=True, text=True)
    started = {int(step): descendants(int(step)) for step in found.stdout.split()}
    there = f"\0SLURMD_NODENAME={node}\0"
    (step,) = (step for step, pids in started.items() if any(there in read(f"/proc/{pid}/environ") for pid in pids))
    for pid in (int(read(f"/run/slurm/slurmd-{node}.pid")), step, *started[step]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_job_goes_on_without_a_node_that_is_lost(cluster: Cluster) -> None:
    made = cluster.run(cluster.scripts / "prep.sh", "text", "--embedded", "--dir", "data")
    assert made.returncode == 0, made.stderr
    shape = ("--set=hardware.gpus_per_node=1", "--set=hardware.nodes=2", "--set=watchdog.silence_seconds=5")
    options = ("--partition=spare", "--nodelist=n3")
    done = cluster.run(
        cluster.scripts / "run.sh", "tiny.yaml", LONG, *shape, "--data=data", "--parsable", "--", *options
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    cluster.wait_until("steps", lambda: cluster.steps(job) > 10)
    assert cluster.record(cluster.only_run(job))["starts"][0]["slurm"]["node_list"] == "n[3-4]"
    lose(VICTIM, job)
    looks: list[datetime] = []  # local, as Slurm's times are

    def requeued() -> bool:
        looks.append(datetime.now())
        return cluster.show(job)["JobState"] != "RUNNING"

    cluster.wait_until("requeue", requeued)
    log = cluster.log(cluster.show(job))
    cluster.wait_until("the exclusion", lambda: cluster.show(job)["ExcNodeList"] == VICTIM)
    # Even if Slurm finds out at once, n3 does not get the job again in the second in which it ended it.
    running = looks[-2:][0].replace(microsecond=0)
    assert datetime.fromisoformat(cluster.show(job)["EligibleTime"]) >= running + timedelta(seconds=120)
    assert f"node {VICTIM} does not answer" in log and f"requeued: job {job} continues from its checkpoint" in log
    # As Slurm finds out for itself after SlurmdTimeout; until then the job is completing there.
    subprocess.run(
        ["scontrol", "update", f"NodeName={VICTIM}", "State=DOWN", "Reason=lost"], check=True, capture_output=True
    )
    cluster.start_again(job)
    cluster.wait(job).succeeded()
    first, second = cluster.record(cluster.only_run(job))["starts"]
    assert first["state"] in ("failed", "killed") and second["state"] == "finished"
    assert second["resumed_at"] >= 10 and second["slurm"]["node_list"] == "n[3,5]"
