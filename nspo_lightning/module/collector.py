"""From a batch of prompts to experience: completions, rewards, outcomes, advantages, and the scores to compare with.

Everything here happens without gradient, before a training step learns from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.grpo import Rollout, group_advantages
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.dynamic import Group, chosen_groups, dynamic_metrics, further_prompts
from nspo_lightning.module.experience import Experience, ExperienceBuffer
from nspo_lightning.module.judging import JudgedRollout, Judging, repeated, repeated_columns
from nspo_lightning.module.prefixes import Begun, Prefixes
from nspo_lightning.module.rollout_metrics import JudgedRows, rollout_metrics
from nspo_lightning.module.rollouts import Rollouts
from nspo_lightning.module.scorer import Scorer
from nspo_lightning.module.signal import groups_with_signal
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.rewards.trainer_state import TrainerState

_ROUND = 32
"""Rollouts are fewer than 2 to this power, so that the rounds of one have seeds that no other rollout has."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What came of one batch of prompts.

    Attributes:
        buffer: This rank's experience, which training steps learn from.
        judged: This rank's completions as text, for tables and logs.
        rows: Lengths, rewards and outcomes of all completions of all ranks.
        metrics: What is logged, by name; over all ranks.
        num_tokens: Tokens of all ranks, where each completion counts with its own prompt.
    """

    buffer: ExperienceBuffer
    judged: JudgedRollout
    rows: JudgedRows
    metrics: dict[str, Tensor | float]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Rolls out, judges and compares.

    Attributes:
        settings: Settings of training.
        rollouts: Draws completions.
        judging: Scores and names them.
        scorer: Computes log-probabilities.
        prefixes: Begins answers, in the share of the groups that the settings say.
    """

    settings: TrainingSettings
    rollouts: Rollouts
    judging: Judging
    scorer: Scorer
    prefixes: Prefixes

    def collect(
        self,
        batch: Mapping[str, Any],
        seed: int,
        update: int,
        state: TrainerState,
        ahead: Ahead | None = None,
        more: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> Collected:
        """Return experience of P * G completions to a batch of P prompts, with the rewards' other `columns`.

        `seed`, `update` and `ahead` are for `Rollouts.draw`, `state` says to rewards where training is, and `more`
        gives further prompts, which dynamic sampling needs.
        """
        settings, group = self.settings, self.settings.group_size
        rounds = [self._answer(batch, seed, update, state, ahead)]
        wanted = drawn = rounds[0].signal.numel()
        while settings.dynamic_sampling is not None and more is not None:
            found, factor = sum(int(one.signal.sum()) for one in rounds), settings.dynamic_sampling.max_factor
            if not (number := further_prompts(wanted, found, drawn, factor, ranks.world_size())):
                break
            if not (further := more(number))["prompt"]:  # the batch has all that the data have, on every rank
                break
            rounds.append(self._answer(further, seed + (len(rounds) << _ROUND), update, state))
            drawn += rounds[-1].signal.numel()
        everyone = JudgedRows.joined([one.everyone for one in rounds])
        metrics = rollout_metrics(everyone, group)
        if settings.dynamic_sampling is None:
            rollout, rewards, of_batch = rounds[0].rollout, rounds[0].judged.result.total, everyone.rewards.total
            counted = rollout.num_prompts
        else:
            chosen = chosen_groups([one.signal for one in rounds], wanted, ranks.world_size())
            mine = [one for one in chosen if one.rank == ranks.rank()]
            rollout, rewards = _learnt_from(rounds, mine or [Group(round=0, prompt=0, rank=ranks.rank())])
            counted = len(mine)  # where it is 0, that group stands in for those of the other ranks
            kept = JudgedRows.joined([rounds[one.round].of_group(one, group) for one in chosen])
            of_batch = kept.rewards.total
            metrics |= dynamic_metrics(
                everyone, kept, rounds=len(rounds), wanted=wanted, group_size=group, cut=self._cut
            )
        advantages = group_advantages(rewards, group, settings.scale_rewards, batch_rewards=of_batch)
        experience = Experience(
            rollout=rollout,
            advantages=advantages.to(rollout.completion_ids.device),
            old_log_probs=self.scorer.log_probs(rollout) if settings.num_minibatches > 1 else None,
            reference_log_probs=self.scorer.reference_log_probs(rollout),
        )
        server = settings.rollout_server
        staleness = {"rollout/staleness": float(update - rounds[0].update)} if server and server.overlap else {}
        return Collected(
            buffer=ExperienceBuffer(experience, settings.num_minibatches, settings.num_iterations, counted),
            judged=JudgedRollout.joined([one.judged for one in rounds]),
            rows=everyone,
            metrics={**metrics, **staleness},
            num_tokens=everyone.num_tokens(group),
        )

    def _are_begun(self, begun: Begun) -> Tensor | None:
        """Say which completions go on from a beginning, shape (R,); None where the settings begin none."""
        if not self.prefixes.settings.share:
            return None
        return torch.tensor(repeated(begun.begins, self.settings.group_size))

    @property
    def _cut(self) -> bool:
        return self.settings.objective.mask_truncated

    def _answer(
        self, batch: Mapping[str, Any], seed: int, update: int, state: TrainerState, ahead: Ahead | None = None
    ) -> _Round:
        group = self.settings.group_size
        begun = self.prefixes.for_training(batch)
        drawn = self.rollouts.draw(begun.batch, seed, update, ahead)
        prompts, asked = repeated(batch["prompt"], group), repeated(batch.get("request", batch["prompt"]), group)
        seen = self.prefixes.judged(begun, drawn.rollout, drawn.texts, self.settings.sampling)
        columns = repeated_columns(batch, group)
        result, outcomes = self.judging.score(asked, seen, columns, drawn.rollout.completion_tokens(), state)
        judged = JudgedRows.of(
            drawn.rollout, result, outcomes, begun=self._are_begun(begun), reads_harm=self.judging.reads_harm
        )
        everyone = judged.of_all_ranks()
        return _Round(
            rollout=drawn.rollout,
            update=drawn.update,
            judged=JudgedRollout(
                prompts=prompts,
                completions=drawn.texts,
                result=result,
                outcomes=outcomes,
                guided=[] if drawn.rollout.guided is None else drawn.rollout.guided.tolist(),
                prefixes=repeated(begun.texts, group) if self.prefixes.settings.share else [],
            ),
            everyone=everyone,
            signal=groups_with_signal(everyone, group, mask_truncated=self._cut),
        )


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A batch of prompts, answered and judged.

    Attributes:
        rollout: This rank's completions.
        update: Updates that the policy that drew them had taken.
        judged: This rank's completions as text, with rewards and outcomes.
        everyone: The completions of all ranks, rank by rank.
        signal: Shape (P of all ranks,), bool, rank by rank, True = the rewards of this group differ.
    """

    rollout: Rollout
    update: int
    judged: JudgedRollout
    everyone: JudgedRows
    signal: Tensor

    def of_group(self, group: Group, size: int) -> JudgedRows:
        """Return the rows of one group, whichever rank drew it."""
        return self.everyone.of_group(group.rank * (len(self.signal) // ranks.world_size()) + group.prompt, size)


def _learnt_from(rounds: Sequence[_Round], mine: Sequence[Group]) -> tuple[Rollout, Tensor]:
    """Return some groups of this rank, at least one, in the order of the data, and their rewards."""
    parts, rewards = [], []
    for number, one in enumerate(rounds):
        if prompts := [group.prompt for group in mine if group.round == number]:
            parts.append(one.rollout.select(prompts))
            rewards.append(one.judged.result.total.view(-1, one.rollout.group_size)[prompts].flatten())
    return Rollout.concat(parts), torch.cat(rewards)
