"""What a chat template makes of an answer: its place in the rendered text, and the token that ends its turn.

Both are found by rendering. Templates add thoughts before an answer, trim it, put text behind its end: nothing can be
said from the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

_PROBES = ("x", "y")
"""Answers without a character in common: what their texts share is the template's."""


class SpecialTokens(Protocol):
    """The part of a Hugging Face tokenizer that knows its special tokens."""

    all_special_ids: Any
    added_tokens_decoder: Any


def answer_place(render: Callable[[str], str], answer: str) -> tuple[str, int, int]:
    """Render a chat that ends with an answer and find the answer in it.

    Args:
        render: From an answer to the text of the whole chat.
        answer: The answer.

    Returns:
        The text, and the characters [start, end) of it that come from the answer, as the template trims and splits it.
    """
    text, others = render(answer), [render(probe) for probe in _PROBES]
    start = min(common_start(text, other) for other in others)
    behind = min(common_start(text[start:][::-1], other[start:][::-1]) for other in others)
    return text, start, len(text) - behind


def special_ids(tokenizer: SpecialTokens) -> frozenset[int]:
    """Return the ids of all special tokens: those with a role, and those that were only added as special."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {int(number) for number, token in added if token.special}


def common_start(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the characters or tokens that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def end_of_turn(ids: Iterable[int], special: frozenset[int]) -> int | None:
    """Return the index of the first special token among those that a template puts behind an answer; None without."""
    return next((i for i, token in enumerate(ids) if token in special), None)
