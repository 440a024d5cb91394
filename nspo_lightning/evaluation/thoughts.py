"""A completion of a policy that thinks first: what it thought, and its answer."""

from __future__ import annotations

import re

OPENINGS = ("<think>", "<thinking>", "<|begin_of_thought|>", "[THINK]")
"""What begins a thought: Qwen3, DeepSeek R1 and their like; others'; Magistral."""
CLOSINGS = ("</think>", "</thinking>", "<|end_of_thought|>", "[/THINK]")
"""What ends it."""
_MARK = re.compile("|".join(re.escape(mark) for mark in (*OPENINGS, *CLOSINGS)))


def answer_of(completion: str) -> str:
    r"""Return the answer after the thought; a completion without a thought is its answer.

    What stands before the last closing mark is thought, also where the prompt had opened it. A thought that does not
    end has no answer: "" is returned, and whoever judges that calls it garbage.

    Example:
        >>> answer_of("<think>2 + 3 is 5</think> 5"), answer_of("2 + 3 is 5</think>\n\n5"), answer_of("<think>2 + 3")
        ('5', '5', '')
        >>> answer_of("5 ")
        '5 '
    """
    marks = list(_MARK.finditer(completion))
    if not marks:
        return completion
    last = marks[-1]
    return "" if last.group() in OPENINGS else completion[last.end() :].strip()


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, so that the completion goes on with it."""
    marks = list(_MARK.finditer(prompt))
    return bool(marks) and marks[-1].group() in OPENINGS and not prompt[marks[-1].end() :].strip()
