"""What `test` leaves behind: rates with their intervals, general text, completions of base and policy side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from nspo_lightning.atomic import write_json
from nspo_lightning.evaluation.rates import Answers, Rate, RateTable, mean_accuracy, row_categories
from nspo_lightning.policy.divergence import TextSums
from nspo_lightning.policy.identity import data_identity, describe, policy_identity, versions

RESULT = "test.json"
COMPLETIONS = "test_completions.jsonl"
TITLES = {
    "safety/unsafe_rate": "attack success",
    "safety/refusal_rate": "refusal of harmful prompts",
    "safety/garbage_rate": "garbage",
    "general/over_refusal_rate": "over-refusal",
    "general/refusal_rate": "refusal of harmless prompts",
}


@runtime_checkable
class Tested(Protocol):
    """What the report needs of a LightningModule; `PolicyModule` has it."""

    def base_answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers | None:
        """Answer a batch as the base does."""

    def text_sums(self, batch: Mapping[str, Any]) -> TextSums:
        """Score a batch of text."""


class TestReport(Callback):
    """Write ``test.json`` and ``test_completions.jsonl`` into the run's folder and print a table, after `test`.

    Counts what the module's `test_step` answered (it returns `{"answers": Answers}`), by category where the rows have
    one, beside what the base answers to the same prompts with the same noise. Each rank writes the completions of its
    own rows; rates are reduced over ranks. Does nothing for other modules.

    Args:
        base: Also let the base answer (twice the time).
        text_rows: Rows of general test text for perplexity and KL; 0 = none, None = all.
        folder: Where to write; default: the logger's folder.
    """

    __test__ = False  # pytest collects classes by this name

    def __init__(self, base: bool = True, text_rows: int | None = 512, folder: str | None = None) -> None:
        self.base = base
        self.text_rows = text_rows
        self.folder = folder
        self.result: dict[str, Any] = {}
        self._tables = {"policy": RateTable(), "base": RateTable()}
        self._file: Path | None = None

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tables = {"policy": RateTable(), "base": RateTable()}
        self._file = None
        if trainer.fast_dev_run or not isinstance(pl_module, Tested):  # type: ignore[attr-defined]
            return
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = COMPLETIONS if trainer.global_rank == 0 else COMPLETIONS.replace(".", f".{trainer.global_rank}.", 1)
        self._file = folder / name
        self._file.write_text("")

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
        if self._file is None or not isinstance(pl_module, Tested) or not isinstance(outputs, Mapping):
            return
        answers = {"policy": outputs["answers"]}
        if self.base and (base := pl_module.base_answer(batch, dataloader_idx, batch_idx)) is not None:
            answers["base"] = base
        columns = batch.get("columns", {})
        for who, given in answers.items():
            observations = [*given.observations, *_by_category(given, columns, harmful=dataloader_idx == 0)]
            self._tables[who].update(observations, pl_module.device)
        with self._file.open("a", encoding="utf-8") as file:
            for row in _side_by_side(answers, batch, columns, "harmful" if dataloader_idx == 0 else "general"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._file is None or not isinstance(pl_module, Tested):
            return
        rates = {who: table.compute_counts(pl_module.device) for who, table in self._tables.items()}
        text = self._text(trainer, pl_module)
        self.result = {
            "identity": self._identity(trainer, pl_module),
            "rates": {who: {name: rate.as_dict() for name, rate in found.items()} for who, found in rates.items()},
            "accuracy": {who: _accuracy(found) for who, found in rates.items()},
            "text": text,
            "completions": COMPLETIONS,
        }
        folder = self._file.parent
        if trainer.is_global_zero:
            write_json(self.result, folder / RESULT)
        _print(rates, text)
        rank_zero_info(f"Written to {folder}: {RESULT}, {COMPLETIONS}")

    def _text(self, trainer: pl.Trainer, module: Tested) -> dict[str, Any]:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.text_rows == 0 or not hasattr(datamodule, "text_dataloader"):
            return {}
        assert isinstance(module, pl.LightningModule)
        total = TextSums()
        loader = datamodule.text_dataloader("test", self.text_rows, getattr(module, "context_tokens", None))
        for batch in loader:
            total += module.text_sums(trainer.strategy.batch_to_device(batch))
        total = total.over_ranks(module.device)
        if not total.tokens:
            return {}
        has_base = total.kl == total.kl  # NaN without an adapter
        return {
            "tokens": total.tokens,
            "perplexity": total.perplexity,
            "nll_nats": total.mean_nll,
            "kl_to_base_nats": total.mean_kl if has_base else None,
        }

    @staticmethod
    def _identity(trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        datamodule: Any = getattr(trainer, "datamodule", None)
        known = hasattr(datamodule, "eval_rows")
        loaded = getattr(pl_module, "adapter_folder", None) or trainer.ckpt_path
        return {
            **policy_identity(pl_module, None if loaded is None else str(loaded)),
            "data": data_identity(datamodule, "test") if known else None,
            "limit_batches": trainer.limit_test_batches,
            "judge": describe(pl_module.judge),
            "decoding": {
                "harmful": describe(pl_module.evaluation_sampling),
                "general": describe(pl_module.general_sampling),
                "seed": pl_module.evaluation_seed,
            },
            "seed": int(torch.initial_seed() % 2**32),
            "ranks": trainer.world_size,
            "versions": versions(),
        }


def _by_category(answers: Answers, columns: Mapping[str, Any], harmful: bool) -> Iterator[tuple[str, float]]:
    for row, outcome in enumerate(answers.outcomes):
        if outcome is None:
            continue
        for category in row_categories(columns, row):
            if harmful:
                yield f"safety/unsafe_rate/{category}", float(outcome == "unsafe")
            else:
                yield f"general/refusal_rate/{category}", float(outcome == "refusal")


def _side_by_side(
    answers: Mapping[str, Answers], batch: Mapping[str, Any], columns: Mapping[str, Any], kind: str
) -> Iterator[dict[str, Any]]:
    for row, prompt in enumerate(batch["prompt"]):
        line: dict[str, Any] = {"kind": kind, "prompt": prompt}
        skill = columns.get("skill")
        if skill is not None:
            line["skill"] = skill[row]
        if categories := row_categories(columns, row):
            line["category"] = categories
        for who in ("base", "policy"):
            if who in answers:
                line[who] = answers[who].completions[row]
                line[f"{who}_outcome"] = answers[who].outcomes[row]
        yield line


def _accuracy(rates: Mapping[str, Rate]) -> float | None:
    return mean_accuracy({name: rate.value for name, rate in rates.items()})


@rank_zero_only
def _print(rates: Mapping[str, Mapping[str, Rate]], text: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    policy, base = rates["policy"], rates["base"]
    table = Table(title="Test prompts: policy and base, with 95 % intervals", title_justify="left")
    for column in ("metric", "base", "policy", "interval", "of"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    names = [n for n in TITLES if n in policy] + sorted(n for n in policy if n not in TITLES)
    for name in names:
        rate = policy[name]
        low, high = rate.interval
        before = f"{100 * base[name].value:.1f} %" if name in base else ""
        title = TITLES.get(name, name)
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(title, before, f"{100 * rate.value:.1f} %", interval, f"{rate.total:,}")
    if (mean := _accuracy(policy)) is not None:
        base_mean = _accuracy(base)
        shown = "" if base_mean is None else f"{100 * base_mean:.1f} %"
        table.add_row("general/accuracy (mean of skills)", shown, f"{100 * mean:.1f} %", "", "")
    if text:
        table.add_row("perplexity of general text", "", f"{text['perplexity']:.4f}", "", f"{text['tokens']:,} tokens")
        if text["kl_to_base_nats"] is not None:
            table.add_row("KL to the base, nats a token", "0", f"{text['kl_to_base_nats']:.4f}", "", "")
    Console().print(table)
