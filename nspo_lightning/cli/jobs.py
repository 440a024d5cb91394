"""The jobs that share one configuration: LightningCLI over GRPOModule, AlignmentDataModule and NullSpaceProjection.

`fit` trains; `validate`, `test` and `predict` measure and write completions; `calibrate`, `data` and `tamper`
are the Trainer's.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import remove_leftovers, without_surrogates
from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.checkpoints import (
    BEST,
    FOLDER,
    LAST,
    LAST_IF_ANY,
    AtomicCheckpointIO,
    check_readable,
    find_checkpoint,
    last_in,
)
from nspo_lightning.cli.errors import exit_codes
from nspo_lightning.cli.given import remember
from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.parser import Parser
from nspo_lightning.cli.run_card import write_card
from nspo_lightning.cli.run_folder import CACHE, DEFAULT_NAME, RUN_FOLDER, RUNS, check_run_name, own_folder
from nspo_lightning.cli.run_record import SaveConfig
from nspo_lightning.cli.standard_callbacks import with_standard_callbacks, without_extras
from nspo_lightning.cli.trained_parameters import TrainedParameters
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.cli.warmup import WARMUP, run_name, tell_what_is_left_out, warmup_callbacks, warmup_trainer
from nspo_lightning.compat.lightning import checkpoint_folder, is_fast_dev_run
from nspo_lightning.compat.lightning_cli import CLIWithoutStoredSettings
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.warmup import WarmupDataModule, WarmupSettings
from nspo_lightning.keys import check_no_key
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.warmup import WarmupModule
from nspo_lightning.report.tensorboard import RunLogger
from nspo_lightning.toy.judge import TownJudge

DESCRIPTION = """Safety GRPO in the null space of general ability.

