"""`nanogpt demo`: the whole way on the prose that ships with the package, from text to a trained model, in minutes."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanogpt.threads import wait_briefly

if TYPE_CHECKING:
    from rich.table import Table

    from nanogpt.spec import RunSpec

NEEDED_MARGIN = 0.3  # nats below the unigram cross-entropy
PROMPT = "Up, and to the office, where"  # how many entries of the diary begin


def demo(
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where data and runs go.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="N", help="Fewer steps, for a quick look; the result is not judged."),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE", help="Another small recipe, such as demo-record92.")
    ] = "demo",
) -> None:
    """Train a small model on the embedded prose: no GPU, no network, about two minutes on two cores.

    It is the speedrun's code, made small by the recipe `demo`. Shows a table, a plot and a text sample, and fails
    if the model ends less than 0.3 nats below the cross-entropy of a unigram model of the same text.
    """
    wait_briefly()
    run_demo(directory, recipe=recipe, steps=steps)


def run_demo(directory: Path, *, recipe: str = "demo", steps: int | None = None) -> Path:
    """Run the demo in `directory`; returns the run's directory. `recipe` may be another one that fits the data.

    Raises:
        RunError: the whole recipe was trained and its loss is not `NEEDED_MARGIN` below the unigram cross-entropy.
    """
    began = time.perf_counter()
    from nanogpt.console import say
    from nanogpt.errors import RunError
    from nanogpt.recipe import load_recipe

    spec = load_recipe(recipe, steps=steps)
    data = directory / "data"
    prepare_data(data, spec.evaluation.tokens + 1)

    from nanogpt.training.recorder import create_run
    from nanogpt.training.sampling import sample_text
    from nanogpt.training.trainer import train_run

    run = create_run(directory, spec)
    training = spec.training
    say(
        f"Training a {spec.model.layers}-layer model of width {spec.model.width} for {training.total_steps} steps on"
        f" {training.total_tokens:,} tokens into {run.path}"
    )
    result = train_run(spec, run=run, data_directory=data, resume=False)
    margin = show_result(run.path, spec, data, result.final_val_loss)

    text = sample_text(run.path, PROMPT, tokens=80, temperature=0.8, top_k=50, seed=0)
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, 78) or [""]]
    typer.echo(f"\nWhat it writes after {PROMPT!r}:\n\n  " + "\n  ".join(lines) + "\n")

    if steps is not None:
        typer.echo(f"Shortened to {training.total_steps} steps: the loss is shown, but not judged.")
    elif not margin >= NEEDED_MARGIN:  # also if it is not a number
        raise RunError(
            f"The demo failed: a validation loss of {result.final_val_loss:.4f} is {margin:.4f} nats below the unigram"
            f" cross-entropy; at least {NEEDED_MARGIN} is expected. This installation does not train as it should: run"
            f" `make test`, and report what fails there with {run.log_path}"
        )
    typer.echo(f"All of it took {time.perf_counter() - began:.0f} s. Next:\n\n" + next_steps(run.path, _gpus_here()))
    return run.path


def prepare_data(directory: Path, val_tokens: int) -> None:
    """Make token shards of the embedded corpus in `directory`, unless they are there and complete.

    Raises:
        InputError: the directory holds other shards, which are left alone, or is a file.
    """
    from nanogpt.console import say
    from nanogpt.data.text import embedded_corpus, prepare_text
    from nanogpt.errors import InputError

    state = data_state(directory, val_tokens)
    if state == "ready":
        say(f"The embedded prose is in {directory} already")
        return
    again = " again: what was there is damaged, or from another version" if state == "stale" else ""
    say(f"Tokenizing the embedded prose into {directory}{again}")
    try:
        prepare_text([embedded_corpus()], directory, val_tokens=val_tokens, force=state == "stale")
    except InputError as error:
        raise InputError(
            f"{directory}: is a file, or holds shards that the demo did not make; name another directory:"
            " nanogpt demo --dir DIR"
        ) from error


def data_state(directory: Path, val_tokens: int) -> str:
    """`ready`; `stale` if shards of the embedded corpus are not as they should be; or `other`."""
    from nanogpt.data.tokenizer import RANKS_SHA256
    from nanogpt.files import read_json

    try:
        manifest = read_json(directory / "text.json")
        if [one["path"] for one in manifest["inputs"]] != ["embedded"]:
            return "other"
        whole = (
            manifest["settings"]["val_tokens"] == val_tokens
            and manifest["tokenizer"]["sha256"] == RANKS_SHA256
            and all(_sha256(directory / shard["name"]) == shard["sha256"] for shard in manifest["shards"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "other"
    return "ready" if whole else "stale"


def _sha256(path: Path) -> str | None:
    from nanogpt.data.manifest import file_sha256

    try:
        return file_sha256(path)
    except FileNotFoundError:
        return None


def show_result(run_path: Path, spec: RunSpec, data: Path, final_loss: float) -> float:
    """Print the run's tables and draw its plot; returns how far the loss ended below the unigram cross-entropy."""
    from nanogpt.console import print_table
    from nanogpt.runs.metrics import read_run
    from nanogpt.runs.plot import Reference, plot_loss
    from nanogpt.runs.table import run_summary, run_table
    from nanogpt.runs.unigram import unigram_cross_entropy

    unigram = unigram_cross_entropy(
        list(data.glob(spec.data.train_files)),
        list(data.glob(spec.data.val_files)),
        spec.evaluation.tokens,
        spec.model.vocab_size,
    )
    run = read_run(run_path)
    summary = run_summary(run)
    typer.echo()
    print_table(run_table(summary), _comparison(spec, summary["first_val_loss"], final_loss, unigram))
    plot = run_path / "loss.png"
    plot_loss({run_path.name: run}, plot, [Reference(unigram, "unigram")])
    typer.echo(f"Loss plot: {plot}")
    return unigram - final_loss


