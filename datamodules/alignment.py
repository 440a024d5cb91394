"""Safety prompts to train on and general data to keep: the datamodule of a whole run."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
from typing_extensions import override

from nspo_lightning.attacks import Attack, find_attacks
from nspo_lightning.datamodules.attacked import HasVictim, attack_loaders
from nspo_lightning.datamodules.general import GeneralDataModule
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.prompts import check_at_least_one
from nspo_lightning.datamodules.safety import SafetyDataModule
from nspo_lightning.datamodules.sources.order import Stop
from nspo_lightning.datamodules.sources.read import SourceReport
from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.sources.source import Sources
from nspo_lightning.datamodules.sources.splits import HeldOutName
from nspo_lightning.datamodules.text.collate import CalibrationText, Side, collate_text
from nspo_lightning.datamodules.text.render import Tokenizer
from nspo_lightning.datamodules.text.text_rows import AnswerFn, choose_text_rows

TEXT_BATCH_SIZE = 16
"""Rows of text scored at once, at most."""
LEARN_ROWS = 256
"""Harmful prompts that the criterion `contrast` is shown."""


class EvalRows(NamedTuple):
    """Rows of each evaluation loader of a split, in the loaders' order, see `evaluation.loaders`."""

    safety: list[PromptRow]
    """Harmful rows."""
    general: list[PromptRow]
    """Benign rows, also those that stand among safety prompts (XSTest's safe half)."""


