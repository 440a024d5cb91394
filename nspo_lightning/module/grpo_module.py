"""The LightningModule: sample groups, score them, learn by GRPO (arXiv 2402.03300), in automatic optimization.

One training step is: a batch of prompts comes in; if there is no rollout of it yet, the policy answers each prompt
`group_size` times, the reward scores the answers and the group's mean and deviation turn scores into advantages; the
next part of that rollout becomes one loss. Lightning does the rest, so every Trainer flag keeps its meaning:
accumulation, clipping, precision, `max_steps`, validation. Null-space projection is not in here: it is a callback, and
plain GRPO is this module without it.

The parts that the module is made of: `TextPolicy` holds the model, `Collector` makes experience, `Scorer` the loss,
`UpdateWindow` says which update is taken, `Evaluator` answers in validation, test and prediction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import HoldsInNullSpace
from nspo_lightning.checkpoints import STATE_KEY, updates_in
from nspo_lightning.compat.lightning import callbacks_of, forget_step_metrics, logs_this_batch, trainer_of
from nspo_lightning.datamodules.loader import FOLLOWING
from nspo_lightning.evaluation.diagnosis import TrainingFacts
from nspo_lightning.evaluation.rates import ACCURACY, Answers, Rate, Seen, with_accuracy
from nspo_lightning.grpo import AdvantageScale, ObjectiveConfig, loss_mask, rows_with_signal
from nspo_lightning.module.base_answers import BaseAnswers
from nspo_lightning.module.checkpoint_content import check_adapter_base, check_checkpoint, keep_trained_
from nspo_lightning.module.collector import Collector
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.evaluator import Evaluator
from nspo_lightning.module.experience import ExperienceBuffer, Minibatch
from nspo_lightning.module.finite import loss_scale, nonfinite_in, on_any_rank, scale_gradients_
from nspo_lightning.module.guided import GuidedSampling
from nspo_lightning.module.judging import JudgedRollout, Judging
from nspo_lightning.module.optimizer_settings import optimizer_settings
from nspo_lightning.module.prefixes import Prefixes, PrefixSettings
from nspo_lightning.module.progress import Progress
from nspo_lightning.module.resumed_settings import (
    check_same_job,
    check_same_training,
    training_settings,
    warn_of_other_weights,
)
from nspo_lightning.module.rollouts import StopOnException, make_rollouts
from nspo_lightning.module.scored_rollouts import ScoredRollouts
from nspo_lightning.module.scorer import Scorer, step_counts, zero_loss
from nspo_lightning.module.signal import Signal
from nspo_lightning.module.start_checks import (
    check_accumulation,
    check_optimizer,
    check_strategy,
    make_optimizer,
    warn_if_none_ended,
)
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.module.training_data import (
    another_step_follows,
    check_repetitions,
    longest_prompt_tokens,
    look_ahead,
    take_on_demand,
)
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.module.training_state import trainer_state
from nspo_lightning.module.victim import PolicyVictim
from nspo_lightning.policy.adapter import load_adapter_
from nspo_lightning.policy.divergence import TextLoss, TextScores
from nspo_lightning.policy.identity import policy_identity
from nspo_lightning.policy.loading_progress import loading_progress
from nspo_lightning.policy.settings import PolicySettings
from nspo_lightning.policy.text_forward import run_trained_layers, text_logits
from nspo_lightning.policy.text_scores import BaseStates, score_text, text_loss
from nspo_lightning.policy.warm_start import WarmStart
from nspo_lightning.rewards import Judge, NonFiniteRewardError, Reward, RewardSet
from nspo_lightning.rewards.protocol import judge_in, prepare
from nspo_lightning.rewards.rules.refusal import RefusalPatterns
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.graphs import check_decoding
from nspo_lightning.rollout.server_config import ServerSettings


def _default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


class GRPOModule(pl.LightningModule):
    """Safety GRPO on a policy with a LoRA adapter.

    Args:
        reward: What the policy is taught: reward callables of TRL's form, by name and weight, or one of them.
        judge: Names what a completion is, in training, validation, test and prediction. Default: the reward itself if
            it can judge, else refusal patterns, which say what is refused or garbage and nothing of harm:
            `safety/answered_rate` then stands in place of `safety/unsafe_rate`.
        policy: The model and its adapter.
        optimizer: Makes the optimizer from the trainable parameters.
        scheduler: Makes the learning-rate scheduler, stepped once an update.
        group_size: Completions a prompt, at least 2.
        sampling: How completions are sampled in training.
        objective: The loss.
        scale_rewards: Divide advantages by the deviation of the group, of the batch, or by nothing.
        num_iterations: Passes over one rollout.
        num_minibatches: Updates that one pass over a rollout is cut into.
        tokens_per_microbatch: Most tokens (prompts once, completions each) in one forward and backward; null = all.
        share_prefix: Run each prompt once a group instead of once a completion. Same numbers, less work.
        evaluation_sampling: How harmful prompts are answered in validation and test; default as in training.
        general_max_new_tokens: Length limit of the greedy answers to general prompts.
        over_refusal_skills: General skills whose refusals count as over-refusal (XSTest and its like have the skill
            `over_refusal`); where there are none, all harmless prompts count.
        max_nonfinite_updates: Skipped updates in a row, for a loss, gradient, reward or log-probability that is not
            finite, after which the run stops.
        max_unscored_rollouts: Rollouts in a row in which every reward gave None for every completion, after which the
            run stops.
        max_rollouts_without_signal: Rollouts in a row in which all answers to each prompt got the same reward, after
            which the run stops, as there is nothing to learn from (exit code 1). Not if the policy is safe already:
            that is said, and the run goes on. null or 0 = no limit.
        dynamic_sampling: Replace prompts whose groups have no signal by further ones from the data (DAPO), up to
            `max_factor` times a batch: costs so many times the completions at most, and every update learns from a full
            batch. null = a batch is learnt from as it comes. See docs/questions.md.
        guided: Sample a part of each group under a safety prompt that training does not see, its tokens weighted by the
            truncated importance ratio. null = none. See docs/questions.md.
        prefixes: A share of the groups answers from the beginning of a harmful answer on, which the loss does not see;
            and how begun answers are judged everywhere. See docs/robustness.md.
        rollout_server: Server that draws training completions; null = this process does. See docs/server.md.

    Raises:
        ValueError: If a number is out of its range.
    """

    job = "fit"
    """What trains it; a checkpoint of one is no place for the other to go on from."""

    def __init__(
        self,
        reward: RewardSet | Reward | Callable[..., Any],
        judge: Judge | None = None,
        policy: PolicySettings = PolicySettings(),  # noqa: B008  (never changed)
        optimizer: OptimizerCallable = _default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        group_size: int = 8,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008
        scale_rewards: AdvantageScale = "group",
        num_iterations: int = 1,
        num_minibatches: int = 1,
        tokens_per_microbatch: int | None = 16_384,
        share_prefix: bool = True,
        evaluation_sampling: SamplingConfig | None = None,
        general_max_new_tokens: int = 64,
        over_refusal_skills: Sequence[str] = ("over_refusal",),
        max_nonfinite_updates: int = 5,
        max_unscored_rollouts: int = 5,
        max_rollouts_without_signal: int | None = 50,
        dynamic_sampling: DynamicSampling | None = None,
        guided: GuidedSampling | None = None,
        rollout_server: ServerSettings | None = None,
        prefixes: PrefixSettings = PrefixSettings(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.settings = TrainingSettings(
            group_size=group_size,
            sampling=sampling,
            objective=objective,
            scale_rewards=scale_rewards,
            num_iterations=num_iterations,
            num_minibatches=num_minibatches,
            tokens_per_microbatch=tokens_per_microbatch,
            max_nonfinite_updates=max_nonfinite_updates,
            max_unscored_rollouts=max_unscored_rollouts,
            max_rollouts_without_signal=max_rollouts_without_signal,
            dynamic_sampling=dynamic_sampling,
            guided=guided,
            rollout_server=rollout_server,
            prefixes=prefixes,
        )
        self.strict_loading = False  # checkpoints hold trained parameters only
        self.reward = reward if isinstance(reward, RewardSet) else RewardSet([reward])
        rewards_judge = judge_in(self.reward)
        self.judge = judge or rewards_judge or RefusalPatterns()
        judging = Judging(
            reward=self.reward,
            judge=self.judge,
            reward_names_outcomes=judge is None or judge is rewards_judge,
        )
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.evaluation_sampling = (evaluation_sampling or sampling).with_stops_of(sampling)
        greedy = SamplingConfig(max_new_tokens=general_max_new_tokens, temperature=0.0, decoding=sampling.decoding)
        self.general_sampling = greedy.with_stops_of(sampling)

        self.policy: nn.Module | None = None  # the model of `text_policy`, which makes its parameters this module's
        self.adapter_folder: Path | None = None  # a trained adapter to measure
        self.warm_start: WarmStart | None = None  # what training goes on from
        self._has_started = False
        self._asked: dict[str, Any] | None = None  # settings of the optimizer and its schedule
        self._loaded_step: int | None = None  # global step of the checkpoint that is measured
        self.text_policy = TextPolicy(policy, share_prefix=share_prefix)
        self.base_states = BaseStates()
        rollouts = make_rollouts(self.text_policy, self.settings)
        self.prefixes = Prefixes(
            policy=self.text_policy,
            judge=self.judge,
            settings=prefixes,
            sampling=sampling,
            run_seed=lambda: self.progress.seed,
        )
        self.scorer = Scorer(self.text_policy, self.settings)
        self.collector = Collector(
            settings=self.settings,
            rollouts=rollouts,
            judging=judging,
            scorer=self.scorer,
            prefixes=self.prefixes,
        )
        self.evaluator = Evaluator(
            policy=self.text_policy,
            judging=judging,
            harmful=self.evaluation_sampling,
            general=self.general_sampling,
            over_refusal_skills=tuple(over_refusal_skills),
            prefixes=self.prefixes,
        )
        self.base_answers = BaseAnswers(
            policy=self.text_policy,
            sampling=self.general_sampling,
            tell_of_thoughts=self.evaluator.tell_of_thoughts,
        )
        self.progress = Progress(
            max_nonfinite=self.settings.max_nonfinite_updates,
            scored=ScoredRollouts(max_unscored=self.settings.max_unscored_rollouts),
            signal=Signal(max_without=self.settings.max_rollouts_without_signal or None),
        )
        self.last_rollout: JudgedRollout | None = None
        self.step_state_to_save: dict[str, Any] | None = None

    # ------------------------------------------------------------------ start

    @override
    def setup(self, stage: str) -> None:
        self.progress.seed = torch.initial_seed() % 2**31
        if stage == "fit":
            check_strategy(self.trainer, self.reward)
            check_accumulation(self.trainer, self.settings)
            check_optimizer(self.make_optimizer)
            self.collector.rollouts.check_start(self.trainer.strategy)

    @override
    def configure_model(self) -> None:
        trainer = trainer_of(self)
        self.load(torch.device("cpu") if trainer is None else trainer.strategy.root_device)

    def load(self, device: torch.device) -> None:
        """Load the policy, once, and before it what the rewards need: a wrong path or key is found before long work."""
        if self.policy is not None:
            return
        for sampling in (self.settings.sampling, self.evaluation_sampling):
            check_decoding(sampling.decoding, device)
        trainer = trainer_of(self)
        if trainer is None or trainer.state.fn is not None:  # calibration asks no judge
            prepare(self.reward)
            prepare(self.judge)
        shown = trainer is None or trainer.progress_bar_callback is not None
        here = os.path.exists(self.policy_settings.model_path)  # a download has a bar of its own
        with loading_progress("Loading the policy", visible=shown and here):
            self.policy = self.text_policy.load(device)
        if self.adapter_folder is not None:
            self.load_adapter(self.adapter_folder)

    def load_adapter(self, folder: Path) -> None:
        """Put a trained adapter in place of the fresh one; PolicyError if it belongs on another base."""
        check_adapter_base(folder, self.text_policy)
        load_adapter_(self.require_policy(), folder)
        self._has_started = True

    def start(self) -> None:
        """Go on from the adapter that the settings name, unless a checkpoint or an adapter was loaded already."""
        if not self._has_started:
            self.warm_start = self.text_policy.start_warm()
        self._has_started = True

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.make_optimizer, self.text_policy.trainable_parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # type: ignore[typeddict-item]

    @override
    def on_fit_start(self) -> None:
        self.start()
        longest, policy = longest_prompt_tokens(self.trainer), self.text_policy
        drawn, begun = self.settings.sampling.max_new_tokens, self.trained_prefix_tokens
        policy.check_room(longest, max(drawn, self.evaluation_sampling.max_new_tokens))
        policy.check_room(longest, drawn, begun=begun)
        if extra := self.collector.rollouts.guidance.extra_tokens():
            policy.check_room(longest + extra, drawn, begun=begun)
        policy.check_room(longest, self.general_sampling.max_new_tokens, "general_max_new_tokens")

    @override
    def on_train_start(self) -> None:
        # transformers loads in eval mode, and everything that evaluates leaves the mode as it found it.
        self.require_policy().train()
        check_repetitions(self.trainer, self.settings)
        look_ahead(self.trainer, self.settings)
        take_on_demand(self.trainer, self.settings)
        self.progress.load_rollouts(self.device)

    @override
    def configure_callbacks(self) -> list[Callback]:
        return [StopOnException(self.collector.rollouts)]  # modules are not told of exceptions

    @override
    def teardown(self, stage: str) -> None:
        self.progress.ahead = None
        self.collector.rollouts.stop()

    @override
    def on_train_end(self) -> None:
        self.progress.scored.check_end(self.progress.rollouts)
        self.progress.signal.check_end()
        self.progress.warn_without_update(self.trainer.global_step)

    # ------------------------------------------------------------------ training

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        start, settings, window = time.perf_counter(), self.settings, self.progress.window
        parameters, config = self.text_policy.trainable_parameters(), self.settings.objective
        if not batch["prompt"]:  # only there so that passes over a window's rollouts are updates of their own
            return zero_loss(parameters)
        try:
            buffer = self._filled_buffer(batch)
        except NonFiniteRewardError as error:  # all ranks raise it together
            if self.progress.rollouts == 0:
                raise  # the first batch fails: the reward itself is broken
            self.progress.rollouts += 1  # other noise next time
            window.nonfinite = f"reward: {error}"
            return zero_loss(parameters)
        if (following := batch.get(FOLLOWING)) is not None and another_step_follows(self.trainer, batch_idx):
            begun = self.prefixes.for_training(following).batch
            self.progress.ahead = self.collector.rollouts.ask(begun, self.progress.noise_seed, self.updates)
        experience = buffer.next()
        mask = loss_mask(experience.rollout.completion_mask, experience.rollout.finished, config)
        normaliser = window.add(*step_counts(mask, settings), config.loss_type)
        with_signal = rows_with_signal(experience.advantages, mask, has_kl=config.beta > 0)
        if not ranks.any_rank(bool(with_signal.any())):
            self._log_step({"step_time": time.perf_counter() - start}, mean_over_ranks=True)
            return zero_loss(parameters)
        window.has_signal = True
        if not len(mask):  # another rank has something
            experience = buffer.stand_in()
            mask = torch.zeros_like(experience.rollout.completion_mask)
            with_signal = mask.any(dim=1)
        minibatch = Minibatch.of(experience, mask, with_signal)
        loss = self.scorer.loss(minibatch, normaliser, loss_scale(self.trainer) or 1.0)
        self._log_step(loss.means)
        self.collector.rollouts.check_means(loss.means)
        trained_on = torch.where(minibatch.mask, loss.log_probs, 0.0)
        seen = nonfinite_in({"log-probabilities": trained_on, "loss": loss.value})
        if seen := on_any_rank(seen, "loss or log-probabilities"):
            window.nonfinite = seen
            return zero_loss(parameters)
        if buffer.wants_log_probs:
            buffer.keep_old_log_probs(loss.log_probs, minibatch.rows)
        shown = {"loss": loss.value.detach() * window.own_scale, "step_time": time.perf_counter() - start}
        self._log_step(shown, mean_over_ranks=True)
        return loss.value

    def _filled_buffer(self, batch: Mapping[str, Any]) -> ExperienceBuffer:
        progress, number = self.progress, batch.get("batch_number")
        buffer = progress.open_rollouts.get(number)
        if buffer is None:
            state = trainer_state(self.trainer, progress, len(batch["prompt"]))
            ahead, progress.ahead = progress.ahead, None
            collected = self.collector.collect(batch, progress.noise_seed, progress.updates, state, ahead, self._more)
            if progress.rollouts == 0:
                warn_if_none_ended(collected, self.text_policy, self.settings.sampling)
            progress.num_tokens += collected.num_tokens
            buffer, self.last_rollout = collected.buffer, collected.judged
            progress.open_rollouts.put(number, buffer, at_most=self.trainer.accumulate_grad_batches)
            self._log_step({**collected.metrics, "num_tokens": float(progress.num_tokens)})
            progress.rollouts += 1
            rewards, said = collected.rows.rewards.total, collected.judged.completions
            progress.scored.count(rewards, self.reward.names, progress.rollouts, said)
            cut = self.settings.objective.mask_truncated
            progress.signal.count(collected.rows, self.settings.group_size, mask_truncated=cut)
        return buffer

    def _more(self, number: int) -> Any:
        """Take so many further prompts from the data (`take_on_demand` has seen that it gives some)."""
        loader: Any = self.trainer.train_dataloader
        return self.trainer.strategy.batch_to_device(loader.more(number))

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        loss = optimizer_closure() if optimizer_closure is not None else None  # only then it is known what to do
        parameters, before = self.text_policy.trainable_parameters(), loss_scale(self.trainer)
        window = self.progress.close_window(parameters, look=before is None)  # a gradient scaler looks by itself
        if window.nonfinite:
            self._skip_nonfinite(window.nonfinite)
            return
        if not window.has_signal:
            self.progress.updates_skipped += 1
            return
        factor = window.correction(self.trainer.accumulate_grad_batches)
        scale_gradients_(parameters, factor)
        # None would tell a gradient scaler that the whole window had no loss.
        closure_result = loss if loss is not None else torch.zeros((), device=self.device)
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: closure_result)
        after = loss_scale(self.trainer)
        if (after or 1.0) < min(before or 1.0, 1.0):  # it backs off at first; below 1 nothing is left to scale
            self._skip_nonfinite("gradient, at a loss scale below 1")
        elif (after or 1.0) >= (before or 1.0):
            self.progress.nonfinite_in_a_row = 0
            self.progress.updates += 1

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        forget_step_metrics(self.trainer, batch_idx)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        counts = {
            "updates_skipped": self.progress.updates_skipped,
            "updates_nonfinite": self.progress.updates_nonfinite,
        }
        self._log_step({name: float(count) for name, count in counts.items()})
        if self.trainer.optimizers:
            self._log_step({"learning_rate": float(self.trainer.optimizers[0].param_groups[0]["lr"])})

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # After callbacks, so of the projected gradient, and before clipping.
        if logs_this_batch(self.trainer):
            grads = [p.grad for p in self.text_policy.trainable_parameters() if p.grad is not None]
            squares = [ranks.full_tensor(torch.linalg.vector_norm(grad.detach().float())).square() for grad in grads]
            self._log_step({"grad_norm": torch.stack(squares).sum().sqrt()} if squares else {})

    def _skip_nonfinite(self, seen: str) -> None:
        self._log_step({"updates_nonfinite": float(self.progress.updates_nonfinite + 1)})
        for parameter in self.text_policy.trainable_parameters():
            parameter.grad = None
        self.progress.skip_nonfinite(seen, self.trainer.global_step)

    def _log_step(self, values: Mapping[str, Any], *, mean_over_ranks: bool = False) -> None:
        """Log values that are the same on all ranks already, or their mean over ranks."""
        reduce = mean_over_ranks and ranks.world_size() > 1
        for name, value in values.items():
            on_bar = name in {"reward", "unsafe", "answered"}
            self.log(name, value, on_step=True, on_epoch=False, prog_bar=on_bar, sync_dist=reduce, batch_size=1)

    # ------------------------------------------------------------------ evaluation

    @override
    def on_validation_start(self) -> None:
        self.start()

    on_test_start = on_predict_start = on_validation_start

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluator.count(batch, dataloader_idx, batch_idx)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Answers]:
        return {"answers": self.evaluator.count(batch, dataloader_idx, batch_idx)}

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        state = trainer_state(self.trainer, self.progress, len(batch["prompt"]))
        return self.evaluator.predict(batch, dataloader_idx, batch_idx, state)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_rates("")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_rates("test/")  # other prompts than validation's, whose curves are in the same folder

    def _log_rates(self, prefix: str) -> None:
        rates = with_accuracy(self.evaluator.finished(self.evaluator.rates))
        # All ranks have the same values; `sync_dist` only tells Lightning so.
        several = ranks.world_size() > 1
        for name, rate in rates.items():
            self.log(f"{prefix}{name}", rate, prog_bar=name == ACCURACY, sync_dist=several)
        if self._loaded_step:  # drawn where `fit` drew its validation of that state, not at 0: Lightning counts from 0
            self.log("step", float(self._loaded_step - 1), sync_dist=several)

    # ------------------------------------------------------------------ checkpoints

    def step_state(self) -> dict[str, Any]:
        """Copy what a training step changes before any weight moves; see `ExactResume`."""
        return self.progress.snapshot()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained_(checkpoint, self.text_policy)
        snapshot, self.step_state_to_save = self.step_state_to_save, None
        trainer = trainer_of(self)
        interrupted = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
        checkpoint[STATE_KEY] |= self.progress.state_dict(snapshot, wait=not interrupted)
        checkpoint[STATE_KEY]["settings"] = self._settings(self.trainer)
        checkpoint[STATE_KEY]["job"] = self.job
        checkpoint[STATE_KEY]["sampling_weights"] = self.text_policy.sampling_mode

    def _settings(self, trainer: pl.Trainer) -> dict[str, Any]:
        if self._asked is None:
            parameters = self.text_policy.trainable_parameters()
            self._asked = optimizer_settings(self.make_optimizer, self.make_scheduler, parameters)
        return training_settings(self.settings, self.text_policy, trainer) | self._asked

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        check_checkpoint(checkpoint, self.text_policy)
        self._has_started, self.warm_start = True, None
        trainer = trainer_of(self)
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        self._loaded_step = None if fits else checkpoint.get("global_step")
        if trainer is not None and fits:
            check_same_job(checkpoint[STATE_KEY].get("job", "fit"), self.job)
            check_same_training(checkpoint[STATE_KEY].get("settings", {}), self._settings(trainer))
            warn_of_other_weights(checkpoint[STATE_KEY].get("sampling_weights"), self.text_policy)
        self.progress.load_state_dict(checkpoint[STATE_KEY])
        self.progress.updates = updates_in(checkpoint)

    # ------------------------------------------------------------------ what callbacks, data and commands ask for

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the policy over text, shape (batch, length), and return logits, shape (batch, length, vocabulary)."""
        return text_logits(self.require_policy(), input_ids, attention_mask)

    def calibration_forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Run the policy over text for calibration, see `run_trained_layers`."""
        run_trained_layers(self.require_policy(), input_ids, attention_mask)

    @property
    def rollouts(self) -> int:
        """Batches of prompts that were rolled out so far."""
        return self.progress.rollouts

    @property
    def updates(self) -> int:
        """Updates that were taken and stand; the Trainer's `global_step` counts skipped and taken back ones too."""
        return self.progress.updates

    @property
    def updates_undone(self) -> int:
        """Updates that were taken, and taken back."""
        return self.progress.updates_undone

    def go_back(self, updates: int) -> None:
        """Count on from weights as they were after so many updates, which were put back."""
        self.progress.go_back(updates)

    def training_facts(self) -> TrainingFacts:
        """Return what rollouts and updates came to since the run began, for a diagnosis."""
        progress = self.progress
        return replace(
            progress.signal.facts(self.settings.sampling.max_new_tokens),
            updates=progress.updates,
            skipped=progress.updates_skipped,
            nonfinite=progress.updates_nonfinite,
            undone=progress.updates_undone,
        )

    def require_policy(self) -> Any:
        """Return the loaded model."""
        return self.text_policy.require()

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.text_policy.tokenizer

    def use_chat_template(self, template: str) -> None:
        """Take a datamodule's chat template for all uses; PolicyError if `policy.chat_template` is another."""
        self.text_policy.use_chat_template(template)

    def check_tokens(self, texts: Sequence[Sequence[int]]) -> None:
        """Refuse texts, as token ids, with a token that the loaded policy has no row for; PolicyError names it."""
        self.text_policy.check_tokens(texts)

    @property
    def policy_settings(self) -> PolicySettings:
        """The model and its adapter."""
        return self.text_policy.settings

    @property
    def fingerprint(self) -> str:
        """Names the base; "" before it is loaded."""
        return self.text_policy.fingerprint

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the policy's context holds, as far as its configuration says."""
        return self.text_policy.context_tokens

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained, as `from_pretrained` loads it, the tokenizer, and what a later run asks of it."""
        self.text_policy.save(folder)
        trainer = trainer_of(self)
        if trainer is None or self.policy_settings.lora is None or self.policy_settings.merged is not None:
            return
        holding = (c.held_in() for c in callbacks_of(trainer) if isinstance(c, HoldsInNullSpace))
        basis, leak = next((found for found in holding if found is not None), (None, None))
        record = WarmStart(policy=self.fingerprint, policy_path=self.policy_settings.path, basis=basis, leak=leak)
        record.write(Path(folder))

    def calibration_answers(self, prompts: Sequence[Any], max_new_tokens: int | None = None) -> list[str]:
        """Answer as the base does, as `calibration_text: prompt_and_model_answer` wants it; see `BaseAnswers`."""
        return self.base_answers.to(prompts, max_new_tokens)

    @property
    def base_states_bytes(self) -> int:
        """Bytes of the base's hidden states that are kept of texts which are scored again and again."""
        return self.base_states.nbytes

    @property
    def tokens_per_microbatch(self) -> int | None:
        """Most tokens in one forward and backward pass; None = no bound."""
        return self.settings.tokens_per_microbatch

    @property
    def trained_prefix_tokens(self) -> int:
        """The most tokens of a begun answer in training; 0 = none is begun."""
        return self.prefixes.settings.max_tokens if self.prefixes.settings.share else 0

    @property
    def victim(self) -> PolicyVictim:
        """The policy as attacks see it."""
        return PolicyVictim(
            policy=self.text_policy,
            judge=self.judge,
            sampling=self.evaluation_sampling,
            over_refusal_skills=self.evaluator.over_refusal_skills,
            start=self.start,
        )

    def base_answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers | None:
        """Answer an evaluation batch as the base does; None without an adapter."""
        return self.evaluator.base_answer(batch, dataloader_idx, batch_idx)

    def base_text(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Return harmful prompts with the base's own answers as text to score; None without an adapter."""
        return self.evaluator.base_text(batch, batch_idx)

    def test_identity(self) -> dict[str, Any]:
        """Say what `test` measures: policy, judge, decoding."""
        loaded = self.adapter_folder or self.trainer.ckpt_path
        return {**policy_identity(self, None if loaded is None else str(loaded)), **self.evaluator.identity()}

    def evaluate(self, dataloaders: Sequence[Any]) -> dict[str, float]:
        """Return the values of `measure`, and `general/accuracy`, the mean over skills."""
        return with_accuracy(self.measure(dataloaders))

    def measure(self, dataloaders: Sequence[Any], seen: Seen | None = None) -> dict[str, Rate]:
        """Measure outside of a Trainer loop: rates, over harmful and general prompts; `seen` is told the answers."""
        return self.evaluator.measure(dataloaders, self.trainer.strategy.batch_to_device, seen)

    def text_scores(self, batch: Mapping[str, Any]) -> TextScores:
        """Score a batch of given text, and how far the policy is from the base on it; see `score_text`."""
        return score_text(self.require_policy(), batch, self.base_states)

    def text_loss(self, batch: Mapping[str, Any], kind: TextLoss) -> tuple[Tensor, int]:
        """Sum what `text_scores` measures over a batch, with a gradient, and count its tokens; see `text_loss`."""
        return text_loss(self.require_policy(), batch, kind, self.base_states)
