"""Compare a completion with the reference answer of a general prompt."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(completion: str, answer: Any, final: Any) -> bool | None:
    """Return whether a completion is right, by the short final answer, else by the reference; None without either.

    Example:
        >>> is_right("5", "2 + 3 #### 5", None), is_right("(A)", "(A)", "B"), is_right("5", None, None)
        (True, False, None)
    """
    if final is not None:
        return final_answers_match(completion, str(final))
    return None if answer is None else answers_match(completion, str(answer))


def answers_match(completion: str, answer: str) -> bool:
    """Return whether a completion agrees with a reference answer.

    With a ``####`` in the answer (GSM8K), what follows is a number and the completion's last number counts; else texts
    must be equal but for white space.

    Example:
        >>> answers_match("So it is 1,042.", "40 + 1002 = 1042 #### 1042"), answers_match(" a  b", "a b")
        (True, True)
    """
    if "####" in answer:
        expected = answer.rsplit("####", 1)[1].strip().replace(",", "")
        numbers = [number.replace(",", "") for number in _NUMBER.findall(completion)]
        return bool(numbers) and numbers[-1] == expected
    return completion.split() == answer.split()


def final_answers_match(completion: str, final: str) -> bool:
    """Return whether a completion says a short final answer: its last number, or its first word (a letter, say).

    Example:
        >>> final_answers_match("2 + 3 gives 5.", "5"), final_answers_match("(B) the moon", "B")
        (True, True)
    """
    wanted = final.strip().replace(",", "")
    if _NUMBER.fullmatch(wanted):
        return answers_match(completion, f"#### {wanted}")
    first = completion.strip().split(maxsplit=1)[:1]
    return bool(first) and first[0].strip("().:,") == wanted