Start with `fit -c quickstart`; `SUBCOMMAND --help=all` lists every setting, `fit -c FILE --print_config` prints them
with their values. Other jobs have a help of their own: `judge --help` (score a file), `compare --help`
(methods, seeds and sweeps in one table), `evaluate --help` (lm-evaluation-harness), `export --help` (an adapter or a
merged model out of a checkpoint)."""
NOISE = (
    ".*`training_step` returned `None`.*",  # a step without signal is no mistake here
    ".*isinstance\\(treespec, LeafSpec\\).*",  # between lightning and torch
    ".*`is_gradient_checkpointing` is deprecated.*",  # between peft and transformers
    ".*Checkpoint directory .* exists and is not empty.*",  # resuming
    ".*there is no last checkpoint available.*",  # we say it ourselves
    ".*weights_only. was not set.*",  # ours is always True
)
PREVIEW = "preview"
"""What `judge --preview` runs."""
_BAREBONES_OFF = (
    *("logger", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    *("num_sanity_val_steps", "profiler"),
)
SHORT_NAMES = (TownJudge, NullSpaceProjection)  # imported, so a config may name them without their module


class CLI(CLIWithoutStoredSettings):
    """LightningCLI with the callback's own section, run folders, and the callbacks that a run should not miss."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        own = {name: {"model", "datamodule"} for name in (WARMUP, "calibrate", "data", PREVIEW, "tamper")}
        return {**LightningCLI.subcommands(), **own}

    @property
    def settings(self) -> Any:
        """The instantiated settings of the subcommand that runs."""
        return self.config_init[self.subcommand] if self.subcommand else self.config_init

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default=DEFAULT_NAME, help="Name of the run; it is kept in runs/<name>."
        )
        parser.add_lightning_class_args(NullSpaceProjection, "nullspace")
        parser.add_class_arguments(WarmupSettings, "warmup")
        parser.link_arguments(
            ("model.num_iterations", "model.num_minibatches"),
            "data.repeat_batches",
            compute_fn=lambda iterations, minibatches: iterations * minibatches,
        )

    @override
    def after_parsing(self) -> None:
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        check_run_name(config["name"])
        check_no_key("", config.as_dict())
        _check_whole(config.as_dict())
        path = config.get("ckpt_path")
        if path:
            check_readable(str(path))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        silence_noise()  # libraries that were imported meanwhile brought filters of their own
        config = self.settings.trainer
        _check_trainer(config)
        bare, runs = bool(config.get("barebones")), str(config.get("default_root_dir") or RUNS)
        if bare:  # what a file says of an ordinary run, Lightning refuses here
            kwargs |= {**dict.fromkeys(_BAREBONES_OFF), "detect_anomaly": False}
        if bare or config.get("logger") is False:  # without a logger this is the run's folder
            kwargs["default_root_dir"] = str(Path(runs) / run_name(self.settings.name, self.subcommand))
            if not bare and self.settings.nullspace.source.cache_dir == "auto":  # that of all runs
                self.settings.nullspace.source.cache_dir = Path(runs) / CACHE
        elif config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            name = run_name(self.settings.name, self.subcommand)
            kwargs["logger"] = RunLogger(runs, name=name, version="", default_hp_metric=False)
        callbacks = list(config.get("callbacks") or [])
        if self.subcommand == PREVIEW:  # one process, and no run
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False, "enable_checkpointing": False}
            callbacks = [one for one in callbacks if not isinstance(one, Checkpoint)]
        if self.subcommand == WARMUP:
            kwargs |= warmup_trainer(self.settings.warmup)
            tell_what_is_left_out(callbacks, config)
            callbacks = warmup_callbacks(callbacks, self.settings.warmup)
        if not bare and config.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # half of what it says is of no use on a 4-bit base
            callbacks.append(TrainedParameters())
        kwargs["callbacks"] = with_standard_callbacks(
            without_extras(callbacks) if bare else callbacks,
            checkpoints=config.get("enable_checkpointing") is not False and not bare and self.subcommand != PREVIEW,
            progress_bar=config.get("enable_progress_bar") is not False and not bare,
        )
        given = config.get("plugins") or []
        plugins = list(given) if isinstance(given, (list, tuple)) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find what `--ckpt_path` means, lock the run's folder and move an earlier run of its name out of the way."""
        folder, found = Path(self.trainer.log_dir or RUNS), self._checkpoint_to_resume()
        remove_leftovers(Path(self.settings.trainer.get("default_root_dir") or RUNS) / CACHE, shared=True)
        if not is_fast_dev_run(self.trainer):
            goes_on = found is not None and found.resolve().is_relative_to(folder.resolve())
            RUN_FOLDER.begin(folder, set_aside=not goes_on, shared=_own_folder(self.trainer) is None)

    def _checkpoint_to_resume(self) -> Path | None:
        """Put a file in the place of `best`, `last` and `last-if-any`; None for what is none, or Lightning's own."""
        name = self.settings.get("ckpt_path")
        if name not in {BEST, LAST, LAST_IF_ANY}:
            return None if name is None else Path(str(name))
        run = checkpoint_folder(self.trainer).parent
        if name == LAST_IF_ANY and last_in(run / FOLDER) is None:
            rank_zero_info(f"There is no checkpoint in {run / FOLDER} yet: the run begins.")
            self.settings.ckpt_path = None
            return None
        found = find_checkpoint(BEST if name == BEST else LAST, run)
        self.settings.ckpt_path = str(found)
        return found

    def after_fit(self) -> None:
        """Describe the adapter that the run has written."""
        folder = self.trainer.log_dir  # all ranks must ask together: the first tells the others
        if self.trainer.is_global_zero and not is_fast_dev_run(self.trainer) and folder:
            write_card(Path(folder))

    def before_warmup(self) -> None:
        """Prepare as for `fit`, with the settings that both sides of a warm start take."""
        self.model.warmup = self.datamodule.warmup = self.settings.warmup
        self.before_fit()

    def after_warmup(self) -> None:
        """Say what was reached; a warm start that is none is an error."""
        if is_fast_dev_run(self.trainer):
            return
        self.after_fit()
        said = self.model.conclusion()
        folder = Path(self.trainer.log_dir or RUNS) / "adapter"
        rank_zero_info(f"{said} GRPO goes on from it with the same configuration: --model.policy.adapter {folder}")

    def before_validate(self) -> None:
        """Find what `--ckpt_path` means: `best`, `last`, a checkpoint, or an adapter's folder."""
        name = self.settings.get("ckpt_path")
        if name is not None:
            found = find_checkpoint(str(name), checkpoint_folder(self.trainer).parent)
            if found.is_dir():
                self.model.adapter_folder = found
            self.settings.ckpt_path = None if found.is_dir() else str(found)
        folder = _own_folder(self.trainer)
        if folder is not None and not folder.exists() and not is_fast_dev_run(self.trainer):
            RUN_FOLDER.begin(folder, set_aside=False)  # a job that is refused leaves none

    before_test = before_predict = before_tamper = before_validate


