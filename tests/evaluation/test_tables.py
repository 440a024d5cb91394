"""Tables as Markdown, on a narrow terminal, and as text for a log."""

from __future__ import annotations

import io

from rich.console import Console

from nspo_lightning.evaluation.tables import markdown_blocks, markdown_table, rich_table, table_text

COLUMNS = ["layer", "share"]
ROWS = [["layers.0.[q,k]", "1.5 %"], ["layers.0.o", "20.0 %"]]


def test_markdown_keeps_every_cell_in_its_column():
    table = markdown_table(COLUMNS, [["a|b", "two\nlines"]], align="r")
    assert table.splitlines() == ["| layer | share |", "|--:|---|", "| a\\|b | two<br>lines |"]


def test_a_terminal_shows_brackets_and_whole_numbers():
    out = io.StringIO()
    Console(file=out, width=24).print(rich_table("Shares", COLUMNS, ROWS, align="lr"))
    assert out.getvalue().startswith("Shares")
    assert "│ layers.0.[q │" in out.getvalue()
    assert "│ ,k]         │" in out.getvalue()
    assert "20.0 %" in out.getvalue()


def test_text_for_a_log_has_one_line_a_row():
    lines = table_text(rich_table("", COLUMNS, ROWS, align="lr")).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:])] == [COLUMNS, *([*r[:1], *r[1].split()] for r in ROWS)]


def test_blocks_hold_long_text_and_say_numbers_on_a_line():
    rows = [{"prompt": "Who?", "completion": "```\nme <b>\n```", "reward": 0.51234, "outcome": "safe"}]
    assert markdown_blocks(rows) == (
        "**1.** reward 0.512, outcome safe\n\nprompt:\n\n```text\nWho?\n```\n\n"
        "completion:\n\n````text\n```\nme <b>\n```\n````"
    )
