"""Measure a policy before and after a fit, keep the best checkpoint's adapter, and say in one table what happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from nspo_lightning.atomic import write_json
from nspo_lightning.checkpoints import best_of, read_checkpoint

HEADLINES = (
    "safety/unsafe_rate",
    "safety/refusal_rate",
    "safety/garbage_rate",
    "general/accuracy",
    "general/over_refusal_rate",
)


@runtime_checkable
class Evaluable(Protocol):
    """What the report needs of a LightningModule."""

    def evaluate(self, dataloaders: Any) -> dict[str, float]:
        """Return metrics by name."""

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained."""


class RunReport(Callback):
    """Write ``summary.json`` and ``adapter/`` into the run's folder and print a table of before and after.

    The figures come from the datamodule's test split, which neither stopping nor the choice of the checkpoint has seen.
    What is reported and saved is the checkpoint that `ModelCheckpoint` calls best, else the last state.

    Args:
        folder: Where to write; default: the logger's folder.
        evaluate: Measure before and after; without it only the adapter and the certificate are left.
    """

    def __init__(self, folder: str | None = None, evaluate: bool = True) -> None:
        self.folder = folder
        self.evaluate = evaluate
        self.before: dict[str, float] = {}
        self._start = 0.0
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
        self._start = time.monotonic()
        if self.evaluate and not self.before:
            if trainer.global_step > 0:
                rank_zero_info("RunReport: resumed, but the checkpoint holds no figures from before the run.")
            rank_zero_info("Measuring the policy before training ...")
            self.before = self._measure(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = cast(Evaluable, pl_module)
        best = self._load_best(trainer, pl_module)
        after: dict[str, float] = {}
        if self.evaluate:
            rank_zero_info("Measuring the policy after training ...")
            after = self._measure(trainer, pl_module)
        # Without a start, training was over in the checkpoint already.
        seconds = self._seconds + (time.monotonic() - self._start if self._start else 0.0)
        summary: dict[str, Any] = {
            **{f"before/{name}": value for name, value in self.before.items()},
            **{f"after/{name}": value for name, value in after.items()},
            "nullspace/leak_max": _leak_max(trainer),
            "seconds": round(seconds, 1),
            "updates": trainer.global_step,
            "checkpoint": best,
        }
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            module.save_adapter(folder / "adapter")
            write_json(summary, folder / "summary.json")
        self._print(self.before, after, summary, folder)

    @override
    def state_dict(self) -> dict[str, Any]:
        elapsed = time.monotonic() - self._start if self._start else 0.0
        return {"before": self.before, "seconds": self._seconds + elapsed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict["before"])
        self._seconds = float(state_dict["seconds"])

    @staticmethod
    def _measure(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise MisconfigurationException(
                "RunReport measures on the datamodule's `test_dataloader()`, and there is none."
            )
        loaders = datamodule.test_dataloader()
        rates = cast(Evaluable, pl_module).evaluate(loaders if isinstance(loaders, (list, tuple)) else [loaders])
        return dict(sorted(rates.items()))

    @staticmethod
    def _load_best(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        path = best_of(c.state_dict() for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        if path is None:
            return None
        pl_module.load_state_dict(read_checkpoint(path)["state_dict"], strict=False)
        return path.name

    @rank_zero_only
    def _print(self, before: dict[str, float], after: dict[str, float], summary: dict[str, Any], folder: Path) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Held-out prompts, before and after", title_justify="left")
        for column in ("metric", "before", "after", "change"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        names = [n for n in HEADLINES if n in after] + sorted(n for n in after if n not in HEADLINES)
        for name in names:
            old, new = before.get(name), after[name]
            change = "" if old is None else f"{100 * (new - old):+.1f}"
            table.add_row(name, "" if old is None else f"{100 * old:.1f} %", f"{100 * new:.1f} %", change)
        console = Console()
        console.print(table)
        leak = summary["nullspace/leak_max"]
        promise = "no projection" if leak is None else f"largest leak into the protected space {leak:.1e}"
        console.print(f"{promise}; {summary['updates']} updates in {summary['seconds']:.0f} s; written to {folder}")


def _leak_max(trainer: pl.Trainer) -> float | None:
    leaks: list[float] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        certificate = getattr(callback, "certificate", None)
        if callable(certificate):
            leaks += certificate().values()
    return max(leaks) if leaks else None
