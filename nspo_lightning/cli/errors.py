"""Tell a user's mistake, which a message explains, from a bug, which needs its traceback; and say it on one screen."""

from __future__ import annotations

import os
import re
import textwrap
import traceback
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

import nspo_lightning
from nspo_lightning.keys import mask_keys

_PACKAGE = Path(nspo_lightning.__file__).parent
_OWN = tuple(str((_PACKAGE / part).resolve()) for part in ("", "callbacks", "datamodules"))
_CHECKERS = (*_OWN, str(Path(pl.__file__).parent), str(Path(jsonargparse.__file__).parent))
_UNION = "Does not validate against any of the Union subtypes"
_NOT_A_SUBCLASS = re.compile(r"Import path (?P<path>\S+) does not correspond to a subclass of \S+")
_LINES = 30


def is_users_mistake(error: BaseException) -> bool:
    """Tell a mistake from a bug.

    Args:
        error: What was raised.

    Returns:
        True for a misconfiguration; for an OSError about a named file (it is not there, or may not be read or
        written); and for a ValueError or TypeError that this package itself, Lightning's or jsonargparse's own checks
        raised.
    """
    if isinstance(error, MisconfigurationException):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(_CHECKERS)


def explain(error: BaseException) -> str:
    """Say what is wrong, on one screen at most.

    Args:
        error: A user's mistake.

    Returns:
        The message. Where jsonargparse lists what every possible type had against a value, only the complaint that
        this package made is left, if there is one.
    """
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"There is nothing at {os.fspath(error.filename)!r}: expected a file or folder. Mend the path."
    text = str(error)
    if text.startswith(_UNION):
        text = _from_union(text)
    lines = mask_keys(text).splitlines()
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"... and {len(lines) - _LINES} lines more"]
    return "\n".join(lines)


def _from_union(text: str) -> str:
    """Pick the reason out of jsonargparse's list; the subtype that the value names is the one whose reason counts."""
    errors = [part.strip() for part in re.split(r"\n  - ", text)[1:]]
    reasons = [part for part in errors if not part.startswith(("Not a valid subclass", "Unable to import", "Expected"))]
    own = [part for part in reasons if not _NOT_A_SUBCLASS.match(part)]
    chosen = max(own or reasons or errors or [text], key=len)
    return textwrap.dedent(chosen.split("\nGiven value")[0])
