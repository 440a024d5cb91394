"""Log-probabilities of a rollout under the policy or its base, and the loss, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.grpo import (
    MicroBatch,
    Normaliser,
    ObjectiveMetrics,
    Rollout,
    accumulated_loss,
    objective,
    split_microbatches,
    token_weights,
)
from nspo_lightning.module.experience import Minibatch
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.log_probs import TokenScores
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.policy.sharing import can_share_prompts
from nspo_lightning.policy.text_scores import text_loss


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A training step's loss.

    Attributes:
        value: Scalar, whose backward hands out the gradients of all micro-batches.
        log_probs: Shape (r, C), the policy's, detached.
        means: What is logged, over all ranks.
    """

    value: Tensor
    log_probs: Tensor
    means: dict[str, Tensor]


@dataclass(frozen=True)
class Scorer:
    """Scores completions with the temperature that they were sampled with."""

    policy: TextPolicy
    settings: TrainingSettings

    def log_probs(self, rollout: Rollout) -> Tensor:
        """Score without gradient and without dropout: shape (R, C), zero at padding."""
        scores = torch.zeros(rollout.completion_ids.shape, device=rollout.completion_ids.device)
        with evaluation_mode(self.policy.require()), torch.no_grad():
            for micro in self._split(rollout):
                part = self._score(micro, with_entropy=False)
                scores[micro.rows, : part.log_probs.shape[1]] = part.log_probs
        return scores

    def reference_log_probs(self, rollout: Rollout) -> Tensor | None:
        """Score under the base, the policy with its adapter off; None at beta 0, where nothing needs it."""
        beta = self.settings.objective.beta
        if beta == 0:
            return None
        if not has_adapter(self.policy.require()):
            raise PolicyError(
                f"`objective.beta` is {beta}, and the reference is the policy with its adapter off, but "
                "there is no adapter (`policy.lora: null`). Set `objective.beta: 0`, or train an adapter."
            )
        with adapters_off(self.policy.require()):
            return self.log_probs(rollout)

    def loss(self, minibatch: Minibatch, normaliser: Normaliser, loss_scale: float) -> PolicyLoss:
        """Build one scalar whose backward hands out the gradients of all micro-batches; all ranks ask together."""
        experience, mask, config = minibatch.experience, minibatch.mask, self.settings.objective
        weights = token_weights(mask, config.loss_type, normaliser)
        kept = torch.zeros(mask.shape, device=mask.device)
        metrics: list[ObjectiveMetrics] = []

        def one(micro: MicroBatch) -> Tensor:
            def part(values: Tensor | None) -> Tensor | None:
                return None if values is None else micro.take(values)

            scores = self._score(micro, with_entropy=True)
            kept[micro.rows, : scores.log_probs.shape[1]] = scores.log_probs.detach()
            result = objective(
                scores.log_probs,
                mask=micro.take(mask),
                weights=micro.take(weights),
                advantages=micro.take(experience.advantages),
                config=config,
                old_log_probs=part(experience.old_log_probs),
                reference_log_probs=part(experience.reference_log_probs),
                entropy=scores.entropy,
                sampling_log_probs=micro.rollout.log_probs,
                importance_cap=self.settings.importance_cap,
                guided=micro.rollout.guided,
            )
            metrics.append(result.metrics)
            return result.loss

        micros = self._split(experience.rollout)
        value = accumulated_loss(self.policy.trainable_parameters(), micros, one, loss_scale=loss_scale)
        return PolicyLoss(value=value, log_probs=kept, means=_of_all_ranks(metrics).means())

    def likelihood_loss(self, rollout: Rollout, tokens: float, loss_scale: float) -> Tensor:
        """Return the negative log-likelihood of given answers, divided by a number of tokens; see `loss`."""

        def one(micro: MicroBatch) -> Tensor:
            return -self._score(micro, with_entropy=False).log_probs.sum() / tokens

        return accumulated_loss(self.policy.trainable_parameters(), self._split(rollout), one, loss_scale=loss_scale)

    def kl_loss(self, rollout: Rollout, tokens: float, loss_scale: float) -> Tensor:
        """Return KL(base || policy) summed over given answers' tokens, divided by a number of tokens; see `loss`."""

        def one(micro: MicroBatch) -> Tensor:
            return text_loss(self.policy.require(), answers_as_text(micro.rollout), "kl")[0] / tokens

        micros = split_microbatches(rollout, self.settings.tokens_per_microbatch, share_prefix=False)
        return accumulated_loss(self.policy.trainable_parameters(), micros, one, loss_scale=loss_scale)

    def _split(self, rollout: Rollout) -> list[MicroBatch]:
        shares = self.policy.share_prefix and can_share_prompts(policy_parts(self.policy.require()).model)
        return split_microbatches(rollout, self.settings.tokens_per_microbatch, share_prefix=shares)

    def _score(self, micro: MicroBatch, *, with_entropy: bool) -> TokenScores:
        return score_completions(
            self.policy.require(),
            micro.rollout,
            temperature=self.settings.sampling.temperature,
            share_prefix=self.policy.share_prefix,
            with_entropy=with_entropy,
            counts=micro.counts,
        )


