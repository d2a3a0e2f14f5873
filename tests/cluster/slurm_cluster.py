"""A user's view of the tests' Slurm: submit, wait, read logs and runs. See setup-slurm.sh for the cluster itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
PATIENCE_S = 900.0  # for one job; busy machines are slow

# The demo's recipe made tiny, in the same number of stages; some hundredths of a second a step.
TINY = """\
base: demo.yaml
name: tiny
model: {width: 32, heads: 4, head_dim: 8, bigram_rows: 2048, rotary: {frequencies: 2}}
training:
  slots: 8
  stages:
    - {steps: 38, batch_tokens: 128, window_blocks: {short: 2, long: 6}, token_weights: [1, 0.5, 0.25], lr_factor: 1.0}
    - {steps: 38, batch_tokens: 256, window_blocks: {short: 4, long: 10}, token_weights: [1, 0.5], lr_factor: 1.22}
    - {steps: 38, batch_tokens: 256, window_blocks: {short: 6, long: 16}, token_weights: [1], lr_factor: 1.41}
  extension:
    {steps: 6, batch_tokens: 256, window_blocks: {short: 6, long: 20}, token_weights: [1], lr_factor: 1.41}
evaluation: {every: 40, tokens: 2048, micro_batch_tokens: 256}
checkpoint: {every: 10}
"""


@dataclass
class Ended:
    """A job that is over."""

    id: str
    state: str
    exit_code: int
    seconds: float  # from its start to its end
    log: str

    def succeeded(self) -> Ended:
        """Itself; a failure of the test with the log where it did not."""
        assert (self.state, self.exit_code) == ("COMPLETED", 0), f"job {self.id}: {self.state}\n{self.log}"
        return self


class Cluster:
    """Commands as the user, in a directory of the user's with `tiny.yaml` and `data`."""

    def __init__(self, as_user: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, sif: Path, work: Path):
        self._as_user = as_user
        self.checkout, self.sif, self.work = checkout, sif, work
        self.scripts = checkout / "slurm"
        # One thread a process: side by side on few cores, more wait for one another.
        self.environment = {"NANOGPT_SIF": str(sif), "OMP_NUM_THREADS": "1"}
        if os.environ.get("CLUSTER_TEST_SIF"):  # an image of another day runs this checkout's code
            self.environment["NANOGPT_SRC"] = str(checkout)

    def run(
        self, *command: str | Path, cwd: Path | None = None, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the "login node"."""
        variables = {**self.environment, **environment}
        return self._as_user(list(command), cwd=cwd or self.work, environment=variables, timeout=timeout)

    def submit(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run sbatch, or run.sh that does; returns the job's id."""
        done = self.run(*command, cwd=cwd, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        match = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert match, done.stdout + done.stderr
        return match.group(1)

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        text = self.run("scontrol", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_until(self, what: str, condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """What `condition` returns, once that is true."""
        until = time.monotonic() + patience_s
        while not (found := condition()):
            assert time.monotonic() < until, f"{what}: not in {patience_s:.0f} s\n{self.picture()}"
            time.sleep(0.2)
        return found

    def wait(self, job: str, patience_s: float = PATIENCE_S) -> Ended:
        """Wait for the end of a job."""
        self.wait_until(f"end of job {job}", lambda: self.show(job)["JobState"] in OVER, patience_s)
        shown = self.show(job)
        hours, minutes, seconds = re.findall(r"\d+", shown["RunTime"])[-3:]
        run_time = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        return Ended(job, shown["JobState"], int(shown["ExitCode"].partition(":")[0]), run_time, self.log(shown))

    def start_again(self, job: str) -> None:
        """Wait until the job is back in the queue, and spare it most of the two minutes that Slurm makes it wait.

        Not all: a node that gets the job again in the second in which it ended takes it for the one that is over.
        """
        self.wait_until("requeue", lambda: self.show(job)["JobState"] == "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        self.wait_until("start", lambda: self.show(job)["JobState"] != "PENDING")
        assert self.show(job)["Restarts"] == "1"

    def log(self, shown: dict[str, str]) -> str:
        """The log of the job that `show` describes; empty where there is none."""
        path = Path(shown["StdOut"])
        return path.read_text() if path.is_file() else ""

    def picture(self) -> str:
        """The queue and the newest logs, for a test that failed."""
        logs = sorted((self.work / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime)[-2:]
        parts = [self.run("squeue", "--states=all").stdout] + [f"{path}:\n{path.read_text()[-3000:]}" for path in logs]
        return "\n".join(parts)

    def runs(self, job: str, directory: str | Path = "runs") -> list[Path]:
        """Directories of the job's runs, oldest first."""
        found = []
        for path in sorted((self.work / directory).glob("*/record.json")):
            slurm = self.record(path.parent)["starts"][-1]["slurm"]
            if slurm and job in (slurm["job_id"], slurm["array_job_id"]):
                found.append(path.parent)
        return found

    def only_run(self, job: str) -> Path:
        """Directory of the job's one run."""
        (path,) = self.runs(job)
        return path

    def record(self, run: Path) -> dict[str, Any]:
        """The run's record."""
        record: dict[str, Any] = json.loads((run / "record.json").read_text())
        return record

    def steps(self, job: str) -> int:
        """Steps that the job's run has made so far, by its metrics."""
        runs = self.runs(job)
        path = runs[-1] / "metrics.jsonl" if runs else None
        if path is None or not path.exists():
            return 0
        records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return max((record["step"] for record in records if record["kind"] == "step"), default=0)

    def processes_of(self, job: str) -> list[str]:
        """Processes of the job that still run, by what is in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_JOB_ID={job}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


def make_cluster(as_user: Any, checkout: Path, sif: Path, home: Path, name: str) -> Cluster:
    """The cluster, with an empty working directory `name` in `home`.

    What the last tests left there goes: 2 GB of checkpoints a time had filled a disk. Fails the test where Slurm does
    not answer.
    """
    nodes = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], capture_output=True, text=True, check=False
    )
    if nodes.returncode or not nodes.stdout.split():
        pytest.fail(f"no Slurm here: {nodes.stderr}; tests/cluster/setup-slurm.sh (as root) makes one")
    work = home / "slurm-tests" / name
    as_user(["rm", "-rf", work], check=True)
    as_user(["mkdir", "-p", work / "logs"], check=True)
    (work / "tiny.yaml").write_text(TINY)
    os.chmod(work / "tiny.yaml", 0o644)  # noqa: PTH101
    return Cluster(as_user, checkout, sif, work)
