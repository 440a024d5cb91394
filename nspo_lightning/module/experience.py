"""What training steps learn from: a judged rollout, cut into minibatches.

Notation as in `nspo_lightning.grpo.batch`: P prompts, G completions each, R = P * G rows of C tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.grpo import Rollout
from nspo_lightning.grpo.records import map_tensors


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A judged rollout.

    Attributes:
        rollout: Prompts and completions; with log-probabilities if a server or a merged copy drew them.
        advantages: Shape (R,).
        old_log_probs: Shape (R, C), under the policy that sampled; None while that is still the current policy.
        reference_log_probs: Shape (R, C), under the base; None at beta 0.
    """

    rollout: Rollout
    advantages: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    def select(self, prompts: slice | Tensor) -> Experience:
        """Keep whole groups, given as a slice or a bool tensor of shape (P,)."""
        chosen = torch.zeros(self.rollout.num_prompts, dtype=torch.bool, device=self.advantages.device)
        chosen[prompts] = True
        rows = chosen.repeat_interleave(self.rollout.group_size)
        return replace(map_tensors(self, lambda tensor: tensor[rows]), rollout=self.rollout.select(chosen))

    def to(self, device: torch.device | str) -> Experience:
        """Return the same experience on a device."""
        return replace(map_tensors(self, lambda tensor: tensor.to(device)), rollout=self.rollout.to(device))


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """What one training step learns from: some groups of an experience of R rows.

    Attributes:
        experience: Those groups, r rows.
        mask: Shape (r, C), bool, True = token that is trained on.
        rows: Shape (R,), bool, True = a row of these groups.
    """

    experience: Experience
    mask: Tensor
    rows: Tensor

    @classmethod
    def of(cls, experience: Experience, mask: Tensor, with_signal: Tensor) -> Minibatch:
        """Leave groups out whose gradient is zero.

        Args:
            experience: P groups, R rows; at least one.
            mask: Shape (R, C), bool, True = token that is trained on.
            with_signal: Shape (R,), bool, see `rows_with_signal`.

        Returns:
            The groups that have a row with signal. At least one is kept, with nothing to train on if need be: other
            ranks may be waiting in the backward pass.
        """
        size = experience.rollout.group_size
        signal = with_signal.view(-1, size).any(dim=1)
        kept = signal.clone()
        kept[0] |= ~signal.any()
        rows = kept.repeat_interleave(size)
        trained = mask & signal.repeat_interleave(size)[:, None]
        return cls(experience=experience.select(kept), mask=trained[rows], rows=rows)


class ExperienceBuffer:
    """Hand out one rollout's minibatches, `num_iterations` times over, one a training step.

    Args:
        experience: The judged rollout.
        num_minibatches: Parts that one pass over the rollout is cut into (by prompts). Some are empty where there are
            fewer prompts: each batch takes the same number of steps.
        num_iterations: Passes.
        counted: Prompts that are learnt from, from the first on; None = all. Where a rank has none, its experience is
            a group that only stands in.
    """

    def __init__(
        self, experience: Experience, num_minibatches: int, num_iterations: int, counted: int | None = None
    ) -> None:
        self.experience = experience
        self.counted = experience.rollout.num_prompts if counted is None else counted
        self.num_minibatches = num_minibatches
        self.num_iterations = num_iterations
        self.step = 0

    @property
    def is_empty(self) -> bool:
        """Whether every part has been handed out as often as asked."""
        return self.step >= self.num_minibatches * self.num_iterations

    @property
    def wants_log_probs(self) -> bool:
        """Whether the step that was handed out last must keep its log-probabilities for later passes.

        That step is on-policy and computes them anyway; in later passes the policy is no longer the one that sampled.
        """
        return self.num_minibatches == 1 and self.num_iterations > 1 and self.experience.old_log_probs is None

    def next(self) -> Experience:
        """Hand out the next minibatch: whole groups of the rollout, or none."""
        part = self.step % self.num_minibatches
        self.step += 1
        prompts, parts = self.counted, self.num_minibatches
        return self.experience.select(slice(part * prompts // parts, (part + 1) * prompts // parts))

    def stand_in(self) -> Experience:
        """Return one group, for a rank whose part is empty while others have theirs."""
        return self.experience.select(slice(0, 1))

    def keep_old_log_probs(self, log_probs: Tensor, rows: Tensor) -> None:
        """Keep the log-probabilities of an on-policy step over the rollout, for the passes that follow.

        `rows` says which the step scored; the others (groups without signal) are never learnt from.
        """
        whole = log_probs.new_zeros(len(rows), log_probs.shape[1])
        whole[rows] = log_probs
        self.experience = replace(self.experience, old_log_probs=whole)

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and values on the CPU, for checkpoints; `from_state_dict` reads them."""
        experience = self.experience.to("cpu")
        return {
            **vars(experience),
            "rollout": experience.rollout.state_dict(),
            "num_minibatches": self.num_minibatches,
            "num_iterations": self.num_iterations,
            "counted": self.counted,
            "step": self.step,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> ExperienceBuffer:
        """Rebuild a buffer at its place, on a device; earlier checkpoints hold log-probabilities beside the rollout."""
        values = dict(state)
        counted = values.pop("counted", None)  # earlier checkpoints have none
        parts, passes, step = (values.pop(name) for name in ("num_minibatches", "num_iterations", "step"))
        rollout = Rollout(**{"log_probs": values.pop("sampling_log_probs", None), **values["rollout"]})
        experience = Experience(**values | {"rollout": rollout})
        buffer = cls(experience.to(device), parts, passes, counted)
        buffer.step = step
        return buffer
