"""Measure a policy before and after a fit, keep the best checkpoint's adapter, and say in one table what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import write_json
from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.callbacks.general_text import TEXT_ROWS, measure_text
from nspo_lightning.callbacks.protocols import (
    Certifies,
    CountsRates,
    CountsUpdates,
    Evaluable,
    GoesBack,
    TellsNullSpace,
)
from nspo_lightning.checkpoints import best_of, read_checkpoint
from nspo_lightning.compat.lightning import callbacks_of, datamodule_of, is_fast_dev_run, model_checkpoints
from nspo_lightning.evaluation.diagnosis import unmatched
from nspo_lightning.evaluation.kept_answers import KeptAnswers, When, read_answers, with_earlier, write_answers
from nspo_lightning.evaluation.loaders import HARMFUL
from nspo_lightning.evaluation.rates import (
    ACCURACY,
    ANSWERED,
    GARBAGE,
    OVER_REFUSAL,
    REFUSAL,
    REFUSED,
    UNSAFE,
    UNSCORED,
    Answers,
    RateTable,
    mean_accuracy_interval,
    with_accuracy,
)
from nspo_lightning.evaluation.report import observations_by_category
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.evaluation.text_means import TEXT_NAMES, in_nats, text_means
from nspo_lightning.terminal import counted

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "summary.json"
ANSWERS = "answers.jsonl"
"""A few answers of each kind, before and after."""
HEADLINES = (
    UNSAFE,
    ANSWERED,
    REFUSED,
    GARBAGE,
    ACCURACY,
    REFUSAL,
    OVER_REFUSAL,
    *TEXT_NAMES,
)


@dataclass
class _Watched:
    """What is seen of the answers of one measurement beside their rates."""

    device: torch.device
    kept: KeptAnswers = field(default_factory=KeptAnswers)
    categories: RateTable = field(default_factory=RateTable)

    def __call__(self, batch: Mapping[str, Any], loader: int, answers: Answers) -> None:
        harmful = loader == HARMFUL
        self.kept.see(batch, answers, harmful=harmful)
        by_category = observations_by_category(answers, batch.get("columns", {}), harmful=harmful)
        self.categories.update(by_category, self.device)

    def by_category(self) -> dict[str, Any]:
        """Return the rates by category over ranks, as a result file holds them; empty where no row names one."""
        rates = self.categories.compute_counts(self.device)
        return {name: rate.as_dict() for name, rate in rates.items()}


class RunReport(Callback):
    """Write ``summary.json``, ``answers.jsonl`` and ``adapter/`` into the run's folder; print a table before and after.

    The figures come from the datamodule's test split, which neither stopping nor the choice of the checkpoint has seen,
    within `trainer.limit_test_batches` (0 measures nothing).
    They are the rates of answers with their 95 % intervals, also by category where the rows have one, and what
    `text_means` says of general text; and a few answers of each kind, evenly spread over the first rank's prompts.
    What is reported and saved is the checkpoint that `ModelCheckpoint` calls best, else the last state. A run that was
    over and reported on already keeps what it has.

    Args:
        folder: Where to write; default: the logger's folder.
        evaluate: Measure before and after; without it only the adapter and the certificate are left.
        text_rows: Rows of general test text whose NLL and KL to the base are measured; 0 = none, None = all.
    """

    def __init__(self, folder: str | None = None, evaluate: bool = True, text_rows: int | None = TEXT_ROWS) -> None:
        self.folder = folder
        self.evaluate = evaluate
        self.text_rows = text_rows
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.intervals: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}
        self.by_category: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
        self._start = 0.0
        self._trained = False
        self._seconds = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, Evaluable):
            raise MisconfigurationException(
                f"RunReport needs a LightningModule with `evaluate` and `save_adapter`, got "
                f"{type(pl_module).__name__}. Add the two methods, or remove the callback."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._trained = time.monotonic(), False
        if self.evaluate and not self.before:
            if trainer.global_step > 0:
                rank_zero_info("RunReport: resumed, but the checkpoint holds no figures from before the run.")
            self.before, self.intervals["before"] = self._measure(trainer, pl_module, "before")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_fast_dev_run(trainer) or not isinstance(pl_module, Evaluable):
            return
        folder, steps = self._folder(trainer), trainer.global_step
        if not self._trained and _is_reported(folder / SUMMARY, steps):
            rank_zero_info(
                f"This run is over: its checkpoint stands at step {steps}, its end, and nothing was trained now. What "
                f"it left in {folder} stays as it is. To train on, raise `--trainer.max_steps` or "
                "`--trainer.max_epochs`; to measure, use `test --ckpt_path last`."
            )
            return
        best = _load_best(trainer, pl_module)
        for callback in callbacks_of(trainer):
            if isinstance(callback, TellsNullSpace):
                callback.measure_outputs(trainer, pl_module)  # of the weights that are reported
        if self.evaluate:
            self.after, self.intervals["after"] = self._measure(trainer, pl_module, "after")
        updates = pl_module.updates if isinstance(pl_module, CountsUpdates) else steps
        undone = pl_module.updates_undone if isinstance(pl_module, GoesBack) else 0
        summary: dict[str, Any] = {
            **{f"before/{name}": value for name, value in self.before.items()},
            **{f"after/{name}": value for name, value in self.after.items()},
            "intervals_95": self.intervals,
            **({"by_category": self.by_category} if any(self.by_category.values()) else {}),
            "nullspace/leak_max": _leak_max(trainer),
            **_certified(trainer),
            "seconds": round(self._elapsed(), 1),
            "updates": updates,
            "updates_skipped": steps - updates - undone,
            "updates_undone": undone,
            "checkpoint": best,
        }
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            pl_module.save_adapter(folder / "adapter")
            write_json(summary, folder / SUMMARY)
            _say_why_early(trainer)
            _print(_change_table(self.before, self.after, self.intervals["after"]), summary, folder)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "intervals": self.intervals["before"],
            "by_category": self.by_category["before"],
            "seconds": self._elapsed(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict["before"])
        self.intervals["before"] = dict(state_dict.get("intervals", {}))  # earlier checkpoints have none
        self.by_category["before"] = dict(state_dict.get("by_category", {}))
        self._seconds = float(state_dict["seconds"])

    def _measure(
        self, trainer: pl.Trainer, module: Evaluable | pl.LightningModule, when: When
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return metrics by name, and the 95 % intervals of those that have one."""
        datamodule = datamodule_of(trainer)
        if datamodule is None:
            raise MisconfigurationException(
                "RunReport measures on the datamodule's `test_dataloader()`, and there is none."
            )
        loaders, limit = datamodule.test_dataloader(), trainer.limit_test_batches
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        values, intervals = dict[str, float](), dict[str, list[float]]()
        if limit == 0:
            return values, intervals
        label = f"Measuring {when} training"
        with measuring(trainer, label, loaders, limit, "trainer.limit_test_batches") as shown:
            if isinstance(module, CountsRates):
                watched = _Watched(trainer.strategy.root_device)
                rates = module.measure(shown, watched)
                self.by_category[when] = watched.by_category()
                self._keep(trainer, watched.kept.chosen(when))
                values = with_accuracy(rates)
                intervals = {name: list(rate.interval) for name, rate in rates.items()}
                if (ends := mean_accuracy_interval(rates)) is not None:
                    intervals[ACCURACY] = list(ends)
            else:
                assert isinstance(module, Evaluable)  # setup made sure
                values = module.evaluate(shown)
        for name, mean in text_means(measure_text(trainer, module, "test", self.text_rows)).items():
            values[name] = mean.value
            if mean.interval is not None:
                intervals[name] = list(mean.interval)
        return dict(sorted(values.items())), intervals

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder or trainer.log_dir or trainer.default_root_dir)

    def _keep(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        """Write answers beside those that are there, of the same prompts."""
        file = self._folder(trainer) / ANSWERS  # all ranks must ask together: the first tells the others
        if trainer.is_global_zero and rows and not is_fast_dev_run(trainer):
            write_answers(with_earlier(rows, read_answers(file)), file)

    def _elapsed(self) -> float:
        """Seconds of training; without a start, training was over in the checkpoint already."""
        return self._seconds + (time.monotonic() - self._start if self._start else 0.0)


def _is_reported(summary: Path, steps: int) -> bool:
    """Tell whether a summary is that of a run of so many steps."""
    try:
        said = json.loads(summary.read_text())
        others = sum(int(said.get(name, 0)) for name in ("updates_skipped", "updates_undone"))
        return int(said["updates"]) + others == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load_best(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    """Load the checkpoint that the last monitoring `ModelCheckpoint` calls best, and return its name."""
    path = best_of(callback.state_dict() for callback in model_checkpoints(trainer))
    if path is None:
        return None
    pl_module.load_state_dict(read_checkpoint(path)["state_dict"], strict=False)
    return path.name


def _leak_max(trainer: pl.Trainer) -> float | None:
    certifying = [callback for callback in callbacks_of(trainer) if isinstance(callback, Certifies)]
    return max((leak for callback in certifying for leak in callback.certificate().values()), default=None)


def _certified(trainer: pl.Trainer) -> dict[str, float | None]:
    """Return the certificate's bound and measured change of outputs, and the share of gradients that was kept."""
    telling = (callback for callback in callbacks_of(trainer) if isinstance(callback, TellsNullSpace))
    facts = next((found for callback in telling if (found := callback.null_space_facts()) is not None), None)
    if facts is None:
        return {}
    return {
        "nullspace/output_change_bound": facts.bound,
        "nullspace/output_change": facts.change,
        "nullspace/kept_gradient_energy": facts.kept_energy,
    }


def _change_table(
    before: Mapping[str, float], after: Mapping[str, float], intervals: Mapping[str, list[float]]
) -> Table:
    rows = []
    skills = [name for name in after if name.startswith(f"{ACCURACY}/")]
    nothing = unmatched(before, after)
    hidden = {f"{ACCURACY}/{skill}" for skill in nothing} | ({ACCURACY} if len(nothing) == len(skills) else set())
    details = sorted(name for name in after if _is_detail(name, before, after))
    for name in [name for name in (*HEADLINES, *details) if name in after and name not in hidden]:
        old, new, unit = before.get(name), after[name], _unit(name)
        ends = [unit(end).removesuffix(" %") for end in intervals.get(name, [])]
        change = "" if old is None else unit(new - old, "+").removesuffix(" %")
        shown = name if name in HEADLINES or in_nats(name) else name.removeprefix("general/")  # 80 columns hold it
        rows.append((shown, "" if old is None else unit(old), unit(new), " to ".join(ends), change))
    columns = ["metric", "before", "after", "95 %", "change"]
    table = rich_table("Held-out prompts, before and after", columns, rows, align="lrrrr")
    said = []
    if any(name in after for name in TEXT_NAMES):
        said.append("kl (from the base) and nll: nats a token of held-out answers; nll_change: to the base")
    if nothing:
        said.append(f"accuracy left out, since no answer matches a reference: {', '.join(nothing)}")
    free = {name.removeprefix(UNSCORED): after[name] for name in sorted(after) if name.startswith(UNSCORED)}
    if free:
        shares = ", ".join(skill if share == 1 else f"{skill} ({100 * share:.0f} %)" for skill, share in free.items())
        said.append(f"not compared with a reference (none, or free text): {shares}")
    table.caption, table.caption_justify = "\n".join(said) or None, "left"
    return table


def _is_detail(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether a metric has a line below the headlines: by skill, what `test` shows, only refusals that there are."""
    if name in HEADLINES or in_nats(name) or name.startswith(UNSCORED):
        return False
    return not name.startswith(f"{REFUSAL}/") or bool(before.get(name) or after[name])


def _unit(name: str) -> Callable[..., str]:
    """Return what writes a metric's values, by their value and maybe a sign: in nats, or in per cent."""
    if in_nats(name):
        return lambda value, sign="": f"{round(value, 4) + 0.0:{sign}.4f}"  # adding 0 turns -0.0 into 0.0
    return lambda value, sign="": f"{round(100 * value, 1) + 0.0:{sign}.1f} %"


def _say_why_early(trainer: pl.Trainer) -> None:
    """Say which callback ended the training before its time, and why."""
    for callback in callbacks_of(trainer):
        if trainer.should_stop and isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            reason = " ".join(callback.stopping_reason_message.split())
            rank_zero_info(f"Stopped early at step {trainer.global_step}: {reason}")


def _print(table: Table, summary: Mapping[str, Any], folder: Path) -> None:
    from rich import get_console

    console = get_console()
    if table.row_count:
        console.print(table)
    leak = summary["nullspace/leak_max"]
    promise = "no projection" if leak is None else f"largest leak into the protected space {leak:.1e}"
    updates, skipped, undone = (summary[name] for name in ("updates", "updates_skipped", "updates_undone"))
    others = [f"{count} more {what}" for count, what in ((skipped, "skipped"), (undone, "taken back")) if count]
    taken = counted(updates, "update") if updates else "NO UPDATE IS LEFT" if undone else "NO UPDATE WAS TAKEN"
    taken += f" ({', '.join(others)})" if others and (updates or undone) else ""
    console.print(f"{promise}; {taken} in {summary['seconds']:.0f} s; written to {folder}")
