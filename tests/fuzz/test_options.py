"""Command lines that nobody means, of every command that neither trains for minutes nor asks the network."""

from __future__ import annotations

import inspect
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from mutated import WORDS, examples
from tiny_runs import make_data, tiny_spec, train, write_recipe

from nanogpt.cli.main import COMMANDS

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = {"demo", "experiment", "prep", "launch", "warm", "bench", "doctor", "watch", "job node"}
OUTSIDE = {"/", "/abs/*", "../.."}  # where nothing of a test is to be written


def functions() -> Iterator[tuple[list[str], Callable[..., Any]]]:
    """The words that name each command, and its function."""
    for command in COMMANDS:
        loaded = command.load()
        if not isinstance(loaded, typer.Typer):
            yield [command.name], loaded
            continue
        for inner in loaded.registered_commands:
            assert inner.callback is not None
            yield [command.name, inner.name or inner.callback.__name__], inspect.unwrap(inner.callback)


def parameters(function: Callable[..., Any]) -> Iterator[tuple[list[str], bool]]:
    """Of each parameter its flags, none for an argument, and whether it takes a value."""
    for annotation in typing.get_type_hints(function, include_extras=True).values():
        if typing.get_origin(annotation) is typing.Annotated:
            kind, info = typing.get_args(annotation)[:2]
            flags = [w for w in (info.default, *(info.param_decls or ())) if str(w).startswith("-")]
            yield flags, kind is not bool


def command_line(function: Callable[..., Any], good: list[str], chance: random.Random) -> Iterator[str]:
    words = [word for word in WORDS if word not in OUTSIDE]
    for flags, takes_value in parameters(function):
        value = chance.choice((*words, *good, *good, *good))
        if not flags:
            if chance.random() < 0.85:
                yield value
        elif chance.random() < 0.3:
            flag = chance.choice(flags)
            if not takes_value:
                yield flag
            elif chance.random() < 0.5:
                yield f"{flag}={value}"
            else:
                yield from (flag, value)


def test_any_option(nanogpt: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuzz: int) -> None:
    data = make_data(tmp_path / "data")
    spec = tiny_spec("checkpoint={at_end: true}", model="gpt2")
    train(spec, data, tmp_path / "run")
    recipe = write_recipe(tmp_path / "tiny.yaml", spec)
    (tmp_path / "text.txt").write_text("some words. " * 50)
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("NANOGPT_SCRIPTS", "slurm")
    good = [str(path) for path in (data, tmp_path / "run", recipe, tmp_path / "text.txt", place / "new")]
    commands = [
        (words, function) for words, function in functions() if " ".join(words) not in LONG and words[0] not in LONG
    ]
    assert len(commands) > 20
    for number, chance in enumerate(examples(200 * fuzz, "options")):
        words, function = commands[number % len(commands)]
        outcome = nanogpt(*words, *command_line(function, good, chance))
        assert outcome.code in (0, 1, 2)
        assert outcome.code == 0 or outcome.err or outcome.out
    assert not [path for path in place.iterdir() if path.name.startswith(("~", "$"))]
