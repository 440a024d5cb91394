"""The spectrum picture: every input is in a panel of its kind, and every line can be told apart."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.nullspace import BasisSettings, Calibration, bases_from_spectra
from nspo_lightning.nullspace.basis import Spectrum
from nspo_lightning.nullspace.picture import by_kind, spectrum_figure

pytest.importorskip("matplotlib")
SETTINGS = BasisSettings(criterion="rank", threshold=2)


def calibration(groups: dict[str, list[str]]) -> Calibration:
    spectra = {
        first: Spectrum(values=torch.arange(1.0, 9.0).pow(-2).double(), vectors=torch.eye(8).double(), tokens=99)
        for first in groups
    }
    return Calibration(bases=bases_from_spectra(spectra, SETTINGS), groups=groups, settings=SETTINGS)


def model(layers: int) -> Calibration:
    groups = {}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        groups[f"{attention}.q_proj"] = [f"{attention}.{n}" for n in ("q_proj", "k_proj", "v_proj")]
        groups[f"{mlp}.down_proj"] = [f"{mlp}.down_proj"]
    return calibration(groups)


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
