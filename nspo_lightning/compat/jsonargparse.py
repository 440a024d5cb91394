"""What is used of jsonargparse beyond its API: the text of one message.

A value that fits no type of a union raises a plain ValueError. What each type had against the value is in its text
alone; only the first type's exception is its cause.
"""

from __future__ import annotations

import re
import textwrap

_UNION = "Does not validate against any of the Union subtypes"
_WRONG_TYPE = ("Not a valid subclass", "Unable to import", "Expected")
_NOT_A_SUBCLASS = re.compile(r"Import path \S+ does not correspond to a subclass of \S+")


def told_reason(text: str) -> str:
    """Return what the subtype that a value names had against it; any other message is returned as it is."""
    if not text.startswith(_UNION):
        return text
    errors = [part.strip() for part in re.split(r"\n  - ", text)[1:]]
    reasons = [part for part in errors if not part.startswith(_WRONG_TYPE)]
    named = [part for part in reasons if not _NOT_A_SUBCLASS.match(part)]
    chosen = max(named or reasons or errors or [text], key=len)
    return textwrap.dedent(chosen.split("\nGiven value")[0])