def _comparison(spec: RunSpec, first: float | None, final: float, unigram: float) -> Table:
    from nanogpt.console import new_table

    vocabulary = spec.model.vocab_size
    table = new_table("validation loss", "nats per token", "", wrap=[""])
    chance = f"ln({vocabulary}) = {math.log(vocabulary):.4f}: all tokens alike"
    table.add_row("before training", "" if first is None else f"{first:.4f}", chance)
    table.add_row("unigram model", f"{unigram:.4f}", "knows how frequent each token is")
    side = "below" if final <= unigram else "above"
    table.add_row(
        "after training",
        f"{final:.4f}",
        f"{abs(unigram - final):.4f} {side} unigram; {NEEDED_MARGIN} below is expected",
    )
    return table


def next_steps(run_path: Path, gpus: Sequence[str]) -> str:
    """Commands to try next, each below its purpose; `gpus` are this machine's, by the driver's names."""
    from nanogpt.gpus import known_type
    from nanogpt.hardware import largest_count
    from nanogpt.models import MODELS
    from nanogpt.registry import kind_of, specs_of

    recipe = kind_of(specs_of(MODELS)[0])
    lines = [
        (f"nanogpt sample {run_path} --prompt 'My wife and I'", "more text from this model"),
        (f"nanogpt show {run_path / 'spec.yaml'}", "everything that decided this run"),
    ]
    kind = known_type(gpus[0]) if gpus else None
    if gpus:
        count = largest_count(len(gpus))
        on = f"--on {count}x{kind}" if kind else f"--set hardware.gpu=l40s --set hardware.gpus_per_node={count}"
        start = "train" if count == 1 else "launch"
        lines += [
            ("prep-fineweb", "FineWeb's token shards, 2 GB (needs internet)"),
            (f"nanogpt {start} {recipe} {on}", f"the speedrun, on {count} x {gpus[0]}"),
        ]
    else:
        lines.append((f"nanogpt validate {recipe} --on 1xh100", "the speedrun, which needs a GPU: check its recipe"))
        if Path("slurm/run.sh").is_file():
            lines.append((f"slurm/run.sh --dry-run {recipe} --on 1xh100", "on a Slurm cluster: docs/cluster.md"))
    activate = Path(sys.prefix) / "bin" / "activate"
    found = shutil.which("nanogpt")
    if activate.is_file() and (found is None or Path(found).parent != activate.parent):
        shown = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        lines.insert(0, (f". {shown}", "put the commands on the PATH"))
    return "\n".join(f"  # {what}\n  {command}" for command, what in lines)


def _gpus_here() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
