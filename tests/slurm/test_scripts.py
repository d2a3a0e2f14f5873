"""The scripts in slurm/, with a stand-in for Apptainer and recorded answers of Slurm's commands."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import made_run
from other_user import ME, as_other, needs_root, shared_place
from recorded import ONE_NODE, SQUEUE, program
from tiny_runs import make_data, tiny_spec

from nanogpt.recipe import dump_spec

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "slurm"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with an image, shards, Slurm's commands in bin/ and those of the image in inside/."""
    (tmp_path / "nanogpt.sif").touch()
    make_data(tmp_path / "data", val_tokens=20_000, bos=50256)
    program(tmp_path / "bin", "sbatch", {"": "12\n"})
    program(tmp_path / "bin", "squeue", {"": SQUEUE})
    inside = tmp_path / "inside"
    inside.mkdir()
    nanogpt = inside / "nanogpt"
    nanogpt.write_text(f'#!/bin/sh\nPYTHONPATH={SCRIPTS.parent} exec {sys.executable} -m nanogpt "$@"\n')
    nanogpt.chmod(0o755)
    return tmp_path


def variables(place: Path, more: dict[str, str]) -> dict[str, str]:
    """The environment of a script."""
    all_of_them = {
        "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        "HOME": str(place),
        "USER": "ada",
        "APPTAINER": str(HERE / "fake_apptainer.sh"),
        "FAKE_IMAGE_PATH": f"{place / 'inside'}:/usr/bin:/bin",
        **more,
    }
    return {name: value for name, value in all_of_them.items() if value}


