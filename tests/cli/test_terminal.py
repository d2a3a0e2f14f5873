"""What commands print, on terminals, files and pipes that cannot take it as it is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from made_runs import made_run
from tiny_runs import make_data, tiny_spec, train, write_recipe

from nanogpt import terminal
from nanogpt.cluster.jobs import Job, jobs_table
from nanogpt.console import print_table, progress, say
from nanogpt.recipe import load_recipe
from nanogpt.runs.display import StepDisplay

NANOGPT = [sys.executable, "-m", "nanogpt"]
PREP_TEXT = [sys.executable, "-c", "from nanogpt.cli.prep_text import text_main; text_main()"]
EVIL = "\x1b]0;title\x07\x1b[31mred\x1b[0m \u202erevo\u2066 \x9b2J \r\b\x7f"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\x1b[0m \u202erevo\u2066 \x9b2J \x0d\x08\x7f"
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TERMINALS = {"C": C_LOCALE, "ascii": {"PYTHONIOENCODING": "ascii"}, "latin-1": {"PYTHONIOENCODING": "latin-1"}}


def run(*command: object, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE, **environment: str):
    """The finished process, which buffers as a user's; its outputs are bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "", **environment}
    return subprocess.run(
        list(map(str, command)), stdout=stdout, stderr=stderr, env=environment, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of gpt2 with a checkpoint; its shards are beside it in `data`."""
    parent = tmp_path_factory.mktemp("tiny")
    train(tiny_spec("checkpoint.at_end=true", model="gpt2"), make_data(parent / "data"), parent / "run")
    return parent / "run"


# --- output that goes nowhere -------------------------------------------------------------------------------------

QUICK = (["recipes"], ["validate", "demo"], ["show", "demo"], ["schema"], ["--help"], ["validate", "--help"])


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_a_full_standard_output_is_an_error_and_no_traceback(arguments):
    with Path("/dev/full").open("wb") as full:
        done = run(*NANOGPT, *arguments, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "nanogpt: standard output cannot be written: No space left on device: the output is lost;"
        " redirect it to a file on a disk with free space"
    ]


@pytest.mark.parametrize("arguments", [["recipes"], ["validate", "demo"], ["--help"]], ids=" ".join)
def test_so_is_a_closed_one(arguments):
    done = run("sh", "-c", '"$@" >&-', "sh", *NANOGPT, *arguments)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("nanogpt: standard output is closed: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_standard_error_that_takes_nothing_changes_nothing_else(how):
    done = run("sh", "-c", f'"$@" {how}', "sh", *NANOGPT, "validate", "demo", "nosuch")
    assert done.returncode == 2
    assert done.stdout.startswith(b"demo: valid")


def test_a_run_outlives_its_outputs(tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_spec(model="gpt2"))
    data = make_data(tmp_path / "data")
    command = [*NANOGPT, "train", recipe, "--data", data, "--out", tmp_path / "runs"]
    done = run("sh", "-c", '"$@" >/dev/full 2>/dev/full', "sh", *command)
    assert done.returncode == 1
    (made,) = (tmp_path / "runs").glob("tiny-gpt2-*")
    assert json.loads((made / "record.json").read_text())["state"] == "finished"


def test_no_file_takes_a_closed_streams_number(tmp_path):
    """What would be written to descriptor 1 by whoever does not know better does not end in a file of ours."""
    code = (
        "import os, sys\n"
        "from nanogpt.terminal import terminal\n"
        "with terminal():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    os.write(1, b'lost')\n"
        "    sys.exit(file.fileno())\n"
    )
    done = run("sh", "-c", '"$@" >&- 2>&- <&-', "sh", sys.executable, "-c", code)
    assert done.returncode > 2
    assert (tmp_path / "file").read_text() == ""


def test_what_a_full_output_loses_is_not_what_the_command_makes(tiny, tmp_path):
    out = tmp_path / "documents.json"
    command = [*NANOGPT, "evaluate", tiny, "--data", tiny.parent / "data", "--device", "cpu", "--out", out]
    with Path("/dev/full").open("wb") as full:
        done = run(*command, stdout=full.fileno())
    assert done.returncode == 1
    assert b"standard output cannot be written" in done.stderr and b"Traceback" not in done.stderr
    assert json.loads(out.read_text())


# --- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", TERMINALS.values(), ids=TERMINALS)
def test_show_prints_a_recipe_that_reads_back_wherever(tmp_path, environment):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: demo.yaml\ndescription: naïve √ \\u2028 日本\n")
    for flags in ([], ["--json"]):
        done = run(*NANOGPT, "show", recipe, *flags, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        again = tmp_path / "again.yaml"
        again.write_bytes(done.stdout)
        assert load_recipe(again) == load_recipe(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [TERMINALS["C"], TERMINALS["latin-1"]], ids=["C", "latin-1"])
def test_commands_end_as_they_should_on_terminals_without_unicode(tiny, tmp_path, environment):
    text = tmp_path / "naïve"
    text.mkdir()
    for number in range(30):
        (text / f"{number}-日本.txt").write_text(f"Ünïcode «{number}» and more of it. " * 20)
    commands: list[list[object]] = [
        [*PREP_TEXT, text, "--dir", tmp_path / "shards", "--val-tokens", "100"],
        [*NANOGPT, "sample", tiny, "--prompt", "\u201c", "--tokens", "5"],
        [*NANOGPT, "evaluate", tiny, "--data", tiny.parent / "data", "--device", "cpu"],
        [*NANOGPT, "runs", tiny.parent],
        [*NANOGPT, "validate", tmp_path / "日本.yaml"],
    ]
    for command in commands:
        done = run(*command, **environment)
        assert b"Traceback" not in done.stderr and b"Error" not in done.stderr, done.stderr.decode()
        # The tiny model has none of GPT-2's tokens.
        assert done.returncode == (2 if {"sample", "validate"} & {*map(str, command)} else 0)


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend"])
def test_a_notebooks_choice_of_a_backend_draws_all_the_same(tiny, tmp_path, backend):
    done = run(*NANOGPT, "plot", tiny, "--out", tmp_path / "loss.png", MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- escape sequences ---------------------------------------------------------------------------------------------


def test_printable():
    assert terminal.printable(EVIL) == SHOWN
    assert terminal.printable(SHOWN) == SHOWN  # done twice, as tables in tables do
    plain = "naïve √ 日本 \u2028 \U0001f600\n\tand so on"
    assert terminal.printable(plain) == plain


@pytest.mark.parametrize("option", ["recipe", "value", "key", "flag", "command"])
def test_errors_show_escape_sequences(tmp_path, option):
    evil = EVIL.replace("\x00", "")
    arguments = {
        "recipe": ["validate", evil],
        "value": ["validate", "demo", "--set", "hardware.gpu=" + json.dumps(evil)],
        "key": ["validate", "demo", "--set", f"{evil}=3"],
        "flag": ["validate", "demo", f"--{evil}"],
        "command": [evil],
    }[option]
    done = run(*NANOGPT, *arguments)
    assert done.returncode == 2
    text = done.stderr.decode()
    assert r"\x1b[31mred" in text or r"\u001b[31mred" in text
    assert not set(EVIL) - set(" 0;]titlemrdo1[3evJ2") & set(text)


def test_tables_show_escape_sequences(tmp_path):
    name = "run \x1b[31mred[bold]"
    made_run(tmp_path / name, state="failed")
    done = run(*NANOGPT, "runs", tmp_path, COLUMNS="300")
    assert done.returncode == 0
    assert r"run \x1b[31mred[bold]" in done.stdout.decode()
    assert b"\x1b" not in done.stdout + done.stderr


def test_jobs_show_escape_sequences(capsys):
    job = Job("1", "1", "RUNNING", "1:00", "2:00", "p", 1, "\x1b[5m", "n\u202e1", None, "a\x1b[2Jb")
    with terminal.terminal():
        print_table(jobs_table([job]))
        say(job.name)
    captured = capsys.readouterr()
    assert r"a\x1b[2Jb" in captured.out and r"running (\x1b[5m)" in captured.out and r"n\u202e1" in captured.out
    assert captured.err == "a\\x1b[2Jb\n"
    assert "\x1b" not in captured.out


class Screen(io.StringIO):
    """A terminal that obeys ANSI's sequences."""

    def isatty(self) -> bool:
        return True


def test_bars_keep_their_own_sequences_and_show_others(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.terminal():
        with progress("f\x1b[31m[/x]", 3) as advance:
            advance(3)
        with StepDisplay() as display:
            display.start(2)
            display.evaluation(1, "line\x1b[31m", 1.0)
            display.step(2, "line")
    written = screen.getvalue()
    assert r"f\x1b[31m[/x]" in written and r"line\x1b[31m" in written
    assert "\x1b[" in written and "f\x1b[31m" not in written and "line\x1b[31m" not in written


def test_words_for_programs_stay_as_they_are(capfdbinary):
    with terminal.terminal():
        terminal.verbatim(sys.stdout).write("srun\0--x=\x1b\0")
    assert capfdbinary.readouterr().out == b"srun\0--x=\x1b\0"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_way_of_printing_takes_every_character(monkeypatch, encoding):
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding=encoding))
    with terminal.terminal() as streams:
        print("√\udcff")
        typer.echo("√\udcff")
        terminal.rich_console(width=80).print("√\udcff")
        assert streams.problem() is None
    shown = "√" if encoding == "utf-8" else r"\u221a"
    assert bytes_written.getvalue().decode(encoding).splitlines() == [shown + r"\udcff"] * 3
