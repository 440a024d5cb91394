"""What one rollout hands to the training steps that learn from it.

Notation as in `nspo_lightning.grpo.batch`: P prompts, G completions each, R = P * G rows of C tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.grpo import Rollout


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A judged rollout.

    Attributes:
        rollout: Prompts and completions.
        advantages: Shape (R,).
        old_log_probs: Shape (R, C), under the policy that sampled; None while that is still the current policy.
        reference_log_probs: Shape (R, C), under the base; None at beta 0.
        sampling_log_probs: Shape (R, C), as a server says that it drew them; None if this process drew them.
    """

    rollout: Rollout
    advantages: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    sampling_log_probs: Tensor | None = None

    def select(self, prompts: slice | Tensor) -> Experience:
        """Keep whole groups.

        Args:
            prompts: Which prompts: a slice, or a bool tensor of shape (P,).

        Returns:
            The experience of these prompts.
        """
        chosen = torch.zeros(self.rollout.num_prompts, dtype=torch.bool, device=self.advantages.device)
        chosen[prompts] = True
        rows = chosen.repeat_interleave(self.rollout.group_size)
        return Experience(
            rollout=self.rollout.select(chosen),
            advantages=self.advantages[rows],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[rows],
            reference_log_probs=None if self.reference_log_probs is None else self.reference_log_probs[rows],
            sampling_log_probs=None if self.sampling_log_probs is None else self.sampling_log_probs[rows],
        )

    def to(self, device: torch.device | str) -> Experience:
        """Move all tensors.

        Args:
            device: Where to.

        Returns:
            The same experience there.
        """
        return Experience(
            rollout=self.rollout.to(device),
            advantages=self.advantages.to(device),
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs.to(device),
            reference_log_probs=None if self.reference_log_probs is None else self.reference_log_probs.to(device),
            sampling_log_probs=None if self.sampling_log_probs is None else self.sampling_log_probs.to(device),
        )


class ExperienceBuffer:
    """Hand out one rollout's minibatches, `num_iterations` times over, one a training step.

    Args:
        experience: The judged rollout.
        num_minibatches: Parts that one pass over the rollout is cut into (by prompts).
        num_iterations: Passes.
    """

    def __init__(self, experience: Experience, num_minibatches: int, num_iterations: int) -> None:
        self.experience = experience
        self.num_minibatches = min(num_minibatches, experience.rollout.num_prompts)
        self.num_iterations = num_iterations
        self.step = 0

    @property
    def is_empty(self) -> bool:
        """Whether every part has been handed out as often as asked."""
        return self.step >= self.num_minibatches * self.num_iterations

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether a later step will see a policy that is no longer the one that sampled."""
        return self.num_minibatches * self.num_iterations > 1

    def next(self) -> Experience:
        """Hand out the next minibatch.

        Returns:
            Whole groups of the rollout.
        """
        part = self.step % self.num_minibatches
        self.step += 1
        prompts, parts = self.experience.rollout.num_prompts, self.num_minibatches
        return self.experience.select(slice(part * prompts // parts, (part + 1) * prompts // parts))

    def keep_old_log_probs(self, log_probs: Tensor, rows: Tensor) -> None:
        """Keep the log-probabilities of an on-policy step over the rollout, for the passes that follow.

        Args:
            log_probs: Shape (rows that count, C), detached.
            rows: Shape (R,), True = the step scored this row; the others (groups without signal) are never learnt from.
        """
        whole = log_probs.new_zeros(len(rows), log_probs.shape[1])
        whole[rows] = log_probs
        self.experience = replace(self.experience, old_log_probs=whole)

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and values, for checkpoints.

        Returns:
            A dict that `from_state_dict` reads.
        """
        experience = self.experience.to("cpu")
        return {
            "rollout": experience.rollout.state_dict(),
            "advantages": experience.advantages,
            "old_log_probs": experience.old_log_probs,
            "reference_log_probs": experience.reference_log_probs,
            "sampling_log_probs": experience.sampling_log_probs,
            "num_minibatches": self.num_minibatches,
            "num_iterations": self.num_iterations,
            "step": self.step,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> ExperienceBuffer:
        """Rebuild a buffer at its place.

        Args:
            state: What `state_dict` returned.
            device: Where the tensors shall be.

        Returns:
            The buffer.
        """
        experience = Experience(
            rollout=Rollout(**state["rollout"]),
            advantages=state["advantages"],
            old_log_probs=state["old_log_probs"],
            reference_log_probs=state["reference_log_probs"],
            sampling_log_probs=state.get("sampling_log_probs"),  # older checkpoints have none
        )
        buffer = cls(experience.to(device), state["num_minibatches"], state["num_iterations"])
        buffer.step = state["step"]
        return buffer
