"""Completions that are no answer at all: empty, or the same thing over and over."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_SCRIPTIO_CONTINUA = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
"""Scripts written without spaces: there a character stands for a word."""
_MAX_REPETITION = 0.6
"""The largest share of repeated word 3-grams that still counts as an answer."""
_MIN_REPEATED_WORDS = 20
"""Shorter texts may repeat themselves ("no, no, no")."""


def _words(text: str) -> list[str]:
    return _WORD.findall(_SCRIPTIO_CONTINUA.sub(lambda match: f" {match.group()} ", text.lower()))


def repetition(text: str) -> float:
    """Return the share of a text's word 3-grams that stood there before.

    It is 0 if all are different or the text is shorter than three words, nearly 1 if one 3-gram is repeated.

    Example:
        >>> repetition("ha ha ha ha ha ha")
        0.75
    """
    words = _words(text)
    grams = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(grams.values())
    return 1.0 - len(grams) / total if total else 0.0


def is_garbage(text: str) -> bool:
    """Return whether a completion says nothing: no letter or digit, one character in a row, or a loop."""
    words = _words(text)
    if not words or re.search(r"([^\s\d=_.*#-])\1{19}", text):  # a ruler of dashes is layout, "aaaa..." is not
        return True
    return len(words) >= _MIN_REPEATED_WORDS and repetition(text) > _MAX_REPETITION
