"""What a recipe asks of Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_runs import python

from nanogpt.cluster.request import (
    CPUS,
    GIVEN,
    STOP_SIGNAL,
    environment_overrides,
    job_request,
    left_behind,
    sbatch_command,
    warm_request,
)
from nanogpt.errors import InputError
from nanogpt.recipe import load_recipe, shipped_recipes

RUN_SH = Path(__file__).parents[2] / "slurm" / "run.sh"


def header() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH (--[a-z-]+)=?(.*)$", RUN_SH.read_text(), re.MULTILINE))


def test_the_script_s_header_is_what_the_8_gpu_recipe_needs() -> None:
    options = job_request(load_recipe("8xh200")).options()
    found = header()
    assert found.pop("--job-name") == "nanogpt"
    assert {name: value for name, value in options.items() if name != "--job-name"}.items() <= found.items()
    assert (found["--signal"], found["--open-mode"], found["--requeue"]) == (STOP_SIGNAL, "append", "")
    assert not {"--partition", "--account", "--qos"} & found.keys()


@pytest.mark.parametrize("path", sorted(shipped_recipes().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_request(path: Path) -> None:
    spec = load_recipe(path)
    request = job_request(spec)
    assert request.nodes * max(request.gpus_per_node, 1) == spec.world_size
    assert 20 <= request.minutes <= 360  # the shortest limit of a public partition that we know


@pytest.mark.parametrize(
    ("recipe", "gres", "cpus", "nodes"),
    [("1xa100", "gpu:a100:1", 8, 1), ("8xh100", "gpu:h100:8", 64, 1), ("2x4xh100", "gpu:h100:4", 32, 2)],
)
def test_resources_follow_the_recipe(recipe: str, gres: str, cpus: int, nodes: int) -> None:
    request = job_request(load_recipe(recipe))
    assert (request.gres, request.cpus_per_node, request.nodes) == (gres, cpus, nodes)


def test_fewer_and_slower_gpus_get_more_time() -> None:
    minutes = {name: job_request(load_recipe(name)).minutes for name in ("8xh200", "4xh100", "1xh100", "1xa100")}
    assert minutes["8xh200"] < minutes["1xh100"] < minutes["1xa100"]
    assert minutes["8xh200"] <= minutes["4xh100"] < minutes["1xh100"]
    longer = job_request(load_recipe("1xa100", ["training.extension.steps=4000"]))
    assert longer.minutes > minutes["1xa100"]


def test_the_command_leaves_to_the_user_what_the_user_has_set() -> None:
    request = job_request(load_recipe("8xh200"))
    plain = sbatch_command(request, "slurm/run.sh", ["8xh200"], environ={})
    assert "--gres=gpu:h200:8" in plain and plain[-2:] == ["slurm/run.sh", "8xh200"]
    set_by_user = {"SBATCH_TIMELIMIT": "2:00:00", "SBATCH_GRES": "gpu:8", "SBATCH_JOB_NAME": ""}
    command = sbatch_command(
        request, "slurm/run.sh", ["8xh200"], environ=set_by_user, runs="10", extra=["--partition=mit_normal_gpu"]
    )
    assert not any(word.startswith(("--time", "--gres")) for word in command)
    assert "--array=0-9" in command and "--job-name=speedrun-8xh200" in command
    assert command[-3:] == ["--partition=mit_normal_gpu", "slurm/run.sh", "8xh200"]  # after ours: it wins


def test_an_array_has_its_own_logs_and_may_be_throttled() -> None:
    request = job_request(load_recipe("8xh200"))
    assert request.options()["--output"] == "logs/%x-%j.out"
    options = request.options(runs="10%2")
    assert (options["--array"], options["--output"]) == ("0-9%2", "logs/%x-%A_%a.out")
    for environ, extra in (({"SBATCH_ARRAY_INX": "0-3"}, []), ({}, ["--array=0-3"]), ({}, ["-a", "0-3"])):
        assert "--output=logs/%x-%A_%a.out" in sbatch_command(request, "run.sh", [], environ=environ, extra=extra)
    for runs in ("0", "1001", "10%0", "10%", "ten", "-3", "3,5"):
        with pytest.raises(InputError, match=f"--runs {re.escape(runs)}: expected"):
            request.options(runs=runs)


def test_cpus_of_a_gpu_can_be_set() -> None:
    spec = load_recipe("2x4xh100")
    assert job_request(spec, {CPUS: "15"}).cpus_per_node == 60
    assert job_request(load_recipe("demo"), {CPUS: "15"}).cpus_per_node == 2  # of a CPU run's process
    with pytest.raises(InputError, match=CPUS):
        job_request(spec, {CPUS: "few"})


def test_warming_takes_one_gpu_of_the_type_of_the_runs() -> None:
    request = warm_request(job_request(load_recipe("2x4xh100"), {CPUS: "15"}))
    assert (request.nodes, request.gres, request.cpus_per_node) == (1, "gpu:h100:1", 15)


@pytest.mark.parametrize(
    ("exported", "extra", "left"),
    [
        (None, [], []),
        ("ALL", [], []),
        ("NONE", [], ["NANOGPT_DATA", "NANOGPT_SIF"]),
        (None, ["--export=NONE"], ["NANOGPT_DATA", "NANOGPT_SIF"]),
        (None, ["--export", "HOME,NANOGPT_SIF=/x.sif"], ["NANOGPT_DATA"]),
        ("NONE", ["--export=ALL,A=b"], []),
    ],
)
def test_settings_that_export_leaves_behind_are_refused(
    exported: str | None, extra: list[str], left: list[str]
) -> None:
    environ = {GIVEN: "NANOGPT_SIF NANOGPT_DATA", **({"SBATCH_EXPORT": exported} if exported else {})}
    assert left_behind(environ, extra) == left
    if left:
        with pytest.raises(InputError, match=f"--export=NONE,{','.join(left)}"):
            sbatch_command(job_request(load_recipe("demo")), "run.sh", [], environ=environ, extra=extra)


def test_variables_of_the_guide_change_the_recipe() -> None:
    assert environment_overrides({}) == []
    assert environment_overrides({"GPU_TYPE": "H100", "NUM_GPUS": "4"}) == [
        "hardware.gpu=h100",
        "hardware.gpus_per_node=4",
    ]
    for name, value in (("GPU_TYPE", "v100"), ("NUM_GPUS", "many")):
        with pytest.raises(InputError, match=name):
            environment_overrides({name: value})


HARDWARE_RECIPES = sorted(shipped_recipes().glob("[0-9]*x*.yaml"))


def test_there_is_a_recipe_for_each_machine() -> None:
    names = {path.stem for path in HARDWARE_RECIPES}
    assert names >= {f"{count}x{gpu}" for gpu in ("h100", "h200") for count in (1, 2, 4, 8)}
    assert names >= {"1xa100", "8xa100", "2x4xh100"}


@pytest.mark.parametrize("path", HARDWARE_RECIPES, ids=lambda path: path.stem)
def test_a_hardware_recipe_says_its_hardware_and_repeats_nothing(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    assert written.keys() == {"base", "name", "hardware"}
    assert written["base"] == "speedrun.yaml" and written["name"] == f"speedrun-{path.stem}"
    *nodes, count, gpu = path.stem.split("x")
    hardware = load_recipe(path).hardware
    assert (hardware.nodes, hardware.gpus_per_node, hardware.gpu) == (int(nodes[0]) if nodes else 1, int(count), gpu)


def test_submitting_needs_no_torch() -> None:
    """It takes seconds to import, and a submission or a job's plan does nothing else that does."""
    done = python("-c", "import sys, nanogpt.cli.submit, nanogpt.cluster.job_step; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
