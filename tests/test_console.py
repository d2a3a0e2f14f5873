"""What the console's helpers write."""

from nanogpt.console import markdown_table


def test_markdown_table():
    assert markdown_table(("phase", "s"), [("reading", 1), ("", "2.0")]) == [
        "| phase | s |",
        "| --- | --- |",
        "| reading | 1 |",
        "|  | 2.0 |",
    ]


def test_markdown_table_without_rows_is_its_head():
    assert markdown_table(("stage",), ()) == ["| stage |", "| --- |"]
