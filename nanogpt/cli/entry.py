"""How every command begins and ends: its output, its exit code, and how errors reach the user."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from nanogpt.console import say
from nanogpt.environment import expanded_path, seen_inside
from nanogpt.errors import InputError, NanogptError, RunError
from nanogpt.frames import with_room
from nanogpt.terminal import terminal

# Errors in a name that the user gave; anything else is the machine's fault.
_WRONG_NAME = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EROFS,
}
_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ESTALE,
}


_TYPE = re.compile(r"<(?:list\[)?(\w+)[^>]*>")  # as Typer shows it: <int range>


class Command(typer.core.TyperCommand):
    """A command whose help names arguments and values as people do, without the code's types."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] RUN...`."""
        given = [_named(parameter) for parameter in self.get_params(ctx) if parameter.param_type_name == "argument"]
        return [str(self.options_metavar), *given] if self.options_metavar else given

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The sections Arguments and Options."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            if (record := parameter.get_help_record(ctx)) is not None:
                name, text = record
                rows["Arguments" if is_argument else "Options"].append(
                    (_named(parameter) if is_argument else _TYPE.sub(_value, name), _readable(text))
                )
        for title, section in rows.items():
            if section:
                with formatter.section(title):
                    formatter.write_dl(section)


def _named(argument: Any) -> str:
    """`RECIPE`, `[DIR]` for one that may be left out, `RUN...` for several."""
    name = str(argument.metavar or argument.name.upper())
    several = "..." if argument.nargs != 1 and not name.endswith(("...", "]")) else ""
    return f"{name}{several}" if argument.required or name.startswith("[") else f"[{name}{several}]"


def _value(kind: re.Match[str]) -> str:
    """What stands for the value of an option that does not name it."""
    return {"int": "N", "float": "X", "path": "PATH"}.get(kind[1].lower(), "TEXT")


def _readable(text: str) -> str:
    """An option's help with its default and its range in words."""
    text = re.sub(r"(\[|; )default: \((.*?)\)([\];])", r"\1default: \2\3", text)
    text = re.sub(r"(-?[\d.]+)<=x<=(-?[\d.]+)", r"\1 to \2", text)
    return re.sub(r"; x>=-?[\d.]+|  \[x>=-?[\d.]+\]", "", text)  # too small a value is refused by name


def run_command(name: str, work: Callable[[], object]) -> NoReturn:
    """Do a command's `work` and exit; a user's error is a message, after `name:` if given, without a traceback.

    Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 75 interrupted with a checkpoint, 130 Ctrl-C; that of
    a SystemExit is kept.
    """
    # Pictures go to files: a notebook's choice of backend is not for this process, and may not be installed.
    os.environ["MPLBACKEND"] = "agg"
    for size in ("COLUMNS", "LINES"):  # libraries accept any Unicode digit as a number
        if not re.fullmatch("[0-9]{1,4}", os.environ.get(size, "80")):
            del os.environ[size]
    with terminal() as streams:
        code = _exit_code(name, work)
        if problem := streams.problem():
            say(f"{name or 'nanogpt'}: {problem}")
            code = code or 1
    sys.exit(code)


def click_command(loaded: Any, name: str) -> Any:
    """The command for a function, whose signature and docstring give options and help, or for a Typer application.

    In the directories and files that its options name, `~` and `$VARIABLE` are expanded if the shell has not done
    it: otherwise `--data=~/shards` would make a directory `~`.
    """
    if not isinstance(loaded, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name, cls=getattr(loaded, "command_class", Command))(loaded)
        loaded = single
    for command in loaded.registered_commands:
        command.cls = command.cls if issubclass(command.cls or type, Command) else Command
        if command.callback is not None and not hasattr(command.callback, "__wrapped__"):
            command.callback = _with_paths_expanded(command.callback)
    return typer.main.get_command(loaded)


def _with_paths_expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(**values: Any) -> Any:
        return function(**{name: _expanded(value, function, name) for name, value in values.items()})

    return call


def _expanded(value: Any, function: Callable[..., Any], name: str) -> Any:
    if isinstance(value, list):
        return [_expanded(item, function, name) for item in value]
    text = str(value)
    # A name with a $ may well be intended; one that begins with ~ can be written ./~.
    if not isinstance(value, Path) or not (text.startswith("~") or ("$" in text and not os.path.lexists(text))):
        return value
    info = typing.get_args(typing.get_type_hints(function, include_extras=True)[name])[1]
    flags = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
    return expanded_path(text, "/".join([*flags, *([info.envvar] if info.envvar else [])]) or info.metavar or name)


@with_room
def _exit_code(name: str, work: Callable[[], object]) -> int:
    try:
        work()
    except NanogptError as error:
        return _tell(name, error)
    except (OSError, MemoryError) as error:
        explanation = _explained(error)
        if explanation is None:
            raise
        return _tell(name, explanation)
    except RuntimeError as error:
        found = str(error).partition("\n")[0].rstrip(".")
        if "out of memory" not in found:  # from PyTorch's allocator, or from CUDA itself if another process has it all
            raise
        return _tell(name, RunError(f"{found}. See what else runs on the GPU: nvidia-smi"))
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code)
            return 1
        return end.code or 0
    return 0


def _tell(name: str, error: NanogptError) -> int:
    from nanogpt.launch.launcher import leave_message

    if not leave_message(error):
        say(f"{name}: {error}" if name else str(error))
    return error.exit_code


def _explained(error: OSError | MemoryError) -> NanogptError | None:
    """A user's error for a failure that no command explains better; None: it looks like our own mistake."""
    if isinstance(error, MemoryError):
        return RunError("out of memory: see what else runs here, or ask for more (slurm: --mem)")
    if error.filename is None and error.errno not in _MACHINE:
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    if error.errno in _WRONG_NAME:
        hint = seen_inside(Path(os.fsdecode(error.filename))) if error.filename is not None else ""
        return InputError(f"{place}{error.strerror}; name another file or directory, or fix this one{hint}")
    return RunError(f"{place}{error.strerror}; check that disk and memory have room and that the file system answers")
