"""What the documents say holds: names are ours, links lead somewhere, and commands work as they stand.

Commands that a CPU finishes in seconds are run, on two tiny runs and a little text; those that train, download, or need
a GPU or a cluster, are parsed as they would be there, so that a renamed option or command fails.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from hellaswag_items import write_items
from made_nvml import MadeNvml
from tiny_runs import GPT2_BOS, make_text_data, tiny_spec, train

from nanogpt.cli.entry import click_command
from nanogpt.cli.main import COMMANDS
from nanogpt.cli.prep import prep_fineweb
from nanogpt.cli.prep_text import prep_text
from nanogpt.cli.submission import submission

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("nanogpt/**/*.py"), *ROOT.glob("recipes/*.yaml")]
WITH_NAMES = [
    ROOT / "docs/glossary.md",
    *(ROOT / f"nanogpt/models/{kind}/README.md" for kind in ("speedrun", "record89", "gpt2")),
]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("nanogpt/**/*.md")})


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


# --- names ---


@pytest.mark.parametrize("document", WITH_NAMES, ids=name_of)
def test_names_that_are_ours_exist(document: Path) -> None:
    words = set(re.findall(r"\w+", " ".join(file.read_text() for file in SOURCES)))
    tables = [
        table for table in document.read_text().split("\n\n") if re.match(r"\| (upstream|GPT-2's).*\| here \|", table)
    ]
    ours = [
        name
        for table in tables
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(.*?)`", row.split(" | ")[1])
    ]
    assert len(ours) > 4
    missing = {name: lost for name in ours if (lost := set(re.findall(r"[A-Za-z_]\w+", name)) - words - {"py"})}
    assert not missing


# --- links ---


def prose(document: Path) -> str:
    """The text without its code."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchors(document: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert not [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in text]


# --- commands ---


class Shown(NamedTuple):
    """A command line of a document."""

    document: str
    line: str
    in_text: bool = False  # where it may leave out what is not talked about

    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


BEGINNINGS = ("nanogpt", "prep-", "slurm/", "sbatch", "apptainer", "make", ".venv/bin/", "NANOGPT_")


def commands(document: Path) -> Iterator[Shown]:
    """The command lines in the document's blocks of code, and its `nanogpt ...` in text."""
    text = document.read_text()
    name = name_of(document)
    lines = iter(re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))).splitlines())
    for start in lines:
        if start.startswith(BEGINNINGS) and not start.startswith("NANOGPT_STAGE:"):
            line = start
            while line.partition(" #")[0].count("'") % 2:  # a quoted value continues
                line += f" {next(lines).strip()}"
            yield Shown(name, line)
    for line in re.findall(r"`((?:nanogpt|prep-\w+) [^`]*)`", text):
        yield Shown(name, line.replace("\n", " "), in_text=True)


ALL = sorted({shown for document in DOCUMENTS for shown in commands(document)})
RUN = {"recipes", "validate", "show", "schema", "version", "runs", "compare", "plot", "check", "significance", "sample"}
RUN |= {"evaluate", "export", "cache", "report", "leaderboard", "doctor", "prep-text", "submission"}
FAILS = ("check", "significance")  # of runs like these
MORE = {"submission": ["--unofficial"]}  # of runs like these
BARE = {"doctor", "recipes", "schema", "version"}  # that a text names without options, and that need none
ELSEWHERE = "docs/lab/"  # whose commands read what is on other machines
# What stands for a value in the documents. Lower-case names of runs are in blocks of examples.
PLACES = {
    "RUN": "runs/a", "RUN...": "runs/a runs/b", "RUN_DIR": "runs/a", "OTHER": "runs/b", "OTHER_RUN": "runs/b",
    "A": "runs/a", "B": "runs/b", "runs/A": "runs/a", "runs/B": "runs/b", "runs/RUN": "runs/a", "runs/...": "runs/a",
    "RECIPE": "speedrun", "RECIPE...": "speedrun", "OUT": "made", "DIR": "made", "N": "4", "JOB": "12", "SECONDS": "60",
    "NAME": "a", "FILE": "items.jsonl", "FILE.json": "made.json", "PATH...": "text", "TEXT": "Up", "...": "",
    "DIRECTORY": "made", "31457281": "2000", "SUBMISSIONS": "submissions",
}  # fmt: skip


