"""`last.ckpt` is the last state, whatever other checkpoints a run keeps; all that `kill -9` takes is the interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_jobs import adapter, datamodule, module, trainer

from nspo_lightning.callbacks import ExactResume, LastCheckpoint, LastOnException
from nspo_lightning.checkpoints import last_in
from nspo_lightning.cli.standard_callbacks import with_standard_callbacks
from nspo_lightning.cli.trainer import Trainer


def fit(path: Path, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Train on the tiny job with the callbacks of the command line, as far as they are about checkpoints."""
    pl.seed_everything(3)
    standard = with_standard_callbacks(callbacks, checkpoints=True, progress_bar=False)
    wanted = (LastCheckpoint, ExactResume, LastOnException)
    kept = [c for c in standard if isinstance(c, wanted) or c in callbacks]
    policy = module(path)
    run = trainer(folder, kind=Trainer, callbacks=kept, enable_checkpointing=True, **options)
    run.fit(policy, datamodule(), ckpt_path=ckpt_path)
    return policy


def step_of(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["global_step"])


class Disk(Callback):
    """What `kill -9` would leave, at the start of every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        last = last_in(self.folder)
        self.seen.append((trainer.global_step, 0 if last is None else step_of(last)))


def test_without_a_callback_of_ones_own_it_is_written_at_the_interval_and_at_the_end(
    tiny_llama: Path, tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "checkpoints")
    fit(tiny_llama, tmp_path, LastCheckpoint(every_n_updates=3, every_minutes=None), disk, steps=6)
    assert disk.seen == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 6
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_minutes_are_an_interval_too(tiny_llama: Path, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "checkpoints")
    fit(tiny_llama, tmp_path, LastCheckpoint(every_n_updates=None, every_minutes=1e-6), disk, steps=4)
    assert disk.seen == [(0, 0), (1, 1), (2, 2), (3, 3)]


class Score(Callback):
    """A metric that is best at the second update, and worse ever after."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("score", float(abs(trainer.global_step - 2)))


def test_a_callback_that_keeps_the_best_leaves_the_last_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """All shipped recipes have one with `save_last: true`, by which Lightning writes the last of the best ones."""
    best = ModelCheckpoint(monitor="score", save_last=True, filename="best-{step}")
    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}
    fit(tiny_llama, tmp_path, Score(), best, steps=5, **options)
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["best-step=2.ckpt", "last.ckpt"]
    assert step_of(folder / "last.ckpt") == 5
    state = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"][best.state_key]
    assert Path(state["best_model_path"]).name == "best-step=2.ckpt"
    assert Path(best.last_model_path) == folder / "last.ckpt"
    assert not best.save_last, "it would write the file a second time"


def test_whatever_another_callback_writes_the_last_is_not_older(tiny_llama: Path, tmp_path: Path) -> None:
    every = ModelCheckpoint(every_n_train_steps=2, save_last=True, filename="now-{step}")
    disk = Disk(tmp_path / "checkpoints")
    fit(tiny_llama, tmp_path, every, disk, steps=5)
    assert disk.seen == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4)]


def test_one_with_a_folder_of_its_own_keeps_its_own_last(tiny_llama: Path, tmp_path: Path) -> None:
    own = ModelCheckpoint(dirpath=tmp_path / "own", every_n_train_steps=2, save_last=True)
    fit(tiny_llama, tmp_path, own, steps=3, logger=CSVLogger(tmp_path, name="run", version="a"))
    assert step_of(tmp_path / "own" / "last.ckpt") == 2
    assert step_of(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt") == 3


@pytest.mark.parametrize("stop", ["steps", "early"])
def test_a_run_that_stopped_within_an_epoch_goes_on_to_the_bits_of_a_longer_one(
    tiny_llama: Path, tmp_path: Path, stop: str
) -> None:
    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}
    whole = adapter(fit(tiny_llama, tmp_path / "whole", Score(), steps=6, **options))
    if stop == "early":
        reached = EarlyStopping("score", stopping_threshold=0.5, mode="min", patience=9)
        fit(tiny_llama, tmp_path / "cut", Score(), reached, steps=6, **options)
        assert step_of(tmp_path / "cut" / "checkpoints" / "last.ckpt") == 2
        again = tmp_path / "again.ckpt"
        content = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
        content["ExactResume"]["should_stop"] = False
        torch.save(content, again)
    else:
        fit(tiny_llama, tmp_path / "cut", Score(), steps=3, **options)
        again = tmp_path / "cut" / "checkpoints" / "last.ckpt"
        assert step_of(again) == 3
    resumed = adapter(fit(tiny_llama, tmp_path / "cut", Score(), ckpt_path=again, steps=6, **options))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_weights_that_a_callback_puts_back_at_the_end_are_the_last(tiny_llama: Path, tmp_path: Path) -> None:
    class PutsBack(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(0.25)

    fit(tiny_llama, tmp_path, PutsBack(), steps=2)
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool((value == 0.25).all()) for value in weights.values())


def test_an_exception_writes_the_same_file(tiny_llama: Path, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:  # within an epoch: at its end the file is written anyway
                raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        fit(tiny_llama, tmp_path, Fails(), steps=6)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 3


@pytest.mark.parametrize("given", [{"every_n_updates": 0}, {"every_minutes": -1.0}])
def test_an_interval_is_positive(given: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"must be positive, got"):
        LastCheckpoint(**given)
