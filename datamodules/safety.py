"""Harmful prompts for training and for measuring refusal."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.prompts import PromptDataModule, check_at_least_one
from nspo_lightning.datamodules.sources.order import Stop
from nspo_lightning.datamodules.sources.source import Sources
from nspo_lightning.datamodules.text.render import Tokenizer


class SafetyDataModule(PromptDataModule):
    """Safety prompts: training batches for rollouts, held-out ones for evaluation.

    Benign prompts may be mixed in (a source with `kind: benign` and a `weight`), for rewards that look at both.
    The arguments that are not listed are those of `PromptDataModule`.

    Args:
        mixture: When an epoch of several sources ends: before the first repeats a row, or when all were seen whole.
        repeat_batches: How often each batch comes (one rollout feeds that many steps).

    Raises:
        ValueError: If a size is out of range.
    """

    domain = "safety"
    kind = "harmful"

    def __init__(
        self,
        train: Sources,
        *,
        val: Sources | None = None,
        test: Sources | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        val_size: int | None = None,
        test_size: int | None = None,
        max_prompt_tokens: int | None = None,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        mixture: Stop = "shortest",
        repeat_batches: int = 1,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_at_least_one(repeat_batches=repeat_batches)
        super().__init__(
            train,
            val=val,
            test=test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            max_prompt_tokens=max_prompt_tokens,
            system_prompt=system_prompt,
            chat_template=chat_template,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.mixture = mixture
        self.repeat_batches = repeat_batches

    @override
    def train_dataloader(self) -> PromptLoader:
        loader = self.train_loader(repeat_batches=self.repeat_batches, stop=self.mixture)
        if len(self.sources.train) > 1:
            rank_zero_info(f"Mixture of safety prompts: an epoch visits {loader.describe()}")
        return loader
