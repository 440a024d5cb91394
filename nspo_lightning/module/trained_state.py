"""Find what a run has trained: a checkpoint or an adapter's folder."""

from __future__ import annotations

from pathlib import Path

from nspo_lightning.checkpoints import read_checkpoint
from nspo_lightning.policy.adapter import ADAPTER_CONFIG
from nspo_lightning.policy.settings import PolicyError

LAST = "last.ckpt"


def find_trained(name: str, run: Path) -> Path:
    """Resolve what `--ckpt_path` says.

    Args:
        name: ``best`` (what the run's `ModelCheckpoint` with a monitor calls so), ``last``, a checkpoint file, or a
            folder with a PEFT adapter.
        run: The run's folder, for the first two.

    Returns:
        The file or folder.

    Raises:
        PolicyError: If there is none.
    """
    if name not in {"best", "last"}:
        path = Path(name).expanduser()
        if path.is_file() or (path / ADAPTER_CONFIG).is_file():
            return path
        what = f"a folder without {ADAPTER_CONFIG}" if path.is_dir() else "nothing"
        raise PolicyError(
            f"`--ckpt_path {name}`: expected a checkpoint file, or a folder with a PEFT adapter, and found {what} "
            "there. Give a file from a run's `checkpoints/`, its `adapter/`, or `best` or `last`."
        )
    folder = run / "checkpoints"
    last = folder / LAST
    if not last.is_file():
        raise PolicyError(
            f"`--ckpt_path {name}`: expected the run's {last}, and it is not there. Give the name of a run that was "
            "trained (`--name`), or a checkpoint file."
        )
    if name == "last":
        return last
    states = read_checkpoint(last).get("callbacks", {})
    for state in states.values():
        path = Path(str(state.get("best_model_path") or "")) if isinstance(state, dict) else Path()
        if not isinstance(state, dict) or not state.get("monitor"):
            continue
        for candidate in (folder / path.name, path):  # the run's folder may have been moved
            if candidate.is_file():
                return candidate
    raise PolicyError(
        f"`--ckpt_path best`: no `ModelCheckpoint` of {run} monitored a metric and kept a file, so none is the best. "
        "Use `last`, or train with `monitor`."
    )
