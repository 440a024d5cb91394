"""The LightningModule: sample groups, score them, learn by GRPO (arXiv 2402.03300), in automatic optimization.

One training step is: a batch of prompts comes in; if the buffer is empty, the policy answers each prompt `group_size`
times, the reward scores the answers and the group's mean and deviation turn scores into advantages; the next part of
that rollout becomes one loss. Lightning does the rest, so every Trainer flag keeps its meaning: accumulation,
clipping, precision, `max_steps`, validation. Null-space projection is not in here: it is a callback, and plain GRPO is
this module without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from nspo_lightning.grpo import (
    AdvantageScale,
    MicroBatch,
    Normaliser,
    ObjectiveConfig,
    ObjectiveMetrics,
    accumulated_loss,
    groups_with_signal,
    loss_mask,
    objective,
    token_weights,
)
from nspo_lightning.module.collector import CollectingModule, check_start, judge_of
from nspo_lightning.module.experience import Experience, ExperienceBuffer
from nspo_lightning.module.finite import NonFiniteError, explain, nonfinite_gradient, nonfinite_in
from nspo_lightning.module.policy_module import STATE_KEY
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.policy.settings import PolicySettings
from nspo_lightning.rewards import Judge, NonFiniteRewardError, Reward, RewardSet
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.server import RolloutServer
from nspo_lightning.rollout.server_config import ServerSettings

STEP_STATE = (
    "rollouts",
    "num_tokens",
    "updates_skipped",
    "updates_nonfinite",
    "nonfinite_in_a_row",
    "_buffer",
    "_window_has_signal",
    "_window_tokens",
    "_window_nonfinite",
)


def _default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


class GRPOModule(CollectingModule):
    """Safety GRPO on a policy with a LoRA adapter.

    Args:
        reward: What the policy is taught: reward callables of TRL's form, by name and weight, or one of them.
        judge: Names what a completion is, for the `safety/` metrics and over-refusal. Default: the reward itself if it
            can judge, else refusal patterns (everything that is not a refusal counts as unsafe).
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
        rollout_server: Server that draws training completions; null = this process does. See docs/server.md.

    Raises:
        ValueError: If a number is out of its range.
    """

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
        rollout_server: ServerSettings | None = None,
    ) -> None:
        if group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2, got {group_size}: an advantage compares a completion with the "
                "others of its group. 8 is a good start."
            )
        for name, value in {
            "num_iterations": num_iterations,
            "tokens_per_microbatch": 1 if tokens_per_microbatch is None else tokens_per_microbatch,
            "num_minibatches": num_minibatches,
            "max_nonfinite_updates": max_nonfinite_updates,
        }.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if sampling.temperature <= 0:
            raise ValueError(
                f"`sampling.temperature` must be positive in training, got {sampling.temperature}: greedy completions "
                "of one prompt are all the same, so no group would ever have a signal."
            )
        super().__init__(
            reward=reward if isinstance(reward, RewardSet) else RewardSet([reward]),
            judge=judge or judge_of(reward),
            policy=policy,
            sampling=evaluation_sampling or sampling,
            general_max_new_tokens=general_max_new_tokens,
            over_refusal_skills=over_refusal_skills,
            share_prefix=share_prefix,
        )
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.group_size = group_size
        self.sampling = sampling
        self.objective = objective
        self.scale_rewards: AdvantageScale = scale_rewards
        self.num_iterations = num_iterations
        self.num_minibatches = num_minibatches
        self.tokens_per_microbatch = tokens_per_microbatch

        self.rollouts = 0
        self.num_tokens = 0
        self.updates_skipped = 0
        self.updates_nonfinite = 0
        self.nonfinite_in_a_row = 0
        self.max_nonfinite_updates = max_nonfinite_updates
        self.last_completions: dict[str, list[Any]] = {}
        self._seed = 0
        self.server = None if rollout_server is None else RolloutServer(rollout_server)
        self._buffer: ExperienceBuffer | None = None
        self._buffer_states: list[dict[str, Any] | None] = []
        self._window_has_signal = False
        self._window_tokens: list[float] = []
        self._window_nonfinite = ""
        self.step_state_to_save: dict[str, Any] | None = None

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that one rollout feeds; the dataloader must repeat each batch as often."""
        return self.num_iterations * self.num_minibatches

    @override
    def setup(self, stage: str) -> None:
        self._seed = torch.initial_seed() % 2**31
        if stage == "fit":
            check_start(self)

    @override
    def on_fit_start(self) -> None:
        longest = getattr(getattr(self.trainer, "datamodule", None), "longest_prompt_tokens", None)
        self.check_room(int(longest or 1), max(self.sampling.max_new_tokens, self.evaluation_sampling.max_new_tokens))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.trainable_parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # type: ignore[typeddict-item]

    # ------------------------------------------------------------------ training

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        start = time.perf_counter()
        if self._buffer is None or self._buffer.is_empty:
            try:
                self._buffer = self._collect(batch)
            except NonFiniteRewardError as error:  # all ranks raise it together
                if self.rollouts == 0:
                    raise  # no accident on the way: the reward is wrong
                self.rollouts += 1  # other noise next time
                self._window_nonfinite = f"reward: {error}"
                return self._no_loss()
        experience = self._buffer.next()
        mask = loss_mask(experience.rollout.completion_mask, experience.rollout.finished, self.objective)
        normaliser = self._normaliser(mask)
        self._window_tokens.append(normaliser.num_tokens)
        if self.objective.loss_type == "dapo":
            normaliser = replace(normaliser, num_tokens=max(self._window_tokens[0], 1.0))
        if not self._any_rank(bool((experience.advantages != 0).any())):
            self._log_step({"step_time": time.perf_counter() - start}, mean_over_ranks=True)
            self._log_step({"updates_skipped": float(self.updates_skipped)})
            return self._no_loss()
        self._window_has_signal = True
        rows = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        if self.objective.beta == 0:  # groups without signal have a zero gradient: nothing is lost without them
            signal = groups_with_signal(experience.advantages, self.group_size)
            mask = mask & signal.repeat_interleave(self.group_size)[:, None]
            kept = signal.clone()
            kept[0] |= ~signal.any()  # one at least: other ranks may be waiting in the backward pass
            rows = kept.repeat_interleave(self.group_size)
            experience, mask = experience.select(kept), mask[rows]
        loss, log_probs = self._loss(experience, mask, normaliser)
        seen = nonfinite_in({"log-probabilities": torch.where(mask, log_probs, 0.0), "loss": loss})
        if self._any_rank(bool(seen)):
            self._window_nonfinite = seen or "another rank's loss or log-probabilities"
            return self._no_loss()
        if self._buffer.num_minibatches == 1 and experience.old_log_probs is None and self._buffer.needs_old_log_probs:
            self._buffer.keep_old_log_probs(log_probs, rows)
        self._log_step({"loss": loss.detach(), "step_time": time.perf_counter() - start}, mean_over_ranks=True)
        return loss

    def _no_loss(self) -> Tensor | None:
        """Say that a batch has nothing to learn from.

        Lightning takes None in a single process alone. DDP wants a backward pass, which averages what an accumulation
        window has gathered before: a loss of zero gives it one.

        Returns:
            None, or a zero that depends on every trainable parameter.
        """
        if self.trainer.world_size == 1:
            return None
        return torch.stack([parameter.sum() for parameter in self.trainable_parameters()]).sum() * 0.0

    def _loss(self, experience: Experience, mask: Tensor, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
        """Build one scalar whose backward hands out the gradients of all micro-batches.

        Returns:
            The loss, and the policy's log-probabilities, shape (R, C), detached.
        """
        weights = token_weights(mask, self.objective.loss_type, normaliser)
        kept = torch.zeros(mask.shape, device=mask.device)
        metrics: list[ObjectiveMetrics] = []

        def one(micro: MicroBatch) -> Tensor:
            scores = score_completions(
                self.require_policy(),
                micro.rollout,
                temperature=self.sampling.temperature,
                share_prefix=self.share_prefix,
                with_entropy=True,
            )
            kept[micro.rows.to(kept.device), : scores.log_probs.shape[1]] = scores.log_probs.detach()
            old, reference = experience.old_log_probs, experience.reference_log_probs
            sampled = experience.sampling_log_probs
            result = objective(
                scores.log_probs,
                mask=micro.take(mask),
                weights=micro.take(weights),
                advantages=micro.take(experience.advantages),
                config=self.objective,
                old_log_probs=None if old is None else micro.take(old),
                reference_log_probs=None if reference is None else micro.take(reference),
                entropy=scores.entropy,
                sampling_log_probs=None if sampled is None else micro.take(sampled),
                importance_cap=None if self.server is None else self.server.settings.importance_cap,
            )
            metrics.append(result.metrics)
            return result.loss

        micros = self._split(experience.rollout)
        loss = accumulated_loss(self.trainable_parameters(), micros, one, loss_scale=self._loss_scale())
        means = self._of_all_ranks(metrics).means()
        self._log_step(means)
        self._check_sampler(means)
        return loss, kept

    def _normaliser(self, mask: Tensor) -> Normaliser:
        local = Normaliser.of(mask, self.sampling.max_new_tokens)
        if self.objective.loss_type == "bnpo" or self.trainer.world_size == 1:
            return local
        counts = torch.tensor([float(local.num_rows), local.num_tokens], device=self.device)
        dist.all_reduce(counts)  # of the last batch of an epoch, ranks may have different numbers of rows
        rows, tokens = (counts / self.trainer.world_size).tolist()
        return Normaliser(num_rows=rows, num_tokens=tokens, max_new_tokens=local.max_new_tokens)

    def _loss_scale(self) -> float:
        scaler = self._scaler()
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        # The closure runs first, so that a window without signal takes no step: zero gradients would still let Adam's
        # momentum move the weights.
        loss = optimizer_closure() if optimizer_closure is not None else None
        has_signal, tokens, seen = self._window_has_signal, self._window_tokens, self._window_nonfinite
        self._window_has_signal, self._window_tokens, self._window_nonfinite = False, [], ""
        if has_signal and not seen and self._scaler() is None:  # a gradient scaler looks and skips by itself
            seen = nonfinite_gradient(self.trainable_parameters())
            if self._any_rank(bool(seen)):
                seen = seen or "another rank's gradient"
        if seen:
            self._skip_nonfinite(seen)
            return
        if not has_signal:
            self.updates_skipped += 1
            return
        if self.objective.loss_type == "dapo" and len(tokens) > 1:
            self._renormalise(tokens)
        # None would tell a gradient scaler that the whole window had no loss.
        closure_result = loss if loss is not None else torch.zeros((), device=self.device)
        scale = self._loss_scale()
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: closure_result)
        if self._loss_scale() < min(scale, 1.0):  # it backs off at first; below 1 there is nothing left to scale
            self._skip_nonfinite("gradient, at a loss scale below 1")
        elif self._loss_scale() >= scale:
            self.nonfinite_in_a_row = 0

    def _skip_nonfinite(self, seen: str) -> None:
        self.updates_nonfinite += 1
        self.nonfinite_in_a_row += 1
        self._log_step({"updates_nonfinite": float(self.updates_nonfinite)})
        for parameter in self.trainable_parameters():
            parameter.grad = None
        if self.nonfinite_in_a_row >= self.max_nonfinite_updates:
            raise NonFiniteError(explain(seen, self.nonfinite_in_a_row, self.trainer.global_step))
        rank_zero_warn(f"Update {self.trainer.global_step} is skipped: {seen}.")

    def _renormalise(self, tokens: Sequence[float]) -> None:
        """Make an accumulation window's gradient the mean over all its tokens, not the mean of its batches' means.

        Every batch of the window was divided by the first one's tokens, and by Lightning by the number of batches.
        """
        factor = self.trainer.accumulate_grad_batches * tokens[0] / max(sum(tokens), 1.0)
        gradients = [parameter.grad for parameter in self.trainable_parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)

    # ------------------------------------------------------------------ checkpoints

    def step_state(self) -> dict[str, Any]:
        """Copy what a training step changes before any weight moves; see `ExactResume`.

        Returns:
            Attribute to value; the buffer's tensors are shared.
        """
        return {name: copy(getattr(self, name)) for name in STEP_STATE}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        now, self.step_state_to_save = self.step_state_to_save or self.step_state(), None
        buffer = now["_buffer"]
        state = None if buffer is None or buffer.is_empty else buffer.state_dict()
        states: list[Any] = [state]
        if self._distributed:
            states = [None] * self.trainer.world_size
            dist.all_gather_object(states, state)
        counters = {name: value for name, value in now.items() if name != "_buffer"}
        checkpoint[STATE_KEY] |= {"seed": self._seed, "buffers": states, "counters": counters}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE_KEY]
        self._seed = int(state["seed"])
        self._buffer_states = state["buffers"]
        for name in state["counters"].keys() & set(STEP_STATE):
            setattr(self, name, state["counters"][name])

    @override
    def on_train_start(self) -> None:
        # transformers loads in eval mode, and everything that evaluates leaves the mode as it found it.
        self.require_policy().train()
        states, self._buffer_states = self._buffer_states, []
        mine = states[self.global_rank] if len(states) == self.trainer.world_size else None
        if mine is not None:
            self._buffer = ExperienceBuffer.from_state_dict(mine, self.device)
