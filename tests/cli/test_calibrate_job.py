"""Calibration as a job of its own, called from Python."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from null_space_problems import WIDTH, Net, general_inputs, trainer
from rich.console import Console

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.cli.calibrate import calibrate
from nspo_lightning.nullspace import TO_LEARN


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


class Domains(pl.LightningDataModule):
    """General text of two domains, and inputs to learn from."""

    def calibration_dataloader(self) -> Iterator[dict[str, object]]:
        learnt = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
        for domain, x in (
            ("facts", general_inputs(64)),
            ("look-alikes", general_inputs(9) + learnt[:9]),
            (TO_LEARN, learnt),
        ):
            yield {"x": x, "domain": [domain] * len(x)}


def limited(limits: dict[str, float]) -> NullSpaceProjection:
    return NullSpaceProjection(
        criterion="contrast", domain_limits=limits, batch_to_inputs=lambda batch: (batch["x"], None)
    )


def test_what_is_promised_of_each_domain_is_printed_beside_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=80, file=StringIO())
    monkeypatch.setattr("nspo_lightning.cli.calibrate.get_console", lambda: console)
    monkeypatch.chdir(tmp_path)
    projection = limited({"look-alikes": 0.5})
    calibrate(
        Net(), Domains(), out="b.safetensors", projection=projection, keep_moments=None, trainer=trainer(tmp_path)
    )
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines[:-2])) <= 80
    cells = [re.findall(r"[\w.-]+", line) for line in lines]
    shown = next(row for row in cells if row[:1] == ["look-alikes"])
    assert projection.calibration is not None
    promise = projection.calibration.promises["look-alikes"]
    assert promise.harm <= 0.5
    assert shown[1:3] == [f"{promise.harm:.2g}", "0.5"]
    assert any(row[:1] == ["facts"] for row in cells)


def test_a_limit_on_an_unknown_domain_is_refused_before_any_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passed(*_: object, **__: object) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr("nspo_lightning.callbacks.null_space_projection.calibrate_modules", passed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"names \['benign'\]; calibration saw \['facts', 'look-alikes'\]"):
        calibrate(
            Net(),
            Domains(),
            out="b.safetensors",
            projection=limited({"benign": 0.5}),
            keep_moments=None,
            trainer=trainer(tmp_path),
        )


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
