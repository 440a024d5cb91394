"""Rows under attack: training rows in templates, and held-out rows as an attack leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nspo_lightning.attacks import Attack, AttackRow, Victim
from nspo_lightning.datamodules.sources.rows import Prompt, PromptRow, hash_rank


def in_templates(rows: Sequence[PromptRow], attacks: Sequence[Attack], seed: int) -> list[PromptRow]:
    """Leave each row as it is, or put it into one of some templates, with equal shares, as seed and its text decide."""
    found = []
    for row in rows:
        choice = int.from_bytes(hash_rank(row.key, f"attack {seed}")[:8], "big") % (len(attacks) + 1)
        found.append(row if choice == len(attacks) else attacked_rows([row], attacks[choice], None)[0])
    return found


def attacked_rows(rows: Sequence[PromptRow], attack: Attack, victim: Victim | None) -> list[PromptRow]:
    """Return rows as an attack leaves them; each remembers its request.

    `victim` is the policy, for attacks that search.
    """
    plain = [AttackRow(prompt=row.prompt, harmful=row.kind == "harmful") for row in rows]
    return [
        replace(
            row,
            prompt=_as_prompt(new.prompt),
            request=row.prompt,
            prefix_tokens=new.prefix_tokens,
            prefix_text=new.prefix_text,
            columns={**row.columns, "attack": attack.name},
        )
        for row, new in zip(rows, attack.attacked(plain, victim), strict=True)
    ]


def _as_prompt(text: object) -> Prompt:
    return text if isinstance(text, str) else [dict(turn) for turn in text]  # type: ignore[attr-defined]
