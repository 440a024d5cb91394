"""A warm start: a few supervised refusals, so that GRPO finds groups in which some answers refuse and some don't.

A policy that never refuses gives every group the same reward, and GRPO learns nothing from it. `WarmupModule` learns a
few written refusals by their likelihood, on the same adapter, in the same null space (the callback holds it as it
does in `fit`), and looks every few updates at held-out prompts until enough of its answers refuse. General prompts
stand beside the harmful ones in each update: the base answers them, and the policy is held to the base on these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.datamodules.warmup import GENERAL_PROMPTS, WarmupDataModule, WarmupSettings
from nspo_lightning.evaluation.loaders import HARMFUL
from nspo_lightning.evaluation.rates import Rate, RateTable, Seen
from nspo_lightning.grpo import group_advantages
from nspo_lightning.module.evaluator import EVALUATION_SEED
from nspo_lightning.module.finite import loss_scale, nonfinite_in, on_any_rank
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.judging import repeated, repeated_columns
from nspo_lightning.module.scorer import given_answers, step_counts
from nspo_lightning.module.training_data import longest_prompt_tokens
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.module.training_state import trainer_state
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.rewards.protocol import Outcome
from nspo_lightning.rollout.places import places_among_ranks
from nspo_lightning.terminal import counted

REFUSED, SIGNAL = "warmup/refusal_rate", "warmup/groups_with_signal"
GENERAL, GENERAL_KL = "warmup/general_refusal_rate", "warmup/general_kl"
_LEAST_KNOWN = 0.5  # share of the taught answers that the judge must call refusals


class WarmupError(ValueError):
    """A warm start that did not reach its goal, or can't reach it."""

    raised_on_all_ranks = True


