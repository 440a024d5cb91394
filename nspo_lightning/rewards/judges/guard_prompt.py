"""A guard's prompt: its own chat template where the tokenizer has one, with nothing lost and nothing smuggled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo_lightning.rewards.protocol import RewardError


def render(tokenizer: Any, chat: list[dict[str, str]], template: str | None, guideline: str | None, family: str) -> str:
    """Write the guard's prompt for one conversation.

    Args:
        tokenizer: The guard's, with `apply_chat_template`.
        chat: User and assistant turns; the last is the completion.
        template: A Jinja template with `prompt` and `completion` that replaces the tokenizer's own.
        guideline: The policy that is asked about, for guards that take one.
        family: The guard's name, for messages.

    Returns:
        The prompt, up to where the guard begins to answer.

    Raises:
        RewardError: If the template leaves out the prompt or the completion, or can't take this conversation.
    """
    variables: dict[str, Any] = {} if guideline is None else {"guideline": guideline}
    if template is not None:
        asked = chat[:-1] if len(chat) > 2 else []
        prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked) if asked else chat[0]["content"]
        variables |= {"chat_template": template, "prompt": prompt, "completion": chat[-1]["content"]}
    problem = "leaves out the prompt or the completion"
    for parts in (False, True):  # some templates read strings, others lists of parts, and silently skip the other form
        try:
            text: str = tokenizer.apply_chat_template(
                _as_parts(chat) if parts else chat, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # Jinja's many kinds
            problem = f"can't take this conversation ({type(error).__name__}: {error})"
            continue
        if all(turn["content"].strip() in text for turn in (chat[0], chat[-1])):
            return text
    raise RewardError(
        f"The chat template of guard '{family}' {problem}. Give the prompt of its model card as `template` (Jinja with "
        f"prompt and completion)."
    )


def fork(tokenizer: Any, text: str, endings: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tokenise a text with several endings: the tokens that all share, and the next token of each ending."""
    # The whole is encoded, since tokens may merge across the seam.
    encoded = [tokenizer(text + ending, add_special_tokens=False)["input_ids"] for ending in endings]
    shared = 0
    shortest = min(len(ids) for ids in encoded)
    while shared < shortest and len({ids[shared] for ids in encoded}) == 1:
        shared += 1
    following = [ids[shared] for ids in encoded if len(ids) > shared]
    if len(set(following)) < len(endings):
        raise RewardError(
            f"The guard's tokenizer doesn't tell the labels {', '.join(map(repr, endings))} apart by one token. Check "
            f"that `family` names the right guard and that its tokenizer is the model's own."
        )
    return encoded[0][:shared], following


def missing(text: str, lead_in: str) -> str:
    """Give the lead-in, less what the prompt already ends with if that is white space."""
    if lead_in.strip():
        return lead_in
    return lead_in[len(text) - len(text.rstrip("\n")) :] if lead_in else ""


def read_template(template: str | None) -> str | None:
    """Return a Jinja template that is given as such or as the path of its file."""
    if template is None or "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ValueError(
            f"`template` must be a Jinja template or the path of one, got '{template}', which is neither. Write "
            f"{{{{ prompt }}}} and {{{{ completion }}}} into it."
        )
    return path.read_text(encoding="utf-8")


def _as_parts(chat: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
