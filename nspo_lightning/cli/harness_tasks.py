"""Which tasks of lm-evaluation-harness `evaluate` runs: by name, from a YAML file, or on a local file of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

_TASK = re.compile(r"^task:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def find_tasks(text: str) -> tuple[list[str], list[str]]:
    """Read `--tasks`: names and YAML files, separated by commas.

    Returns:
        The names of all tasks, and the folders of the YAML files, in which the harness finds them.

    Raises:
        MisconfigurationException: If a YAML file is missing or holds no task.
    """
    names, folders = [], []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if not entry.endswith((".yaml", ".yml")):
            names.append(entry)
            continue
        path = Path(entry)
        # The harness's own tags (`!function`) are none of YAML's, so only the one line is read.
        found = _TASK.search(path.read_text()) if path.is_file() else None
        if found is None:
            why = "holds no line `task: NAME`" if path.is_file() else "is not there"
            raise MisconfigurationException(
                f"`--tasks`: the task file {entry} {why}. Give the path of one task's YAML, see docs/evaluation.md."
            )
        names.append(found[1])
        folders.append(str(path.resolve().parent))
    return names, folders


def find_data(pairs: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """Read `--data TASK=FILE` options.

    Returns:
        Task to the file of its rows.

    Raises:
        MisconfigurationException: If one is written otherwise, is about no task of `tasks`, or has no readable file.
    """
    found = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        path = Path(file)
        if not equals or name not in tasks:
            raise MisconfigurationException(
                f"`--data` takes TASK=FILE with a task of `--tasks` ({', '.join(tasks)}), got {pair!r}."
            )
        if not path.is_file():
            raise MisconfigurationException(f"`--data {pair}`: there is no file {file}. Give the path of the rows.")
        if _format(path) is None:
            raise MisconfigurationException(
                f"`--data {pair}`: expected a file that ends in {', '.join(_FORMATS)} (or that with .gz)."
            )
        found[name] = path.resolve()
    return found


def harness_tasks(tasks: Sequence[str], data: Mapping[str, Path], manager: Any) -> list[Any]:
    """Return what the harness is asked to run: names, and for tasks with a local file the task itself.

    Such a task keeps its prompts and its metrics, and reads the file's rows instead of its own; no examples are put
    before them, since the file has none to spare.

    Raises:
        MisconfigurationException: If a task's data can't be fetched, or a file's rows are not those that it reads.
    """
    built: list[Any] = []
    for name in tasks:
        if name not in data:
            _check_fetched(name, manager)
            built.append(name)
            continue
        own = {
            "task": name,
            "dataset_path": _format(data[name]),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data[name])}},
            "test_split": "test",
            **dict.fromkeys(("training_split", "validation_split", "fewshot_split")),
            "num_fewshot": 0,
        }
        try:  # a group is the one place where the harness takes changes to a task of its own; it tries the first row
            task = manager.load([{"group": "local", "task": [own]}])["tasks"].get(name)
        except Exception as error:  # of readers, of templates, of the tasks' own functions
            raise MisconfigurationException(
                f"`--data {name}={data[name]}`: task {name} cannot read its rows ({type(error).__name__}: {error}). "
                "Give the rows in the layout of the task's own dataset, or a task of your own as YAML, see "
                "docs/evaluation.md."
            ) from error
        if task is None:
            raise MisconfigurationException(
                f"`--data {name}=...`: {name} is a group of tasks. Give the file to one task, as arc_challenge."
            )
        built.append(task)
    return built


def _check_fetched(name: str, manager: Any) -> None:
    """Fetch a task's data now, into the cache of `datasets`, and not after the policy was loaded."""
    try:
        manager.load([name])
    except Exception as error:  # of the hub's client, of the network, of the task's own code
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MisconfigurationException(
            f"`--tasks {name}`: its data can't be fetched or read ({type(error).__name__}: {reason[:300]}). Offline, "
            f"give the rows as a file, `--data {name}=FILE`, or run it once where the hub can be reached."
        ) from error


def _format(path: Path) -> str | None:
    return _FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
