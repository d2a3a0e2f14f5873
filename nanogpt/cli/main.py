"""`nanogpt`: the list of commands, and how their errors reach the user.

A command's module is imported when that command runs, so that `nanogpt --help` and `nanogpt validate` stay quick
whatever the others import. Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 75 interrupted
with a checkpoint, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import typer
import typer.core

from nanogpt.cli.entry import click_command, run_command
from nanogpt.console import say


class Command(NamedTuple):
    """A command: its name, where its function is, and how `nanogpt --help` lists it."""

    name: str
    target: str  # "module:function"; the function's signature and docstring are the command's options and help
    section: str
    help: str

    def load(self) -> Callable[..., Any]:
        """Import the command's function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


COMMANDS = (
    Command("demo", "nanogpt.cli.demo:demo", "Start here", "Train a small model on embedded prose, on a CPU."),
    Command("recipes", "nanogpt.cli.show:recipes", "Recipes", "List the recipes that come with the package."),
    Command("validate", "nanogpt.cli.validate:validate", "Recipes", "Check recipes; every error with file and line."),
    Command("show", "nanogpt.cli.show:show", "Recipes", "Print a recipe with everything it inherits."),
    Command("schema", "nanogpt.cli.schema:schema", "Recipes", "Print the JSON Schema of recipes, for editors."),
    Command("prep", "nanogpt.cli.prep:prep_fineweb", "Data", "Download FineWeb's token shards and verify them."),
    Command("prep-text", "nanogpt.cli.prep_text:prep_text", "Data", "Make token shards of your own text."),
    Command("train", "nanogpt.cli.train:train", "Runs", "Train a recipe, or continue a run."),
    Command("launch", "nanogpt.cli.launch:launch", "Runs", "Train on several GPUs or nodes."),
    Command("runs", "nanogpt.cli.runs:runs", "Runs", "List runs: state, loss, time, GPUs."),
    Command("sample", "nanogpt.cli.sample:sample", "Runs", "Write text with a run's model."),
    Command("evaluate", "nanogpt.cli.evaluate:evaluate", "Runs", "Validation loss of a checkpoint, by document."),
    Command("export", "nanogpt.cli.export:export", "Runs", "Write a model for Hugging Face transformers."),
    Command("plot", "nanogpt.cli.plot:plot", "Runs", "Draw the losses of runs."),
    Command("compare", "nanogpt.cli.compare:compare", "Runs", "Runs side by side, and how they differ."),
    Command("report", "nanogpt.cli.report:report", "Runs", "Write a page about runs that opens without network."),
    Command("significance", "nanogpt.cli.significance:significance", "Records", "Test the mean loss of several runs."),
    Command("check", "nanogpt.cli.check:check", "Records", "Check a run against the public rules."),
    Command("submission", "nanogpt.cli.submission:submission", "Records", "Make a record ready to publish."),
    Command("leaderboard", "nanogpt.cli.leaderboard:leaderboard", "Records", "Write submissions as a static page."),
    Command("submit", "nanogpt.cli.submit:submit", "Cluster", "Submit a recipe to Slurm: what slurm/run.sh does."),
    Command("preflight", "nanogpt.cli.preflight:preflight", "Cluster", "Check this machine for a recipe, in seconds."),
    Command("status", "nanogpt.cli.status:status", "Cluster", "My jobs: step, loss, ms/step, time left."),
    Command("watch", "nanogpt.cli.watch:watch", "Cluster", "Follow a job live."),
    Command("cancel", "nanogpt.cli.cancel:cancel", "Cluster", "Cancel a job, and see it end."),
    Command("job", "nanogpt.cli.job:job", "Cluster", "Parts of slurm/run.sh inside a job. Not for users."),
    Command("warm", "nanogpt.cli.warm:warm", "Speed", "Compile a recipe's code ahead of its runs."),
    Command("cache", "nanogpt.cli.cache:cache", "Speed", "List and prune the files of compiled code."),
    Command("bench", "nanogpt.cli.bench:bench", "Speed", "Time the kernels, or a training step of a recipe."),
    Command("experiment", "nanogpt.cli.experiment:experiment", "Speed", "Try ideas against a recipe, seed by seed."),
    Command("doctor", "nanogpt.cli.doctor:doctor", "Help", "Check that everything here is fit for a run."),
    Command("version", "nanogpt.cli.version:version", "Help", "Print the versions that a bug report needs."),
)


class _Commands(typer.core.TyperGroup):
    """Imports a command when it is used, and lists the commands by section without importing any."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for command in COMMANDS:
            if command.name == cmd_name:
                loaded = command.load()
                return click_command(loaded, cmd_name)
        return None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(len(command.name) for command in COMMANDS)
        for section, commands in itertools.groupby(COMMANDS, key=lambda command: command.section):
            with formatter.section(section):
                formatter.write_dl([(command.name.ljust(width), command.help) for command in commands])


def _print_version(wanted: bool) -> None:
    if wanted:
        from nanogpt import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the package's version and exit."
    ),
) -> None:
    """Train GPT-2-sized models fast: the modded-NanoGPT speedrun, from data to result."""


def app() -> typer.Typer:
    """The Typer application."""
    root = typer.Typer(
        cls=_Commands,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="`nanogpt COMMAND --help` explains each.",
    )
    root.callback()(_root)
    for command in COMMANDS:  # the names, from which Typer makes suggestions after a typo
        root.command(command.name, help=command.help)(lambda: None)
    return root


def _say_which_code() -> None:
    """In an image, if NANOGPT_SRC names a checkout, say that its code runs, and not the image's."""
    source = os.environ.get("NANOGPT_SRC")
    if source and os.environ.get("LOCAL_RANK", "0") == "0" and Path(__file__).is_relative_to(Path(source).absolute()):
        say(f"nanogpt: the code of {source} runs (NANOGPT_SRC)")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (None: the process's own) and exit; a user's error is a message, not a traceback."""

    def work() -> None:
        _say_which_code()
        app()(args=None if argv is None else list(argv), prog_name="nanogpt")

    run_command("", work)


if __name__ == "__main__":
    main()
