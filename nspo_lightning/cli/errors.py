"""Tell a user's mistake, which a message explains, from a bug, which needs its traceback; and say it on one screen."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

import nspo_lightning
from nspo_lightning import ranks
from nspo_lightning.atomic import whole
from nspo_lightning.cli.run_folder import RUN_FOLDER
from nspo_lightning.cli.shipped import UnknownConfigError
from nspo_lightning.compat.jsonargparse import told_reason
from nspo_lightning.keys import mask_keys

TRACEBACK_VARIABLE = "NSPO_LIGHTNING_TRACEBACK"

_PACKAGE = Path(nspo_lightning.__file__).parent
_OWN = tuple(str((_PACKAGE / part).resolve()) for part in ("", "callbacks", "datamodules"))
_CHECKERS = (*_OWN, str(Path(pl.__file__).parent), str(Path(jsonargparse.__file__).parent))
_LINES = 30


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with one message after a user's mistake, of code 2 for wrong usage, else 1; raise a bug."""
    try:
        yield
    except UnknownConfigError as error:
        print(f"\nerror: {mask_keys(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        RUN_FOLDER.withdraw()  # also after a bug: the earlier run gets its place back
        if os.environ.get(TRACEBACK_VARIABLE) or not is_users_mistake(error):
            raise
        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        if not (rank and ranks.raised_on_all_ranks(error)):  # what all say is said once
            where, hint = f" on rank {rank}" if rank else "", f"(set {TRACEBACK_VARIABLE}=1 for the traceback)"
            print(f"\nerror{where}: {message_for(error)}\n{hint}", file=sys.stderr)
        sys.exit(1)
    except BaseException:  # Ctrl-C, SIGTERM
        RUN_FOLDER.withdraw()
        raise
    finally:
        RUN_FOLDER.end()


def is_users_mistake(error: BaseException) -> bool:
    """Tell a mistake from a bug.

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


def message_for(error: BaseException) -> str:
    """Say what is wrong, on one screen at most.

    Args:
        error: A user's mistake.

    Returns:
        The message. Where jsonargparse lists what every possible type had against a value, only the complaint that
        this package made is left, if there is one.
    """
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        where = mask_keys(repr(os.fspath(error.filename)))
        return f"There is nothing at {where}: expected a file or folder. Mend the path."
    lines = mask_keys(told_reason(str(error))).splitlines()
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"... and {len(lines) - _LINES} lines more"]
    return whole("\n".join(lines))
