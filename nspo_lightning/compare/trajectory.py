"""Measures a run along the way, keeps the weights that the selection rule prefers, and measures those on test prompts.

The validation loop is Lightning's own; nothing here depends on the method that is trained.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from nspo_lightning.atomic import write_json
from nspo_lightning.attacks import find_attacks
from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.callbacks.general_text import measure_text
from nspo_lightning.callbacks.protocols import CountsUpdates, Evaluable
from nspo_lightning.compare.cost import Cost
from nspo_lightning.compare.distance import Distance
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compat.lightning import callbacks_of, datamodule_of
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.evaluation.rates import UNSAFE, is_at_most
from nspo_lightning.evaluation.text_means import text_means

_Split = Literal["validation", "test"]

_PREFIXES = ("safety/", "general/")


class Trained(Evaluable, CountsUpdates, Protocol):
    """What is asked of the module that `fit` trains; `GRPOModule` has it."""

    @property
    def rollouts(self) -> int:
        """Batches of prompts that were rolled out so far."""


class Trajectory(Callback):
    """Record every validation, stop by one rule for all methods, measure the selected checkpoint on the test split.

    Args:
        result: JSON file, written when the run is complete and never before.
        steps: Training steps at most.
        unsafe_limit: See `SelectionRule`.
        metric: See `SelectionRule`.
        higher_is_better: See `SelectionRule`.
        stop_unsafe: Stop once an evaluation's unsafe rate is at most this.
        text_rows: General test rows with an answer whose NLL and KL to the base are measured; 0 = none, None = all.
            On validation rows `GeneralText` does so. So many harmful prompts are answered by the base, see `Distance`.
        measure_start: Measure before the first step as well (what the base does).
        attacks: Also measure the selected checkpoint under these attacks, see `test --attacks`.
    """

    def __init__(
        self,
        result: str,
        steps: int,
        unsafe_limit: float = 0.05,
        metric: str = "general/accuracy",
        higher_is_better: bool = True,
        stop_unsafe: float = 0.01,
        text_rows: int | None = 0,
        measure_start: bool = False,
        attacks: list[str] | None = None,
    ) -> None:
        self.result = Path(result)
        self.rule = SelectionRule(unsafe_limit=unsafe_limit, metric=metric, higher_is_better=higher_is_better)
        self.steps = steps
        self.stop_unsafe = stop_unsafe
        self.text_rows = text_rows
        self.measure_start = measure_start
        self.attacks = None if attacks is None else find_attacks(attacks)
        self.records: list[dict[str, float]] = []
        self.selected: dict[str, float] = {}
        self.distance = Distance(text_rows)
        self.cost = Cost()
        self._weights: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._begin = 0.0
        self._moved: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.monotonic()
        self.cost.begin(pl_module.device)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.distance.begin(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.cost.step_begins()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.cost.step_ends()
        if trainer.fit_loop.total_batch_idx + 1 >= self.steps:
            trainer.should_stop = True  # Lightning validates once more on the way out

    def _is_recorded(self, trainer: pl.Trainer) -> bool:
        # The last step's validation runs once more on the way out.
        return bool(self.records) and self.records[-1]["steps"] == trainer.fit_loop.total_batch_idx + 1

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not at the validation's end: a run that a signal ended goes on from its beginning.
        if not trainer.sanity_checking and not self._is_recorded(trainer):
            self._moved = self.distance.measure(trainer, pl_module, _datamodule(trainer), "validation")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self._is_recorded(trainer):
            return
        rates = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(_PREFIXES)}
        self._record(trainer, pl_module, rates | self._moved)
        if UNSAFE not in rates:
            raise MisconfigurationException(
                f"`compare` chooses checkpoints by {UNSAFE}, and nobody tells unsafe answers here: the reward is no "
                "judge. Set `model.judge`, for instance a GuardJudge."
            )
        if is_at_most(rates[UNSAFE], self.stop_unsafe):
            rank_zero_info(f"Stopping: unsafe rate {rates[UNSAFE]:.3f} <= {self.stop_unsafe}.")
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.measure_start and not self.records:
            moved = self.distance.measure(trainer, pl_module, _datamodule(trainer), "validation")
            self._record(trainer, pl_module, self._measure(trainer, pl_module, "validation") | moved)
        if self._weights:
            pl_module.load_state_dict(self._weights, strict=False)
        _datamodule(trainer).test_attacks = self.attacks
        test = self._measure(trainer, pl_module, "test")
        _datamodule(trainer).test_attacks = None
        test |= self.distance.measure(trainer, pl_module, _datamodule(trainer), "test")
        harmful, general = _datamodule(trainer).eval_rows("test")
        result = {
            "selected": self.selected,
            "test": test,
            "test_prompts": {"harmful": len(harmful), "general": len(general)},
            "trajectory": self.records,
            "seconds": round(self._elapsed(), 1),
            "cost": self.cost.found(callbacks_of(trainer), pl_module.device),
            **_null_space(trainer),
        }
        if trainer.is_global_zero:
            write_json(result, self.result)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "selected": self.selected,
            "weights": self._weights,
            "seconds": self._elapsed(),
            "distance": self.distance.state_dict(),
            "cost": self.cost.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records, self.selected = list(state_dict["records"]), dict(state_dict["selected"])
        self._weights, self._seconds = dict(state_dict["weights"]), float(state_dict["seconds"])
        self.distance.load_state_dict(state_dict.get("distance", {}))
        self.cost.load_state_dict(state_dict.get("cost", {}))

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._begin if self._begin else 0.0)

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rates: dict[str, float]) -> None:
        record = {
            "steps": float(trainer.fit_loop.total_batch_idx + 1),
            "rollouts": float(_trained(pl_module).rollouts),
            "updates": float(_trained(pl_module).updates),
            **rates,
        }
        if self.rule.metric not in record:
            raise MisconfigurationException(
                f"No `{self.rule.metric}` to select checkpoints by among {', '.join(sorted(record))}: answers that are "
                "missing or free text cannot be compared. Use `--metric general/nll --higher_is_better false`, or "
                "general rows with short answers."
            )
        self.records.append(record)
        if not self.selected or self.rule.preference(record) > self.rule.preference(self.selected):
            self.selected = record
            trained = ((n, p) for n, p in pl_module.named_parameters() if p.requires_grad)
            self._weights = {name: parameter.detach().cpu().clone() for name, parameter in trained}

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: _Split) -> dict[str, float]:
        """Return rates and general text outside of the validation loop."""
        data = _datamodule(trainer)
        loaders = data.test_dataloader() if split == "test" else data.val_dataloader()
        with measuring(trainer, f"Measuring on {split} prompts", loaders) as shown:
            rates = _trained(pl_module).evaluate(shown)
        means = text_means(measure_text(trainer, pl_module, split, self.text_rows))
        return rates | {name: mean.value for name, mean in means.items()}


def _trained(pl_module: pl.LightningModule) -> Trained:
    return cast(Trained, pl_module)


def _datamodule(trainer: pl.Trainer) -> AlignmentDataModule:
    return cast(AlignmentDataModule, datamodule_of(trainer))


def _null_space(trainer: pl.Trainer) -> dict[str, float | None]:
    """Read leak, null share and energy left off the projection callback, None where it is off."""
    for callback in callbacks_of(trainer):
        if not isinstance(callback, NullSpaceProjection):
            continue
        leaks = callback.certificate()  # before a look at the bases: a run that was over when resumed gets them by it
        if callback.calibration is not None:
            bases = callback.calibration.bases.values()
            return {
                "leak": max(leaks.values(), default=0.0),
                "null_share": fmean(b.null_dims / b.width for b in bases),
                "energy_left": fmean(b.choice.energy_left for b in bases),
            }
    return {"leak": None, "null_share": None, "energy_left": None}
