"""What a run was trained with: `config.yaml`, written once. Every other command, and a resume, writes beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.terminal import shortened

CONFIG = "config.yaml"
_WITHOUT_EFFECT = ("seed_everything", ".patience")
"""Ends of names of what a checkpoint holds and Lightning or `ExactResume` restores."""
_LONGEST = 60
_MOST_SHOWN = 15


class SaveConfig(SaveConfigCallback):
    """Save the resolved configuration beside the run and show it in TensorBoard.

    `config.yaml` is what the run was begun with, and no command rewrites it: others write `config.COMMAND.yaml`, and a
    run that goes on with other settings says which and, once it trains, writes `config.resumed.N.yaml`.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            self.config_filename = f"config.{TrainerFn(stage).value}.yaml"
        elif self.config.get("ckpt_path"):
            folder = Path(str(trainer.log_dir))
            if trainer.is_global_zero and (record := latest_record(folder)) is not None:
                _say_differences(record, self._now())
            return
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.already_saved:
            return
        folder, name = Path(str(trainer.log_dir)), CONFIG
        if trainer.is_global_zero and (record := latest_record(folder)) is not None:
            name = next_record(folder) if any(differing(_read(record), self._now())) else ""
        self.config_filename = trainer.strategy.broadcast(name)
        if self.config_filename:
            super().setup(trainer, pl_module, "fit")
        self.already_saved = True

    def _now(self) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return content

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = self.parser.dump(self.config, skip_none=False)
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")


def latest_record(run: Path) -> Path | None:
    """Return the configuration that a run was trained with last; None if there is no run."""
    records = [run / CONFIG, *sorted(run.glob("config.resumed.*.yaml"), key=_number)]
    return next((record for record in reversed(records) if record.is_file()), None)


def next_record(run: Path) -> str:
    """Return the name of the next file for a resume."""
    return f"config.resumed.{max(map(_number, run.glob('config.resumed.*.yaml')), default=0) + 1}.yaml"


def _number(record: Path) -> int:
    number = record.name.split(".")[2]
    return int(number) if number.isdigit() else 0


def differing(saved: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each setting that differs; what one side lacks is null there.

    Example:
        >>> list(differing({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 1, "c": [1, 3], "d": None}}))
        [('a.c[1]', 2, 3)]
    """
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*saved, *(key for key in now if key not in saved)]:
            if (inner := f"{name}.{key}" if name else str(key)) != "ckpt_path":
                yield from differing(saved.get(key), now.get(key), inner)
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for index, (old, new) in enumerate(zip(saved, now, strict=True)):
            yield from differing(old, new, f"{name}[{index}]")
    elif saved != now:
        yield name, saved, now


def _say_differences(record: Path, now: Mapping[str, Any]) -> None:
    lines = [
        f"  {name}: {shortened(old, _LONGEST)} -> {shortened(new, _LONGEST)}"
        + (" (without effect: the checkpoint's own goes on)" if name.endswith(_WITHOUT_EFFECT) else "")
        for name, old, new in differing(_read(record), now)
    ]
    if not lines:
        return
    if len(lines) > _MOST_SHOWN:
        lines = [*lines[:_MOST_SHOWN], f"  ... and {len(lines) - _MOST_SHOWN} more"]
    rank_zero_info(f"This run goes on with other settings than it was trained with ({record}):\n" + "\n".join(lines))


def _read(record: Path) -> Any:
    try:
        return yaml.safe_load(record.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
