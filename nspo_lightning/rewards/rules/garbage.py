"""Completions that are no answer at all: empty, or the same thing over and over."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_SCRIPTIO_CONTINUA = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
"""Scripts written without spaces: there a character stands for a word."""


def _words(text: str) -> list[str]:
    return _WORD.findall(_SCRIPTIO_CONTINUA.sub(lambda match: f" {match.group()} ", text.lower()))


def repetition(text: str, size: int = 3) -> float:
    """Return the share of a text's word n-grams that stood there before.

    It is 0 if all are different or the text is shorter than `size` words, nearly 1 if one n-gram is repeated.

    Example:
        >>> repetition("ha ha ha ha ha ha", size=3)
        0.75
    """
    words = _words(text)
    grams = Counter(zip(*(words[i:] for i in range(size)), strict=False))
    total = sum(grams.values())
    return 1.0 - len(grams) / total if total else 0.0


def is_garbage(text: str, max_repetition: float = 0.6, min_repeated_words: int = 20) -> bool:
    """Return whether a completion says nothing: no letter or digit, one character in a row, or a loop.

    Args:
        text: The completion.
        max_repetition: Largest share of repeated word 3-grams that still counts as an answer.
        min_repeated_words: Shorter texts may repeat themselves ("no, no, no").
    """
    words = _words(text)
    if not words or re.search(r"([^\s\d=_.*#-])\1{19}", text):  # a ruler of dashes is layout, "aaaa..." is not
        return True
    return len(words) >= min_repeated_words and repetition(text) > max_repetition
