"""What the datamodules share: the tokenizer, the length limit, the ranks, the place in the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from typing_extensions import override

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.domain import DomainRows, DomainSources, download, load_domain
from nspo_lightning.datamodules.sources.errors import DataError
from nspo_lightning.datamodules.sources.read import announce
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import PromptSource
from nspo_lightning.datamodules.text.collate import collate_prompts
from nspo_lightning.datamodules.text.render import ChatRenderer, Tokenizer


class PromptDataModule(pl.LightningDataModule):
    """One domain's rows as batches of rendered prompts.

    Args:
        sources: What the domain is read from.
        batch_size: Training rows a batch and rank.
        eval_batch_size: Evaluation rows a batch and rank.
        max_prompt_tokens: The longest rendered prompt; longer rows are left out and reported.
        chat_template: A Jinja template or its path, where the tokenizer's own is missing or wrong.
        tokenizer: The policy's tokenizer; taken from the LightningModule when None.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        sources: DomainSources,
        *,
        batch_size: int,
        eval_batch_size: int,
        max_prompt_tokens: int | None,
        chat_template: str | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"`max_prompt_tokens` must be at least 1, got {max_prompt_tokens}.")
        self.sources = sources
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.chat_template = chat_template
        self.tokenizer = tokenizer
        self.rows: DomainRows | None = None
        self.longest_prompt_tokens = 0

    @property
    def renderer(self) -> ChatRenderer:
        """Applies the chat template.

        Raises:
            DataError: If there is no tokenizer, or no template.
        """
        tokenizer = self.tokenizer
        if tokenizer is None and self.trainer is not None:
            tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise DataError(
                "the datamodule",
                "it has no tokenizer",
                "Pass `tokenizer=...`, or give the LightningModule a `tokenizer`.",
            )
        return ChatRenderer(tokenizer, self.chat_template)

    @property
    def all_sources(self) -> list[PromptSource]:
        """Every source that is read."""
        return [*self.sources.train, *self.sources.validation, *self.sources.test]

    @override
    def prepare_data(self) -> None:
        download(self.all_sources)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.rows is not None:
            return
        renderer = self.renderer

        def too_long(rows: list[PromptRow], source: PromptSource) -> list[str | None]:
            limit = source.max_prompt_tokens or self.max_prompt_tokens
            lengths = [len(ids) for ids in renderer.encode([renderer.text(row.prompt) for row in rows])]
            fitting = [length for length in lengths if limit is None or length <= limit]
            self.longest_prompt_tokens = max([self.longest_prompt_tokens, *fitting])
            return [None if limit is None or length <= limit else f"longer than {limit} tokens" for length in lengths]

        self.rows = load_domain(self.sources, too_long)
        announce(self.rows.reports)

    def loaded(self) -> DomainRows:
        """The rows, read on first use.

        Returns:
            The domain's rows.
        """
        self.setup()
        assert self.rows is not None
        return self.rows

    def shard(self) -> tuple[int, int]:
        """This process's rank and the number of processes.

        Returns:
            (0, 1) without a trainer.
        """
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def unfinished_batches(self) -> int:
        """Batches that the trainer took but has not trained on: 1 when it stops in the middle of a step.

        Returns:
            0 without a trainer.
        """
        if self.trainer is None:
            return 0
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return max(0, int(current.ready - current.processed))

    def train_loader(self, *, seed: int, repeat_batches: int, stop: Literal["shortest", "longest"]) -> PromptLoader:
        """Build the loader of training prompts.

        Args:
            seed: Decides the order.
            repeat_batches: How often each batch comes in a row.
            stop: When an epoch of a mixture ends.

        Returns:
            A loader whose place can be saved.
        """
        rows, renderer = self.loaded(), self.renderer
        return PromptLoader(
            rows.train,
            lambda batch: collate_prompts(batch, renderer),
            batch_size=self.batch_size,
            weights=rows.weights,
            stop=stop,
            shuffle=True,
            seed=seed,
            repeat_batches=repeat_batches,
            shard=self.shard,
            unfinished=self.unfinished_batches,
        )

    def eval_loader(self, rows: Sequence[PromptRow]) -> PromptLoader:
        """Build a loader that gives rows in their order.

        Args:
            rows: The rows.

        Returns:
            The loader.
        """
        renderer = self.renderer
        return PromptLoader(
            [rows], lambda batch: collate_prompts(batch, renderer), batch_size=self.eval_batch_size, shard=self.shard
        )

    def val_dataloader(self) -> Any:
        """Validation prompts.

        Returns:
            A loader.
        """
        return self.eval_loader(self.loaded().validation)

    def test_dataloader(self) -> Any:
        """Test prompts.

        Returns:
            A loader.
        """
        return self.eval_loader(self.loaded().test)
