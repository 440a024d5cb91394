"""The command line: LightningCLI over GRPOModule, AlignmentDataModule and NullSpaceProjection.

``python -m nspo_lightning fit -c config.yaml`` trains; `validate`, `test` and `predict` measure and write completions.
Nothing imports this module but `__main__`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from nspo_lightning.callbacks import (
    EndTogether,
    ExactResume,
    LastOnException,
    NullSpaceProjection,
    PredictionWriter,
    RunReport,
    SampleCompletions,
    TestReport,
)
from nspo_lightning.checkpoints import AtomicCheckpointIO, check_checkpoint, remove_leftovers
from nspo_lightning.cli import help as command_face
from nspo_lightning.cli.errors import explain, is_users_mistake
from nspo_lightning.cli.run_folder import RunFolder
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.keys import mask_keys
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.trained_state import find_trained
from nspo_lightning.toy.judge import TownJudge

DESCRIPTION = """Safety GRPO in the null space of general ability.

Start with `fit -c quickstart`; `SUBCOMMAND --help=all` lists every setting, `fit -c FILE --print_config` prints them
with their values. Other jobs have a help of their own: `judge --help` (score a file), `compare --help`
(methods, seeds and sweeps in one table), `evaluate --help` (lm-evaluation-harness), `export --help` (an adapter or a
merged model out of a checkpoint)."""
COMMANDS = {
    "judge": "nspo_lightning.cli.judge",
    "compare": "nspo_lightning.cli.compare",
    "evaluate": "nspo_lightning.cli.evaluate",
    "export": "nspo_lightning.cli.export",
}
"""Subcommands beside LightningCLI's: their modules have a `main(arguments)` and are imported on use."""
RUNS = "runs"
NOISE = (
    ".*`training_step` returned `None`.*",  # a step without signal is no mistake here
    ".*isinstance\\(treespec, LeafSpec\\).*",  # between lightning and torch
    ".*`is_gradient_checkpointing` is deprecated.*",  # between peft and transformers
    ".*Checkpoint directory .* exists and is not empty.*",  # resuming
    ".*there is no last checkpoint available.*",  # we say it ourselves
    ".*weights_only. was not set.*",  # ours is always True
)
SHORT_NAMES = (TownJudge, NullSpaceProjection)  # imported, so a config may name them without their module
CHECKPOINT_WORDS = ("last", "best", "hpc", "registry")
TRACEBACK_VARIABLE = "NSPO_LIGHTNING_TRACEBACK"
RUN_FOLDER = RunFolder()


class SaveConfig(SaveConfigCallback):
    """Save the resolved configuration beside the run and show it in TensorBoard."""

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = self.parser.dump(self.config, skip_none=False)
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")


class Parser(LightningArgumentParser):
    """Takes a path among data or calibration settings as what it is, not as a file with settings to be read.

    What it says of a wrong option repeats no key.
    """

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(mask_keys(message), ex)
        raise AssertionError  # it has exited

    @override
    def format_usage(self) -> str:
        return f"usage: {self.prog} [-c FILE] [--SECTION.OPTION VALUE ...]\n"

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if nested_key not in {"data", "nullspace"}:
            return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        added: list[str] = self.add_class_arguments(lightning_class, nested_key, fail_untyped=False)
        return added


