"""In somebody else's project: imports, LightningCLI, other callbacks, two instances, metrics."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from null_space_problems import PROTECTED, Net, general_inputs, leak, projection, trainer
from paths import SUPPORT
from torch.optim.swa_utils import get_ema_avg_fn

LEAK = 1e-6


def test_it_trains_with_torch_and_lightning_alone(tmp_path):
    """transformers, peft, bitsandbytes, datasets, safetensors (until a file is written): none may be needed."""
    script = textwrap.dedent(
        f"""
        import sys, importlib.abc
        import lightning.pytorch  # torchmetrics imports transformers where it is installed: not our doing
        banned = {{"transformers", "peft", "bitsandbytes", "datasets", "safetensors", "openai"}}
        for name in [n for n in sys.modules if n.split(".")[0] in banned]:
            del sys.modules[name]
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in banned:
                    raise ModuleNotFoundError(f"blocked: {{name}}")
        sys.meta_path.insert(0, Block())
        sys.path.insert(0, {str(SUPPORT)!r})
        from nspo_lightning.callbacks import NullSpaceProjection
        from null_space_problems import Net, leak, trainer
        model, callback = Net(), NullSpaceProjection(criterion="rank", threshold=10, cache_dir=None)
        trainer({str(tmp_path)!r}, callback, max_steps=5).fit(model)
        assert leak(model) <= 1e-6
        print("held")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert "held" in done.stdout, done.stderr[-2000:]


def test_light_cli_by_class_path(tmp_path):
    arguments = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "nspo_lightning.callbacks.NullSpaceProjection",
                    "init_args": {"criterion": "rank", "threshold": PROTECTED, "unprotected": "error"},
                }
            ],
        }
    }
    cli = LightningCLI(
        Net,
        args={"fit": arguments},
        save_config_callback=None,
        auto_configure_optimizers=False,
    )
    assert leak(cli.model) <= LEAK


def test_beside_checkpoints_averaging_and_a_learning_rate_finder(tmp_path):
    class Tuned(Net):
        def __init__(self):
            super().__init__()
            self.lr = 1e-2

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    model = Tuned()
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=24, save_top_k=-1)
    run = trainer(
        tmp_path,
        finder,
        projection(),
        averaging,
        saving,
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        max_epochs=50,
    )
    run.fit(model)
    assert leak(model) <= LEAK  # fit ends with the averaged weights; averages of null updates are null
    averaged = Tuned()
    averaged.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
    assert leak(averaged) <= LEAK


def test_two_instances_on_different_modules(tmp_path):
    first = projection(target_modules=["first"], threshold=10)
    second = projection(target_modules=["second"], threshold=6)
    model = Net()
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=24, save_top_k=-1)
    trainer(tmp_path, first, second, saving, enable_checkpointing=True).fit(model)
    assert set(first.certificate()) == {"first"}
    assert set(second.certificate()) == {"second"}
    assert max(*first.certificate().values(), *second.certificate().values()) <= LEAK
    assert first.calibration is not None
    assert second.calibration is not None
    assert first.calibration.basis_of("first").protected == 10
    assert second.calibration.basis_of("second").protected == 6
    assert len(torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]) == 3


class SharedLogger(Logger):
    """Writes where other runs write too, as wandb's logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return "shared"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_files_of_a_fit_go_into_a_folder_of_its_own_alone(tmp_path):
    trainer(tmp_path, projection(), logger=SharedLogger(tmp_path / "all"), max_steps=1).fit(Net())
    assert not list(tmp_path.rglob("*null*space*"))
    trainer(tmp_path, projection(), logger=CSVLogger(tmp_path, name="run", version=""), max_steps=1).fit(Net())
    assert {"nullspace.layers.csv", "null_space.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_datamodule_provides_the_text(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return Net().train_dataloader()

        def calibration_dataloader(self):
            return [general_inputs()]

    class Bare(Net):
        train_dataloader = pl.LightningModule.train_dataloader
        calibration_dataloader = None  # type: ignore[assignment]

    model = Bare()
    trainer(tmp_path, projection()).fit(model, datamodule=Data())
    assert leak(model) <= LEAK


def test_calibration_text_is_read_once(tmp_path):
    """The certificate's reference is taken on the first batch that calibration read, not on a second reading."""

    class Counting(list):
        readings = 0

        def __iter__(self):
            Counting.readings += 1
            return super().__iter__()

    callback = projection(calibration=Counting([general_inputs()]))
    trainer(tmp_path, callback, max_steps=2).fit(Net())
    assert Counting.readings == 1
    assert callback.output_change is not None


def test_metrics_arrive_at_the_logging_interval(tmp_path):
    import csv

    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, projection(), logger=logger, log_every_n_steps=4, max_steps=12).fit(Net())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    steps = [row for row in rows if row.get("nullspace/leak_max")]
    assert len(steps) == 3
    for row in steps:
        before, after = float(row["nullspace/grad_norm_before"]), float(row["nullspace/grad_norm_after"])
        assert 0 < after < before
        assert float(row["nullspace/kept_gradient_energy"]) == pytest.approx((after / before) ** 2, rel=1e-3)
        assert float(row["nullspace/leak_max"]) <= LEAK
    start = next(row for row in rows if row.get("nullspace/null_dims_mean"))
    assert float(start["nullspace/null_dims_mean"]) == (32 - 10 + 24 - 10) / 2


def test_the_spectrum_is_a_figure_in_tensorboard(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = loggers.TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, projection(), logger=logger, max_steps=2).fit(Net())
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert "nullspace/spectrum" in found.Tags()["images"]


def test_optimizers_are_left_without_hooks(tmp_path):
    model = Net()
    run = trainer(tmp_path, projection())
    run.fit(model)
    assert not run.optimizers[0]._optimizer_step_post_hooks

    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    failing = trainer(tmp_path, projection())
    with pytest.raises(RuntimeError, match="stop"):
        failing.fit(Failing())
    assert not failing.optimizers[0]._optimizer_step_post_hooks


def test_training_modes_are_restored_after_calibration(tmp_path):
    class Watching(Net):
        def __init__(self):
            super().__init__()
            self.first.eval()

        def on_train_start(self):
            self.modes = (self.first.training, self.second.training)

        def on_fit_start(self):
            self.first.eval()

    model = Watching()
    trainer(tmp_path, projection(), max_steps=1).fit(model)
    assert model.modes == (False, True)
