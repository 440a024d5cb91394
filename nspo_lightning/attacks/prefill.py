"""Prefill: the answer is begun for the policy, with the first tokens of one that complies (arXiv 2406.05946)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from typing_extensions import override

from nspo_lightning.attacks.protocol import Attack, AttackError, AttackRow, Victim

TOKENS = (3, 5, 10, 20)
"""Those of the default attacks."""


class Prefill(Attack):
    """Begin the answer with the first tokens of one that complies.

    Args:
        tokens: How many, at least 1.

    Raises:
        AttackError: If there are none.
    """

    def __init__(self, tokens: int = 5) -> None:
        if tokens < 1:
            raise AttackError(f"`prefill_{tokens}` begins the answer with no token. Give at least 1 (`prefill_5`).")
        self.tokens = tokens
        self.name = f"prefill_{tokens}"

    @override
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        return [replace(row, prefix_tokens=self.tokens) for row in rows]
