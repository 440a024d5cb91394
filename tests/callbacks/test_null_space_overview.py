"""A calibration of many layers is a few lines of 80 columns, and a file with every input."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from nspo_lightning.callbacks.null_space.logs import overview_table
from nspo_lightning.callbacks.null_space.overview import overview_rows, remarks, write_details
from nspo_lightning.nullspace import BasisSettings, Calibration, bases_from_spectra
from nspo_lightning.nullspace.basis import Spectrum

SETTINGS = BasisSettings(criterion="rank", threshold=2)


def model(layers: int, *, tokens: int = 99) -> Calibration:
    """A model whose inputs are 8 wide, those of the second layer of its MLPs 16."""
    groups = {}
    for i in range(layers):
        attention, mlp = f"policy.model.model.layers.{i}.self_attn", f"policy.model.model.layers.{i}.mlp"
        groups[f"{attention}.q_proj"] = [f"{attention}.{n}" for n in ("q_proj", "k_proj", "v_proj")]
        groups[f"{mlp}.down_proj"] = [f"{mlp}.down_proj"]
    spectra = {}
    for first in groups:
        width = 16 if "down" in first else 8
        values = torch.arange(1.0, width + 1).pow(-2).double()
        spectra[first] = Spectrum(values=values, vectors=torch.eye(width).double(), tokens=tokens)
    return Calibration(bases=bases_from_spectra(spectra, SETTINGS), groups=groups, settings=SETTINGS)


def test_layers_are_a_row_for_each_kind_with_the_range_of_what_is_free() -> None:
    found = model(30)
    wide = next(name for name in found.bases if name.endswith("29.mlp.down_proj"))
    choice = replace(found.bases[wide].choice, energy_left=0.5)
    found.bases[wide] = replace(found.bases[wide], choice=choice)
    rows = overview_rows(found)
    assert [row["input of"] for row in rows] == ["self_attn.{q,k,v}_proj", "mlp.down_proj"]
    assert [row["layers"] for row in rows] == ["0 to 29", "0 to 29"]
    assert [row["width"] for row in rows] == ["8", "16"]
    assert [row["free"] for row in rows] == ["75 %", "88 %"]
    assert rows[1]["energy left"].endswith(" to 0.5")


def test_it_fits_in_80_columns() -> None:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(overview_table(model(30)))
    lines = capture.get().splitlines()
    assert len(lines) < 10
    assert max(map(len, lines)) <= 80
    assert any("self_attn.{q,k,v}_proj" in line and "75 %" in line for line in lines)


def test_what_is_special_is_counted() -> None:
    assert remarks(model(4)) == []
    told = remarks(model(4, tokens=10))
    assert told == ["4 of 8 inputs: fewer tokens of text than the input is wide; give more (`data.calibration_size`)"]


def test_every_input_is_in_the_file(tmp_path: Path) -> None:
    write_details(model(3), tmp_path / "basis.layers.csv")
    with (tmp_path / "basis.layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[0]["layer"] == "0.self_attn.{q_proj,k_proj,v_proj}"
    assert rows[1]["width"] == "16"
