"""The one door to a GGUF model: its converted folder, from the cache or made now, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.atomic import replacing_folder
from nspo_lightning.policy.gguf.convert import RECORD, convert
from nspo_lightning.policy.gguf.file import Header, content_hash, find_gguf, read_header

VARIABLE = "NSPO_LIGHTNING_CACHE"
"""Environment variable with the folder of what this package keeps between runs."""
_FORMAT = "1"
"""Changed when files must be converted anew."""
_told: set[Path] = set()


def cache_folder() -> Path:
    """Return where converted files are kept: `$NSPO_LIGHTNING_CACHE/gguf`, else `nspo_lightning/gguf` in `HF_HOME`."""
    from huggingface_hub import constants

    own = os.environ.get(VARIABLE)
    root = Path(own).expanduser() if own else Path(constants.HF_HOME) / "nspo_lightning"
    return root.absolute() / "gguf"


def model_folder(path: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """Return the folder or hub id to load a model from: the path itself, or the converted folder of a GGUF file.

    A file is converted at its first use, by one process while others wait for it, and known by its content after that,
    whatever its name. Say once a process where the folder is.

    Args:
        path: A GGUF file, a folder, or a hub id.
        gguf_file: Name of the file in that folder or hub repository.
        revision: On the hub.

    Raises:
        GGUFError: If the file can't be found, read or trusted; nothing is left of it then.
    """
    file = find_gguf(path, gguf_file, revision)
    if file is None:
        return path
    folder = cache_folder() / f"{content_hash(file)[:32]}-v{_FORMAT}"
    if not (folder / RECORD).is_file():
        header = read_header(file)  # what can't be a policy leaves nothing, not even a lock
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / RECORD).is_file():
                _fill(file, header, folder)
    if folder not in _told:
        _told.add(folder)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        rank_zero_info(
            f"{file.name} is used as converted in {folder}: {record['nll_per_token']:.2f} nats a token of plain "
            f"English (limit {record['nll_limit']})."
        )
    return str(folder)


def _fill(file: Path, header: Header, folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):  # of killed processes: whoever is alive holds the lock
        shutil.rmtree(left, ignore_errors=True)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").info(  # whichever rank it is
        f"Converting {file} ({header.architecture}, {header.elements:,} weights) once; this takes a while ..."
    )
    with replacing_folder(folder) as partial:
        convert(file, header, partial)
