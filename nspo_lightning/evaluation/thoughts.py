"""A completion of a policy that thinks first: where the thought ends, and what the answer is.

As servers split them: a thought stands at the beginning, and ends with the first closing mark of its kind. Marks
further on are text, so that nothing can be hidden from a judge by them.
"""

from __future__ import annotations

import re

THOUGHT_MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "[THINK]": "[/THINK]",
}
"""What begins and ends a thought: DeepSeek R1, Qwen3 and their like; others; Magistral."""
_OPENING = re.compile("|".join(map(re.escape, THOUGHT_MARKS)))
_CLOSING = re.compile("|".join(map(re.escape, THOUGHT_MARKS.values())))


def answer_of(completion: str) -> str:
    r"""Return the answer after the thought; a completion without a thought is its answer, as it is.

    A closing mark alone ends a thought that the prompt had opened. A thought that does not end has no answer: "" is
    returned, which judges call garbage. Marks in the answer get a space inside, so that its answer is itself.

    Example:
        >>> answer_of("<think>2 + 3 is 5</think> 5"), answer_of("2 + 3 is 5</think>\n\n5"), answer_of("<think>2 + 3")
        ('5', '5', '')
        >>> answer_of("5 "), answer_of("Sure <think>no</think> yes")
        ('5 ', 'Sure <think>no</think> yes')
    """
    opening, closing = _OPENING.search(completion), _CLOSING.search(completion)
    if opening is not None and not completion[: opening.start()].strip():
        return without_marks(completion.partition(THOUGHT_MARKS[opening[0]])[2]).strip()
    if closing is None or (opening is not None and opening.start() < closing.start()):
        return completion
    return without_marks(completion[closing.end() :]).strip()


def is_unfinished(completion: str) -> bool:
    """Whether a completion is a thought that does not end: cut, and no answer."""
    opening = _OPENING.match(completion.lstrip())
    return opening is not None and THOUGHT_MARKS[opening[0]] not in completion


def without_marks(text: str) -> str:
    """Return a text with a space inside each mark of a thought, which makes it text."""
    for pattern in (_OPENING, _CLOSING):
        text = pattern.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)
    return text


def open_thought(prompt: str) -> str:
    """Return the end of a rendered prompt from the mark on that opens a thought for the completion; else ""."""
    marks = list(_OPENING.finditer(prompt))
    return prompt[marks[-1].start() :] if marks and not prompt[marks[-1].end() :].strip() else ""


def thought_around(prompt: str, begun: str) -> str:
    r"""Return what opens the thought that a completion goes on with; "" where it is no part of one.

    Args:
        prompt: The rendered prompt.
        begun: The beginning of the answer that stands behind it; "" = none. It may open a thought, or end one.

    Example:
        >>> thought_around("Burn it.", "<think>\nThey want"), thought_around("<think>\n", "</think> Sure")
        ('<think>', '')
    """
    opened = open_thought(prompt)
    if not begun:
        return opened
    if not is_unfinished(opened + begun):
        return ""
    return opened or next(mark for mark in THOUGHT_MARKS if begun.lstrip().startswith(mark))


def completion_with_thought(completion: str, prompt: str, begun: str = "") -> str:
    """Return a completion that shows by itself what its thought is.

    Where the rendered prompt, or the beginning of the answer behind it, had opened a thought, the completion begins
    with that; where not, a closing mark without an opening one is text, or a policy could hide from a judge all that
    stands before it.
    """
    if opened := thought_around(prompt, begun):
        return opened + completion
    answer = answer_of(completion)
    starts_open = _OPENING.match(completion.lstrip())
    return completion if starts_open or answer == completion else without_marks(completion)
