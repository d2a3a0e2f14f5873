"""The command line as a whole: help, versions, errors without tracebacks, exit codes, what is imported."""

import inspect
import json
import re
import resource
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
import typer

import nanogpt
from nanogpt.cli import main as cli
from nanogpt.errors import InputError, RunError


def test_every_command_can_be_loaded_and_is_documented():
    for command in cli.COMMANDS:
        assert inspect.getdoc(command.load()), command.name
    assert len({command.name for command in cli.COMMANDS}) == len(cli.COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_under_its_section(nanogpt, flag):
    outcome = nanogpt(flag)
    assert outcome.code == 0
    sections = list(dict.fromkeys(command.section for command in cli.COMMANDS))
    positions = [outcome.out.index(f"\n{section}:\n") for section in sections]
    assert positions == sorted(positions)
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command.name} +{re.escape(command.help)}$", outcome.out, re.MULTILINE)


@pytest.mark.parametrize("name", [command.name for command in cli.COMMANDS])
def test_every_command_explains_itself(nanogpt, name):
    outcome = nanogpt(name, "--help")
    assert outcome.code == 0
    assert f"Usage: nanogpt {name}" in outcome.out


def all_helps(nanogpt):
    for command in cli.COMMANDS:
        loaded = command.load()
        names = [part.name for part in loaded.registered_commands] if isinstance(loaded, typer.Typer) else []
        for name in [*names, None]:
            yield nanogpt(command.name, *([name] if name else []), "--help").out


def test_help_names_values_without_the_types_of_the_code(nanogpt):
    for text in all_helps(nanogpt):
        for unwanted in ("<int", "<str", "<path", "<list", "<float", "INTEGER", "{", "x>=", "x<=", "default: ("):
            assert unwanted not in text, text
        assert max(map(len, text.splitlines())) <= 80
        assert not re.search(r"^  [a-z-]+ +.*\.\.\.$", text, re.MULTILINE)  # a description that was cut off


def test_the_shell_completes_commands_and_recipes(nanogpt, monkeypatch):
    monkeypatch.setenv("_NANOGPT_COMPLETE", "complete_bash")
    for words, at, expected in (("nanogpt comp", 1, ["compare"]), ("nanogpt train 8xh", 2, ["8xh100", "8xh200"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(at))
        assert nanogpt().out.split() == expected


def test_no_arguments_show_the_help(nanogpt):
    outcome = nanogpt()
    assert outcome.code in (0, 2)  # click changed its mind in 8.2
    assert "validate" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validat"], "Did you mean 'validate'"),
        (["validate"], "Missing argument"),
        (["validate", "speedrun", "--step", "3"], "--steps"),
        (["validate", "speedrun", "--steps", "none"], "--steps"),
        (["validate", "speedrun", "--steps", "0"], "--steps"),
        (["show", "speedrun", "gpt2"], "gpt2"),
    ],
)
def test_wrong_usage(nanogpt, arguments, message):
    outcome = nanogpt(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("recipe.yaml:3: no"), 2, "recipe.yaml:3: no\n"),
        (RunError("disk full"), 1, "disk full\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (
            torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
            1,
            "CUDA error: out of memory. See what else runs on the GPU: nvidia-smi\n",
        ),
    ],
)
def test_errors_become_messages_and_exit_codes(nanogpt, monkeypatch, error, code, message):
    def fail() -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, cli.Command("fail", f"{__name__}:fail", "Help", "Fail.")))
    outcome = nanogpt("fail")
    assert (outcome.code, outcome.out, outcome.err.strip("\n")) == (code, "", message.strip("\n"))


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_a_bug_is_not_hidden(monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("fail", f"{__name__}:fail", "Help", "Fail."),))
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        cli.main(["fail"])


def test_version(nanogpt):
    lines = dict(line.split(maxsplit=1) for line in nanogpt("version").out.splitlines())
    assert lines["nanogpt-speedrun"] == nanogpt_version()
    assert lines["torch"] == metadata.version("torch")
    assert lines["python"] == sys.version.split()[0]
    found = json.loads(nanogpt("version", "--json").out)
    assert {name: value or "-" for name, value in found.items()} == lines
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["commit"])
    assert nanogpt("--version").out == f"{nanogpt_version()}\n"


def nanogpt_version() -> str:
    return nanogpt.__version__


# --- in a process of its own --------------------------------------------------------------------------------------

NANOGPT = [sys.executable, "-c", "from nanogpt.cli.main import main; main()"]


def test_the_console_script_is_installed():
    (script,) = [entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "nanogpt"]
    assert script.load() is cli.main


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["version"], ["recipes"], ["validate", "speedrun"], ["show", "8xh200"], ["schema"]],
    ids=" ".join,
)
def test_quick_commands_import_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from nanogpt.cli.main import main\n"
        "try:\n main(sys.argv[1:])\n"
        "finally:\n print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "huggingface_hub", "tiktoken", "scipy"}
    if arguments == ["--help"]:
        assert not imported & {"pydantic", "yaml"}


def test_validate_takes_little_more_than_its_imports():
    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time on the same machine, whatever that is: half a second where the imports take a quarter.
    imports = min(seconds(sys.executable, "-c", "import pydantic, typer, typer.main, yaml") for _ in range(4))
    assert min(seconds(*NANOGPT, "validate", "recipes/speedrun.yaml") for _ in range(4)) < 6 * imports


def test_a_reader_that_stops_early_gives_no_traceback():
    command = subprocess.Popen([*NANOGPT, "show", "speedrun"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait() == 1


def test_an_interrupt_ends_with_130():
    code = (
        "import signal, time, nanogpt.cli.main as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "def wait() -> None:\n print('ready', flush=True)\n time.sleep(60)\n"
        "cli.COMMANDS = (cli.Command('wait', '__main__:wait', 'Help', 'Wait.'),)\n"
        "cli.main(['wait'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 130
    assert b"Traceback" not in errors
