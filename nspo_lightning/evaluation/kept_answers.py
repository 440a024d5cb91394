"""A few answers of each kind, before and after: spread evenly over the prompts, so that nobody has picked them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.atomic import json_text, replacing
from nspo_lightning.evaluation.rates import Answers
from nspo_lightning.evaluation.report import side_by_side

When = Literal["before", "after"]

EACH = 32
"""Answers that are kept of harmful prompts, and of each skill of harmless ones."""


def evenly(count: int, wanted: int) -> list[int]:
    """Return at most so many of the places 0 ... count - 1, evenly spread.

    Example:
        >>> evenly(10, 4), evenly(2, 4)
        ([0, 2, 5, 7], [0, 1])
    """
    return [place * count // wanted for place in range(wanted)] if count > wanted else list(range(count))


class KeptAnswers:
    """Gathers the answers of one measurement."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def see(self, batch: Mapping[str, Any], answers: Answers, *, harmful: bool) -> None:
        """Note what was answered to a batch of prompts."""
        for row in side_by_side({"policy": answers}, batch, harmful=harmful):
            self._rows.setdefault((row["kind"], str(row.get("skill", ""))), []).append(row)

    def chosen(self, when: When, each: int = EACH) -> list[dict[str, Any]]:
        """Return a record a prompt, with the answer and its outcome under ``<when>`` and ``<when>_outcome``."""
        found = []
        for (kind, _), rows in sorted(self._rows.items(), key=lambda item: item[0][0] != "harmful"):
            for place in evenly(len(rows), each):
                row = dict(rows[place])
                answer, outcome = row.pop("policy"), row.pop("policy_outcome")
                found.append({**row, "kind": kind, "place": place, when: answer, f"{when}_outcome": outcome})
        return found


def with_earlier(rows: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with what earlier ones say of the same prompts, at the same places."""
    known = {_which(row): row for row in earlier}
    return [{**known.get(_which(row), {}), **row} for row in rows]


def write_answers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write records as JSON lines, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, those that can be read; none if it is not there."""
    rows = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a file that is being written
                    continue
                if isinstance(row, dict):
                    rows.append(row)
    except OSError:
        return []
    return rows


def _which(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(name) for name in ("kind", "skill", "place", "prompt")], sort_keys=True, default=str)