class CLI(LightningCLI):
    """LightningCLI with the callback's own section, run folders, and the callbacks that a run should not miss."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        own = {name: {"model", "datamodule"} for name in ("calibrate", "data")}
        return {**LightningCLI.subcommands(), **own}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "data":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # Its arguments can't be a group named after it: that name is the datamodule's.
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        parser.add_argument("--examples", type=int, default=3, help="Rendered texts of each use.")
        self._subcommand_method_arguments[subcommand] = ["examples"]
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning looks for hyperparameters in the file here; ours stand in config.yaml. What is looked at is whether
        # the checkpoint can be read at all, before models are loaded and data is read.
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and str(path) not in CHECKPOINT_WORDS and "://" not in str(path):
            check_checkpoint(Path(path))

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="nspo", help="Name of the run; it is kept in runs/<name>.")
        parser.add_lightning_class_args(NullSpaceProjection, "nullspace")
        parser.link_arguments(
            ("model.num_iterations", "model.num_minibatches"),
            "data.repeat_batches",
            compute_fn=lambda iterations, minibatches: iterations * minibatches,
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        _silence_noise()  # libraries that were imported meanwhile brought filters of their own
        config = self._get(self.config_init, "trainer")
        _check_trainer(config)
        name = self._get(self.config_init, "name")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = TensorBoardLogger(RUNS, name=name, version="")
        callbacks: list[Callback] = list(config.get("callbacks") or [])
        if config.get("enable_checkpointing") is False:
            standard: list[Callback] = []
        else:
            # Names hold the step, so a file that is there already is the same one, written before a crash.
            checkpoint = ModelCheckpoint(save_last=True, save_on_exception=False, enable_version_counter=False)
            standard = [checkpoint, ExactResume(), LastOnException()]
        # What fails together ends together, after what is to be saved is saved.
        standard += [EndTogether(), SampleCompletions(), PredictionWriter(), RunReport(), TestReport()]
        if config.get("enable_progress_bar") is not False:
            standard.append(RichProgressBar())
        for callback in standard:
            kind = ProgressBar if isinstance(callback, ProgressBar) else type(callback)
            if not any(isinstance(other, kind) for other in callbacks):
                callbacks.append(callback)
        # The one that writes `last` comes last: its file then holds what the others decided.
        kwargs["callbacks"] = sorted(callbacks, key=lambda c: bool(getattr(c, "save_last", False)))
        given = config.get("plugins") or []
        plugins = list(given) if isinstance(given, (list, tuple)) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Move an earlier run of the same name out of the way (`runs/name` is always the latest)."""
        folder, ckpt_path = self.trainer.log_dir, self._get(self.config_init, "ckpt_path")
        remove_leftovers(Path(self.trainer.default_root_dir) / "nullspace", shared=True)
        if folder and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            RUN_FOLDER.begin(Path(folder), set_aside=not ckpt_path)
        if ckpt_path == "last" and not self._has_last():
            rank_zero_info("There is no checkpoint to go on from yet (`--ckpt_path last`): the run starts anew.")

    def before_validate(self) -> None:
        """Find what `--ckpt_path` means: `best`, `last`, a checkpoint, or an adapter's folder."""
        name = self._get(self.config_init, "ckpt_path")
        if name is None:
            return
        found = find_trained(str(name), Path(self.trainer.log_dir or RUNS))
        if found.is_dir():
            self.model.adapter_folder = found
        self.config_init[self.subcommand].ckpt_path = None if found.is_dir() else str(found)

    before_test = before_predict = before_validate

    def _has_last(self) -> bool:
        folders = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folders += [Path(self.trainer.log_dir) / "checkpoints"] if self.trainer.log_dir else []
        return any(list(Path(folder).glob("last*.ckpt")) for folder in folders)


def _check_trainer(config: Any) -> None:
    """Refuse what Lightning would stumble over later, or not at all."""
    accumulate, clip = config.get("accumulate_grad_batches"), config.get("gradient_clip_val")
    if accumulate is not None and accumulate < 1:
        raise MisconfigurationException(f"`trainer.accumulate_grad_batches` must be at least 1, got {accumulate}.")
    if clip is not None and clip < 0:
        raise MisconfigurationException(
            f"`trainer.gradient_clip_val` must not be negative, got {clip}. Leave it out for no clipping."
        )


def _silence_noise() -> None:
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())


def cli_arguments() -> dict[str, Any]:
    """Return what the command line is made of.

    Returns:
        Arguments of `CLI`, without `args`.
    """
    return {
        "model_class": GRPOModule,
        "datamodule_class": AlignmentDataModule,
        "trainer_class": Trainer,
        "trainer_defaults": {"default_root_dir": RUNS},
        "save_config_callback": SaveConfig,
        "save_config_kwargs": {"overwrite": True},
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "parser_class": Parser,
        "parser_kwargs": {"description": DESCRIPTION},
    }


def main(args: list[str] | None = None) -> None:
    """Run the command line: exit code 0, 1 (failed), 2 (usage).

    Args:
        args: Arguments; None = those of the process.

    Raises:
        BaseException: What is no user's mistake, or any error if NSPO_LIGHTNING_TRACEBACK is set.
    """
    _silence_noise()
    arguments = list(sys.argv[1:] if args is None else args)
    if (text := command_face.help_text(arguments)) is not None:
        print(text)
        return
    if not arguments:
        print(f"{command_face.overview()}\n\nerror: expected a subcommand, got none.", file=sys.stderr)
        sys.exit(2)
    try:
        arguments = command_face.prepared(arguments)
        if arguments[0] == "completion":
            command_face.completion(arguments[1:])
        elif arguments[0] in COMMANDS:
            import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        else:
            if args is None:
                sys.argv[1:] = arguments  # where LightningCLI looks, and warns if it is told something else
            CLI(**cli_arguments(), args=None if args is None else arguments)
    except command_face.UnknownConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_users_mistake(error):
            raise
        RUN_FOLDER.withdraw()
        rank: int = getattr(rank_zero_only, "rank")  # noqa: B009  (an attribute of a function)
        if not (rank and getattr(error, "raised_on_all_ranks", False)):  # what all say is said once
            where = f" on rank {rank}" if rank else ""
            print(f"\nerror{where}: {explain(error)}\n(set {TRACEBACK_VARIABLE}=1 for the traceback)", file=sys.stderr)
        sys.exit(1)
