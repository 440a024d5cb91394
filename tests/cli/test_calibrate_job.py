"""Calibration as a job of its own, called from Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from null_space_problems import Net, general_inputs, trainer

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.cli.calibrate import calibrate


def test_no_more_text_is_read_than_is_used(tmp_path: Path) -> None:
    class Endless(pl.LightningDataModule):
        read = 0

        def calibration_dataloader(self) -> Iterator[torch.Tensor]:
            for _ in itertools.count():
                self.read += 1
                yield general_inputs(16)

    data = Endless()
    projection = NullSpaceProjection(limit_batches=3)
    out = tmp_path / "basis.safetensors"
    calibrate(Net(), data, out=out, projection=projection, keep_moments=None, trainer=trainer(tmp_path))
    assert data.read == 3
    found = projection.calibration
    assert found is not None
    assert set(found.domain_tokens.values()) == {48}
