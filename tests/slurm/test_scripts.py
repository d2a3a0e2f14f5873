"""The scripts in slurm/: what they submit, and what they do in a job."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from made_runs import made_run
from recorded import ONE_NODE, program
from scripts_place import SCRIPTS, Run, bound, executable, job_environment
from tiny_runs import make_data, tiny_spec

from nanogpt.recipe import dump_spec


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
