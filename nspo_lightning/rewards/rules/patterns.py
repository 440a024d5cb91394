"""Refusal patterns: kept as data (`refusal_patterns.yaml`), compiled once, searched in a completion's opening."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from importlib.resources import files

import yaml

PATTERN_FILE = "refusal_patterns.yaml"

_APOSTROPHES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "´": "'", "“": '"', "”": '"'})  # noqa: RUF001


def normalise(text: str) -> str:
    """Write a text as the patterns are: NFKC, lower case, straight apostrophes, single spaces, no leading markup."""
    plain = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    return re.sub(r"\s+", " ", plain).strip().lstrip("*_#>-\"'( ")


@functools.cache
def load_patterns() -> dict[str, tuple[str, ...]]:
    """Read the pattern file that ships with the package: language code to its regular expressions."""
    text = files("nspo_lightning.rewards.rules").joinpath(PATTERN_FILE).read_text(encoding="utf-8")
    read: dict[str, tuple[str, ...]] = {code: tuple(patterns) for code, patterns in yaml.safe_load(text).items()}
    for language, patterns in read.items():
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"{PATTERN_FILE}, {language}: a pattern must be a string, got {pattern!r}. Write a space that "
                    f"follows a colon as \\s."
                )
    return read


def refusal_matcher(chosen: Sequence[str] | None = None, extra: Sequence[str] = ()) -> re.Pattern[str]:
    """Return the patterns of some languages (all by default) as one compiled expression, for normalised text.

    `extra` has further regular expressions.

    Raises:
        ValueError: If a language is unknown or an extra pattern is no regular expression.
    """
    known = load_patterns()
    unknown = sorted(set(chosen or ()) - set(known))
    if unknown:
        raise ValueError(
            f"`languages` must be among {', '.join(known)}, got {', '.join(unknown)}. Give patterns of your own as "
            f"`extra_patterns`, or add the language to {PATTERN_FILE}."
        )
    for pattern in extra:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`extra_patterns` must be regular expressions, got {pattern!r}: {error}.") from error
    patterns = [pattern for language in chosen or known for pattern in known[language]]
    return re.compile("|".join(f"(?:{pattern})" for pattern in [*patterns, *extra]))


def is_refusal(text: str, matcher: re.Pattern[str], window_chars: int) -> bool:
    """Tell whether a completion opens with a refusal: whether a pattern is found in its first `window_chars`."""
    # Further down, the same words are mostly quoted or about something else.
    return matcher.search(normalise(text[: 4 * window_chars])[:window_chars]) is not None