def given_answers(batch: Mapping[str, Any]) -> Rollout:
    """Return prompts and the answers that are given to them (see `collate_answers`) as P groups of one."""
    return Rollout(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        group_size=1,
        completion_ids=batch["answer_ids"],
        completion_mask=batch["answer_mask"],
        finished=torch.ones(len(batch["prompt"]), dtype=torch.bool, device=batch["prompt_ids"].device),
    )


def answers_as_text(rollout: Rollout) -> dict[str, Tensor]:
    """Return prompts and completions as text whose completions are scored, see `text_loss`; shape (R, L + C)."""
    ids, mask = rollout.whole_rows()
    labels = mask.clone()
    labels[:, : rollout.prompt_ids.shape[1]] = False
    return {"input_ids": ids, "attention_mask": mask.long(), "labels_mask": labels.long()}


def zero_loss(parameters: Sequence[Tensor]) -> Tensor | None:
    """Return what says that a batch has nothing to learn from."""
    # Lightning takes None in a single process alone. DDP wants a backward pass, which averages what an accumulation
    # window has gathered before: a zero that depends on every parameter gives it one.
    return None if ranks.world_size() == 1 else torch.stack([parameter.sum() for parameter in parameters]).sum() * 0.0


def step_counts(mask: Tensor, settings: TrainingSettings) -> tuple[Normaliser, float]:
    """Count the batch of a step (cross-rank synchronisation).

    Args:
        mask: Shape (R, C), bool, True = token that is trained on.
        settings: For the loss type and the length limit.

    Returns:
        Rows and tokens, the mean over ranks (but for ``bnpo``, see `Normaliser`), and what the batch weighs in its
        accumulation window: its tokens for ``dapo``; for ``bnpo`` 1, or the share of ranks that have a row of it; its
        rows for the others.
    """
    local, loss_type = Normaliser.of(mask, settings.sampling.max_new_tokens), settings.objective.loss_type
    values = [float(local.num_rows), local.num_tokens, float(local.num_rows > 0)]
    if ranks.world_size() > 1:  # of the last batch of an epoch, ranks may have different numbers of rows
        counts = ranks.all_reduce_sum(torch.tensor(values, device=mask.device))
        values = (counts / ranks.world_size()).tolist()
    rows, tokens, present = values
    if loss_type == "bnpo":
        return local, present
    return replace(local, num_rows=rows, num_tokens=tokens), tokens if loss_type == "dapo" else rows


def _of_all_ranks(metrics: Sequence[ObjectiveMetrics]) -> ObjectiveMetrics:
    summed = ObjectiveMetrics.merge(metrics)
    if ranks.world_size() == 1:
        return summed
    return ObjectiveMetrics.merge(ranks.gather_objects(summed.to("cpu")))
