"""A rollout that a server draws while the one before is trained on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.grpo import Rollout


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A rollout that was requested before its batch is trained on.

    Attributes:
        prompt_ids: Shape (P, L), left-padded.
        seed: Of the sampling noise.
        update: Updates that the policy had taken when the rollout was requested.
        answer: The rollout once it is there, with log-probabilities under the policy that drew it; or the error.
    """

    prompt_ids: Tensor
    seed: int
    update: int
    answer: Future[Rollout]

    @classmethod
    def begin(cls, work: Callable[[], Rollout], prompt_ids: Tensor, seed: int, update: int) -> Ahead:
        """Start the work on a thread that keeps no process alive."""
        answer: Future[Rollout] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:  # it is raised where the answer is wanted
                answer.set_exception(error)

        threading.Thread(target=run, name="rollout-ahead", daemon=True).start()
        return cls(prompt_ids=prompt_ids, seed=seed, update=update, answer=answer)

    def is_of(self, batch: Mapping[str, Any], seed: int, update: int) -> bool:
        """Return whether it was requested for this batch, with this seed, by a policy of at most `update` updates."""
        return self.update <= update and seed == self.seed and torch.equal(self.prompt_ids, batch["prompt_ids"])

    def state_dict(self, *, wait: bool) -> dict[str, Any] | None:
        """Return plain tensors and values on the CPU, for checkpoints; None if it failed, or is not there yet."""
        if not (wait or self.answer.done()) or self.answer.exception() is not None:
            return None
        return {
            "seed": self.seed,
            "update": self.update,
            "rollout": self.answer.result().to("cpu").state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Ahead:
        """Rebuild it, answered, on a device; earlier checkpoints hold the log-probabilities beside the rollout."""
        answer: Future[Rollout] = Future()
        rollout = Rollout(**{"log_probs": state.get("log_probs"), **state["rollout"]}).to(device)
        answer.set_result(rollout)
        return cls(prompt_ids=rollout.prompt_ids, seed=int(state["seed"]), update=int(state["update"]), answer=answer)
