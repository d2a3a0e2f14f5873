"""What the console's helpers write."""

import contextlib
import io
import os
import subprocess
import sys

from nanogpt.console import markdown_table, new_table, print_report, print_table
from nanogpt.terminal import rich_console


def test_markdown_table():
    assert markdown_table(("phase", "s"), [("reading", 1), ("", "2.0")]) == [
        "| phase | s |",
        "| --- | --- |",
        "| reading | 1 |",
        "|  | 2.0 |",
    ]


def test_markdown_table_without_rows_is_its_head():
    assert markdown_table(("stage",), ()) == ["| stage |", "| --- |"]


def printed(print_it, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_it(*arguments)
    return out.getvalue()


def a_table():
    table = new_table("run", "loss", "what", "seed", wrap=["what"], spare=["seed"])
    table.add_row("first", "3.28", "many words " * 9, "0")
    table.add_row("b", "12.5", "few", "1")
    return table


def test_a_table_in_a_pipe_has_a_line_for_each_row_and_no_frame():
    assert printed(print_table, a_table(), "a note").splitlines() == [
        f"run    loss  what{' ' * 95}  seed",
        f"first  3.28  {'many words ' * 9}     0",
        f"b      12.5  few{' ' * 96}     1",
        "a note",
    ]


def test_a_table_on_a_narrow_terminal_wraps_and_leaves_out_what_it_can_spare():
    screen = io.StringIO()
    rich_console(screen, force_terminal=True, width=40, color_system=None).print(a_table())
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) > 5
    assert lines[0].split() == ["run", "loss", "what"]


def test_a_report_shows_its_markdown_tables_in_that_style():
    lines = ["Title", "", *markdown_table(("name", "n"), [(r"a\|b", 1), ("c", "-20")]), "", "| no table"]
    shown = ["Title", "", "name    n", "a|b     1", "c     -20", "", "| no table"]
    assert printed(print_report, lines).splitlines() == shown


def test_a_line_is_one_write_beside_other_processes_lines() -> None:
    """Each write of a process whose output is not buffered is one of the operating system's."""
    read, write = os.pipe2(os.O_DIRECT)  # a pipe that keeps writes apart
    code = "from nanogpt.console import say; say('rank 1: done')"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, "-c", code], stderr=write, env=environment, check=True)
    os.close(write)
    assert os.read(read, 1000) == b"rank 1: done\n"
    os.close(read)