class WarmupModule(GRPOModule):
    """Supervised refusals on the policy of a `GRPOModule`, whose arguments it takes.

    Attributes:
        warmup: The settings of the warm start.
        before: Rates before the first update, by name.
        latest: Rates of the last check, by name.
        stopped: Why no update follows: "reached", "general", or "" while it goes on.
    """

    job = "warmup"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warmup = WarmupSettings()
        self.before: dict[str, Rate] = {}
        self.latest: dict[str, Rate] = {}
        self.stopped = ""
        self._seen = RateTable()

    # ------------------------------------------------------------------ training

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.warmup.general_rows and not has_adapter(self.require_policy()):
            raise WarmupError(
                "`warmup.general_share` holds the policy to its base, the policy with its adapter off, and there is no "
                "adapter (`policy.lora: null`). Set `warmup.general_share: 0`, or train an adapter."
            )
        if self.warmup.general_rows:
            longest = longest_prompt_tokens(self.trainer)
            self.text_policy.check_room(longest, self.warmup.answer_tokens, "warmup.answer_tokens")
        self._check_judge()

    @override
    def on_train_start(self) -> None:
        self.require_policy().train()
        if _share(self.before, REFUSED) >= self.warmup.refusal_share and not self.stopped:
            rank_zero_info("The policy refuses as often as was asked for before any update: nothing is taught.")
            self._stop("reached")

    @override
    def on_train_end(self) -> None:
        pass

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.text_policy.trainable_parameters())
        for group in optimizer.param_groups if self.warmup.lr is not None else ():
            group["lr"] = self.warmup.lr
        return optimizer

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        start, window = time.perf_counter(), self.progress.window
        # A look-alike is taught its own answer, which must not come again behind its beginning.
        batch = dict(self.prefixes.for_training(batch, alike=False).batch)
        rollout = given_answers(batch)
        normaliser = window.add(*step_counts(rollout.completion_mask, self._by_tokens), "dapo")
        window.has_signal = True
        loss = self.scorer.likelihood_loss(rollout, normaliser.num_tokens, loss_scale(self.trainer) or 1.0)
        shown: dict[str, Any] = {"loss": loss.detach() * window.own_scale}
        if (general := batch.get(GENERAL_PROMPTS)) is not None:
            kl = self._general_kl(general)
            shown[GENERAL_KL] = kl.detach()
            loss = loss + self.warmup.general_weight * kl
        window.nonfinite = on_any_rank(nonfinite_in({"loss": loss}), "loss")
        shown["step_time"] = time.perf_counter() - start
        self._log_step(shown, mean_over_ranks=True)
        return loss

    @property
    def _by_tokens(self) -> TrainingSettings:
        """The settings with the loss type that averages over tokens, which a warm start always does."""
        return replace(self.settings, objective=replace(self.settings.objective, loss_type="dapo"))

    def _general_kl(self, batch: Mapping[str, Any]) -> Tensor:
        """Return KL(base || policy), nats a token, on the base's greedy answers to general prompts.

        They are drawn anew each time, so that they depend on the batch alone, whatever was seen before a resume.
        """
        most = self.warmup.answer_tokens
        sampling = replace(self.general_sampling, max_new_tokens=most, min_new_tokens=0)
        with adapters_off(self.require_policy()):
            rollout, _ = self.text_policy.generate(batch, sampling, 1, EVALUATION_SEED, exact=True)
        counts, _ = step_counts(rollout.completion_mask, self._by_tokens)
        return self.scorer.kl_loss(rollout, counts.num_tokens, loss_scale(self.trainer) or 1.0)

    # ------------------------------------------------------------------ checks

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == HARMFUL:
            observations = self._answer_in_groups(batch, batch_idx)
        else:
            found = self.evaluator.answer(batch, dataloader_idx, batch_idx)
            observations = [(GENERAL, float(outcome == "refusal")) for outcome in found.outcomes if outcome is not None]
        self._seen.update(observations, self.device)

    def _answer_in_groups(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, float]]:
        """Answer harmful prompts in groups, as GRPO will.

        Returns:
            Observations of which answers refuse and which groups have a signal. Where answers are begun in training,
            only these count: plain ones are learnt on the way.
        """
        group, count = self.settings.group_size, len(batch["prompt"])
        places = places_among_ranks(count)
        seed, begun = EVALUATION_SEED + batch_idx, self.prefixes.for_training(batch)
        rollout, texts = self.text_policy.generate(begun.batch, self.settings.sampling, group, seed, places, exact=True)
        texts = self.prefixes.judged(begun, rollout, texts, self.settings.sampling)
        prompts, columns = repeated(batch["prompt"], group), repeated_columns(batch, group)
        state = trainer_state(self.trainer, self.progress, count)
        result, outcomes = self.evaluator.judging.score(prompts, texts, columns, rollout.completion_tokens(), state)
        signal = group_advantages(result.total, group).reshape(count, group).ne(0).any(1)
        counted = [begins or not any(begun.begins) for begins in begun.begins]
        refused = [
            (REFUSED, float(outcome == "refusal"))
            for i, outcome in enumerate(outcomes)
            if outcome is not None and counted[i // group]
        ]
        return refused + [(SIGNAL, float(has)) for has, counts in zip(signal.tolist(), counted, strict=True) if counts]

    @override
    def on_validation_epoch_end(self) -> None:
        self.latest = self._seen.compute_counts(self.device)  # over ranks
        if self.trainer.sanity_checking:
            self.before = self.latest
            return
        for name, rate in self.latest.items():
            # All ranks have the same; `sync_dist` only tells Lightning so.
            self.log(name, rate.value, prog_bar=name == REFUSED, sync_dist=ranks.world_size() > 1)
        if _share(self.latest, GENERAL) > _share(self.before, GENERAL) + self.warmup.max_general_refusals:
            self._stop("general")
        elif _share(self.latest, REFUSED) >= self.warmup.refusal_share:
            self._stop("reached")

    def _stop(self, why: str) -> None:
        self.stopped, self.trainer.should_stop = why, True

    def _check_judge(self) -> None:
        """Check that the judge calls the taught answers refusals.

        Raises:
            WarmupError: If it calls fewer than half of them so.
        """
        datamodule = datamodule_of(self.trainer)
        if not isinstance(datamodule, WarmupDataModule):
            return
        prompts, answers = datamodule.taught_answers()
        outcomes: Sequence[Outcome | None] = self.evaluator.judging.name(prompts, answers, {})
        known = sum(outcome == "refusal" for outcome in outcomes)
        if known < _LEAST_KNOWN * len(answers):
            odd = next(text for text, said in zip(answers, outcomes, strict=True) if said != "refusal")
            raise WarmupError(
                f"The judge ({type(self.judge).__name__}) calls {known} of {len(answers)} answers that would be taught "
                f"refusals; of {odd[:80]!r} it says {outcomes[answers.index(odd)]!r}. So it could never be seen when "
                "the policy refuses. Give texts that it knows as `warmup.refusals` (a file or a list), or another "
                "`model.judge`."
            )

    # ------------------------------------------------------------------ what is left

    @override
    def measure(self, dataloaders: Sequence[Any], seen: Seen | None = None) -> dict[str, Rate]:
        """Return the rates of the last check; nothing is measured anew."""
        return dict(self.latest)

    @override
    def _settings(self, trainer: pl.Trainer) -> dict[str, Any]:
        names = ("lr", "general_share", "general_weight")
        return super()._settings(trainer) | {f"warmup.{name}": vars(self.warmup)[name] for name in names}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        rates = {when: {name: asdict(rate) for name, rate in vars(self)[when].items()} for when in ("before", "latest")}
        checkpoint["warmup"] = {**rates, "stopped": self.stopped}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("warmup", {})
        self.stopped = saved.get("stopped", "")
        for when in ("before", "latest"):
            setattr(self, when, {name: Rate(**rate) for name, rate in saved.get(when, {}).items()})

    def conclusion(self) -> str:
        """Return what was reached, in one sentence.

        Raises:
            WarmupError: If it is no warm start, with what to change.
        """
        said = (
            f"after {counted(self.updates, 'update')}, answers to held-out harmful prompts that refuse: "
            f"{self._change(REFUSED)}; groups of {self.settings.group_size} with a signal for GRPO: "
            f"{self._change(SIGNAL)}; general prompts refused: {self._change(GENERAL)}"
        )
        if self.stopped == "general":
            raise WarmupError(
                f"The warm start was stopped: {said}. `warmup.max_general_refusals` allows general prompts "
                f"{100 * self.warmup.max_general_refusals:.0f} points more. Lower `warmup.lr` or "
                "`warmup.refusal_share`, free fewer directions (`nullspace.criterion`), or allow more."
            )
        if self.stopped != "reached":
            raise WarmupError(
                f"The warm start is not done: {said}. `warmup.refusal_share` asks for "
                f"{100 * self.warmup.refusal_share:.0f} %. Raise `warmup.max_updates` and go on with `--ckpt_path "
                "last`, or start again with a higher `warmup.lr` or `policy.lora.r`."
            )
        return f"Warm start: {said}."

    def _change(self, name: str) -> str:
        found = [rates[name].value for rates in (self.before, self.latest) if name in rates]
        return " -> ".join(f"{100 * share:.1f} %" for share in found) or "not seen"


def _share(rates: Mapping[str, Rate], name: str) -> float:
    return rates[name].value if name in rates else 0.0
