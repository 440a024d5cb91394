"""Answers before and after, side by side, out of `test_completions.jsonl` or `answers.jsonl`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.atomic import without_surrogates
from nspo_lightning.callbacks.run_report import ANSWERS
from nspo_lightning.callbacks.test_report import COMPLETIONS
from nspo_lightning.evaluation.kept_answers import evenly, read_answers
from nspo_lightning.report.records import Answer, Answers, Exchange
from nspo_lightning.terminal import counted

SHOWN = 32
"""Exchanges of each kind on a page."""
LONGEST = 4000
"""Characters of a text on a page; what is cut is said."""
_SIDES = {COMPLETIONS: ("base", "policy"), ANSWERS: ("before", "after")}


def read_exchanges(folder: Path, look_alikes: Sequence[str], *, tested: bool) -> Answers | None:
    """Return exchanges of a run; None if it kept none.

    Args:
        folder: The run's.
        look_alikes: Skills whose prompts only look harmful.
        tested: Whether `test`'s are wanted; else, and where there are none, those of `fit`.
    """
    names = list(_SIDES) if tested else [ANSWERS]
    for name in names:
        rows = read_answers(folder / name)
        exchanges = [_exchange(row, *_SIDES[name], look_alikes) for row in rows]
        if exchanges:
            plain = [exchange for exchange in exchanges if not exchange.attack]
            attacked = [exchange for exchange in exchanges if exchange.attack]
            total = Counter(exchange.kind for exchange in plain)
            return Answers(
                source=name,
                total={str(kind): count for kind, count in total.items()},
                shown=tuple(_spread(plain, by="skill")),
                attacked_total=len(attacked),
                attacked=tuple(_spread(attacked, by="attack")),
            )
    return None


def _exchange(row: Mapping[str, Any], before: str, after: str, look_alikes: Sequence[str]) -> Exchange:
    skill, category = str(row.get("skill") or ""), row.get("category") or ""
    kind: Literal["harmful", "look-alike", "general"] = "harmful" if row.get("kind") == "harmful" else "general"
    attack = str(row.get("attack") or "")
    if kind == "general" and (attack or skill in look_alikes):  # of harmless prompts attacks take look-alikes alone
        kind = "look-alike"
    return Exchange(
        kind=kind,
        skill=_text(skill),
        category=_text(", ".join(map(str, category)) if isinstance(category, list) else str(category)),
        prompt=_text(prompt_text(row.get("prompt"))),
        before=_answer(row, before),
        after=_answer(row, after),
        attack=_text(attack),
        prefix=_text(str(row.get("prefix") or "")),
    )


def prompt_text(prompt: Any) -> str:
    r"""Return a prompt as text: a chat has its roles before its turns.

    Example:
        >>> prompt_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
        'system: Be kind.\nuser: Hi'
    """
    if not isinstance(prompt, list):
        return "" if prompt is None else str(prompt)
    turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in prompt]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in turns)


def _answer(row: Mapping[str, Any], who: str) -> Answer | None:
    if not isinstance(row.get(who), str):
        return None
    return Answer(text=_text(row[who]), outcome=_text(str(row.get(f"{who}_outcome") or "not judged")))


def _text(text: str) -> str:
    """Return text that any page holds: control characters are shown as what they are, and what is long is cut."""
    seen = "".join(_shown(sign) for sign in without_surrogates(text[:LONGEST]))
    return seen if len(text) <= LONGEST else f"{seen} [... {counted(len(text) - LONGEST, 'character')} more]"


def _shown(sign: str) -> str:
    code = ord(sign)
    if sign in "\n\t" or (code >= 32 and not 127 <= code < 160):
        return sign
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else "\ufffd"


def _spread(exchanges: Iterable[Exchange], by: Literal["skill", "attack"]) -> Iterable[Exchange]:
    """Yield at most `SHOWN` of each kind, from its skills (or attacks) in turn, evenly spread over each."""
    by_kind: dict[str, dict[str, list[Exchange]]] = {"harmful": {}, "look-alike": {}, "general": {}}
    for exchange in exchanges:
        group = exchange.skill if by == "skill" else exchange.attack
        by_kind[exchange.kind].setdefault(group, []).append(exchange)
    for skills in by_kind.values():
        each = [[found[place] for place in evenly(len(found), SHOWN)] for found in skills.values()]
        if len(each) > 1:
            wanted = -(-SHOWN // len(each))
            each = [[found[place] for place in evenly(len(found), wanted)] for found in each]
        in_turn = [exchange for round_ in zip_longest(*each) for exchange in round_ if exchange is not None]
        yield from in_turn[:SHOWN]
