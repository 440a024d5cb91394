"""What `test` leaves behind: rates with their intervals, general text, completions of base and policy side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import json_text, partial_of, remove_leftovers, set_aside_other, write_json
from nspo_lightning.attacks import ATTACK, LOOKALIKES
from nspo_lightning.callbacks.attack_samples import (
    ATTACK_SAMPLES,
    attack_identity,
    attacks_of,
    show_attacks,
    trained_attacks,
)
from nspo_lightning.callbacks.general_text import TEXT_ROWS, measure_text
from nspo_lightning.callbacks.protocols import AnswersTests, HasEvalRows
from nspo_lightning.compat.lightning import datamodule_of, is_fast_dev_run
from nspo_lightning.evaluation.attacked import attack_markdown, attack_table
from nspo_lightning.evaluation.loaders import HARMFUL
from nspo_lightning.evaluation.report import (
    AnswerCounts,
    rates_summary,
    report_table,
    side_by_side,
    text_summary,
)
from nspo_lightning.policy.identity import data_identity, versions

RESULT = "test.json"
COMPLETIONS = "test_completions.jsonl"


class TestReport(Callback):
    """Write ``test.json`` and ``test_completions.jsonl`` into the run's folder and print a table, after `test`.

    Counts what the module's `test_step` answered (it returns `{"answers": Answers}`), by category where the rows have
    one, beside what the base answers to the same prompts with the same noise, and measures general text (`text_means`),
    which says something of free text too. Each rank writes the completions of
    its own rows; rates are reduced over ranks. Under `test --attacks` a second table has both under each attack, and
    TensorBoard has it by category, with sample answers. Does nothing for other modules. What an earlier `test` left
    stays until this one is complete, and if it was about something else (another checkpoint, other rows, a limit) it
    is kept in ``test.1/``.

    Args:
        base: Also let the base answer (twice the time).
        text_rows: Rows of general test text for perplexity and KL; 0 = none, None = all.
        folder: Where to write; default: the logger's folder.
    """

    __test__ = False  # pytest collects classes by this name

    def __init__(self, base: bool = True, text_rows: int | None = TEXT_ROWS, folder: str | None = None) -> None:
        self.base = base
        self.text_rows = text_rows
        self.folder = folder
        self.result: dict[str, Any] = {}
        self._counts = AnswerCounts()
        self._file: Path | None = None
        self._attack_samples: dict[str, list[dict[str, Any]]] = {}

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counts, self._file, self._attack_samples = AnswerCounts(), None, {}
        if is_fast_dev_run(trainer) or not isinstance(pl_module, AnswersTests):
            return
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = COMPLETIONS if trainer.global_rank == 0 else COMPLETIONS.replace(".", f".{trainer.global_rank}.", 1)
        self._file = folder / name
        if trainer.is_global_zero:
            remove_leftovers(folder)
        partial_of(self._file).write_text("")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            partial_of(self._file).unlink(missing_ok=True)
            self._file = None

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._file is None or not isinstance(pl_module, AnswersTests) or not isinstance(outputs, Mapping):
            return
        attack = batch.get(ATTACK)
        harmful = dataloader_idx == HARMFUL if attack is None else not batch[LOOKALIKES]
        answers = {"policy": outputs["answers"]}
        if self.base and (base := pl_module.base_answer(batch, dataloader_idx, batch_idx)) is not None:
            answers["base"] = base
        name = "" if attack is None else attack.name
        self._counts.update(answers, batch.get("columns", {}), harmful=harmful, device=pl_module.device, attack=name)
        rows = list(side_by_side(answers, batch, harmful=harmful))
        if attack is not None and batch_idx == 0:
            self._attack_samples[f"{name}{'' if harmful else ', look-alikes'}"] = rows[:ATTACK_SAMPLES]
        with partial_of(self._file).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json_text(row) + "\n")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._file is None or not isinstance(pl_module, AnswersTests):
            return
        rates = self._counts.rates(pl_module.device)
        attacks = attacks_of(trainer)
        order, trained = [one.name for one in attacks], trained_attacks(trainer, pl_module, attacks)
        scores = measure_text(trainer, pl_module, "test", self.text_rows)
        self.result = {
            "identity": {**_identity(trainer, pl_module), "base": self.base, "text_rows": self.text_rows},
            **rates_summary(rates),
            **text_summary(scores),
            **({"attacks_in_training": [name for name in order if name in trained]} if order else {}),
            "completions": COMPLETIONS,
        }
        file, folder, self._file = self._file, self._file.parent, None
        if trainer.is_global_zero:
            others = sorted(folder.glob(COMPLETIONS.replace(".", "*.", 1)))
            if kept := set_aside_other(folder / RESULT, self.result["identity"], others):
                rank_zero_info(f"An earlier test of something else stood there; it is now in {kept}.")
        trainer.strategy.barrier("earlier test set aside")
        partial_of(file).replace(file)
        if trainer.is_global_zero:
            from rich import get_console

            write_json(self.result, folder / RESULT)
            get_console().print(report_table(rates, scores))
            if order:
                get_console().print(attack_table(rates, order, trained))
                show_attacks(trainer.loggers, attack_markdown(rates, order, trained), self._attack_samples)
        rank_zero_info(f"Written to {folder}: {RESULT}, {COMPLETIONS}")


def _identity(trainer: pl.Trainer, module: AnswersTests) -> dict[str, Any]:
    """Return what the result is about."""
    datamodule = datamodule_of(trainer)
    return {
        **module.test_identity(),
        "data": data_identity(datamodule, "test") if isinstance(datamodule, HasEvalRows) else None,
        "limit_batches": trainer.limit_test_batches,
        "seed": int(torch.initial_seed() % 2**32),
        "ranks": trainer.world_size,
        **attack_identity(trainer),
        "versions": versions(),
    }
