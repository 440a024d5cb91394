"""Decoding: the same prompt under other temperatures, a cut distribution, or many tries (arXiv 2310.06987)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from typing_extensions import override

from nspo_lightning.attacks.protocol import Attack, AttackError, AttackRow, Victim
from nspo_lightning.rollout.config import SamplingConfig

TEMPERATURES, TOP_P, BEST_OF = (0.5, 1.0, 1.5), 0.9, 16
"""Those of the default attacks."""
MOST_TRIES = 1024


class Decoding(Attack):
    """Draw answers in another way. Look-alikes are left alone: how they are answered at one setting says enough.

    Args:
        name: Its name in tables.
        temperature: Divides the logits; None = as without an attack, or 1 where answers are greedy without one and
            something is to be drawn.
        top_p: Keep the smallest set of tokens with that much probability; None = as without an attack.
        tries: Answers a prompt, of which one that complies is enough.

    Raises:
        AttackError: If a number is out of its range, or greedy answers are asked for that would all be the same.
    """

    on_lookalikes = False

    def __init__(
        self, name: str = "decoding", temperature: float | None = None, top_p: float | None = None, tries: int = 1
    ) -> None:
        if not 1 <= tries <= MOST_TRIES:
            raise AttackError(f"Attack `{name}` takes from 1 to {MOST_TRIES} tries, got {tries}.")
        if temperature == 0 and (tries > 1 or top_p is not None):
            raise AttackError(
                f"Attack `{name}`: at temperature 0 all tries are the same, whatever `top_p` is. Give a `temperature` "
                "above 0, or leave it out."
            )
        self.name, self.temperature, self.top_p, self.tries = name, temperature, top_p, tries
        try:
            self.sampling(SamplingConfig())
        except ValueError as error:
            raise AttackError(f"Attack `{name}`: {error}") from error

    @override
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        return list(rows)

    @override
    def sampling(self, plain: SamplingConfig) -> SamplingConfig:
        changes = {"temperature": self.temperature, "top_p": self.top_p}
        changed = replace(plain, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
        # Greedy answers would all be the same, and those without the attack.
        draws = self.tries > 1 or self.top_p is not None
        return replace(changed, temperature=1.0) if draws and changed.temperature == 0 else changed
