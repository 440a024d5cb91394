"""Prompts and completions as strings or as chat messages, read the same way everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nspo_lightning.atomic import without_surrogates
from nspo_lightning.evaluation.thoughts import answer_of
from nspo_lightning.policy.chats import as_turns
from nspo_lightning.rewards.protocol import Text

_TEXT_PARTS = ("text", "input_text", "output_text")


def part_text(part: Any) -> str | None:
    """Read a part of a message's content: a string, or an object of text (also OpenAI's kinds); None for no text."""
    if isinstance(part, Mapping):
        part = part.get("text") if part.get("type", "text") in _TEXT_PARTS else None
    return part if isinstance(part, str) else None


def content_text(content: Any) -> str:
    """Read the text of a message's content: a string, the text parts of a list, or nothing (a bare tool call)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return without_surrogates(content)
    return without_surrogates("".join(part_text(part) or "" for part in content))


def answer_text(completion: Text) -> str:
    """Read a completion's answer, without the thought before it, as one string; see `answer_of`."""
    return answer_of(as_text(completion))


def without_thought(completion: Text) -> Text:
    """Return a completion that is its answer alone: text, unless it has more than one message."""
    if isinstance(completion, str) or len(completion) <= 1:
        return answer_text(completion)
    return with_last(completion, answer_text(completion))


def as_text(text: Text) -> str:
    """Read a prompt or completion as one string: of chat messages the last one's text, "" without messages."""
    if isinstance(text, str):
        return without_surrogates(text)
    return content_text(text[-1].get("content")) if text else ""


def with_last(text: Text, said: str) -> Text:
    """Return a prompt or completion whose last turn says something else.

    Example:
        >>> with_last("Hi", "Ho"), with_last([{"role": "user", "content": "Hi"}], "Ho")
        ('Ho', [{'role': 'user', 'content': 'Ho'}])
    """
    return said if isinstance(text, str) else [*text[:-1], {**text[-1], "content": said}]


def as_plain_text(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward's arguments with prompts and completions as text, for a function that knows of no messages."""
    plain = dict(arguments)
    for name, read in {"prompts": transcript, "completions": as_text}.items():
        if name in plain:
            plain[name] = [text if isinstance(text, str) else read(text) for text in plain[name]]
    return plain


def transcript(prompt: Text) -> str:
    """Read a whole prompt as one string: a single turn as it is, several with their roles."""
    # A system turn says what the assistant is and not what was asked.
    if isinstance(prompt, str):
        return without_surrogates(prompt)
    turns = [turn for turn in prompt if turn.get("role") != "system"]
    if len(turns) == 1:
        return content_text(turns[0].get("content"))
    return "\n".join(f"{turn.get('role')}: {content_text(turn.get('content'))}" for turn in turns)


def as_chat(prompt: Text, completion: Text) -> list[dict[str, Any]]:
    """Join a prompt and the answer to it, each a string or messages, into one conversation with string contents."""
    answer = without_thought(completion)
    tail: Any = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return [
        {"role": str(turn.get("role", "user")), "content": content_text(turn.get("content"))}
        for turn in [*as_turns(prompt), *tail]
    ]


def match_format(prompt: Text, completion: Text) -> Text:
    """Give a completion the shape that TRL gives it: one assistant message where the prompt is a chat."""
    if not isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion
