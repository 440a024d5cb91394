"""What rewards are told about training: TRL's `trainer_state`, as far as there is one here."""

from __future__ import annotations

from typing import Any

_KEPT = "is kept by transformers' Trainer, which does not run here"
_UNKNOWN = "is not known: training has no end"
_NOT_GIVEN = {
    "log_history": f"{_KEPT}; keep in the reward what it must remember, and report figures by `log_metric`",
    "total_flos": _KEPT,
    "best_metric": "is chosen by `ModelCheckpoint`, after rewards were computed",
    "best_global_step": "is chosen by `ModelCheckpoint`, after rewards were computed",
    "best_model_checkpoint": "is chosen by `ModelCheckpoint`, after rewards were computed",
    "eval_steps": "has no counterpart: `trainer.val_check_interval` says when validation runs",
    "save_steps": "has no counterpart: `ModelCheckpoint` says when it writes",
    "stateful_callbacks": _KEPT,
    "trial_name": "belongs to a search of transformers' Trainer",
    "trial_params": "belongs to a search of transformers' Trainer",
    "max_steps": f"{_UNKNOWN} (`trainer.max_steps`, `max_epochs`), or this is no training",
    "num_train_epochs": f"{_UNKNOWN} (`trainer.max_epochs`), or this is no training",
    "epoch": "is not known, since this is no training",
    "train_batch_size": "is not known, since this is no training",
}


class TrainerState:
    """Where training is, under the names of transformers' class; what is not known is not there.

    Attributes:
        epoch: Passes over the data so far, with the part of the present one; only while training.
        global_step: Updates so far, with those that were skipped.
        max_steps: Updates that training takes at most; only while training, and if it has an end.
        num_train_epochs: Passes over the data at most; only while training, and if it has an end.
        num_input_tokens_seen: Tokens of prompts and completions so far, each completion with its own prompt.
        train_batch_size: Prompts in this rank's batch; only while training.
        logging_steps: Updates between two points of the logs.
        is_world_process_zero: Whether this process is the first of all.
        is_local_process_zero: Whether it is the first on its machine.
        is_hyper_param_search: False.
    """

    epoch: float
    global_step: int
    max_steps: int
    num_train_epochs: int
    num_input_tokens_seen: int
    train_batch_size: int
    logging_steps: int
    is_world_process_zero: bool
    is_local_process_zero: bool
    is_hyper_param_search: bool = False

    def __init__(self, **values: float | bool | None) -> None:
        self.__dict__.update({name: value for name, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        """Say why a name of transformers' class is not there; asked only for those that are not."""
        reason = _NOT_GIVEN.get(name, f"is not there; there are {', '.join(sorted(self.__dict__))}")
        raise AttributeError(f"`trainer_state.{name}` {reason}.")
