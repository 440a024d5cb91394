"""Harmful prompts for training and for measuring refusal."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.prompts import PromptDataModule
from nspo_lightning.datamodules.sources.domain import DomainSources
from nspo_lightning.datamodules.sources.source import Sources, as_sources, with_system
from nspo_lightning.datamodules.text.render import Tokenizer


class SafetyDataModule(PromptDataModule):
    """Safety prompts: training batches for rollouts, held-out ones for evaluation.

    Benign prompts may be mixed in (a source with `kind: benign` and a `weight`), for rewards that look at both.

    Args:
        train: Where training prompts come from.
        val: Validation prompts; held out of `train` when None.
        test: Test prompts; held out of `train` when None.
        batch_size: Prompts a training batch and rank.
        eval_batch_size: Prompts an evaluation batch and rank.
        val_size: Validation prompts; None = a world's own split, else a tenth, at most 500.
        test_size: Test prompts, likewise.
        max_prompt_tokens: The longest rendered prompt; longer rows are left out and reported.
        system_prompt: A system message for prompts that have none, unless their source sets its own.
        chat_template: A Jinja template or its path, where the tokenizer's own is missing or wrong.
        mixture: When an epoch of several sources ends: before the first repeats a row, or when all were seen whole.
        repeat_batches: How often each batch comes in a row (one rollout feeds that many steps).
        seed: Decides order and held-out rows.
        tokenizer: The policy's tokenizer; taken from the LightningModule when None.

    Raises:
        ValueError: If a size is out of range.
    """

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
        mixture: Literal["shortest", "longest"] = "shortest",
        repeat_batches: int = 1,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if repeat_batches < 1:
            raise ValueError(f"`repeat_batches` must be at least 1, got {repeat_batches}.")
        super().__init__(
            DomainSources(
                train=with_system(as_sources(train, "safety"), system_prompt),
                validation=with_system(as_sources(val, "safety_val"), system_prompt),
                test=with_system(as_sources(test, "safety_test"), system_prompt),
                kind="harmful",
                validation_size=val_size,
                test_size=test_size,
                seed=seed,
            ),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_prompt_tokens=max_prompt_tokens,
            chat_template=chat_template,
            tokenizer=tokenizer,
        )
        self.mixture: Literal["shortest", "longest"] = mixture
        self.repeat_batches = repeat_batches
        self.seed = seed

    @override
    def train_dataloader(self) -> PromptLoader:
        loader = self.train_loader(seed=self.seed, repeat_batches=self.repeat_batches, stop=self.mixture)
        if len(self.sources.train) > 1:
            rank_zero_info(f"Mixture of safety prompts: an epoch visits {loader.describe()}")
        return loader
