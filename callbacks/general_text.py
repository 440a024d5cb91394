"""Measure a policy on held-out general text at every validation, as `fit`'s report and `test` do."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.callbacks.protocols import HasHeldOutText, LimitsContext, ScoresText
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.evaluation.text_means import text_means
from nspo_lightning.policy.divergence import TextScores

TEXT_ROWS = 256
"""Rows of general text that are measured before and after a fit and by `test`, unless the callback says otherwise."""


class GeneralText(Callback):
    """Log what `text_means` says of general validation text: `general/kl`, `general/kl_first`, `general/nll`, ...

    Does nothing for modules without `text_scores` or datamodules without `text_dataloader`.

    Args:
        text_rows: Rows with a reference answer, spread over skills; 0 = none, None = all.
    """

    def __init__(self, text_rows: int | None = 64) -> None:
        self.text_rows = text_rows

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        means = text_means(measure_text(trainer, pl_module, "validation", self.text_rows))
        for name, mean in means.items():  # the same on all ranks; `sync_dist` only tells Lightning so
            pl_module.log(name, mean.value, sync_dist=ranks.world_size() > 1)


def measure_text(
    trainer: pl.Trainer, module: object, split: Literal["validation", "test"], rows: int | None
) -> TextScores:
    """Score held-out general text; all ranks do it together and get all rows.

    Args:
        trainer: Knows the datamodule, and how many batches of text at most (`limit_val_batches`,
            `limit_test_batches`).
        module: Scores text.
        split: Which rows.
        rows: How many, spread over skills; 0 = none, None = all.

    Returns:
        The scores; without rows where the module or the datamodule does not know of text.
    """
    datamodule = datamodule_of(trainer)
    if rows == 0 or not isinstance(module, ScoresText) or not isinstance(datamodule, HasHeldOutText):
        return TextScores()
    longest = module.context_tokens if isinstance(module, LimitsContext) else None
    limit = trainer.limit_val_batches if split == "validation" else trainer.limit_test_batches
    whole = isinstance(limit, float) and limit == 1.0
    options = {} if whole else {"limit_batches": limit}
    loader = datamodule.text_dataloader(split, rows, longest, **options)
    scores = TextScores()
    with measuring(trainer, "Scoring general text", [loader]) as [batches]:
        for batch in batches:
            scores += module.text_scores(trainer.strategy.batch_to_device(batch))
    return scores.over_ranks()