def nanogpt_words(words: list[str]) -> list[str] | None:
    """The arguments of `nanogpt` that a command line comes to; None where it is another program's."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:2] in (["apptainer", "exec"], ["apptainer", "run"]):
        image = next(index for index, word in enumerate(words) if word.endswith(".sif"))
        words = words[image + 1 :] if words[1] == "exec" else ["nanogpt", *words[image + 1 :]]
    if words[:1] == ["sbatch"]:
        words = words[next(index for index, word in enumerate(words) if word.startswith("slurm/")) :]
    head = words[0].removeprefix(".venv/bin/") if words else ""
    scripts = {"slurm/run.sh": ["submit"], "slurm/nanogpt.sh": [], "slurm/warm.sh": ["warm"], "nanogpt": []}
    if head in scripts:
        return [*scripts[head], *words[1:]]
    return [head, *words[1:]] if head.startswith("prep-") else None


def command_of(arguments: list[str]) -> tuple[Any, list[str]]:
    """The innermost command that the arguments name, and what is left for it."""
    loose = {"prep-fineweb": prep_fineweb, "prep-text": prep_text}
    if arguments[0] in loose:
        return click_command(loose[arguments[0]], arguments[0]), arguments[1:]
    known = {command.name: command for command in COMMANDS}
    assert arguments[0] in known, f"no command {arguments[0]}"
    loaded = known[arguments[0]].load()
    command, rest = click_command(loaded, arguments[0]), arguments[1:]
    if isinstance(loaded, typer.Typer) and rest:
        assert rest[0] in command.commands, f"no command {arguments[0]} {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def filled(arguments: list[str]) -> list[str]:
    """The arguments with something real for each placeholder."""
    return [part for word in arguments for part in (PLACES[word].split() if word in PLACES else [word])]


def parse(command: Any, rest: list[str]) -> None:
    """Read the options as the command does; values may be left out where a text names an option alone."""
    if command.name == "launch":
        from nanogpt.cli.launch import _hardware
        from nanogpt.launch.launcher import parse as parse_launch

        parse_launch(rest if "--grace" not in rest else [*rest, "speedrun"], _hardware)
        return
    with command.make_context(command.name, list(rest)):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like a checkout, with two runs."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "slurm"):
        (place / name).symlink_to(ROOT / name)
    vocabulary = ("model.vocab_size=50257", "model.padded_vocab_size=50304", f"data.bos={GPT2_BOS}", "data.epochs=null")
    data = make_text_data(place / "data")
    for seed, name in enumerate("ab"):
        spec = tiny_spec(
            *vocabulary, "checkpoint.at_end=true", f"training.seed={seed}", f"data.directory={data}", model="gpt2"
        )
        train(spec, data, place / "runs" / name)
    write_items(place / "items.jsonl")
    submission([place / "runs/a", place / "runs/b"], "words", place / "submissions/one", unofficial=True)
    for number in range(40):
        (place / f"text/{number}").mkdir(parents=True)
        (place / f"text/{number}/a.txt").write_text(f"a text of its own, number {number}. " * 40)
    return place


def test_there_are_commands_to_test() -> None:
    assert len(ALL) > 60
    named = {words[0] for shown in ALL if (words := nanogpt_words(shown.words()))}
    assert {command.name for command in COMMANDS} - named <= {"job", "prep", "schema"}


@pytest.mark.usefixtures("one_thread")
def test_commands_of_the_documents_work(
    place: Path, nanogpt: Callable[..., Any], nvml: MadeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.show(*["NVIDIA H200"] * 4)
    monkeypatch.chdir(place)
    monkeypatch.setenv("NANOGPT_CACHE", str(place / "cache"))
    done, wrong = set(), []
    for shown in ALL:
        arguments = nanogpt_words(shown.words())
        if not arguments or arguments[0].startswith(("COMMAND", "--")):
            continue
        arguments = filled(arguments)
        if tuple(arguments) in done:
            continue
        done.add(tuple(arguments))
        try:
            command, rest = command_of(arguments)
            if (not rest and arguments[0] not in BARE) or "--help" in rest:  # a text names the command
                continue
            Path("made").mkdir(exist_ok=True)
            parse(command, rest)
        except Exception as error:
            if not (shown.in_text and str(error).startswith("Missing parameter")):
                wrong.append(f"{shown}: {error}")
            continue
        if arguments[0] not in RUN or shown.document.startswith(ELSEWHERE):
            continue
        shutil.rmtree("made", ignore_errors=True)
        outcome = nanogpt(*arguments, *MORE.get(arguments[0], ()))
        if outcome.code != (1 if arguments[0] in FAILS or "--gpu" in rest else 0):
            wrong.append(f"{shown}: {outcome}")
    assert not wrong, "\n".join(wrong)
    assert len(done) > 60


def test_scripts_and_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for shown in ALL:
        for word in shown.words():
            if re.fullmatch(r"(slurm|tests)/\S+\.(sh|py)", word):
                assert (ROOT / word).is_file(), shown
        if shown.line.startswith("make "):
            for word in shown.words()[1:]:
                assert "=" in word or word.startswith("-") or word in targets | {"&&", "make"}, shown
