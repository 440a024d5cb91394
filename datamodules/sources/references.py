"""Which rows' answers a completion can be compared with: the source, its preset or the row says so, else a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import AnswerUse
from nspo_lightning.evaluation.answers import after_hashes, is_short
from nspo_lightning.terminal import counted

FINAL_ANSWER = "final_answer"
"""The column with what a completion is compared with; empty where the answer is free text."""
_SHORT_SHARE = 0.9


def with_final_answers(rows: Sequence[PromptRow], use: AnswerUse | None, notes: list[str]) -> list[PromptRow]:
    """Return the rows, all benign ones that have an answer with a `final_answer`; what is not compared is noted.

    Args:
        rows: Rows of one source.
        use: What the source says of its answers. By default those of a skill that has no `final_answer` yet are
            compared if nine in ten are short (see `is_short`); otherwise the skill is free text, and none of them is.
        notes: What a user should know is added here.
    """
    short: dict[str, list[bool]] = {}
    for row in filter(_is_open, rows):
        short.setdefault(row.skill, []).append(is_short(row.answer))
    compared = {skill for skill, found in short.items() if sum(found) >= _SHORT_SHARE * len(found)}
    done = [_decided(row, use, row.skill in compared) for row in rows]
    benign = [row for row in done if row.kind == "benign"]
    for skill in sorted({row.skill for row in benign}):
        waiting = [row for row in benign if row.skill == skill and not row.columns.get(FINAL_ANSWER)]
        if missing := sum(not row.answer for row in waiting):
            notes.append(f"{counted(missing, 'row')} of skill {skill} with an empty answer: not scored")
        if free := len(waiting) - missing:
            notes.append(f"{counted(free, 'answer')} of skill {skill} in free text: scored by likelihood, not compared")
    return done


def _is_open(row: PromptRow) -> bool:
    return row.kind == "benign" and bool(row.answer) and FINAL_ANSWER not in row.columns


def _decided(row: PromptRow, use: AnswerUse | None, compared: bool) -> PromptRow:
    if use == "text" and row.kind == "benign":
        final = ""
    elif not _is_open(row):
        return row
    else:
        final = after_hashes(row.answer) if use == "match" or (compared and is_short(row.answer)) else ""
    return replace(row, columns={**row.columns, FINAL_ANSWER: final})
