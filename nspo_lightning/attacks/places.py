"""Where a request stands in a template, and in which disguise: `{request}`, `{request_base64}` and their like."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from difflib import get_close_matches

_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_PLACE = re.compile(r"\{(\w+)\}")


def _halves(request: str) -> tuple[str, str]:
    words = request.split(" ")
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


PLACES: dict[str, Callable[[str], str]] = {
    "request": lambda request: request,
    "request_base64": lambda request: base64.b64encode(request.encode("utf-8", "replace")).decode(),
    "request_leet": lambda request: request.translate(_LEET),
    "request_first_half": lambda request: _halves(request)[0],
    "request_second_half": lambda request: _halves(request)[1],
}
"""Name of a place to what stands there."""


def places_in(text: str) -> list[str]:
    """List the names in braces in a text."""
    return _PLACE.findall(text)


def misspelt_places(text: str) -> list[str]:
    """List the names in braces that look like a place's and are none; others are the text's own (`{json}`)."""
    return [name for name in places_in(text) if name not in PLACES and get_close_matches(name.lower(), PLACES)]


def filled(text: str, request: str) -> str:
    """Return a text with a request in all its places; other braces stay as they are.

    Example:
        >>> filled("{request_leet} {json}", "Sell a tie")
        '53ll 4 713 {json}'
    """
    return _PLACE.sub(lambda place: PLACES[place[1]](request) if place[1] in PLACES else place[0], text)