class AlignmentDataModule(pl.LightningDataModule):
    """Trains on safety prompts, calibrates on general text, evaluates on both.

    Evaluation has two loaders, see `EvalRows`, and one or two for each attack.

    Args:
        safety: Where safety prompts come from: a path, a source, or a list (a mixture).
        general: Where general data comes from; calibration mixes several sources by weight, equally by default.
        safety_val: Validation prompts; held out of `safety` when None.
        safety_test: Test prompts; held out of `safety` when None.
        general_val: General validation rows; held out of `general` when None.
        general_test: General test rows; held out of `general` when None.
        batch_size: Prompts a training batch and rank.
        eval_batch_size: Rows an evaluation batch and rank.
        val_size: Validation rows of each domain; None = a world's own split, else a tenth, at most 300.
        test_size: Test rows of each domain; None as for `val_size`.
        max_prompt_tokens: The longest rendered prompt; longer rows are left out and reported.
        calibration_size: General rows that the null space is computed from; None = all.
        calibration_text: The prompt alone, with its reference answer, or with the base's own answer (adapter off).
        calibration_batch_size: Rows a calibration batch and rank.
        calibration_max_tokens: The longest calibration text; longer rows are left out and reported.
        calibration_padding: Where short calibration rows are padded.
        calibration_starts: Further rows of which the criterion `contrast` sees the start of the base's own answer:
            whether to answer is decided there, and few rows overstate which directions general text leaves unused.
        text_max_tokens: Held-out general text is cut there where it is scored (KL and NLL); None = at the model's own
            limit. A row whose prompt alone is longer is not scored.
        system_prompt: A system message for prompts that have none, unless their source sets its own.
        chat_template: Another name of `policy.chat_template`, for datamodules that are used without a policy.
        val_attacks: Attacks that validation also measures, on held-out prompts (`[prefill_5]`), to watch training by
            and to choose checkpoints by `attack/prefill_5/refusal_rate`; `test` has `--attacks`.
        attack_rows: Held-out prompts of each kind that an attack is tried on at most; None = all.
        mixture: When an epoch of several safety sources ends: before the first repeats a row (`shortest`), or when
            all were seen whole (`longest`).
        repeat_batches: How often each training batch comes (one rollout feeds that many steps).
        seed: Decides order, held-out and calibration rows.
        tokenizer: The policy's tokenizer; taken from the LightningModule when None.
    """

    eval_names = EvalRows._fields

    def __init__(
        self,
        safety: Sources,
        general: Sources,
        safety_val: Sources | None = None,
        safety_test: Sources | None = None,
        general_val: Sources | None = None,
        general_test: Sources | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        val_size: int | None = None,
        test_size: int | None = None,
        max_prompt_tokens: int | None = None,
        calibration_size: int | None = 1024,
        calibration_text: CalibrationText = "prompt_and_answer",
        calibration_batch_size: int = 16,
        calibration_max_tokens: int | None = None,
        calibration_padding: Side = "right",
        calibration_starts: int = 512,
        text_max_tokens: int | None = 1024,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        mixture: Stop = "shortest",
        repeat_batches: int = 1,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        val_attacks: list[str] | None = None,
        attack_rows: int | None = 200,
    ) -> None:
        super().__init__()
        check_at_least_one(text_max_tokens=text_max_tokens, attack_rows=attack_rows)
        self.text_max_tokens = text_max_tokens
        self.val_attacks = None if val_attacks is None else find_attacks(val_attacks)
        self.test_attacks: list[Attack] | None = None  # what `test --attacks` says
        self.attack_rows = attack_rows
        self.safety = SafetyDataModule(
            safety,
            val=safety_val,
            test=safety_test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            max_prompt_tokens=max_prompt_tokens,
            system_prompt=system_prompt,
            chat_template=chat_template,
            mixture=mixture,
            repeat_batches=repeat_batches,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.general = GeneralDataModule(
            general,
            val=general_val,
            test=general_test,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            calibration_size=calibration_size,
            calibration_text=calibration_text,
            calibration_batch_size=calibration_batch_size,
            calibration_max_tokens=calibration_max_tokens,
            calibration_padding=calibration_padding,
            calibration_starts=calibration_starts,
            max_prompt_tokens=max_prompt_tokens,
            system_prompt=system_prompt,
            chat_template=chat_template,
            seed=seed,
            tokenizer=tokenizer,
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was given; None means the LightningModule's."""
        return self.safety.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.safety.tokenizer = self.general.tokenizer = tokenizer

    @property
    def longest_prompt_tokens(self) -> int:
        """The length of the longest rendered prompt among all usable rows."""
        return max(self.safety.longest_prompt_tokens, self.general.longest_prompt_tokens)

    @property
    def reports(self) -> list[SourceReport]:
        """What became of every source's rows."""
        return [*self.safety.loaded().reports, *self.general.loaded().reports]

    @override
    def prepare_data(self) -> None:
        self.safety.prepare_data()
        self.general.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        for part in (self.safety, self.general):
            part.trainer = self.trainer
            part.setup(stage)

    def eval_rows(self, split: HeldOutName) -> EvalRows:
        """List the evaluation rows of a split, of all sources."""
        rows = self.safety.loaded().held_out[split] + self.general.loaded().held_out[split]
        return EvalRows(
            safety=[row for row in rows if row.kind == "harmful"], general=[row for row in rows if row.kind == "benign"]
        )

    @override
    def train_dataloader(self) -> PromptLoader:
        return self.safety.train_dataloader()

    @override
    def val_dataloader(self) -> list[PromptLoader]:
        return self._eval_loaders("validation")

    @override
    def test_dataloader(self) -> list[PromptLoader]:
        return self._eval_loaders("test")

    @override
    def predict_dataloader(self) -> list[PromptLoader]:
        return self.test_dataloader()

    def _eval_loaders(self, split: HeldOutName) -> list[PromptLoader]:
        harmful, benign = self.eval_rows(split)
        loaders = [self.safety.eval_loader(rows) for rows in (harmful, benign)]
        attacks = self.test_attacks if split == "test" else self.val_attacks
        if not attacks:
            return loaders
        module = None if self.trainer is None else self.trainer.lightning_module
        return loaders + attack_loaders(
            attacks,
            harmful,
            benign,
            victim=module.victim if isinstance(module, HasVictim) else None,
            renderer=self.safety.renderer,
            make_loader=self.safety.eval_loader,
            limit=self.attack_rows,
        )

    @property
    def trained_attacks(self) -> list[Attack]:
        """The templates that training prompts stand in."""
        named = [source.attacks or [] for source in self.safety.sources.train]
        return [attack for names in named if names for attack in find_attacks(names)]

    def text_dataloader(
        self,
        split: HeldOutName,
        rows: int | None = None,
        max_tokens: int | None = None,
        limit_batches: float = 1.0,
    ) -> PromptLoader:
        """Return batches of held-out general text to score; no calibration row is among them.

        They have `input_ids`, `attention_mask`, `labels_mask` (1 = the answer's tokens) and `domain`.

        Args:
            split: Which rows.
            rows: How many, spread over skills; None = all.
            max_tokens: Where longer texts are cut, if that is before `text_max_tokens`.
            limit_batches: At most so many batches a rank (an int) or such a share of them (a float), as in Lightning's
                Trainer: fewer rows, spread over skills likewise.
        """
        everything, renderer = self.eval_rows(split).general, self.general.renderer
        cut = min((limit for limit in (max_tokens, self.text_max_tokens) if limit is not None), default=None)
        chosen = choose_text_rows(everything, rows)
        size = min(self.general.eval_batch_size, TEXT_BATCH_SIZE)
        at_once = size * self.general.shard()[1]
        batches = -(-len(chosen) // at_once)
        most = limit_batches if isinstance(limit_batches, int) else int(batches * limit_batches)
        if most < batches:
            chosen = choose_text_rows(everything, most * at_once)
        return PromptLoader(
            [chosen],
            lambda batch: collate_text(batch, renderer, cut),
            batch_size=size,
            shard=self.general.shard,
        )

    def reference_dataloader(self, rows: int, answer_fn: AnswerFn | None = None) -> PromptLoader:
        """Return batches of the first calibration rows, laid out as in `text_dataloader`: each skill has its share."""
        chosen, renderer = self.general.calibration_rows(answer_fn)[:rows], self.general.renderer
        size = min(self.general.calibration_batch_size, TEXT_BATCH_SIZE)
        cut = self.text_max_tokens
        return PromptLoader([chosen], lambda batch: collate_text(batch, renderer, cut), batch_size=size)

    def calibration_dataloader(
        self, answer_fn: AnswerFn | None = None, to_learn: bool = False, starts: bool = False
    ) -> PromptLoader:
        """Return batches of general text for the null space; see `GeneralDataModule.calibration_dataloader`.

        With `to_learn`, up to `LEARN_ROWS` of the harmful prompts that are trained on come too.
        """
        harmful: list[PromptRow] = []
        if to_learn:
            train = self.safety.loaded().train_of("harmful")
            harmful = [train[i] for i in take_ranked(train, min(LEARN_ROWS, len(train)), "to learn")]
        return self.general.calibration_dataloader(answer_fn, harmful, starts)

    def count_calibration_starts(self) -> int:
        """Return how many starts of answers calibration text can have, see `GeneralDataModule`."""
        return self.general.count_calibration_starts()
