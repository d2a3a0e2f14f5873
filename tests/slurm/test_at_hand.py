"""Hardware that a recipe leaves open, from what the driver tells, torchrun's variables and a job of Slurm's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest
from made_nvml import MadeNvml
from recorded import NO_GPU, ONE_NODE, TWO_NODES, program

from nanogpt.cluster.at_hand import at_hand, check_type, of_the_job
from nanogpt.errors import InputError
from nanogpt.hardware import Fill, largest_count, shape
from nanogpt.recipe import load_recipe
from nanogpt.recipe_yaml import RecipeError

H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def only_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("NANOGPT_RELAY", raising=False)


def filled(fill: Fill, *overrides: str, recipe: str = "record89") -> str:
    return shape(load_recipe(recipe, overrides, fill=fill).hardware)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([H200] * 4, "4xh200"),
        (["NVIDIA H100 80GB HBM3"], "1xh100"),
        (["NVIDIA A100-SXM4-80GB"] * 8, "8xa100"),
        (["NVIDIA L40S"] * 4, "4xl40s"),
        ([H200] * 6, "4xh200"),
        ([H200] * 3, "2xh200"),
        ([H200] * 16, "8xh200"),
    ],
)
def test_all_gpus_of_the_machine_or_as_many_as_a_run_takes(
    nvml: MadeNvml, names: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml.show(*names)
    assert filled(at_hand({})) == expected
    said = capsys.readouterr().err
    count, gpu = expected.split("x")
    assert f"hardware: {count} x {gpu}, the GPUs at hand" in said and "--on chooses another" in said
    assert (f"({count} of {len(names)}:" in said) == (int(count) < len(names))


def test_only_gpus_that_are_visible(nvml: MadeNvml) -> None:
    nvml.show(*[H200] * 8)
    assert filled(at_hand({"CUDA_VISIBLE_DEVICES": "4,5"})) == "2xh200"
    with pytest.raises(InputError, match=r"CUDA_VISIBLE_DEVICES=9 hides all.*--on 1xh100"):
        filled(at_hand({"CUDA_VISIBLE_DEVICES": "9"}))


def test_under_torchrun_the_processes_decide(nvml: MadeNvml, capsys: pytest.CaptureFixture[str]) -> None:
    nvml.show(*[H200] * 8)
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert filled(at_hand(environ)) == "2xh200"
    assert "2 x h200, the processes started (2 of 8" in capsys.readouterr().err
    assert filled(at_hand({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})) == "2x4xh200"
    assert not capsys.readouterr().err  # rank 0 says it for all
    assert filled(at_hand(environ), "hardware.gpu=cpu") == "2xcpu"
    with pytest.raises(RecipeError, match="1 x 3 makes a world size of 3"):
        filled(at_hand({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}))


def test_what_is_said_is_not_asked_for(nvml: MadeNvml) -> None:
    nvml.show(*["NVIDIA L40S"] * 4)
    assert filled(at_hand({}), "hardware.gpu=a100") == "4xa100"
    assert filled(at_hand({}), "hardware.gpu=a100", "hardware.nodes=4") == "4x2xa100"
    assert filled(at_hand({}), "hardware.gpu=cpu") == "1xcpu"
    calls = nvml.calls
    assert filled(at_hand({}), recipe="8xh200") == "8xh200"
    assert filled(at_hand({}), recipe="demo") == "1xcpu"
    assert calls and nvml.calls == calls


def test_a_type_that_is_not_known_says_how_to_go_on(nvml: MadeNvml) -> None:
    nvml.show("NVIDIA L4", "NVIDIA L4")
    with pytest.raises(InputError, match=r"NVIDIA L4 is not one of .*types: .*, l40s.*--set hardware\.gpu=l40s"):
        filled(at_hand({}))
    nvml.show(H200, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(InputError, match=r"several types: NVIDIA H200, NVIDIA A100-SXM4-80GB.*--on 1xh100"):
        filled(at_hand({}))


def test_a_machine_without_gpus(nvml: MadeNvml) -> None:
    nvml.error = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with pytest.raises(InputError, match=r"NVIDIA driver: not found.*--on 1xh100.*recipe demo"):
        filled(at_hand({}))


def test_another_type_of_gpu_is_refused(nvml: MadeNvml) -> None:
    nvml.show("NVIDIA H100 80GB HBM3")
    with pytest.raises(InputError, match=r"is for h200, this machine has NVIDIA H100 80GB HBM3.*--on 1xh100"):
        check_type(load_recipe("1xh200").hardware, {})
    check_type(load_recipe("1xh100").hardware, {})
    check_type(load_recipe("demo").hardware, {})
    nvml.show("NVIDIA Something New")
    check_type(load_recipe("1xa100").hardware, {})
    nvml.error = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    check_type(load_recipe("1xh200").hardware, {})


def test_code_is_not_compiled_on_another_type_of_gpu(nvml: MadeNvml, nanogpt: Callable) -> None:
    nvml.show("NVIDIA H200")
    outcome = nanogpt("warm", "record89", "--on", "8xh100")
    assert outcome.code == 2 and "this machine has NVIDIA H200" in outcome.err
    assert "ask for --gres=gpu:h100:1" in outcome.err and "--on 8xh200" in outcome.err


def job(number: int, nodes: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": nodes}


def test_in_a_job_what_slurm_gave_it(tmp_path: Path, nvml: MadeNvml, capsys: pytest.CaptureFixture[str]) -> None:
    program(tmp_path / "bin", "scontrol", {"hostnames": "n1\n", "show job": ONE_NODE})
    assert filled(of_the_job(job(1, "n1"))) == "2xh200"
    assert "hardware: 2 x h200, of job 1; --on" in capsys.readouterr().err
    program(tmp_path / "bin", "scontrol", {"hostnames": "node07\nnode09\n", "show job": TWO_NODES})
    assert filled(of_the_job(job(2, "node[07,09]"))) == "2x4xh100"
    assert filled(of_the_job(job(2, "node[07,09]")), "hardware.gpu=a100") == "2x4xa100"
    nvml.show("NVIDIA A100-SXM4-80GB")
    program(tmp_path / "bin", "scontrol", {"hostnames": "n1\n", "show job": ONE_NODE.replace("h200:", "")})
    assert filled(of_the_job(job(1, "n1"))) == "2xa100"  # a site without types
    program(tmp_path / "bin", "scontrol", {"hostnames": "n1\n", "show job": NO_GPU})
    with pytest.raises(InputError, match=r"job 4 has no GPU.*--on"):
        filled(of_the_job(job(4, "n1")))


def test_counts_that_a_run_takes() -> None:
    assert [largest_count(gpus) for gpus in range(10)] == [0, 1, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [largest_count(gpus, nodes=2) for gpus in (1, 3, 4, 8)] == [1, 2, 4, 4]
    assert largest_count(8, nodes=3) == 0