def _check_whole(config: dict[str, Any]) -> None:
    """Refuse what no file can hold: the configuration is saved with the run."""
    broken = [name for name, value in config.items() if without_surrogates({name: value}) != {name: value}]
    if broken:
        raise MisconfigurationException(
            f"`{ascii(broken[0])[1:-1]}` holds half a character (a lone surrogate, such as \\ud800), which no file can "
            "hold. Write the character itself."
        )


def _own_folder(trainer: pl.Trainer) -> Path | None:
    """Return the run's folder; None if it is not the run's alone, as without a logger."""
    logger = trainer.logger
    if logger is None:
        return own_folder(trainer.default_root_dir, os.path.dirname(trainer.default_root_dir))
    if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return None
    return own_folder(str(logger.log_dir), str(logger.save_dir))


def _check_trainer(config: Any) -> None:
    """Refuse what Lightning would stumble over later, or not at all."""
    accumulate, clip = config.get("accumulate_grad_batches"), config.get("gradient_clip_val")
    if accumulate is not None and accumulate < 1:
        raise MisconfigurationException(f"`trainer.accumulate_grad_batches` must be at least 1, got {accumulate}.")
    if clip is not None and clip < 0:
        raise MisconfigurationException(
            f"`trainer.gradient_clip_val` must not be negative, got {clip}. Leave it out for no clipping."
        )


def silence_noise() -> None:
    """Filter warnings and tips of other libraries that mean nothing here."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_says_something)  # a filter that is there is not added again


def _says_something(record: logging.LogRecord) -> bool:
    """Leave out tips, that all batches are used, and that all epochs are over (said of runs that stop early, too)."""
    message = record.getMessage()
    nothing = ("Tip:", "was configured so 100% of the batches", "`Trainer.fit` stopped: `max_epochs=")
    return not any(part in message for part in nothing)


def cli_arguments(command: str = "fit") -> dict[str, Any]:
    """Return the arguments of `CLI` for a subcommand, without `args`."""
    warms_up = command == WARMUP
    return {
        "model_class": WarmupModule if warms_up else GRPOModule,
        "datamodule_class": WarmupDataModule if warms_up else AlignmentDataModule,
        "trainer_class": Trainer,
        # A step takes seconds: Lightning's 50 would leave short runs without curves.
        "trainer_defaults": {"default_root_dir": RUNS, "log_every_n_steps": 1},
        "save_config_callback": SaveConfig,
        "save_config_kwargs": {"overwrite": True},
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "parser_class": Parser,
        "parser_kwargs": {"prog": PROG, "description": DESCRIPTION},
    }


def run_job(arguments: list[str]) -> None:
    """Run a job as the command line does, in a worker process or from other Python code."""
    silence_noise()
    remember(arguments)
    with exit_codes():
        CLI(**cli_arguments(arguments[0]), args=arguments)
