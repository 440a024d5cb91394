"""How far a run has moved: ||D||_F of its weights, and the KL to the base on harmful prompts.

The two things that forgetting is said to follow (a norm of the update; RL's Razor, arXiv 2509.04259: the KL on the task
that is trained). KL(base || policy) is taken on answers that the base itself gave, once, so that its sum over an answer
is an unbiased estimate of the divergence between whole answers; at temperature 1, in nats a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.callbacks.protocols import AnswersAsBase
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.alignment import TEXT_BATCH_SIZE
from nspo_lightning.datamodules.sources.rows import take_ranked
from nspo_lightning.evaluation.text_means import SAFETY_KL, SAFETY_KL_FIRST
from nspo_lightning.nullspace.movement import Movement
from nspo_lightning.policy.divergence import TextScores
from nspo_lightning.terminal import counted

UPDATE_NORM = "weights/change"
"""||D||_F, see `Movement`."""


class Distance:
    """Measures a run's distance from where it started.

    Args:
        rows: Harmful prompts a split, at most, that the base answers; 0 = none, None = all.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self._start: dict[str, dict[str, Tensor]] | None = None
        self._movement: Movement | None = None
        self._texts: dict[str, list[dict[str, Any]]] = {}

    def begin(self, module: pl.LightningModule) -> None:
        """Note where the weights are, unless that is known from the run that goes on here."""
        self._movement = Movement(module, self._start)
        if missing := self._movement.uncounted:
            rank_zero_warn(
                f"`{UPDATE_NORM}` leaves out {counted(len(missing), 'trained parameter')}, the first {missing[0]}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return where the weights began; {} before that."""
        start = self._start if self._movement is None else self._movement.state_dict()
        return {} if start is None else {"start": start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what an earlier process noted."""
        self._start = state.get("start")

    def measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: AlignmentDataModule,
        split: Literal["validation", "test"],
    ) -> dict[str, float]:
        """Return the metrics that can be had, by name; all ranks do it together."""
        movement = self._movement
        if movement is None and self._start is not None:  # training was over when the run went on
            movement = Movement(module, self._start)
        found = {UPDATE_NORM: 0.0 if movement is None else movement.norm()}
        scores = self._scores(trainer, module, data, split)
        if scores.tokens:
            first = sum(row.first_tokens for row in scores.rows)
            found |= {SAFETY_KL: scores.mean_kl, SAFETY_KL_FIRST: sum(r.first_kl for r in scores.rows) / first}
        return found

    def _scores(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: AlignmentDataModule,
        split: Literal["validation", "test"],
    ) -> TextScores:
        if self.rows == 0 or not isinstance(module, AnswersAsBase):
            return TextScores()
        if split not in self._texts:
            self._texts[split] = list(self._answered(trainer, module, data, split))
        scores = TextScores()
        with measuring(trainer, "Scoring the base's answers", [self._texts[split]]) as [batches]:
            for batch in batches:
                scores += module.text_scores(trainer.strategy.batch_to_device(batch))
        return scores.over_ranks()

    def _answered(
        self,
        trainer: pl.Trainer,
        module: AnswersAsBase,
        data: AlignmentDataModule,
        split: Literal["validation", "test"],
    ) -> Iterable[dict[str, Any]]:
        """Yield harmful prompts with the base's answers, on the CPU, few enough at a time to be scored together."""
        harmful = data.eval_rows(split).safety
        size = len(harmful) if self.rows is None else min(self.rows, len(harmful))
        loader = data.safety.eval_loader([harmful[i] for i in take_ranked(harmful, size, "safety text")])
        with measuring(trainer, "Answering as the base", [loader]) as [batches]:
            for number, batch in enumerate(batches):
                text = module.base_text(trainer.strategy.batch_to_device(batch), number)
                if text is None:
                    return
                for start in range(0, len(text["input_ids"]), TEXT_BATCH_SIZE):
                    yield {name: part[start : start + TEXT_BATCH_SIZE].cpu() for name, part in text.items()}
