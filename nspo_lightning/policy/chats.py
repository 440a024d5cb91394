"""Prompts as chats: text is what a user says in one turn, and a template shows a system message where it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Turn = dict[str, Any]


def as_turns(prompt: str | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return a prompt, text or a chat, as turns of its own.

    Example:
        >>> as_turns("Hi"), as_turns([{"role": "system", "content": "Be kind."}])
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'system', 'content': 'Be kind.'}])
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def with_system(prompt: Any, text: str, *, fold: bool) -> list[Turn]:
    """Return a prompt, text or a chat, with a system message before its own, or before its first user turn (`fold`)."""
    turns = as_turns(prompt)
    role = "user" if fold else "system"
    place = next((i for i, turn in enumerate(turns) if turn["role"] == role), None)
    if place is None:
        return [{"role": role, "content": text}, *turns]
    own = turns[place]["content"]
    turns[place]["content"] = f"{text}\n\n{own}" if isinstance(own, str) else [{"type": "text", "text": text}, *own]
    return turns


def folds_system(render: Callable[[list[Turn]], str], text: str) -> bool | None:
    """Find where a chat template shows a system message.

    Args:
        render: From a chat to what the policy reads; may raise anything.
        text: The message.

    Returns:
        False = as a system turn, True = only before the user's words, None = nowhere.
    """
    for fold in (False, True):
        try:
            shown = render(with_system("x", text, fold=fold))
        except Exception:  # Jinja raises its own types, and a template may raise anything
            continue
        if text.strip() in shown:
            return fold
    return None
