"""Many shots: turns in which an assistant complies stand before the request (anthropic.com/research/many-shot).

The turns are harmless ones: what is measured is the pull of the pattern, without harmful text in the package.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from typing_extensions import override

from nspo_lightning.attacks.protocol import Attack, AttackError, AttackRow, Victim
from nspo_lightning.attacks.templates import SHIPPED, read_yaml
from nspo_lightning.policy.chats import as_turns
from nspo_lightning.rewards.protocol import Text

SHOTS = (4, 16, 64)
"""Those of the default attacks."""
MOST = 1024
"""So many turns have some 25,000 tokens."""


class ManyShot(Attack):
    """Put turns of a complying assistant before the request.

    Args:
        shots: How many, from 1 to `MOST`; those of the package are repeated where there are fewer.

    Raises:
        AttackError: If there are none, or more.
    """

    def __init__(self, shots: int = 16) -> None:
        if shots < 1:
            raise AttackError(f"`many_shot_{shots}` has no turns. Give at least 1 (`many_shot_16`).")
        if shots > MOST:
            raise AttackError(f"`many_shot_{shots}` has more turns than the attack takes. Give at most {MOST}.")
        self.shots = shots
        self.name = f"many_shot_{shots}"

    @override
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        return [replace(row, prompt=self.before(row.prompt)) for row in rows]

    def before(self, prompt: Text) -> Text:
        """Return a prompt with the turns before it, behind its system message."""
        own = as_turns(prompt)
        pairs = _pairs()
        turns = [
            {"role": role, "content": text}
            for number in range(self.shots)
            for role, text in zip(("user", "assistant"), pairs[number % len(pairs)], strict=True)
        ]
        start = 1 if own[0].get("role") == "system" else 0
        return [*own[:start], *turns, *own[start:]]

    @property
    @override
    def changes_prompts(self) -> bool:
        return True


@functools.cache
def _pairs() -> list[tuple[str, str]]:
    """Return the shipped turns: (what is asked, what is answered)."""
    return [(str(asked), str(answered)) for asked, answered in read_yaml(SHIPPED)["shots"]]
