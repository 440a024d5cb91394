"""Tell a user's mistake, which a message explains, from a bug, which needs its traceback; and say it on one screen."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
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
from nspo_lightning.atomic import without_surrogates
from nspo_lightning.cli.explain import how_to_install
from nspo_lightning.cli.given import given
from nspo_lightning.cli.run_folder import RUN_FOLDER
from nspo_lightning.cli.shipped import UnknownConfigError, WrongOptionsError
from nspo_lightning.compat.jsonargparse import told_reason
from nspo_lightning.keys import mask_keys
from nspo_lightning.terminal import counted

TRACEBACK_VARIABLE = "NSPO_LIGHTNING_TRACEBACK"

_PACKAGE = Path(nspo_lightning.__file__).parent
_OWN = tuple(str((_PACKAGE / part).resolve()) for part in ("", "callbacks", "datamodules"))
_CHECKERS = (*_OWN, str(Path(pl.__file__).parent), str(Path(jsonargparse.__file__).parent))
_LINE = 1000
_SETTING = re.compile(r"`(?:--)?([a-z_]\w*(?:\.\w+)*)`")
_LINES = 18  # with what stands before and after it, a screen of 24
_NETWORK = ("requests.", "httpx.", "httpcore.", "urllib3.", "urllib.error", "huggingface_hub.", "datasets.exceptions")
"""Where exceptions come from that mean: something could not be fetched."""


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with one message after a user's mistake, of code 2 for wrong usage, else 1; raise a bug."""
    try:
        yield
    except (UnknownConfigError, WrongOptionsError) as error:
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
        written); for a package that is not installed; for what could not be fetched; and for a ValueError or TypeError
        that this package itself, Lightning's or jsonargparse's own checks raised.
    """
    if isinstance(error, MisconfigurationException) or _missing_package(error) or _is_of_the_network(error):
        return True
    if isinstance(error, ImportError) and "pip install" in str(error):  # it says itself what is missing
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
    if isinstance(error, OSError) and error.filename is not None:
        return without_surrogates(mask_keys(_file_message(error)))
    if package := _missing_package(error):
        told = f"This needs the package `{package}`, which is not installed. Install it: `{how_to_install(package)}`."
    elif _is_of_the_network(error):
        told = (
            f"Something could not be fetched, and this machine may be offline: {_first_line(error)}\nConnect it (and "
            "leave HF_HUB_OFFLINE out), or give files of your own: paths are taken wherever a hub id is."
        )
    else:
        told = located(told_reason(str(error)))
    lines = mask_keys(told).splitlines()
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"... and {counted(len(lines) - _LINES, 'line')} more"]
    return without_surrogates("\n".join(line if len(line) <= _LINE else f"{line[:_LINE]}..." for line in lines))


def located(message: str) -> str:
    """Add to a message that begins with a setting's name where that stands, if it stands in one place of a file."""
    found = _SETTING.match(message)
    place = given().place_of_name(found[1]) if found else None
    return message if found is None or place is None else f"{found[0]} ({place}){message[found.end() :]}"


def _file_message(error: OSError) -> str:
    where, reason = repr(os.fspath(error.filename)), error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return f"There is nothing at {where}: expected a file or folder. Mend the path."
    if isinstance(error, PermissionError):
        return (
            f"{where} may not be read or written by this user ({reason}). Give another path, or mend its permissions."
        )
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"{where} is in the way: expected a folder, found a file ({reason}). Give another path."
    if error.errno == errno.EROFS:
        return f"{where} is on a file system that can only be read ({reason}). Give another path."
    return f"{where}: {reason}."


def _missing_package(error: BaseException) -> str:
    """Return the package that an error says is not installed; "" where it says none, or names one of ours."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    top = error.name.split(".")[0]
    ours = top == _PACKAGE.name or top in sys.stdlib_module_names
    return "" if ours or importlib.util.find_spec(top) is not None else top


def _is_of_the_network(error: BaseException) -> bool:
    kinds = (f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__)
    return isinstance(error, ConnectionError) or any(kind.startswith(_NETWORK) for kind in kinds)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