@pytest.fixture
def run(place: Path) -> Run:
    """Run a script in `place` with nothing of this process's environment."""

    def started(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            cwd=place,
            env=variables(place, environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return started


def test_run_sh_validates_prints_and_submits(run: Run, place: Path) -> None:
    done = run("run.sh", "demo", "--steps=20", "--data=data", "--runs=3%2", "--", "--partition=gpu")
    assert done.returncode == 0, done.stderr
    command, said = done.stdout.splitlines()
    assert command.startswith("sbatch --job-name=demo --nodes=1") and "--array=0-2%2 --partition=gpu" in command
    assert command.endswith(f"{SCRIPTS}/run.sh demo --steps=20 --data=data")
    assert said == "Submitted batch job 12"
    assert (place / "bin" / "calls").read_text().strip() == command.replace("sbatch", "sbatch --parsable", 1)
    assert (place / "logs").is_dir()
    assert "nanogpt.sh watch 12" in done.stderr


def test_a_script_gets_the_job_s_id(run: Run, place: Path) -> None:
    """Also where Slurm adds the cluster's name."""
    program(place / "bin", "sbatch", {"": "12;north\n"})
    done = run("run.sh", "demo", "--steps=20", "--data=data")
    assert done.stdout.splitlines()[1] == "Submitted batch job 12 on cluster north"
    assert "nanogpt.sh watch 12;" in done.stderr
    for options in (["--parsable"], ["--", "--parsable"]):
        done = run("run.sh", "demo", "--steps=20", "--data=data", *options)
        assert done.stdout == "12;north\n" and "sbatch --job-name=demo" in done.stderr


def test_options_of_sbatch_have_their_place(run: Run, place: Path) -> None:
    done = run("run.sh", "demo", "--data=data", "--mail-type=END")
    assert done.returncode == 2
    assert (
        "--mail-type: no such option. An option of sbatch goes after --: slurm/run.sh RECIPE -- --mail" in done.stderr
    )
    done = run("run.sh", "demo", "--data=data", "--step=20")
    assert done.returncode == 2 and "Did you mean --steps?" in done.stderr
    done = run("run.sh", "demo", "gpt2", "--data=data")
    assert done.returncode == 2 and "gpt2: expected one RECIPE" in done.stderr
    for script, option in (("run.sh", ["--mail-type=END"]), ("run.sh", ["--", "--mail-type=END"])):
        done = run(script, "demo", "--data=data", *option, **job_environment(place))
        assert done.returncode == 2 and "before the script: sbatch --mail-type" in done.stderr
    assert not (place / "bin" / "calls").exists()


def test_warm_is_submitted_outside_of_a_job(run: Run, place: Path) -> None:
    done = run("warm.sh", "record89", "--on=8xh100", "--world-size=4", "--fresh", "--", "--partition=gpu")
    assert done.returncode == 0, done.stderr
    command, said = done.stdout.splitlines()
    assert "--nodes=1 " in command and "--gres=gpu:h100:1 --cpus-per-task=8 " in command
    assert command.endswith(f"--partition=gpu {SCRIPTS}/warm.sh record89 --on=8xh100 --world-size=4 --fresh")
    assert said == "Submitted batch job 12"
    done = run("warm.sh", "record89")
    assert done.returncode == 2 and "Say what to run on" in done.stderr
    executable(place / "inside" / "nanogpt", '#!/bin/sh\necho "$@"\n')
    assert run("warm.sh", "record89", SLURM_JOB_ID="7").stdout == "warm record89\n"


def test_dry_run_submits_nothing(run: Run, place: Path) -> None:
    done = run("run.sh", "--dry-run", "recipes/8xh200.yaml", GPU_TYPE="h100", NUM_GPUS="4", SBATCH_TIMELIMIT="60")
    assert "--gres=gpu:h100:4 --cpus-per-task=32" in done.stdout and "--time" not in done.stdout
    assert done.stdout.strip().endswith("--set=hardware.gpu=h100 --set=hardware.gpus_per_node=4")
    assert done.returncode == 2 and "no such directory" in done.stderr  # the shards, which the job would be refused for
    assert run("run.sh", "--dry-run", "demo", "--data=data").returncode == 0
    assert not (place / "bin" / "calls").exists() and not (place / "logs").exists()


def test_hardware_is_said_on_the_command_line(run: Run, place: Path) -> None:
    done = run("run.sh", "--dry-run", "record89", "--on", "2x4xh100", "--", "--time=20", NUM_GPUS="8")
    assert "sbatch --job-name=record89 --nodes=2" in done.stdout and "--gres=gpu:h100:4 " in done.stdout
    assert done.stdout.strip().endswith(f" --time=20 {SCRIPTS}/run.sh record89 --on=2x4xh100")
    done = run("run.sh", "--dry-run", "record89", GPU_TYPE="h200", NUM_GPUS="2")
    assert "--gres=gpu:h200:2 " in done.stdout, done.stderr
    done = run("run.sh", "record89", GPU_TYPE="h200")
    assert done.returncode == 2 and "leaves it open. Say what to run on: --on 8xh100" in done.stderr
    done = run("run.sh", "record89-8xh200")
    assert done.returncode == 2 and "record89 --on 8xh200" in done.stderr
    assert not (place / "bin" / "calls").exists()


def test_nothing_is_queued_that_cannot_run(run: Run, place: Path) -> None:
    for arguments, message in (
        (("8xh200", "--set", "training.slts=8"), "did you mean slots?"),
        (("8xh20",), "Did you mean 8xh200?"),
        (("demo", "--data", "nowhere"), "nowhere: no such directory"),
    ):
        done = run("run.sh", *arguments)
        assert done.returncode == 2 and message in done.stderr
    assert not (place / "bin" / "calls").exists()


def test_a_refusal_of_sbatch_is_shown(run: Run, place: Path) -> None:
    (place / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2\nexit 1\n")
    done = run("run.sh", "demo", "--data=data")
    assert done.returncode == 1 and "invalid partition: x" in done.stderr


def test_missing_image_and_missing_apptainer(run: Run, place: Path) -> None:
    (place / "nanogpt.sif").unlink()
    done = run("run.sh", "demo")
    assert done.returncode == 2
    assert "there is no image" in done.stderr and "make sif" in done.stderr and "NANOGPT_SIF" in done.stderr
    if Path("/usr/bin/apptainer").exists() or Path("/usr/bin/singularity").exists():
        return
    done = run("run.sh", "demo", APPTAINER="")
    assert done.returncode == 2 and "module load apptainer" in done.stderr


def test_only_what_a_run_needs_of_the_environment_comes_in(run: Run, place: Path) -> None:
    site = place / "site.sh"
    site.write_text("export NCCL_DEBUG=INFO HTTPS_PROXY=http://proxy:1\n")
    done = run(
        "in_image.sh",
        "env",
        NANOGPT_SITE=str(site),
        PYTHONPATH="/conda/lib",
        CONDA_PREFIX="/conda",
        LD_LIBRARY_PATH="/conda/lib",
        SLURM_JOB_ID="7",
        NCCL_IB_DISABLE="0",
        OMP_NUM_THREADS="4",
        FINEWEB_CHUNKS="2",
        NANOGPT_CACHE="/scratch/a b",
        SCRATCH=str(place / "scratch of mine"),
        PROJECT="not-a-directory",
    )
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for name, value in {
        "NCCL_DEBUG": "INFO",
        "HTTPS_PROXY": "http://proxy:1",
        "SLURM_JOB_ID": "7",
        "NCCL_IB_DISABLE": "0",
        "OMP_NUM_THREADS": "4",
        "FINEWEB_CHUNKS": "2",
        "NANOGPT_CACHE": "/scratch/a b",
        "NANOGPT_SIF": str(place / "nanogpt.sif"),
        "SCRATCH": str(place / "scratch of mine"),
    }.items():
        assert inside[name] == value
    assert not {"PYTHONPATH", "CONDA_PREFIX", "LD_LIBRARY_PATH", "APPTAINER", "PROJECT"} & inside.keys()


def test_directories_of_a_run_are_shown_inside(run: Run, place: Path) -> None:
    shared = place / "shared"
    (shared / "shards").mkdir(parents=True)
    (place / "link").symlink_to(shared / "shards")
    log = place / "arguments"
    apptainer = place / "bin" / "apptainer"
    apptainer.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\n')
    apptainer.chmod(0o755)
    run("in_image.sh", "true", APPTAINER="", NANOGPT_DATA="link", NANOGPT_RUNS=str(shared / "new" / "runs"))
    words = log.read_text().splitlines()
    bound = {words[index + 1] for index, word in enumerate(words) if word == "--bind"}
    assert {str(place), str(SCRIPTS.parent), str(place / "link"), str(shared / "shards"), str(shared)} <= bound
    assert "--cleanenv" in words and words[-2:] == [str(place / "nanogpt.sif"), "true"]


def test_status_asks_slurm_outside_of_the_image(run: Run, place: Path) -> None:
    done = run("nanogpt.sh", "status", TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    assert "120_3" in done.stdout and "sacct is not configured here" in done.stderr
    assert "squeue --noheader --states=all --user=ada" in (place / "bin" / "calls").read_text()
    assert not list(place.glob("nanogpt-relay.*"))


def test_the_relay_runs_slurm_s_commands_only(run: Run, place: Path) -> None:
    (place / "inside" / "nanogpt").write_text(
        f"#!/bin/sh\nPYTHONPATH={SCRIPTS.parent} {sys.executable} -c 'from nanogpt.cluster.outside import ask;"
        ' print(ask("touch", "x").code, ask("squeue", "a b", "").out.count(chr(10)))\'\n'
    )
    done = run("nanogpt.sh", "x")
    assert done.stdout == "127 4\n", done.stderr
    assert (place / "bin" / "calls").read_text() == "squeue a b \n"


def job_environment(place: Path) -> dict[str, str]:
    program(place / "bin", "scontrol", {"show hostnames": "n1\n", "show job": ONE_NODE})
    program(place / "bin", "srun", {"": "the step runs\n"}, code=0)
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }


def test_in_a_job_run_sh_starts_one_step(run: Run, place: Path) -> None:
    done = run("run.sh", "demo", "--steps=20", "--data=data", **job_environment(place))
    assert (done.returncode, done.stdout) == (0, "the step runs\n"), done.stderr
    (srun,) = re.findall("^srun (.*)$", (place / "bin" / "calls").read_text(), re.MULTILINE)
    assert srun.startswith("--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=2 --kill-on-bad-exit=0")
    assert f"{SCRIPTS}/in_image.sh nanogpt job node --nodes=1 --ranks=1 demo " in srun  # a node alone needs no address
    assert srun.endswith("demo --steps=20 --out runs --data data")


def test_in_a_job_open_hardware_is_that_of_the_job(run: Run, place: Path) -> None:
    make_data(place / "data", val_tokens=20_000)
    (place / "tiny.yaml").write_text(dump_spec(tiny_spec(), exclude={"hardware": True}))
    environment = job_environment(place)
    done = run("run.sh", "tiny.yaml", "--data=data", **environment)
    assert done.returncode == 0, done.stderr
    assert "hardware: 2 x h200, of job 7" in done.stderr
    (srun,) = re.findall("^srun (.*)$", (place / "bin" / "calls").read_text(), re.MULTILINE)
    assert " --ranks=2 " in srun and srun.endswith(" tiny.yaml --on=2xh200 --out runs --data data")
    done = run("run.sh", "tiny.yaml", "--on=4xh200", "--data=data", **environment)
    assert done.returncode == 2 and "4 GPUs per node needed, 2 allocated on n1" in done.stderr
    assert "--gres=gpu:h200:4" in done.stderr and "tiny.yaml --on=4xh200" in done.stderr


def test_a_task_of_an_array_has_its_own_seed(run: Run, place: Path) -> None:
    environment = {**job_environment(place), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}
    run("run.sh", "demo", "--set=training.seed=10", "--data=data", **environment)
    assert "--set=training.seed=10 --set=training.seed=14" in (place / "bin" / "calls").read_text()


def test_staging_is_a_step_before_and_the_copies_are_used(run: Run, place: Path) -> None:
    run("run.sh", "demo", "--data=data", NANOGPT_STAGE=str(place / "disk"), **job_environment(place))
    stage, step = re.findall("^srun (.*)$", (place / "bin" / "calls").read_text(), re.MULTILINE)
    assert stage.endswith("in_image.sh nanogpt job stage demo --data=data")
    assert f" NANOGPT_SIF={place}/disk/nanogpt-" in step and step.endswith("/shards")
    assert f"env NANOGPT_STAGED_FROM={place}/data " in step
    assert f"NANOGPT_STAGED_BELOW={place}/disk " in step


def test_exit_codes_and_requeue(run: Run, place: Path) -> None:
    environment = job_environment(place)
    program(place / "bin", "srun", {}, code=75)
    done = run("run.sh", "demo", "--data=data", **environment)
    assert done.returncode == 75 and "not requeued: no run of this job" in done.stderr
    program(place / "bin", "srun", {}, code=3)
    assert run("run.sh", "demo", "--data=data", **environment).returncode == 3
    done = run("run.sh", "8xh200", **environment)
    assert done.returncode == 2 and "8 GPUs per node needed, 2 allocated on n1" in done.stderr


@pytest.mark.parametrize("allowed", [True, False])
def test_a_job_whose_node_is_lost_goes_back_without_it(run: Run, place: Path, allowed: bool) -> None:
    environment = {**job_environment(place), "SLURM_JOB_NUM_NODES": "2"}
    answers = {"show hostnames": "n1\nn2\n"}
    program(place / "bin", "scontrol", answers)
    executable(place / "bin" / "srun", '#!/bin/sh\ncase "$*" in *--nodelist=n1*) exit 0 ;; esac\nexit 1\n')
    executable(
        place / "inside" / "nanogpt",
        f'#!/bin/sh\necho "$@" >> {place}/asked\n'
        "case $2 in plan) printf 'srun\\0step\\0' ;; requeue) printf '77\\nn9,n2\\nby my hand\\n' ;; esac\n",
    )
    if not allowed:
        program(place / "bin", "scontrol", answers, code=1)
    done = run("run.sh", "demo", **environment)
    assert done.returncode == 1
    assert (place / "asked").read_text().splitlines() == ["job plan demo", "job requeue --lost=n2 demo"]
    calls = (place / "bin" / "calls").read_text()
    assert "scontrol requeue 77\n" in calls
    assert ("scontrol update JobId=77 ExcNodeList=n9,n2 StartTime=now+120\n" in calls) == allowed
    assert ("not requeued; by hand: by my hand" in done.stderr) == (not allowed)


def test_scripts_name_no_site() -> None:
    for script in SCRIPTS.glob("*.sh"):
        assert os.access(script, os.X_OK)
        assert "mit_" not in script.read_text()


def test_prep_and_build_flash_attn_run_here_and_now(run: Run, place: Path) -> None:
    for name in ("prep-fineweb", "prep-text", "build-flash-attn"):
        program(place / "inside", name, {"": ""})
    run("prep.sh", "--chunks", "3")
    run("prep.sh", "text", "--embedded", "--dir", "my data")
    run("build_flash_attn.sh", "flash-attention.tar.gz", "--out", "fa")
    assert (place / "inside" / "calls").read_text().splitlines() == [
        "prep-fineweb --chunks 3",
        "prep-text --embedded --dir my data",
        "build-flash-attn flash-attention.tar.gz --out fa",
    ]


@pytest.mark.parametrize("script", ["run.sh", "prep.sh", "build_flash_attn.sh"])
def test_a_copy_in_slurm_s_spool_finds_the_others(run: Run, place: Path, script: str) -> None:
    """As in a job: the script runs as another file, and Slurm tells where it came from, for an array once a task."""
    home = place / "a clone"
    home.mkdir()
    (home / "slurm").symlink_to(SCRIPTS)
    spool = place / "slurm_script"
    spool.write_text((SCRIPTS / script).read_text())
    spool.chmod(0o755)
    for name in ("prep-fineweb", "build-flash-attn"):
        program(place / "inside", name, {"": f"{name}\n"})
    environment = job_environment(place)
    command = f"   Command={home}/slurm/{script} demo --data=data\n"
    program(place / "bin", "scontrol", {"show hostnames": "n1\n", "--details": ONE_NODE, "show job 7": command * 2})
    done = run(str(spool), "demo", "--data=data", **environment)
    said = {"run.sh": "the step runs", "prep.sh": "prep-fineweb", "build_flash_attn.sh": "build-flash-attn"}
    assert (done.returncode, done.stdout.strip()) == (0, said[script]), done.stderr


def test_a_run_goes_on_in_a_new_job(run: Run, place: Path) -> None:
    make_data(place / "data", val_tokens=20_000)
    from nanogpt.runs.directory import RunDirectory

    path = RunDirectory.create(place / "runs", tiny_spec()).path.relative_to(place)
    done = run("run.sh", "--dry-run", f"--resume={path}", "--set=hardware.gpus_per_node=4", "--data=data")
    assert "--cpus-per-task=8" in done.stdout, done.stderr
    assert done.stdout.strip().endswith(f"--resume={path} --set=hardware.gpus_per_node=4 --data=data")
    done = run("run.sh", "--dry-run", f"--resume={path}", "--on=2xcpu", "--data=data")
    assert "--cpus-per-task=4" in done.stdout, done.stderr
    done = run("run.sh", f"--resume={path}", "--set=checkpoint.every=5", "--data=data", **job_environment(place))
    assert done.returncode == 0, done.stderr
    assert f"--resume={path} --set=checkpoint.every=5 --data data" in (place / "bin" / "calls").read_text()
    done = run("run.sh", "--dry-run", f"--resume={path}", "--set=training.seed=5")
    assert done.returncode == 2 and "training.seed" in done.stderr
    assert "name a RECIPE" in run("run.sh", "--dry-run").stderr


def test_a_run_that_goes_on_finds_its_shards_by_its_record(run: Run, place: Path) -> None:
    """And what is said after `--` is sbatch's, though no recipe is named."""
    from nanogpt.runs.directory import RunDirectory
    from nanogpt.runs.record import read_record, write_record

    make_data(place / "elsewhere" / "shards", val_tokens=20_000)
    path = RunDirectory.create(place / "runs", tiny_spec()).path
    record = read_record(made_run(place / "made"))
    assert record.data is not None
    record.data.directory = str(place / "elsewhere" / "shards")
    write_record(path, record)
    done = run("run.sh", f"--resume={path.relative_to(place)}", "--", "--exclude=n9")
    assert done.returncode == 0, done.stderr
    assert f" --exclude=n9 {SCRIPTS}/run.sh --resume=runs/" in done.stdout
    shown = bound(run, place, "nanogpt", "evaluate", str(path))
    assert str(place / "elsewhere" / "shards") in shown
    run("run.sh", f"--resume={path.relative_to(place)}", **job_environment(place))
    assert f"--data {place}/elsewhere/shards" in (place / "bin" / "calls").read_text()


# --- what is around a run: the site's file, links, proxies, TMPDIR, signals, other users ---------------------------


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


SITE = """\
export BEFORE=$NOT_SET_ANYWHERE
grep -q nothing /dev/null
set -u
cd /
echo loading modules
false || export NCCL_DEBUG=INFO
root=/nowhere PASS=x IFS=/
export NCCL_SOCKET_IFNAME=ib0
grep -q nothing /dev/null
"""


def test_a_site_s_file_cannot_end_the_script(run: Run, place: Path) -> None:
    site = place / "site.sh"
    site.write_text(SITE)
    done = run("in_image.sh", "sh", "-c", "pwd; env", NANOGPT_SITE="site.sh")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(place) and "loading modules" not in done.stdout  # which a script may read
    assert {"NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME=ib0"} <= {*lines}
    for number in (2, 9):
        assert f"NANOGPT_SITE=./site.sh, line {number}: `grep -q nothing /dev/null` failed (exit code 1)" in done.stderr
    assert done.stderr.count("failed") == 2


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("exit 3\n", 2, "has ended the script (exit code 3): take its `exit` out"),
        ("export A=1\nif then\n", 0, "syntax error"),
        ("export A=1\nreturn 0\nfalse\n", 0, ""),
        pytest.param(
            "module load apptainer\n",
            0,
            "there is no command 'module' here",
            marks=pytest.mark.skipif(Path("/etc/profile.d/lmod.sh").exists(), reason="this machine has Lmod"),
        ),
        ("no-such-program x\n", 0, "line 1: `no-such-program x` failed (exit code 127)"),
        (None, 2, "no such file, or not readable"),
    ],
)
def test_what_a_site_s_file_does_wrong_is_said(
    run: Run, place: Path, text: str | None, code: int, message: str
) -> None:
    if text is not None:
        (place / "site.sh").write_text(text)
    done = run("in_image.sh", "echo", "ran", NANOGPT_SITE=str(place / "site.sh"), LMOD_PKG="/none", MODULESHOME="/none")
    assert (done.returncode, done.stdout) == (code, "ran\n" if code == 0 else "")
    assert message in done.stderr if message else not done.stderr


def test_module_is_looked_for_where_a_batch_shell_lacks_it(run: Run, place: Path) -> None:
    (place / "lmod" / "init").mkdir(parents=True)
    (place / "lmod" / "init" / "bash").write_text('module() { export "NCCL_FROM=$*"; }\n')
    (place / "site.sh").write_text("module load apptainer\n")
    done = run("in_image.sh", "env", NANOGPT_SITE=str(place / "site.sh"), LMOD_PKG=str(place / "lmod"))
    assert "NCCL_FROM=load apptainer\n" in done.stdout and not done.stderr


def bound(run: Run, place: Path, *arguments: str, **environment: str) -> set[str]:
    """What the script has Apptainer show."""
    log = place / "arguments"
    executable(place / "bin" / "apptainer", f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\n')
    done = run("in_image.sh", *arguments, APPTAINER="", **environment)
    assert done.returncode == 0, done.stderr
    words = log.read_text().splitlines()
    return {words[index + 1] for index, word in enumerate(words) if word == "--bind"}


@pytest.mark.parametrize("named", [{"NANOGPT_DATA": "links"}, ("--data", "links"), ("--data=links",)])
def test_what_shards_that_are_links_lead_to_is_shown(
    run: Run, place: Path, tmp_path_factory: pytest.TempPathFactory, named: dict[str, str] | tuple[str, ...]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("store", "between", "a b"):
        (elsewhere / name).mkdir()
    (elsewhere / "store" / "shard").touch()
    (elsewhere / "between" / "shard").symlink_to("../store/shard")
    (place / "links").mkdir()
    (place / "links" / "fineweb_train_000001.bin").symlink_to(elsewhere / "between" / "shard")
    (place / "links" / "fineweb_train_000002.bin").symlink_to(os.path.relpath(elsewhere / "a b" / "x", place / "links"))
    (place / "links" / "fineweb_train_000003.bin").symlink_to(elsewhere / "gone" / "x")
    (place / "links" / "fineweb_train_000004.bin").symlink_to("fineweb_train_000004.bin")
    environment, arguments = (named, ()) if isinstance(named, dict) else ({}, named)
    shown = bound(run, place, "nanogpt", "train", *arguments, **environment)
    assert {str(elsewhere / name) for name in ("store", "between", "a b")} <= shown
    assert str(elsewhere) not in shown and "/" not in shown


def test_a_link_that_leads_nowhere_inside_is_said(run: Run, place: Path) -> None:
    target = place / "not here" / "shard"
    link = place / "data" / "fineweb_val_000000.bin"
    link.unlink()
    link.symlink_to(target)
    done = run("nanogpt.sh", "submit", "demo", "--data=data", "--dry-run")
    assert "Traceback" not in done.stderr
    assert f"is a link to {target}: No such file or directory in the container" in done.stderr
    assert f"export APPTAINER_BIND={target.parent}" in done.stderr
    done = run("in_image.sh", "nanogpt", "train", "demo", "--data=data")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"export APPTAINER_BIND={target.parent}" in done.stderr


def test_proxies_and_certificates_come_in(run: Run, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file itself, wherever it is: at its place the image has its own, or nothing."""
    site = tmp_path_factory.mktemp("site")
    (site / "ca.pem").touch()
    (site / "hashed").mkdir()
    (site / "real").mkdir()
    (site / "real" / "ca.crt").touch()
    (site / "hashed" / "1234abcd.0").symlink_to(site / "real" / "ca.crt")
    environment = {
        "ALL_PROXY": "http://proxy:1",
        "all_proxy": "http://proxy:2",
        "no_proxy": "localhost",
        "SSL_CERT_FILE": str(site / "ca.pem"),
        "SSL_CERT_DIR": str(site / "hashed"),
        "REQUESTS_CA_BUNDLE": str(site / "none.pem"),
        "CURL_CA_BUNDLE": str(site / "ca.pem"),
        "HF_HOME": str(site / "real"),
    }
    program(place / "inside", "prep-fineweb", {"": ""})
    executable(place / "inside" / "prep-fineweb", "#!/bin/sh\nenv\n")
    done = run("prep.sh", **environment)
    assert {f"{name}={value}" for name, value in environment.items()} <= {*done.stdout.splitlines()}, done.stderr
    shown = bound(run, place, "prep-fineweb", **environment)
    assert {str(site / name) for name in ("ca.pem", "hashed", "real")} <= shown and str(site) not in shown


def test_a_tmpdir_that_is_not_there_is_named(run: Run, place: Path) -> None:
    """It is often the login node's."""
    done = run("nanogpt.sh", "status", TMPDIR=str(place / "none"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"TMPDIR={place}/none: no directory here that can be written to; /tmp is used.") == 1
    assert "export TMPDIR=" in done.stderr
    done = run("in_image.sh", "env", TMPDIR=str(place / "none"))
    assert "TMPDIR=/tmp\n" in done.stdout and f"TMPDIR={place}/none" in done.stderr


def start_and_wait(place: Path) -> subprocess.Popen[bytes]:
    """slurm/nanogpt.sh, in a session of its own, once its command runs."""
    ready = place / "ready"
    ready.unlink(missing_ok=True)
    executable(place / "inside" / "nanogpt", f"#!/bin/sh\ntouch {ready}\nexec sleep 300\n")
    started = subprocess.Popen(
        [SCRIPTS / "nanogpt.sh", "x"],
        cwd=place,
        env=variables(place, {"TMPDIR": str(place)}),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(ready.exists)
    return started


def session(number: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == number and fields[0] != "Z":
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("whom", ["script", "group"])
def test_a_relay_is_removed_when_the_script_is_ended(place: Path, whom: str) -> None:
    started = start_and_wait(place)
    try:
        assert len(list(place.glob("nanogpt-relay.*"))) == 1
        (os.kill if whom == "script" else os.killpg)(started.pid, signal.SIGTERM)
        assert started.wait(60) != 0
        assert not list(place.glob("nanogpt-relay.*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_a_killed_script_s_relay_is_removed_by_the_next_one(run: Run, place: Path) -> None:
    killed = start_and_wait(place)
    (relay,) = place.glob("nanogpt-relay.*")
    living = start_and_wait(place)
    try:
        (other,) = {*place.glob("nanogpt-relay.*")} - {relay}
        killed.kill()
        killed.wait(60)
        sleeper = next(pid for pid in session(killed.pid) if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())
        for path in (relay, other):
            os.utime(path, (0, 0))
        executable(place / "inside" / "nanogpt", "#!/bin/sh\n")
        run("nanogpt.sh", "x", TMPDIR=str(place))
        assert relay.exists()  # something of its container still runs
        os.kill(sleeper, signal.SIGKILL)
        until(lambda: sleeper not in session(killed.pid))
        run("nanogpt.sh", "x", TMPDIR=str(place))
        assert {*place.glob("nanogpt-relay.*")} == {other}
        until(lambda: not session(killed.pid))  # what has answered there
    finally:
        for one in (killed, living):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
        living.wait(60)


FAKE_SRUN = """\
#!/usr/bin/env bash
export SLURM_NODEID=0
for word in "$@"; do if [[ $word == --overlap ]]; then overlap=yes; fi; done
if [[ -n ${overlap:-} ]]; then
    while [[ $1 == --* ]]; do shift; done
    exec "$@"
fi
trap 'exit 75' USR1
echo $$ > "$NANOGPT_PID_FILE.0"
echo "$NANOGPT_PID_FILE" > ready
while :; do sleep 0.05; done
"""


def test_before_the_time_limit_the_launcher_is_told(place: Path) -> None:
    environment = variables(place, job_environment(place))
    executable(place / "bin" / "srun", FAKE_SRUN)
    started = subprocess.Popen(
        [SCRIPTS / "run.sh", "demo", "--data=data"], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    )
    until(lambda: (place / "ready").exists() and (place / "ready").read_text().endswith("\n"))
    name = (place / "ready").read_text().strip()
    assert re.fullmatch("/tmp/nanogpt-7-[0-9a-f]{32}", name)
    try:
        started.send_signal(signal.SIGUSR1)
        _, said = started.communicate(timeout=60)
    finally:
        Path(f"{name}.0").unlink()
    assert started.returncode == 75 and "time is nearly up" in said and "names no process" not in said


def tell_launcher(file: Path) -> subprocess.CompletedProcess[str]:
    """What run.sh does on each node, as the user ME: were it wrong, it would signal all that user's processes."""
    found = re.search(r"^tell_launcher='(.*?)'$", (SCRIPTS / "run.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    command = ["setpriv", f"--reuid={ME}", f"--regid={ME}", "--clear-groups", "bash", "-c", found.group(1), "_", file]
    return subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "SLURM_NODEID": "0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@needs_root
@pytest.mark.parametrize("whose", ["theirs", "mine"])
def test_a_planted_process_number_is_not_signalled(whose: str) -> None:
    command = ["setpriv", f"--reuid={ME}", f"--regid={ME}", "--clear-groups", "sleep", "300"]
    with shared_place() as node, subprocess.Popen(command) as process:
        until(lambda: Path(f"/proc/{process.pid}").stat().st_uid == ME)
        file = node / "pid.0"
        contents = ("-1", "0", "1", "", "12 34", f"-{process.pid}", "junk") + (
            (process.pid,) if whose == "theirs" else ()
        )
        for content in contents:
            file.unlink(missing_ok=True)
            if whose == "theirs":
                as_other('echo "$1" > "$2"', content, file)
            else:
                file.write_text(f"{content}\n")
                os.chown(file, ME, ME)
            done = tell_launcher(node / "pid")
            assert "names no process of this run" in done.stderr, content
            assert process.poll() is None
        file.unlink()
        (node / "real").write_text(f"{process.pid}\n")
        os.chown(node / "real", ME, ME)
        file.symlink_to(node / "real")
        assert "names no process" in tell_launcher(node / "pid").stderr and process.poll() is None
        file.unlink()
        (node / "real").rename(file)
        assert not tell_launcher(node / "pid").stderr
        assert process.wait(30) == -signal.SIGUSR1


def test_a_launcher_s_process_number_is_left_for_run_sh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanogpt.cli.job import _pid_file

    monkeypatch.setenv("NANOGPT_PID_FILE", str(tmp_path / "pid"))
    with _pid_file(1):
        assert (tmp_path / "pid.1").read_text() == f"{os.getpid()}\n"
        assert (tmp_path / "pid.1").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.iterdir())


@needs_root
def test_a_staged_image_of_another_user_is_not_run(run: Run, place: Path) -> None:
    with shared_place() as node:
        mine = node / "nanogpt-0" / "tag"
        as_other('mkdir -p "$1" && echo theirs > "$1/nanogpt.sif"', mine)
        environment = {"NANOGPT_SIF": str(mine / "nanogpt.sif"), "NANOGPT_STAGED_BELOW": str(node)}
        done = run("in_image.sh", "echo", "ran", **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert "NANOGPT_STAGE: " in done.stderr and "another's" in done.stderr
        for path in (mine.parent, mine, mine / "nanogpt.sif"):
            os.chown(path, 0, 0)
        assert run("in_image.sh", "echo", "ran", **environment).stdout == "ran\n"
        mine.parent.chmod(0o775)
        assert run("in_image.sh", "echo", "ran", **environment).returncode == 2
        mine.parent.rename(node / "moved")
        mine.parent.symlink_to(node / "moved")
        assert run("in_image.sh", "echo", "ran", **environment).returncode == 2
