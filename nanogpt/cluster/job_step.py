"""A job's step: from recipe, allocation and node names to the srun command that `slurm/run.sh` runs.

Whatever can be refused without a GPU is refused here, on the first node, seconds into the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt.cluster.allocation import read_allocation
from nanogpt.cluster.at_hand import of_the_job
from nanogpt.cluster.job_runs import continuation
from nanogpt.cluster.rendezvous import rendezvous
from nanogpt.cluster.request import environment_overrides, job_request, sbatch_command, shown
from nanogpt.cluster.staging import staged_data, staged_image
from nanogpt.console import say
from nanogpt.environment import number_of, value_of
from nanogpt.errors import InputError
from nanogpt.hardware import Fill, shape
from nanogpt.recipe import load_recipe, resolve_recipe
from nanogpt.runs.data_files import STAGED_FROM, shards_directory
from nanogpt.runs.directory import RunDirectory, output_directory
from nanogpt.spec import RunSpec
from nanogpt.training.resume import resumed_data_directory, resumed_spec

SCRIPTS = "NANOGPT_SCRIPTS"  # where slurm/run.sh is
WAIT_S = 110  # for the other nodes once one has ended: the first may still be writing the checkpoint


@dataclass(frozen=True)
class RunArguments:
    """What a user says about a run on `slurm/run.sh`'s command line."""

    recipe: str | None  # None: with `resume` only
    overrides: Sequence[str] = ()
    steps: int | None = None
    data: Path | None = None
    out: Path | None = None
    resume: Path | None = None  # a run to continue with
    on: str | None = None  # hardware instead of the recipe's: 4xh200

    def with_environment(self, environ: Mapping[str, str]) -> RunArguments:
        """The same with GPU_TYPE and NUM_GPUS applied; the user's `--on` or `--set` takes precedence."""
        if self.on is not None:
            return self
        return replace(self, overrides=[*environment_overrides(environ), *self.overrides])

    def settled(self, fill: Fill) -> RunArguments:
        """The same with `on` set by `fill` if the recipe leaves its hardware open.

        Raises `InputError` with every problem of the recipe, and what `fill` raises.
        """
        if self.resume is not None or self.recipe is None:
            return self
        spec, left_open = resolve_recipe(self.recipe, self.overrides, self.steps, on=self.on, fill=fill)
        return replace(self, on=shape(spec.hardware)) if left_open else self

    def spec(self) -> RunSpec:
        """The resolved recipe, or the resumed run's. Raises `InputError` with every problem."""
        if self.resume is not None:
            return resumed_spec(RunDirectory.open(self.resume), self.recipe, self.overrides, self.steps, on=self.on)
        if self.recipe is None:
            raise InputError("name a RECIPE (`nanogpt recipes` lists them), or a run to continue with --resume")
        return load_recipe(self.recipe, self.overrides, self.steps, on=self.on)

    def data_directory(self, spec: RunSpec) -> Path:
        """Where the shards are."""
        if self.data is not None:
            return self.data
        if self.resume is not None:
            return resumed_data_directory(RunDirectory.open(self.resume), spec)
        return shards_directory(spec)

    def output_directory(self, spec: RunSpec) -> Path:
        """Where run directories are made."""
        if self.resume is not None:
            return self.resume.parent
        return self.out or output_directory(spec)

    def words(self) -> list[str]:
        """As on a command line."""
        words = [] if self.recipe is None else [self.recipe]
        words += [] if self.resume is None else [f"--resume={self.resume}"]
        words += [] if self.on is None else [f"--on={self.on}"]
        words += [f"--set={override}" for override in self.overrides]
        words += [] if self.steps is None else [f"--steps={self.steps}"]
        words += [] if self.data is None else [f"--data={self.data}"]
        return words + ([] if self.out is None else [f"--out={self.out}"])


def plan_step(arguments: RunArguments, environ: Mapping[str, str]) -> list[str]:
    """The srun command of the job that `environ` describes; empty if there is nothing left to do.

    Raises:
        InputError: the recipe is invalid, or the allocation, the shards or the output do not fit it.
        RunError: Slurm does not answer, or a node's name cannot be resolved.
    """
    from nanogpt.cluster.preflight import check_files, raise_for_failures

    arguments = arguments.with_environment(environ).settled(of_the_job(environ))
    spec = arguments.spec()
    request = job_request(spec, environ)
    allocation = read_allocation(environ)
    misfits = allocation.misfits(request)
    if misfits:
        command = sbatch_command(request, f"{value_of(SCRIPTS, environ)}/run.sh", arguments.words(), environ={})
        raise InputError(
            "\n".join(
                [
                    f"{arguments.recipe or arguments.resume}: job {allocation.job_id} does not fit the recipe:",
                    *(f"  {line}" for line in misfits),
                    f"  allocated: {allocation.described()}",
                    "Submit it like this (with your partition and account), or leave it to the script, without sbatch:",
                    f"  {shown(command)}",
                    f"  {shown([f'{value_of(SCRIPTS, environ)}/run.sh', *arguments.words()])}",
                ]
            )
        )
    data, out = arguments.data_directory(spec), arguments.output_directory(spec)
    raise_for_failures(check_files(spec, data, out))

    task = environ.get("SLURM_ARRAY_TASK_ID")
    going_on = continuation(out, environ)
    if going_on.reason:
        say(going_on.reason)
    if going_on.action == "nothing":
        return []
    if going_on.run is not None or arguments.resume is not None:
        resume = going_on.run.path if going_on.run else arguments.resume
        changes = () if arguments.resume is None else arguments.overrides  # the run's spec has those of its start
        train = RunArguments(None, changes, resume=resume, on=arguments.on if arguments.resume else None).words()
    else:
        overrides = list(arguments.overrides)
        if task is not None:
            overrides.append(f"training.seed={spec.training.seed + number_of('SLURM_ARRAY_TASK_ID', environ=environ)}")
        train = [*replace(arguments, overrides=overrides, data=None, out=None).words(), "--out", str(out)]

    stage = environ.get("NANOGPT_STAGE")
    local = []
    if stage:
        image = Path(value_of("NANOGPT_SIF", environ))
        local = ["env", f"{STAGED_FROM}={data.resolve()}"]
        if not image.is_dir():  # an unpacked one stays where it is
            local.append(f"NANOGPT_SIF={staged_image(Path(stage), image)}")
            local.append(f"NANOGPT_STAGED_BELOW={Path(stage)}")  # in_image.sh checks the owner
        data = staged_data(Path(stage), data)
    meeting = []
    if request.nodes > 1:
        meeting = [f"--endpoint={rendezvous(allocation.nodes, number_of('SLURM_JOB_ID', environ=environ)).endpoint}"]
    cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE")
    return [
        "srun",
        f"--nodes={request.nodes}",
        f"--ntasks={request.nodes}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        "--kill-on-bad-exit=0",
        f"--wait={WAIT_S}",
        *local,
        f"{value_of(SCRIPTS, environ)}/in_image.sh",
        "nanogpt",
        "job",
        "node",
        f"--nodes={request.nodes}",
        f"--ranks={spec.hardware.gpus_per_node}",
        *meeting,
        *train,
        "--data",
        str(data),
    ]
