"""Where a run's things are: odd names, links out of home, another home, one compile cache for two jobs; for real."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run, home_of_user  # type: ignore[import-not-found]
from slurm_cluster import Cluster, make_cluster  # type: ignore[import-not-found]

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster(as_user: Run, user_checkout: Path, sif: Path) -> Cluster:
    return make_cluster(as_user, user_checkout, sif, home_of_user(), "places")


@pytest.fixture(scope="module")
def data(cluster: Cluster) -> Path:
    made = cluster.run(cluster.scripts / "prep.sh", "text", "--embedded", "--dir", "data")
    assert made.returncode == 0, made.stderr
    return cluster.work / "data"


@pytest.fixture
def outside(as_user: Run, cluster: Cluster) -> Iterator[Path]:
    """A directory of the user's out of home, which only its links lead to."""
    made = Path(as_user(["mktemp", "-d", "/var/tmp/slurm-test-XXXXXX"], check=True).stdout.strip())
    yield made
    cluster.run("chmod", "-R", "u+w", made)
    shutil.rmtree(made)


# One layer, whose compilation takes half a minute.
COMPILED = """\
base: gpt2.yaml
name: compiled
model: {layers: 1, width: 32, heads: 2, context: 64}
training:
  slots: 4
  max_document_tokens: 64
  window_block: 64
  stages: [{steps: 4, batch_tokens: 256, window_blocks: {short: 1, long: 1}, token_weights: [1], lr_factor: 1}]
  final_window_blocks: {short: 1, long: 1}
  lr_schedule: {warmup_steps: 1}
evaluation: {every: null, tokens: 256, micro_batch_tokens: 64, target_loss: null}
data: {epochs: null}
hardware: {gpu: cpu, gpus_per_node: 1}
runtime: {dtype: fp32, compile: on}
checkpoint: {at_end: false}
"""


def test_two_jobs_with_one_compile_cache(cluster: Cluster, data: Path) -> None:
    """Both compile and write, at once; what is there afterwards is whole."""
    (cluster.work / "compiled.yaml").write_text(COMPILED)
    (cluster.work / "compiled.yaml").chmod(0o644)
    cache = cluster.work / "kept"
    script = cluster.scripts / "run.sh"
    job = cluster.submit(script, "--runs=2", "compiled.yaml", "--data=data", NANOGPT_CACHE=str(cache))
    for task in (f"{job}_0", f"{job}_1"):
        cluster.wait(task).succeeded()
    for run in cluster.runs(job):
        lines = cluster.record(run)["compilation"]["cache"]
        assert any("written" in line or "used" in line for line in lines), lines
    (file,) = cache.iterdir()
    listed = cluster.run(cluster.scripts / "nanogpt.sh", "cache", "ls", NANOGPT_CACHE=str(cache))
    assert listed.returncode == 0 and file.suffix == ".compiled" and "compiled" in listed.stdout, listed.stderr


def test_odd_places(cluster: Cluster, data: Path, outside: Path) -> None:
    """What is named by a link that leads out of home, with colons and commas; an unpacked image, by a link, is not
    staged; a umask that shuts out others; nothing of the environment but what --export names, on every node.
    """
    cluster.run("mkdir", outside / "tmp")
    done = cluster.run("cp", "-r", data, outside / "da:ta,1")
    assert done.returncode == 0, done.stderr
    cluster.run("ln", "-s", outside, cluster.work / "out of home")
    done = cluster.run("apptainer", "build", "--sandbox", outside / "unpacked", cluster.sif, timeout=600)
    assert done.returncode == 0, done.stderr
    cluster.run("ln", "-s", outside / "unpacked", cluster.work / "image:link")
    given = {"NANOGPT_SIF": cluster.work / "image:link", "NANOGPT_STAGE": outside / "disk", "TMPDIR": outside / "tmp"}
    if "NANOGPT_SRC" in cluster.environment:
        given["NANOGPT_SRC"] = cluster.checkout
    exported = ",".join(["NONE", *(f"{name}={value}" for name, value in given.items())])
    places = ("--data=out of home/da:ta,1", "--out=out of home/ru,ns:1")
    two_nodes = ("--set=hardware.gpus_per_node=2", "--set=hardware.nodes=2")
    sbatch = ("sbatch", "--gres=none", "--nodes=2", "--cpus-per-task=4", "--mem=8G", f"--export={exported}")
    umask = ("sh", "-c", 'umask 077; exec "$@"', "sh")
    job = cluster.submit(*umask, *sbatch, cluster.scripts / "run.sh", "tiny.yaml", "--steps=4", *two_nodes, *places)
    ended = cluster.wait(job).succeeded()
    (run,) = (outside / "ru,ns:1").glob("tiny-*")
    record = cluster.record(run)
    assert record["container"]["image"] == str(outside / "unpacked")
    assert record["data"]["directory"] == str(outside / "da:ta,1")
    assert run.stat().st_mode & 0o077 == 0
    assert "is unpacked and stays where it is" in ended.log and "staged shards" in ended.log
    left = [path.name for path in (outside / "tmp").iterdir()]
    assert [name for name in left if not name.startswith("nanogpt-matplotlib-")] == []  # fonts, one directory a user

    shown = cluster.run(cluster.scripts / "run.sh", "--dry-run", f"--resume=out of home/ru,ns:1/{run.name}")
    assert shown.returncode == 0, shown.stderr  # the shards are found by the record
    left = cluster.run(cluster.scripts / "run.sh", "tiny.yaml", "--data=data", "--", "--export=NONE")
    assert left.returncode == 2 and "--export=NONE,NANOGPT_SIF" in left.stderr


def test_a_home_elsewhere(cluster: Cluster, outside: Path) -> None:
    """Than the user database says: the image, found by a link, sees the one that the user means."""
    image = outside / "im,age:link.sif"
    cluster.run("ln", "-s", cluster.sif, image)
    cluster.run("mkdir", outside / "home")
    command = ("sh", "-c", 'touch "$HOME/here" && echo "$HOME"')
    named = (f"HOME={outside / 'home'}", f"NANOGPT_SIF={image}")
    done = cluster.run("env", *named, cluster.scripts / "in_image.sh", *command)
    assert done.stdout.strip() == str(outside / "home"), done.stderr
    assert (outside / "home" / "here").exists()
