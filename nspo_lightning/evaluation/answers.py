"""Compare a completion with the reference answer of a general prompt, where the two can be compared.

A short answer (a number, a letter, a few words) is compared; free text is not, since no two people write the same. Free
text is measured by its likelihood instead.
"""

from __future__ import annotations

import re
from typing import Any

from nspo_lightning.evaluation.numbers import as_number, numbers_in, same_numbers
from nspo_lightning.evaluation.thoughts import answer_of, is_unfinished

SHORT_WORDS = 5
"""The most words of an answer that is compared unless the data say otherwise."""
_SAID = re.compile(r"(?:\bfinal answer\b|\banswer(?: is\b|:))[\s:*]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_AROUND = "().,:;!?*\"'`[] \n\t"


def is_right(completion: str, answer: Any, final: Any) -> bool | None:
    """Return whether a completion is right; None where there is nothing to compare.

    Args:
        completion: What was said; a thought before the answer does not count, and one that does not end has no answer.
        answer: The reference answer; used if there is no `final`, it is short, or ends in ``#### 5``.
        final: What the data declare to compare with; "" = nothing, the reference is free text.

    Example:
        >>> is_right("5", "2 + 3 #### 5", None), is_right("(B) the moon", "because ...", "B"), is_right("5", "", None)
        (True, True, None)
    """
    wanted = reference_of(answer, final)
    return None if wanted is None or is_unfinished(completion) else matches(answer_of(completion), wanted)


def reference_of(answer: Any, final: Any) -> str | None:
    """Return what a completion is compared with; None where there is no reference, or it is free text."""
    if final is not None:
        return after_hashes(str(final)) or None
    text = "" if answer is None else str(answer)
    return after_hashes(text) or None if is_short(text) else None


def after_hashes(answer: str) -> str:
    """Return what follows ``####``, GSM8K's mark of the final answer; without it the whole answer."""
    return answer.rsplit("####", 1)[-1].strip()


def is_short(answer: str) -> bool:
    """Whether an answer is a number, or a few words on one line: short enough for others to say the same."""
    text = answer.strip()
    return "####" in text or ("\n" not in text and len(text.split()) <= SHORT_WORDS) or as_number(text) is not None


def matches(completion: str, reference: str) -> bool:
    r"""Return whether a completion says a reference, as people would see it.

    A number or range is compared with the last one that is said (after ``####``, inside ``\boxed{}`` or in the sentence
    that "the answer is" begins, where there is one); see `numbers`. One word, a letter say, may be followed by more.
    Several words are the whole completion, or the sentence that "the answer is" begins, but for case and punctuation
    around them.

    Example:
        >>> matches("So it costs $1,042.00.", "1042"), matches("13", "3"), matches(" A  b.", "a b")
        (True, False, True)
    """
    if completion.split() == reference.split():
        return True
    if (number := as_number(reference)) is not None:
        said = numbers_in(_final_part(completion), ranges=len(number) > 1)
        return bool(said) and same_numbers(said[-1], number)
    if len(reference.split()) > 1:
        *before, after = _SAID.split(completion)
        said_so = [_SENTENCE_END.split(after, maxsplit=1)[0]] if before else []
        return any(_words(text) == _words(reference) for text in [completion, *said_so])
    wanted = reference.strip(_AROUND).casefold()
    starts = [completion, *_SAID.split(completion)[-1:]]
    words = [text.strip(_AROUND).split(maxsplit=1)[:1] for text in starts]
    return any(word and word[0].strip(_AROUND).casefold() == wanted for word in words)


def _words(text: str) -> list[str]:
    return text.strip(_AROUND).casefold().split()


def _final_part(completion: str) -> str:
    if "####" in completion:
        return after_hashes(completion).split("\n", 1)[0]
    if boxed := _BOXED.findall(completion):
        return str(boxed[-1])
    *before, after = _SAID.split(completion)
    sentence = _SENTENCE_END.split(after, maxsplit=1)[0]
    return sentence if before and numbers_in(sentence) else completion
