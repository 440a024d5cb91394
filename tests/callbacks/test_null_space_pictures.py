"""The spectrum picture: every input is in a panel of its kind, and every line can be told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nspo_lightning.callbacks.null_space.free_figure import free_figure
from nspo_lightning.callbacks.null_space.overview import overview_rows
from nspo_lightning.callbacks.null_space.spectrum_figure import spectrum_figure
from nspo_lightning.nullspace import BasisSettings, Calibration, LayerCertificate, bases_from_spectra
from nspo_lightning.nullspace.basis import Spectrum
from nspo_lightning.nullspace.record import by_kind, null_space_record

pytest.importorskip("matplotlib")
SETTINGS = BasisSettings(criterion="rank", threshold=2)


def calibration(groups: dict[str, list[str]], width: int = 8, settings: BasisSettings = SETTINGS) -> Calibration:
    values, vectors = torch.arange(1.0, width + 1).pow(-2).double(), torch.eye(width).double()
    spectra = {first: Spectrum(values=values, vectors=vectors, tokens=999) for first in groups}
    return Calibration(bases=bases_from_spectra(spectra, settings), groups=groups, settings=settings)


def model(layers: int, *shape: Any) -> Calibration:
    groups = {}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        groups[f"{attention}.q_proj"] = [f"{attention}.{n}" for n in ("q_proj", "k_proj", "v_proj")]
        groups[f"{mlp}.down_proj"] = [f"{mlp}.down_proj"]
    return calibration(groups, *shape)


@pytest.mark.parametrize("layers", [1, 4, 28])
def test_every_input_is_a_line_in_the_panel_of_its_kind(layers):
    found = model(layers)
    panels = by_kind(found)
    assert list(panels) == ["self_attn.{q_proj,k_proj,v_proj}", "mlp.down_proj"]
    assert all([depth for depth, _ in lines] == list(range(layers)) for lines in panels.values())
    figure = spectrum_figure(found)
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in shown] == [f"{kind} (8 wide)" for kind in panels]
    for axes in shown:
        curves = [line for line in axes.lines if len(line.get_xdata()) == 8]
        assert len(curves) == layers
        assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == layers
        assert len(axes.lines) == 2 * layers  # and a dot for each
    if layers == 4:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"layer {i}" for i in range(4)]
    if layers == 28:
        assert any(axes.get_ylabel() == "layer" for axes in figure.axes)


def test_names_without_a_number_are_kinds_of_their_own(tmp_path):
    found = calibration({"encoder": ["encoder"], "head": ["head"], "v2proj": ["v2proj"]})
    assert list(by_kind(found)) == ["encoder", "head", "v2proj"]
    spectrum_figure(found).savefig(tmp_path / "spectrum.png")


@pytest.mark.parametrize("layers", [1, 4, 28])
def test_the_map_shows_what_is_free_at_each_input(layers, tmp_path):
    figure = free_figure(model(layers))
    figure.savefig(tmp_path / "map.png")
    free, harm = (axes for axes in figure.axes if axes.images)
    assert free.images[0].get_array().shape == (2, layers)
    assert set(free.images[0].get_array().flatten()) == {75.0}  # 2 of 8 directions are protected
    gain = model(layers).bases["model.layers.0.mlp.down_proj"].choice.gain
    assert set(harm.images[0].get_array().flatten()) == {gain}
    assert "75 % of the directions are free (75 to 75 %)" in figure.get_suptitle()
    assert (len(free.texts) == 2 * layers) == (layers <= 16), "numbers stand in the cells where they have room"


def test_a_few_free_directions_are_not_shown_as_none_and_colours_tell_them_apart():
    few = model(4, 512, BasisSettings(criterion="rank", threshold=509))
    figure = free_figure(few)
    free = next(axes for axes in figure.axes if axes.images)
    assert "0.59 % of the directions are free (0.59 to 0.59 %)" in figure.get_suptitle()
    assert free.get_title(loc="left") == "free directions, % of the width (colours to 1 %)", (
        "a change of scale is marked"
    )
    assert free.images[0].norm.vmax == 1
    assert {text.get_text() for text in free.texts} == {"0.59"}
    assert overview_rows(few)[0]["free"] == "0.59 %"
    whole = free_figure(model(4))
    assert "colours" not in next(axes for axes in whole.axes if axes.images).get_title(loc="left")


def test_the_record_has_an_entry_for_each_input():
    certificate = LayerCertificate(
        name="model.layers.1.self_attn.k_proj", leak=0.25, update_norm=2.0, output_change=0.5, protected=2, null_dims=6
    )
    record = null_space_record(model(2), [certificate])
    places = [(entry["depth"], entry["kind"], entry["leak"], entry["bound"]) for entry in record["inputs"]]
    attention, mlp = "self_attn.{q_proj,k_proj,v_proj}", "mlp.down_proj"
    assert places == [(0, attention, None, None), (0, mlp, None, None), (1, attention, 0.25, 0.5), (1, mlp, None, None)]
    assert {entry["free_share"] for entry in record["inputs"]} == {0.75}
