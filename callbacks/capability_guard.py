"""A budget for forgetting: measure how far a policy moves from its base on held-out general text, and act in time.

The callback works with any LightningModule. What it needs to know is a divergence: `module.text_sums(batch)`
(`GRPOModule` has it), or two functions, see `logits` and `without_adapter`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import Evaluable, HasHeldOutText, LimitsContext, ScoresText
from nspo_lightning.callbacks.resume.last_good import LastGood, scale_learning_rates_
from nspo_lightning.compat.lightning import datamodule_of, logging_step
from nspo_lightning.evaluation.rates import TRUNCATED
from nspo_lightning.nullspace.modes import adapted_models, adapters_off, evaluation_mode
from nspo_lightning.policy.divergence import TextSums, text_sums

Action = Literal["halve", "stop"]
ACCURACY = "general/accuracy"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How far the policy is from its base.

    Attributes:
        step: Optimizer steps so far.
        kl: KL(base || policy), nats a token.
        accuracy_drop: Of the base's general accuracy, as a share; None = not measured now.
        over: Why the budget is exceeded, in words; empty if it is not.
    """

    step: int
    kl: float
    accuracy_drop: float | None
    over: str


class CapabilityGuard(Callback):
    """Hold a run to a budget of forgetting, and say which checkpoint is the safest within it.

    Every `every_n_updates` updates, and at every validation, KL(base || policy) is measured on held-out general text.
    Over budget, weights and optimizer state go back to the last measurement that was within it (with a budget for
    accuracy: to the last such validation), and the learning rate is halved (or the run stops). At the end of every
    validation `guard/score` is the unsafe rate, plus 1 if over budget: `ModelCheckpoint(monitor="guard/score",
    mode="min")` keeps the safest checkpoint within the budget.

    Logs `guard/kl` (nats a token), `guard/perplexity`, `guard/accuracy_drop`, `guard/unsafe_rate`,
    `guard/over_budget`, `guard/rescues`, `guard/lr_scale`, `guard/score`. Place it behind `EarlyStopping`: a stop that
    was decided on weights over budget is taken back with them. A checkpoint holds the last good state too: the trained
    weights and the optimizer's state once more.

    Args:
        max_kl: Budget in nats a token; None = none.
        max_accuracy_drop: Budget as a share (0.01 = one point) below the base's `accuracy_metric`, checked at every
            validation; None = none.
        every_n_updates: Optimizer steps between two measurements.
        action: Over budget: ``halve`` the learning rate and go back, or go back and ``stop``.
        max_rescues: Stop the run, within the budget, when it would have to be rescued once more.
        text: Batches to measure on; None = the datamodule's `text_dataloader("validation", text_rows)`. With several
            ranks, each gives its share, or all the same.
        text_rows: How many rows of the datamodule's general validation text.
        unsafe_metric: Validation's name of what `guard/score` minimises; before any validation, the rollouts' `unsafe`.
        accuracy_metric: Validation's name of the accuracy.
        logits: Function of (module, batch) to the logits of the positions that count, shape (..., classes), for a
            module without `text_sums`.
        without_adapter: Function of the module to a context manager in which it is its base; with `logits`. Default:
            `disable_adapter` of the module or of the models in it.

    Raises:
        ValueError: If an argument is out of range, or there is no budget at all.
    """

    def __init__(
        self,
        max_kl: float | None = 0.02,
        max_accuracy_drop: float | None = None,
        every_n_updates: int = 5,
        action: Action = "halve",
        max_rescues: int = 8,
        text: Iterable[Any] | None = None,
        text_rows: int = 128,
        unsafe_metric: str = "safety/unsafe_rate",
        accuracy_metric: str = ACCURACY,
        logits: Callable[[Any, Any], Tensor] | None = None,
        without_adapter: Callable[[Any], AbstractContextManager[Any]] | None = None,
    ) -> None:
        if max_kl is None and max_accuracy_drop is None:
            raise ValueError("CapabilityGuard has no budget: give `max_kl` (nats) or `max_accuracy_drop` (a share).")
        for name, value in (("max_kl", max_kl), ("max_accuracy_drop", max_accuracy_drop)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}. Leave it null for no such budget.")
        if max_accuracy_drop is not None and max_accuracy_drop >= 1:
            raise ValueError(f"`max_accuracy_drop` is a share, got {max_accuracy_drop}. Use 0.01 for one point.")
        if action not in get_args(Action):
            raise ValueError(f"`action` must be 'halve' or 'stop', got {action!r}.")
        if every_n_updates < 1 or text_rows < 1 or max_rescues < 0:
            raise ValueError(
                f"`every_n_updates` and `text_rows` must be at least 1 and `max_rescues` at least 0, got "
                f"{every_n_updates}, {text_rows} and {max_rescues}."
            )
        self.max_kl = max_kl
        self.max_accuracy_drop = max_accuracy_drop
        self.every_n_updates = every_n_updates
        self.action: Action = action
        self.max_rescues = max_rescues
        self.text = text
        self.text_rows = text_rows
        self.unsafe_metric = unsafe_metric
        self.accuracy_metric = accuracy_metric
        self.logits = logits
        self.without_adapter = without_adapter
        self.rescues = 0
        self.lr_scale = 1.0
        self.base_accuracy: float | None = None
        self.readings: list[Measurement] = []
        self.good = LastGood()
        self._batches: list[Any] = []
        self._last_sums = TextSums()
        self._stop_before_validation = False

    # ------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"CapabilityGuard cannot go back to an earlier state under {type(trainer.strategy).__name__}, which "
                "keeps weights and optimizer state in flat shards. Use 'ddp' or ModelParallelStrategy (FSDP2)."
            )
        if self.logits is None and not isinstance(pl_module, ScoresText):
            raise MisconfigurationException(
                f"CapabilityGuard cannot compare {type(pl_module).__name__} with its base: it has no `text_sums`. Give "
                "`logits`, a function of (module, batch), and `without_adapter`."
            )
        if self.text is None and not isinstance(datamodule_of(trainer), HasHeldOutText):
            raise MisconfigurationException(
                "CapabilityGuard has no text to measure on: the datamodule has no `text_dataloader`. Give `text`, an "
                "iterable of held-out batches."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.logits is not None and self.without_adapter is None and not adapted_models(pl_module):
            raise MisconfigurationException(
                f"CapabilityGuard has `logits`, but cannot turn {type(pl_module).__name__} into its base. Give "
                "`without_adapter`, a function of the module to a context manager."
            )
        if not self._batches:
            self._batches = list(self._held_out_text(trainer, pl_module))
            if not ranks.any_rank(bool(self._batches)):
                raise MisconfigurationException("CapabilityGuard's text is empty: give held-out general rows.")
        if self.max_accuracy_drop is not None and not trainer.enable_validation:
            raise MisconfigurationException(
                "CapabilityGuard: `max_accuracy_drop` is checked at validation, and there is none. Give validation "
                "data (and `limit_val_batches` above 0), or leave that budget null."
            )
        if self.max_accuracy_drop is not None and self.base_accuracy is None:
            self.base_accuracy = self._measure_base_accuracy(trainer, pl_module)  # raises where there is none
        if self.good.step < 0:
            self._check_start(self._measure(trainer, pl_module, validation=False))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.good.step < 0:  # not earlier: NullSpaceProjection still moves the adapter when training starts
            self.good.take(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step and trainer.global_step % self.every_n_updates == 0:
            self._check(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_before_validation = trainer.should_stop

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._check(trainer, pl_module, validation=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)  # what is left in memory is within the budget too

    # ------------------------------------------------------------------ decisions

    def _check_start(self, found: Measurement) -> None:
        if math.isnan(found.kl) and self.max_kl is not None:
            raise MisconfigurationException(
                "CapabilityGuard: the KL to the base is not a number before training: either there is no adapter "
                "to switch off (`policy.lora: null`), or the base's logits are not finite on the text. Train an "
                "adapter, or set `max_kl: null` and give `max_accuracy_drop`."
            )
        if found.over:
            raise MisconfigurationException(
                f"CapabilityGuard: the run starts over budget ({found.over}), so there is no good state to go "
                "back to. Raise the budget, or start from the base (a fresh adapter)."
            )

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, validation: bool = False) -> None:
        """Measure unless these very weights were measured, keep the state or go back; alike on all ranks."""
        if not validation and self.readings and self.readings[-1].step == trainer.global_step:
            return
        found = self._measure(trainer, pl_module, validation)
        if found.over:
            self._rescue(trainer, pl_module, found, self._stop_before_validation if validation else None)
        elif self.good.step != trainer.global_step and (validation or self.max_accuracy_drop is None):
            # With a budget for accuracy only validation can tell whether a state is good.
            self.good.take(trainer, pl_module)
        self._log(trainer, found, validation)

    def _rescue(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: Measurement, stop_before: bool | None
    ) -> None:
        self.good.put_back_(trainer, pl_module)
        back = f"Guard: {found.over} after update {found.step}; back to the state of update {self.good.step}"
        if self.action == "stop" or self.rescues >= self.max_rescues:
            trainer.should_stop = True
            limit = "" if self.action == "stop" else f" (`max_rescues`: {self.max_rescues})"
            rank_zero_info(f"{back}, and the run stops{limit}.")
            return
        self.rescues += 1
        self.lr_scale /= 2
        scale_learning_rates_(trainer, 0.5)
        if stop_before is not None:
            trainer.should_stop = stop_before  # a goal that validation saw reached, over budget, is not reached
        rank_zero_info(f"{back}, learning rate halved to {self.lr_scale:g} of what was asked.")

    # ------------------------------------------------------------------ measuring

    def _held_out_text(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        if self.text is not None:
            return self.text
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, HasHeldOutText)  # setup made sure
        limit = pl_module.context_tokens if isinstance(pl_module, LimitsContext) else None
        return datamodule.text_dataloader("validation", self.text_rows, limit)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, validation: bool) -> Measurement:
        last = self.readings[-1] if self.readings else None
        if last is None or last.step != trainer.global_step or last.over:
            self._last_sums = self._divergence(trainer, pl_module)
        kl, drop = self._last_sums.mean_kl, None
        if validation and self.max_accuracy_drop is not None:
            drop = self._accuracy_drop(trainer)
        reasons = []
        if self.max_kl is not None and not kl <= self.max_kl:  # NaN is over
            reasons.append(f"KL {kl:.3g} > {self.max_kl:g} nats")
        if drop is not None and drop > float(self.max_accuracy_drop or 0) + 1e-9:
            reasons.append(f"{self.accuracy_metric} {100 * drop:.1f} points below the base")
        found = Measurement(step=trainer.global_step, kl=kl, accuracy_drop=drop, over=" and ".join(reasons))
        self.readings.append(found)
        return found

    def _accuracy_drop(self, trainer: pl.Trainer) -> float:
        accuracy = trainer.callback_metrics.get(self.accuracy_metric)
        if accuracy is None:
            raise self._no_accuracy("validation logged", trainer.callback_metrics)
        if self.base_accuracy is None:
            self.base_accuracy = float(accuracy)  # the first validation stands for the base
        return self.base_accuracy - float(accuracy)

    def _divergence(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TextSums:
        """Return sums over all ranks."""
        total = TextSums()
        with torch.no_grad(), evaluation_mode(pl_module):
            for batch in self._batches:
                total += self._batch_sums(trainer.strategy.batch_to_device(batch), pl_module)
        return total.over_ranks(pl_module.device)

    def _batch_sums(self, batch: Any, pl_module: pl.LightningModule) -> TextSums:
        if self.logits is None:
            assert isinstance(pl_module, ScoresText)  # setup made sure
            return pl_module.text_sums(batch)
        policy = self.logits(pl_module, batch)
        with (self.without_adapter or adapters_off)(pl_module):
            base = self.logits(pl_module, batch)
        classes = policy.shape[-1]
        policy, base = policy.reshape(-1, classes), base.reshape(-1, classes)
        targets = base.argmax(-1)  # without labels, "perplexity" is that of what the base would say
        return text_sums(policy, targets, lambda logits: logits, base, vocab_size=classes)

    def _measure_base_accuracy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
        datamodule = datamodule_of(trainer)
        if not isinstance(pl_module, Evaluable) or datamodule is None or trainer.global_step > 0:
            return None
        loaders = datamodule.val_dataloader()
        if not isinstance(loaders, (list, tuple)) or len(loaders) < 2:
            return None
        limit: Any = trainer.limit_val_batches
        general = loaders[1] if limit == 1.0 and isinstance(limit, float) else _first(loaders[1], limit)
        found = pl_module.evaluate([[], general])
        if self.accuracy_metric not in found:
            raise self._no_accuracy("the general validation rows give", found)
        return found[self.accuracy_metric]

    def _no_accuracy(self, who: str, rates: Mapping[str, Any]) -> MisconfigurationException:
        lacks = f"CapabilityGuard: {who} no `{self.accuracy_metric}`, which `max_accuracy_drop` is about: "
        if cut := float(rates.get(TRUNCATED, 0.0)):
            return MisconfigurationException(
                f"{lacks}{100 * cut:.0f} % of the general completions are thoughts that were cut before an answer. To "
                "have answers, raise `general_max_new_tokens`, or leave that budget null."
            )
        return MisconfigurationException(
            f"{lacks}answers that are missing or free text cannot be compared. Leave that budget null (`max_kl` holds "
            "for free text), give another `accuracy_metric`, or validation rows with short answers."
        )

    # ------------------------------------------------------------------ logs and state

    def _log(self, trainer: pl.Trainer, found: Measurement, validation: bool) -> None:
        metrics = trainer.callback_metrics
        unsafe = metrics.get(self.unsafe_metric, metrics.get("unsafe"))
        values = {
            "guard/kl": found.kl,
            "guard/perplexity": self._last_sums.perplexity,
            "guard/over_budget": float(bool(found.over)),
            "guard/rescues": float(self.rescues),
            "guard/lr_scale": self.lr_scale,
        }
        if found.accuracy_drop is not None:
            values["guard/accuracy_drop"] = found.accuracy_drop
        if unsafe is not None:
            values["guard/unsafe_rate"] = float(unsafe)
            if validation or self.unsafe_metric not in metrics:  # an older validation is not about these weights
                values["guard/score"] = float(unsafe) + float(bool(found.over))
        # Not `self.log`, which a hook after validation may not call.
        metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logging_step(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rescues": self.rescues,
            "lr_scale": self.lr_scale,
            "base_accuracy": self.base_accuracy,
            "good": self.good.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rescues, self.lr_scale = int(state_dict["rescues"]), float(state_dict["lr_scale"])
        self.base_accuracy = state_dict["base_accuracy"]
        self.good.load_state_dict(state_dict["good"])


def _first(loader: Any, limit: float) -> Any:
    count = int(limit) if isinstance(limit, int) else int(limit * len(loader))
    return itertools.islice(loader, count)
