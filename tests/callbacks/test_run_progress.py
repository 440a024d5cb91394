"""A Trainer's bars: one that stays one in a terminal, whatever is said meanwhile, and a line a minute in a log."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from screen import screen, terminal
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import RunProgress
from nspo_lightning.callbacks.batch_rows import BatchRows, batches_of
from nspo_lightning.callbacks.run_progress import metrics_text
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.rows import PromptRow


class Said(pl.LightningModule):
    """Says a line in each phase, and sees the screen at each step."""

    def __init__(self, console) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.console = console
        self.seen: list[list[str]] = []

    def training_step(self, batch, batch_idx):
        self.log("reward", batch_idx / 2, prog_bar=True)
        self.log("unsafe", 0.25, prog_bar=True)
        return self.layer(batch[0]).sum()

    def on_train_batch_start(self, batch, batch_idx):
        if self.console is not None:
            self.seen.append(screen(self.console))

    def validation_step(self, batch, batch_idx):
        rank_zero_info("a line in validation")

    def on_train_end(self):
        print("the end of training")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, tmp_path, **options) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[RunProgress()], num_sanity_val_steps=0, **options,
    )  # fmt: skip
    data: Any = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    trainer.fit(module, data, data)


@pytest.mark.filterwarnings("ignore")
def test_one_bar_over_epochs_and_validations_and_every_line_stays(monkeypatch, tmp_path):
    console = terminal()
    monkeypatch.setattr(rich, "get_console", lambda: console)
    monkeypatch.setattr("sys.stdout", console.file)
    module = Said(console)
    fit(module, tmp_path, max_epochs=3, val_check_interval=2, limit_val_batches=1)
    assert len(module.seen) == 12
    for lines in module.seen:
        bars = [line for line in lines if line.startswith("Training")]
        assert len(bars) == 1
        assert not any(line.startswith("Validation") for line in lines)
    assert "8 of 12 steps" in module.seen[8][-1] or "7 of 12 steps" in module.seen[8][-1]
    assert "unsafe 25 %" in module.seen[8][-1]
    assert screen(console)[-1] == "the end of training"
    assert not any("Training " in line for line in screen(console))


@pytest.mark.filterwarnings("ignore")
def test_a_log_has_one_line_of_a_short_fit(capsys, tmp_path):
    fit(Said(None), tmp_path, max_steps=6, val_check_interval=2)
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if "Training" in line] == ["Training: 6 steps ..."]
    assert said.out.splitlines() == ["the end of training"]


def test_metrics_are_numbers_and_shares():
    assert metrics_text({"reward": torch.tensor(-0.3125), "unsafe": 0.5, "general/accuracy": 0.946}) == (
        "reward -0.312, unsafe 50 %, accuracy 95 %"
    )


def test_limits_are_read_as_lightning_does():
    loader = range(7)
    assert [batches_of(loader, limit, "l") for limit in (1.0, 3, 9, 0.5, 0, 0.0)] == [7, 3, 7, 3, 0, 0]
    assert batches_of(iter(loader), 2, "l") == 2
    assert batches_of(iter(loader), 1.0, "l") == float("inf")
    with pytest.raises(MisconfigurationException, match=r"`l` is 0\.1, which leaves none of 7 batches"):
        batches_of(loader, 0.1, "l")
    with pytest.raises(MisconfigurationException, match="without length"):
        batches_of(iter(loader), 0.5, "l")


def row(number: int) -> PromptRow:
    return PromptRow(prompt=f"p{number}", kind="benign", skill="s", source="s", where="w")


@pytest.mark.parametrize("shard", [(0, 1), (0, 2), (1, 2)])
def test_rows_are_those_that_the_loader_gives(shard):
    def loader(count: int, **options) -> PromptLoader:
        rows = [row(i) for i in range(count)]
        return PromptLoader([rows], lambda batch: {"prompt": batch}, batch_size=4, shard=lambda: shard, **options)

    for one in (loader(9), loader(9, repeat_batches=2, shuffle=True), loader(9, repeat_batches=2, window=lambda: 2)):
        assert one.batch_sizes() == [len(batch["prompt"]) for batch in one]
    rows = BatchRows([loader(9), loader(6)], [1, float("inf")])
    assert rows.unit == "row"
    assert rows.total == rows.of(0, 0) + sum(loader(6).batch_sizes())
    assert BatchRows([loader(9), [1, 2, 3]], [1, 2]).total == 3
