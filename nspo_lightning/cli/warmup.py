"""How a run's configuration becomes that of its warm start: another name, a few updates, a check every few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.callbacks import CapabilityGuard, GeneralText, RunReport
from nspo_lightning.cli.run_folder import check_run_name
from nspo_lightning.datamodules.warmup import WarmupSettings

WARMUP = "warmup"
"""The subcommand."""
_GRPOS_OWN = (EarlyStopping, ModelCheckpoint, CapabilityGuard, GeneralText, RunReport)
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")


def run_name(name: str, command: str | None) -> str:
    """Return what a run's folder is called: a warm start stands beside the run that goes on from it."""
    if command != WARMUP:
        return name
    check_run_name(f"{name}-{WARMUP}")
    return f"{name}-{WARMUP}"


def warmup_trainer(warmup: WarmupSettings) -> dict[str, Any]:
    """Return the Trainer's arguments that a warm start decides."""
    return {
        "max_steps": warmup.updates,
        "max_epochs": -1,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0,
        "limit_test_batches": 1.0,
        "val_check_interval": warmup.check_every,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": -1,  # the figures before the first update
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
    }


def warmup_callbacks(given: Sequence[Callback], warmup: WarmupSettings) -> list[Callback]:
    """Leave out callbacks that stop, choose or act by what GRPO logs; measure text on as many rows as are answered."""
    kept = [callback for callback in given if not isinstance(callback, _GRPOS_OWN)]
    return [*kept, GeneralText(text_rows=warmup.check_prompts), RunReport(text_rows=warmup.check_prompts)]


def tell_what_is_left_out(given: Sequence[Callback], trainer: Mapping[str, Any]) -> None:
    """Say which callbacks, and which limits of batches among the Trainer's arguments, a warm start does without."""
    names = {type(callback).__name__ for callback in given if isinstance(callback, _GRPOS_OWN)}
    limits = [name for name in _LIMITS if trainer.get(name) is not None and not _is_whole(trainer[name])]
    if names or limits:
        own = "; `warmup.max_updates` and `warmup.check_prompts` say how much it does" if limits else ""
        rank_zero_info(
            f"The warm start leaves out {', '.join([*sorted(names), *limits])} of the configuration, which are for "
            f"GRPO{own}."
        )


def _is_whole(limit: Any) -> bool:
    """Whether it is a share of 1; the number 1 is one batch."""
    return isinstance(limit, float) and limit == 1.0
