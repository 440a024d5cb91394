"""Write what `predict` returns as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import json_text, partial_of, set_aside


class PredictionWriter(BasePredictionWriter):
    """Write one JSON line a sample, as the batches come; each rank writes its own file.

    What an earlier `predict` left stays until this one is complete, and is kept in ``predictions.1/`` if it holds more.

    Args:
        path: The file; default: ``predictions.jsonl`` in the run's folder. Ranks but the first add their number.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._file: Path | None = None

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        file = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file if trainer.global_rank == 0 else file.with_suffix(f".{trainer.global_rank}{file.suffix}")
        partial_of(self._file).write_text("")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            partial_of(self._file).unlink(missing_ok=True)
            self._file = None

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self._file is None or not prediction:
            return
        with partial_of(self._file).open("a", encoding="utf-8") as file:
            file.writelines(json_text(row) + "\n" for row in prediction)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._file is None:
            return
        partial = partial_of(self._file)
        if _lines(self._file) > _lines(partial) and (kept := set_aside([self._file], self._file.stem)):
            rank_zero_info(f"More predictions than these stood there; they are now in {kept}.")
        partial.replace(self._file)
        rank_zero_info(f"Predictions written to {self._file}")


def _lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as content:
        return sum(1 for _ in content)
