"""Names of Lightning that no promise covers. A failure here says which one is gone and where it was used."""

from __future__ import annotations

import csv
import inspect
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from nspo_lightning.compat import lightning as compat

VERSION = f"lightning {lightning.__version__}"


@pytest.fixture
def run(tmp_path):
    def fit(*callbacks, steps=3, **options):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            **options,
        )
        trainer.fit(BoringModel())
        return trainer

    return fit


def test_the_loop_counts_batches_that_stepped_and_saves_the_count(run, tmp_path):
    trainer = run(ModelCheckpoint(tmp_path, filename="end"), steps=6, accumulate_grad_batches=2, max_epochs=2)
    assert compat.logging_step(trainer) == 6, f"{VERSION}: see `_batches_that_stepped` in training_epoch_loop.py"
    fit_loop = torch.load(tmp_path / "end.ckpt", weights_only=True)["loops"]["fit_loop"]
    before = dict(fit_loop["epoch_loop.state_dict"])
    compat.take_back_step_(fit_loop)
    assert fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] == before["_batches_that_stepped"] - 1


def test_the_fit_loop_holds_states_of_loaders_until_it_gives_them(run):
    class Loader:
        def _load_state_dicts(self, states):
            self.states = states

    trainer, loader = run(), Loader()
    assert trainer.fit_loop._combined_loader_states_to_load == []
    assert trainer.fit_loop._combined_loader is not None, (
        f"{VERSION}: see `_load_combined_loader_states` in fit_loop.py"
    )
    compat.load_place_in_data_(trainer)
    trainer.fit_loop._combined_loader = loader
    trainer.fit_loop.on_load_checkpoint({"combined_loader": [{"batch": 3}]})
    compat.load_place_in_data_(trainer)
    assert loader.states == [{"batch": 3}]
    assert trainer.fit_loop._combined_loader_states_to_load == []


def test_a_checkpoint_says_where_the_loops_are(run, tmp_path):
    run(ModelCheckpoint(tmp_path, filename="end"), steps=6, max_epochs=2)
    fit_loop = torch.load(tmp_path / "end.ckpt", weights_only=True)["loops"]["fit_loop"]
    for name in (compat.BATCHES, compat.VALIDATION_BATCHES, "epoch_progress"):
        for count in ("total", "current"):
            assert set(compat.COUNTERS) <= set(fit_loop[name][count]), f"{VERSION}: see {name} in loops/progress.py"
    assert "is_last_batch" in fit_loop[compat.BATCHES]
    assert set(fit_loop[compat.OPTIMIZERS]["optimizer"]["step"]["total"]) == {"ready", "completed"}
    assert fit_loop[compat.BATCHES]["total"]["completed"] == 6


def test_model_checkpoint_remembers_its_last_save(run, tmp_path):
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    attributes = {attribute for attribute, _ in compat._CHECKPOINT_STATE.values()}
    assert attributes <= set(vars(callback)), f"{VERSION}: see ModelCheckpoint.__init__ in model_checkpoint.py"
    assert compat.checkpoint_state(callback) == {"last_step": 0, "deferred": False, "last_file": ""}
    trainer = run(callback, steps=3)
    assert compat.model_checkpoints(trainer) == [callback]
    state = compat.checkpoint_state(callback)
    assert state["last_step"] == 2
    assert state["last_file"].startswith(str(tmp_path))
    other = ModelCheckpoint(tmp_path)
    compat.restore_checkpoint_state_(other, state)
    assert compat.checkpoint_state(other) == state
    source = inspect.getsource(ModelCheckpoint)
    for attribute in attributes:  # set, and decided by
        assert source.count(f"self.{attribute}") > 2, f"{VERSION}: `{attribute}` is no longer used"


def test_the_script_launcher_lists_what_it_started(run):
    assert compat.started_processes(run(steps=1)) == []
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    trainer.strategy._configure_launcher()
    launcher: Any = trainer.strategy.launcher
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        launcher.procs.append(process)
        assert compat.started_processes(trainer) == [process], f"{VERSION}: see launchers/subprocess_script.py"
        assert compat.started_processes(trainer) is launcher.procs


def test_what_connectors_set_on_the_trainer(run):
    callback = pl.Callback()
    trainer = run(callback, steps=1)
    assert callback in compat.callbacks_of(trainer)
    assert compat.datamodule_of(trainer) is None
    assert not compat.is_fast_dev_run(trainer)
    assert not compat.logs_this_batch(trainer)  # no logger


def test_ddp_keeps_the_timeout_of_its_process_group():
    strategy = DDPStrategy(timeout=timedelta(minutes=5))
    assert vars(strategy).get("_timeout") == timedelta(minutes=5), f"{VERSION}: see DDPStrategy.__init__ in ddp.py"
    assert compat.process_group_timeout(strategy) == timedelta(minutes=5)
    assert compat.process_group_timeout(SingleDeviceStrategy()) is None


def test_a_module_without_a_trainer_has_none(run):
    assert compat.trainer_of(BoringModel()) is None, f"{VERSION}: see `LightningModule.trainer`"
    trainer = run(steps=1)
    assert compat.trainer_of(trainer.lightning_module) is trainer


def test_forgotten_metrics_are_not_written_again(tmp_path):
    class Logs(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            compat.forget_step_metrics(trainer, batch_idx, "a")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            names = ("a_once", "b_once", "always") if batch_idx == 1 else ("always",)
            pl_module.log_dict(dict.fromkeys(names, float(batch_idx)))
            pl_module.log("a_mean", float(batch_idx), on_step=True, on_epoch=True)

    logger = CSVLogger(tmp_path, name="", version="")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(limit_train_batches=4, max_epochs=1, logger=logger, callbacks=[Logs()], **options)
    trainer.fit(BoringModel())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["always"]]
    hint = f"{VERSION}: see `_results` in training_epoch_loop.py"
    assert [row["a_once"] for row in steps] == ["", "1.0", "", ""], hint
    assert [row["b_once"] for row in steps] == ["", "1.0", "1.0", "1.0"], "not asked for"
    assert [row["a_mean_epoch"] for row in rows if row["a_mean_epoch"]] == ["1.5"], "means over an epoch stay"


@pytest.mark.parametrize("which", ["none", "numbered", "named"])
def test_checkpoints_go_where_lightning_puts_them(tmp_path, which):
    versions: dict[str, Any] = {"numbered": None, "named": ""}
    logger: Any = False if which == "none" else CSVLogger(tmp_path / "logs", name="run", version=versions[which])
    keep = ModelCheckpoint()
    trainer = pl.Trainer(accelerator="cpu", logger=logger, callbacks=[keep], default_root_dir=tmp_path)
    keep.setup(trainer, BoringModel(), "fit")
    assert str(compat.checkpoint_folder(trainer)) == str(keep.dirpath), f"{VERSION}: see ModelCheckpoint's dirpath"


def test_handlers_of_signals_stay_as_they_are_for_one_run(run):
    class Own(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            compat.keep_signal_handlers(trainer, (signal.SIGTERM,))

        def on_train_start(self, trainer, pl_module):
            self.found = signal.getsignal(signal.SIGTERM)

    def mine(*_):
        pass

    own, before = Own(), signal.signal(signal.SIGTERM, mine)
    try:
        trainer = run(own)
        assert own.found is mine, VERSION
        assert signal.getsignal(signal.SIGTERM) is mine
        assert not vars(trainer._signal_connector).get("register_signal_handlers"), VERSION
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(trainer._signal_connector._original_handlers, dict), VERSION
