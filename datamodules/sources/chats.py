"""Chats as rows hold them: TRL's, verl's, ShareGPT's and OpenAI's forms, as roles and text."""

from __future__ import annotations

from typing import Any

from nspo_lightning.datamodules.sources.cells import BadRow, check_prompt
from nspo_lightning.datamodules.sources.data_error import clip
from nspo_lightning.datamodules.sources.rows import Message
from nspo_lightning.rewards.messages import part_text

_ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system", "function": "tool"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def split_chat(value: Any) -> tuple[list[Message], str | None]:
    """Return a chat's turns up to the last user turn, and the assistant's turn after it, if any.

    A chat is a list of ``{"role": ..., "content": ...}`` (or ``from``/``value``); a content is text or a list of parts
    of text. An assistant's last turn may think or call tools without a word: it is an empty answer.

    Raises:
        BadRow: If it is no such list, has no user turn, or holds what a policy of text cannot be given.
    """
    if value is None:
        raise BadRow("the messages are null")
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else type(value).__name__
        raise BadRow(f"the messages are {found}, not a list of role and content")
    turns = [_turn(entry, number) for number, entry in enumerate(value, start=1)]
    answer = turns.pop()[1] or "" if turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        place = (
            f"the last message, {len(turns)}, is"
            if answer is None
            else f"before the answer stands message {len(turns)}"
        )
        found = f": {place} of role {turns[-1][0]!r}" if turns else ""
        raise BadRow(f"the messages do not end with a user turn{found}")
    if None in (silent := [text for _, text in turns]):
        at = silent.index(None)
        does = "calls tools" if _calls(value[at]) else "thinks"
        raise BadRow(f"message {at + 1} {does} without a word, which a policy of text cannot be given")
    check_prompt(turns[-1][1])
    return [{"role": role, "content": text or ""} for role, text in turns], answer


def message_text(value: Any) -> Any:
    """Return the text of an answer that is a chat or a message (TRL's `completion`); anything else as it is."""
    messages = value if isinstance(value, list) else [value]
    if not messages or not isinstance(messages[-1], dict) or "content" not in messages[-1]:
        return value
    return _turn({"role": "assistant", **messages[-1]}, len(messages))[1]


def _turn(entry: Any, number: int) -> tuple[str, str | None]:
    """Return a message's role and text; None for one that thinks or calls tools and says nothing."""
    if not isinstance(entry, dict):
        raise BadRow(f"a message is {type(entry).__name__}, not an object with role and content")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    role = _OTHER_NAMES.get(role.casefold(), role.casefold()) if isinstance(role, str) else role
    wordless = _calls(entry) or any(entry.get(name) for name in _THOUGHTS)
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if role == "assistant" and wordless and not content:
        return role, None
    if role not in _ROLES or not isinstance(content, str):
        raise BadRow(
            f"a message needs a role ({', '.join(_ROLES)}) and text, "
            f"got role {clip(repr(role), 30)} and {'null' if content is None else type(content).__name__}"
        )
    return role, content


def _calls(entry: dict[str, Any]) -> bool:
    return bool(entry.get("tool_calls") or entry.get("function_call"))


def _part(part: Any, number: int) -> str:
    text = part_text(part)
    if text is None:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        raise BadRow(f"message {number} holds a part {clip(repr(kind), 30)}, which a policy of text cannot be given")
    return text
