"""Rows under attack: training rows in templates, and held-out rows as an attack leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nspo_lightning.attacks import Attack, AttackError, AttackRow, Victim
from nspo_lightning.datamodules.sources.rows import Prompt, PromptRow, hash_rank

Show = Callable[[Prompt], Prompt]
"""Gives a prompt such that the chat template shows its system message."""


def as_it_is(prompt: Prompt) -> Prompt:
    """Leave a prompt alone."""
    return prompt


def in_templates(
    rows: Sequence[PromptRow], attacks: Sequence[Attack], seed: int, show: Show = as_it_is
) -> list[PromptRow]:
    """Leave each row as it is, or put it into one of some templates, with equal shares, as seed and its text decide."""
    found = []
    for row in rows:
        choice = int.from_bytes(hash_rank(row.key, f"attack {seed}")[:8], "big") % (len(attacks) + 1)
        found.append(row if choice == len(attacks) else attacked_rows([row], attacks[choice], None, show)[0])
    return found


def attacked_rows(
    rows: Sequence[PromptRow], attack: Attack, victim: Victim | None, show: Show = as_it_is
) -> list[PromptRow]:
    """Return rows as an attack leaves them; each remembers its request.

    Args:
        rows: The rows.
        attack: What is done to them.
        victim: The policy, for attacks that search.
        show: Sees to it that system messages of an attack are shown.

    Raises:
        AttackError: If the attack does not return a row for each.
    """
    plain = [AttackRow(prompt=row.prompt, harmful=row.kind == "harmful") for row in rows]
    attacked = attack.attacked(plain, victim)
    if len(attacked) != len(rows):
        raise AttackError(
            f"Attack `{attack.name}` made {len(attacked)} rows of {len(rows)}: `attacked` must return one for each, in "
            "the same order. Leave rows that it has nothing for as they are."
        )
    return [
        replace(
            row,
            prompt=_shown(row.prompt, _as_prompt(new.prompt), show),
            request=row.prompt,
            prefix_tokens=new.prefix_tokens,
            prefix_text=new.prefix_text,
            columns={**row.columns, "attack": attack.name},
        )
        for row, new in zip(rows, attacked, strict=True)
    ]


def _shown(before: Prompt, after: Prompt, show: Show) -> Prompt:
    """Show the attack's system message; the row's own is shown or not, as without the attack."""
    own = None if isinstance(before, str) else before[0]
    return after if isinstance(after, str) or after[0] == own else show(after)


def _as_prompt(text: object) -> Prompt:
    return text if isinstance(text, str) else [dict(turn) for turn in text]  # type: ignore[attr-defined]
