"""Calibration as a job of its own, called from Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from null_space_problems import Net, general_inputs, trainer
from rich.console import Console

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.cli.calibrate import calibrate


def test_what_it_prints_fits_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(pl.LightningDataModule):
        def calibration_dataloader(self) -> Iterator[torch.Tensor]:
            yield general_inputs(16)

    console = Console(width=80, file=StringIO())
    monkeypatch.setattr("nspo_lightning.cli.calibrate.get_console", lambda: console)
    monkeypatch.chdir(tmp_path)
    calibrate(Net(), Few(), out="basis.safetensors", projection=None, keep_moments=None, trainer=trainer(tmp_path))
    assert isinstance(console.file, StringIO)
    said = console.file.getvalue()
    *table, files = said.splitlines()
    assert max(map(len, table)) <= 80
    assert "spectrum: basis.png, each input: basis.layers.csv" in files
    assert (tmp_path / "basis.layers.csv").read_text().startswith("layer,width,protected,")
    assert "inputs: fewer tokens of text than the input is wide" in said


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
