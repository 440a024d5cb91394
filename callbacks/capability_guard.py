"""A budget for forgetting: measure how far a policy moves from its base on held-out general text, and act in time.

The callback works with any LightningModule. What it needs to know is a divergence: `module.text_scores(batch)`
(`GRPOModule` has it), or two functions, see `logits` and `without_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
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
from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.callbacks.guard.budget import Budget, Measurement
from nspo_lightning.callbacks.last_checkpoint import LastCheckpoint
from nspo_lightning.callbacks.protocols import Evaluable, HasHeldOutText, LimitsContext, ScoresText
from nspo_lightning.callbacks.resume.last_good import LastGood, scale_learning_rates_
from nspo_lightning.callbacks.stopping import is_told_to_stop, stop_if_told
from nspo_lightning.compat.lightning import callbacks_of, datamodule_of, logging_step
from nspo_lightning.evaluation.loaders import GENERAL
from nspo_lightning.evaluation.rates import ACCURACY, REFUSAL, TRUNCATED
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, text_means
from nspo_lightning.nullspace.modes import adapted_models, adapters_off, evaluation_mode
from nspo_lightning.policy.divergence import TextScores, token_scores

Action = Literal["halve", "stop"]
_MEASURED = ("guard/kl", "guard/kl_first", "guard/perplexity", "guard/over_budget", "guard/score")


class _PutOff(Exception):
    """The run was told to stop: what is due now is measured by the run that goes on."""


def _put_off(trainer: pl.Trainer) -> None:
    if is_told_to_stop(trainer):
        raise _PutOff


class CapabilityGuard(Callback):
    """Hold a run to a budget of forgetting, and say which checkpoint is the safest within it.

    Every `every_n_updates` updates, and at every validation, KL(base || policy) is measured on held-out general text.
    Over budget, weights and optimizer state go back to the last measurement that was within it (with a budget for
    accuracy or refusals: to the last such validation), and the learning rate is halved (or the run stops). At the end
    of every validation `guard/score` is the unsafe rate, plus 1 if over budget: `ModelCheckpoint(monitor="guard/score",
    mode="min")` keeps the safest checkpoint within the budget.

    Logs `guard/kl` and `guard/kl_first` (nats a token), `guard/perplexity`, `guard/accuracy_drop`,
    `guard/refusal_rise`, `guard/unsafe_rate`, `guard/over_budget`, `guard/rescues`, `guard/lr_scale`, `guard/score`.
    Place it behind `EarlyStopping`: a stop that was decided on weights over budget is taken back with them. A
    checkpoint holds the last good state too: the trained weights and the optimizer's state once more. A signal ends a
    measurement after the batch at hand; after an update it is then made by the run that goes on, before all else.

    Args:
        max_kl: Budget in nats a token of whole answers; None = none.
        max_accuracy_drop: Budget as a share (0.01 = one point) below the base's `accuracy_metric`, checked at every
            validation; None = none.
        max_kl_first: Budget in nats a token at the first three tokens of answers, where it is decided whether to
            refuse; None = none.
        max_refusal_rise: Budget as a share (0.05 = five points) above the base's `refusal_metric`, checked at every
            validation; None = none.
        every_n_updates: Optimizer steps between two measurements.
        action: Over budget: ``halve`` the learning rate and go back, or go back and ``stop``.
        max_rescues: Stop the run, within the budget, when it would have to be rescued once more.
        text: Batches to measure on; None = the datamodule's `text_dataloader("validation", text_rows)`. With several
            ranks, each gives its share, or all the same.
        text_rows: How many rows of the datamodule's general validation text.
        unsafe_metric: Validation's name of what `guard/score` minimises; before any validation, the rollouts' `unsafe`.
        accuracy_metric: Validation's name of the accuracy.
        refusal_metric: Validation's name of the share of ordinary prompts that are refused.
        logits: Function of (module, batch) to the logits of the positions that count, shape (..., classes), for a
            module without `text_scores`.
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
        max_kl_first: float | None = None,
        max_refusal_rise: float | None = None,
        refusal_metric: str = REFUSAL,
    ) -> None:
        self.budget = Budget(
            max_kl=max_kl,
            max_kl_first=max_kl_first,
            max_accuracy_drop=max_accuracy_drop,
            max_refusal_rise=max_refusal_rise,
        )
        if action not in get_args(Action):
            raise ValueError(f"`action` must be 'halve' or 'stop', got {action!r}.")
        if every_n_updates < 1 or text_rows < 1 or max_rescues < 0:
            raise ValueError(
                f"`every_n_updates` and `text_rows` must be at least 1 and `max_rescues` at least 0, got "
                f"{every_n_updates}, {text_rows} and {max_rescues}."
            )
        self.every_n_updates = every_n_updates
        self.action: Action = action
        self.max_rescues = max_rescues
        self.text = text
        self.text_rows = text_rows
        self.unsafe_metric = unsafe_metric
        self.accuracy_metric = accuracy_metric
        self.refusal_metric = refusal_metric
        self.logits = logits
        self.without_adapter = without_adapter
        self.rescues = 0
        self.lr_scale = 1.0
        self.base_rates: dict[str, float] = {}
        self.readings: list[Measurement] = []
        self.good = LastGood()
        self._batches: list[Any] = []
        self._last_scores = TextScores()
        self._scored: int | None = None
        """Of which update the scores are; None = of weights that are not there any more."""
        self._checked = -1
        """Which update was last held to the budget."""
        self._stop_before_validation = False

    # ------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._scored, self._checked = None, -1  # of an earlier fit
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"CapabilityGuard cannot go back to an earlier state under {type(trainer.strategy).__name__}, which "
                "keeps weights and optimizer state in flat shards. Use 'ddp' or ModelParallelStrategy (FSDP2)."
            )
        if self.logits is None and not isinstance(pl_module, ScoresText):
            raise MisconfigurationException(
                f"CapabilityGuard cannot compare {type(pl_module).__name__} with its base: it has no `text_scores`. "
                "Give `logits`, a function of (module, batch), and `without_adapter`."
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
        self._read_text(trainer, pl_module)
        if self._wanted_rates and not trainer.enable_validation:
            name = "max_refusal_rise" if self.budget.max_accuracy_drop is None else "max_accuracy_drop"
            raise MisconfigurationException(
                f"CapabilityGuard: `{name}` is checked at validation, and there is none. Give validation data (and "
                "`limit_val_batches` above 0), or leave that budget null."
            )
        if self._wanted_rates and not self.base_rates:
            self.base_rates = self._measure_base_rates(trainer, pl_module)  # raises where there are none
        if self.good.step < 0:
            self._check_start(self._measure(trainer, pl_module, validation=False))
            self._checked = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.good.step < 0:  # not earlier: NullSpaceProjection still moves the adapter when training starts
            self.good.take(trainer, pl_module)
        if self._is_due(trainer):  # the run that this one goes on from put it off
            self._check(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due(trainer):
            try:
                self._check(trainer, pl_module, ask=_put_off)  # no run can go on from between two hooks
            except _PutOff:
                unknown = {name: torch.tensor(math.nan) for name in _MEASURED if name in trainer.callback_metrics}
                trainer.callback_metrics.update(unknown)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_before_validation = trainer.should_stop

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._score_now(trainer, pl_module)  # here, since a run goes on from here, and not from the hook below

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._check(trainer, pl_module, validation=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)  # what is left in memory is within the budget too

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.good.step < 0 or trainer.global_step == 0 or self._checked == trainer.global_step:
            return
        self._read_text(trainer, pl_module)
        self._check(trainer, pl_module)  # training was over in the checkpoint, and its last check had been put off
        for callback in callbacks_of(trainer) if self.readings[-1].over else ():
            if isinstance(callback, LastCheckpoint):
                callback.write(trainer)

    # ------------------------------------------------------------------ decisions

    @property
    def _wanted_rates(self) -> list[str]:
        """What must be known of every validation."""
        pairs = (
            (self.accuracy_metric, self.budget.max_accuracy_drop),
            (self.refusal_metric, self.budget.max_refusal_rise),
        )
        return [name for name, budget in pairs if budget is not None]

    def _check_start(self, found: Measurement) -> None:
        if math.isnan(found.kl_first) and not math.isnan(found.kl) and self.budget.max_kl_first is not None:
            raise MisconfigurationException(
                "CapabilityGuard: `max_kl_first` is about the first tokens of answers, and the text has no prompts "
                "with answers. Give general validation rows with an `answer`, or leave that budget null."
            )
        if math.isnan(found.kl) and (self.budget.max_kl is not None or self.budget.max_kl_first is not None):
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

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return step > 0 and step % self.every_n_updates == 0 and step != self._checked

    def _check(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        validation: bool = False,
        ask: Callable[[pl.Trainer], None] = stop_if_told,
    ) -> None:
        """Measure unless these very weights were measured, keep the state or go back; alike on all ranks."""
        if not validation and self._checked == trainer.global_step:
            return
        found = self._measure(trainer, pl_module, validation, ask)
        self._checked = trainer.global_step
        if found.over:
            self._rescue(trainer, pl_module, found, self._stop_before_validation if validation else None)
        elif self.good.step != trainer.global_step and (validation or not self._wanted_rates):
            # With a budget for rates only validation can tell whether a state is good.
            self.good.take(trainer, pl_module)
        self._log(trainer, found, validation)

    def _rescue(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: Measurement, stop_before: bool | None
    ) -> None:
        self.good.put_back_(trainer, pl_module)
        self._scored = None
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

    def _read_text(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = self._batches or list(self._held_out_text(trainer, pl_module))
        if not ranks.any_rank(bool(self._batches)):
            raise MisconfigurationException("CapabilityGuard's text is empty: give held-out general rows.")

    def _held_out_text(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        if self.text is not None:
            return self.text
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, HasHeldOutText)  # setup made sure
        limit = pl_module.context_tokens if isinstance(pl_module, LimitsContext) else None
        return datamodule.text_dataloader("validation", self.text_rows, limit)

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        validation: bool,
        ask: Callable[[pl.Trainer], None] = stop_if_told,
    ) -> Measurement:
        self._score_now(trainer, pl_module, ask)
        means, drop, rise = text_means(self._last_scores), None, None
        kl, kl_first = (means[name].value if name in means else math.nan for name in (KL, KL_FIRST))
        if validation and self._wanted_rates:
            now = self._rates_of(trainer.callback_metrics, "validation logged")
            self.base_rates = self.base_rates or now  # the first validation stands for the base
            changes = {name: now[name] - self.base_rates[name] for name in now}
            rise = changes.get(self.refusal_metric)
            drop = -changes[self.accuracy_metric] if self.accuracy_metric in changes else None
        found = Measurement(step=trainer.global_step, kl=kl, kl_first=kl_first, accuracy_drop=drop, refusal_rise=rise)
        found = replace(found, over=self.budget.over(found, self.accuracy_metric, self.refusal_metric))
        self.readings.append(found)
        return found

    def _rates_of(self, metrics: Mapping[str, Any], who: str) -> dict[str, float]:
        """Return the rates that there is a budget for; an error says that somebody has none."""
        if missing := [name for name in self._wanted_rates if name not in metrics]:
            raise self._no_rate(missing[0], who, metrics)
        return {name: float(metrics[name]) for name in self._wanted_rates}

    def _score_now(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        ask: Callable[[pl.Trainer], None] = stop_if_told,
    ) -> None:
        """Score all ranks' text, unless the weights are those that it was scored with."""
        if self._scored != trainer.global_step:
            self._last_scores = self._score(trainer, pl_module, ask)
            self._scored = trainer.global_step

    def _score(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, ask: Callable[[pl.Trainer], None]
    ) -> TextScores:
        total = TextScores()
        shown = measuring(trainer, "Guarding general text", [self._batches], ask=ask)
        with torch.no_grad(), evaluation_mode(pl_module), shown as [batches]:
            for batch in batches:
                total += self._score_batch(trainer.strategy.batch_to_device(batch), pl_module)
        return total.over_ranks()

    def _score_batch(self, batch: Any, pl_module: pl.LightningModule) -> TextScores:
        if self.logits is None:
            assert isinstance(pl_module, ScoresText)  # setup made sure
            return pl_module.text_scores(batch)
        policy = self.logits(pl_module, batch)
        with (self.without_adapter or adapters_off)(pl_module):
            base = self.logits(pl_module, batch)
        classes = policy.shape[-1]
        policy, base = policy.reshape(-1, classes), base.reshape(-1, classes)
        targets = base.argmax(-1)  # without labels, "perplexity" is that of what the base would say
        scores = token_scores(policy, targets, lambda logits: logits, base, vocab_size=classes)
        return TextScores((scores.as_row(),))

    def _measure_base_rates(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        datamodule = datamodule_of(trainer)
        if not isinstance(pl_module, Evaluable) or datamodule is None or trainer.global_step > 0:
            return {}
        loaders = datamodule.val_dataloader()
        if not isinstance(loaders, (list, tuple)) or len(loaders) < 2:
            return {}
        limit, name = trainer.limit_val_batches, "trainer.limit_val_batches"
        shown = measuring(trainer, "Measuring the base", [loaders[GENERAL]], limit, name)
        with adapters_off(pl_module), shown as [general]:
            found = pl_module.evaluate([[], general])  # no harmful prompt; `general` has the number GENERAL
        return self._rates_of(found, "the general validation rows give")

    def _no_rate(self, name: str, who: str, rates: Mapping[str, Any]) -> MisconfigurationException:
        accuracy = name == self.accuracy_metric
        budget = "max_accuracy_drop" if accuracy else "max_refusal_rise"
        lacks = f"CapabilityGuard: {who} no `{name}`, which `{budget}` is about: "
        if cut := float(rates.get(TRUNCATED, 0.0)):
            return MisconfigurationException(
                f"{lacks}{100 * cut:.0f} % of the general completions are thoughts that were cut before an answer. To "
                "have answers, raise `general_max_new_tokens`, or leave that budget null."
            )
        if not accuracy:
            return MisconfigurationException(
                f"{lacks}there are no ordinary general prompts. Give general validation rows of a skill that is not "
                "among `over_refusal_skills`, another `refusal_metric`, or leave that budget null."
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
            "guard/perplexity": self._last_scores.perplexity,
            "guard/over_budget": float(bool(found.over)),
            "guard/rescues": float(self.rescues),
            "guard/lr_scale": self.lr_scale,
        }
        if not math.isnan(found.kl_first):
            values["guard/kl_first"] = found.kl_first
        if found.accuracy_drop is not None:
            values["guard/accuracy_drop"] = found.accuracy_drop
        if found.refusal_rise is not None:
            values["guard/refusal_rise"] = found.refusal_rise
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
            "base_rates": self.base_rates,
            "good": self.good.state_dict(),
            "checked": self._checked,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rescues, self.lr_scale = int(state_dict["rescues"]), float(state_dict["lr_scale"])
        earlier = state_dict.get("base_accuracy")  # of earlier checkpoints
        self.base_rates = dict(state_dict.get("base_rates") or {})
        if earlier is not None:
            self.base_rates[self.accuracy_metric] = float(earlier)
        self.good.load_state_dict(state_dict["good"])
        self._checked = int(state_dict.get("checked", self.good.step))  # earlier checkpoints lack it
