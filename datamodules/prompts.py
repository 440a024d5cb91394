"""What the datamodules of both domains share: the tokenizer, the length limit, the ranks, the place in the epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning.pytorch as pl
from typing_extensions import override

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.domain import DomainRows, DomainSources, download, load_domain
from nspo_lightning.datamodules.sources.order import Stop
from nspo_lightning.datamodules.sources.read import announce
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource, Sources, as_sources
from nspo_lightning.datamodules.text.collate import collate_prompts
from nspo_lightning.datamodules.text.render import ChatRenderer, Tokenizer


@runtime_checkable
class HasTokenizer(Protocol):
    """A LightningModule whose tokenizer the datamodules take."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer."""


@runtime_checkable
class TakesChatTemplate(Protocol):
    """A LightningModule whose tokenizer holds the one chat template."""

    def use_chat_template(self, template: str) -> None:
        """Use a template for everything; an error if the module was told another."""


@runtime_checkable
class ChecksTokens(Protocol):
    """A LightningModule whose policy can't read every token that its tokenizer gives."""

    def check_tokens(self, texts: Sequence[Sequence[int]]) -> None:
        """Look at texts as token ids; an error names a token that can't be read."""


def check_at_least_one(**sizes: int | None) -> None:
    """Refuse sizes below 1, given by the names of their settings; None means that there is no limit."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


class PromptDataModule(pl.LightningDataModule):
    """One domain's rows as batches of rendered prompts.

    Args:
        train: Where training rows come from: a path, a source, or a list (a mixture).
        val: Validation rows; held out of `train` when None.
        test: Test rows; held out of `train` when None.
        batch_size: Training rows a batch and rank.
        eval_batch_size: Evaluation rows a batch and rank.
        val_size: Validation rows; None = a world's own split, else a tenth, at most 300.
        test_size: Test rows; None as for `val_size`.
        max_prompt_tokens: The longest rendered prompt; longer rows are left out and reported.
        system_prompt: A system message for prompts that have none, unless their source sets its own.
        chat_template: Another name of `policy.chat_template`, for datamodules that are used without a policy.
        seed: Decides order and held-out rows.
        tokenizer: The policy's tokenizer; taken from the LightningModule when None.

    Raises:
        ValueError: If a size is out of range.
    """

    domain: ClassVar[str]
    """What messages call the domain."""

    kind: ClassVar[Kind]
    """What rows are unless their source or preset says otherwise."""

    def __init__(
        self,
        train: Sources,
        *,
        val: Sources | None,
        test: Sources | None,
        batch_size: int,
        eval_batch_size: int,
        val_size: int | None,
        test_size: int | None,
        max_prompt_tokens: int | None,
        system_prompt: str | None,
        chat_template: str | None,
        seed: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__()
        self.sources = DomainSources(
            train=as_sources(train, self.domain, system_prompt),
            validation=as_sources(val, f"{self.domain}_val", system_prompt),
            test=as_sources(test, f"{self.domain}_test", system_prompt),
            kind=self.kind,
            validation_size=val_size,
            test_size=test_size,
            seed=seed,
        )
        check_at_least_one(batch_size=batch_size, eval_batch_size=eval_batch_size, max_prompt_tokens=max_prompt_tokens)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.chat_template = chat_template
        self.seed = seed
        self.tokenizer = tokenizer
        self.rows: DomainRows | None = None
        self.longest_prompt_tokens = 0

    @property
    def renderer(self) -> ChatRenderer:
        """Applies the chat template.

        Raises:
            DataError: If there is no tokenizer, or no template.
        """
        tokenizer, template = self.tokenizer, self.chat_template
        module = None if self.trainer is None else self.trainer.lightning_module
        if template is not None and isinstance(module, TakesChatTemplate):
            module.use_chat_template(template)
            template = template if tokenizer is not None else None  # the module's tokenizer holds it now
        if tokenizer is None and isinstance(module, HasTokenizer):
            tokenizer = module.tokenizer
        if tokenizer is None:
            raise DataError(
                "the datamodule",
                "it has no tokenizer",
                "Pass `tokenizer=...`, or give the LightningModule a `tokenizer`.",
            )
        return ChatRenderer(tokenizer, template, module.check_tokens if isinstance(module, ChecksTokens) else None)

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

        def unfit(rows: list[PromptRow], source: PromptSource) -> list[str | None]:
            limit = source.max_prompt_tokens or self.max_prompt_tokens
            reasons: list[str | None] = []
            for length in _prompt_lengths(rows, source, renderer):
                if length is None:
                    reasons.append("bad (the chat template cannot render it)")
                elif limit is not None and length > limit:
                    reasons.append(f"longer than {limit} tokens")
                else:
                    reasons.append(None)
                    self.longest_prompt_tokens = max(self.longest_prompt_tokens, length)
            return reasons

        self.rows = load_domain(self.sources, unfit, renderer.as_shown)
        announce(self.rows.reports)

    def loaded(self) -> DomainRows:
        """The domain's rows, read on first use."""
        self.setup()
        assert self.rows is not None
        return self.rows

    def shard(self) -> tuple[int, int]:
        """This process's rank and the number of processes; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def accumulated_batches(self) -> int:
        """Batches that make one update; 1 without a trainer."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def unfinished_batches(self) -> int:
        """Batches that the trainer took but has not trained on: 1 when it stops in the middle of a step."""
        if self.trainer is None:
            return 0
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return max(0, int(current.ready - current.processed))

    def train_loader(self, *, repeat_batches: int = 1, stop: Stop = "shortest") -> PromptLoader:
        """Return the loader of training prompts, whose place can be saved; see `PromptLoader` for the arguments."""
        rows, renderer = self.loaded(), self.renderer
        return PromptLoader(
            rows.train,
            lambda batch: collate_prompts(batch, renderer),
            batch_size=self.batch_size,
            weights=rows.weights,
            stop=stop,
            shuffle=True,
            seed=self.seed,
            repeat_batches=repeat_batches,
            window=self.accumulated_batches,
            shard=self.shard,
            unfinished=self.unfinished_batches,
        )

    def eval_loader(
        self, rows: Sequence[PromptRow], collate: Callable[[list[PromptRow]], dict[str, Any]] | None = None
    ) -> PromptLoader:
        """Build a loader that gives rows in their order; `collate` makes batches, by default `collate_prompts`."""
        renderer = self.renderer
        plain = collate or (lambda batch: collate_prompts(batch, renderer))
        return PromptLoader([rows], plain, batch_size=self.eval_batch_size, shard=self.shard)

    @override
    def train_dataloader(self) -> PromptLoader:
        return self.train_loader()

    @override
    def val_dataloader(self) -> PromptLoader:
        return self.eval_loader(self.loaded().validation)

    @override
    def test_dataloader(self) -> PromptLoader:
        return self.eval_loader(self.loaded().test)


def _prompt_lengths(rows: list[PromptRow], source: PromptSource, renderer: ChatRenderer) -> list[int | None]:
    """Return the tokens of each rendered prompt; None for a row that the template refuses, if `bad_rows` drops it.

    Raises:
        DataError: If the template refuses a row (roles that do not alternate, say), with the row's place.
    """
    try:
        return [len(ids) for ids in renderer.encode_prompts(rows)]
    except DataError:
        return [_prompt_length(row, source, renderer) for row in rows]


def _prompt_length(row: PromptRow, source: PromptSource, renderer: ChatRenderer) -> int | None:
    try:
        return len(renderer.encode_prompts([row])[0])
    except DataError as error:
        if source.bad_rows == "drop":
            return None
        raise DataError(
            row.where,
            f"the chat template cannot render it: {error.found}",
            f"Mend or remove the row, or give the source `bad_rows: drop` to leave such rows out. {error.cure}",
        ) from error
