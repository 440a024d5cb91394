"""How many directions each criterion protects, on spectra whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo_lightning.nullspace import BasisSettings, bases_from_spectra, choose_rank, energy_left
from nspo_lightning.nullspace.basis import Spectrum
from nspo_lightning.nullspace.criteria import NoNullDirections, rho

SPECTRUM = torch.tensor([60.0, 30.0, 9.0, 1.0])  # energy left: 1, 0.4, 0.1, 0.01, 0


@pytest.mark.parametrize(
    ("criterion", "threshold", "protected"),
    [
        ("energy", 0.5, 1),
        ("energy", 0.1, 2),  # inclusive: exactly 0.1 is left after two
        ("energy", 0.05, 3),
        ("energy", 0.0, 4),
        ("relative", 0.15, 3),  # 9 = 0.15 * 60 is not null: null is strictly below
        ("relative", 0.2, 2),
        ("absolute", 10.0, 2),
        ("absolute", 9.0, 3),
        ("rank", 3, 3),
        ("rank", 0.5, 2),
        ("rank", 0.3, 2),  # a share is rounded up: rather one direction more protected
        ("bound", math.sqrt(0.1) + 1e-12, 2),
        ("bound", 0.2, 3),
        ("null_share", 0.5, 2),
        ("null_share", 0.3, 2),  # at least 0.3 of 4 directions: two
    ],
)
def test_criteria(criterion, threshold, protected):
    choice = choose_rank(SPECTRUM, criterion, threshold)
    assert choice.protected == protected
    assert choice.energy_left == pytest.approx([1, 0.4, 0.1, 0.01, 0][protected], abs=1e-12)
    assert choice.null_share == (4 - protected) / 4


def test_a_tail_of_1e_12_keeps_its_digits():
    values = torch.tensor([1.0, 1e-12, 1e-13], dtype=torch.float64)
    assert float(energy_left(values)[1]) == pytest.approx(1.1e-12, rel=1e-9)


def test_zero_and_negative_eigenvalues_divide_nothing_by_zero():
    assert choose_rank(torch.zeros(5), "energy", 1e-3).protected == 0
    assert choose_rank(torch.zeros(5)).reason == "its inputs are all zero"
    assert choose_rank(torch.tensor([1.0, 1e-9, -1e-9]), "energy", 1e-3).protected == 1


def test_auto_protects_exactly_the_support_of_a_low_rank_spectrum():
    values = torch.cat([torch.logspace(2, -1, 40), torch.zeros(88)])
    choice = choose_rank(values)
    assert choice.protected == 40
    assert choice.gain < 1e-4


def test_auto_stops_where_the_next_direction_carries_twice_the_mean_of_the_rest():
    values = torch.logspace(0, -2, 200, dtype=torch.float64)
    k = choose_rank(values).protected
    assert values[k - 1] > 2 * values[k:].mean() * 0.97
    assert values[k] < 2 * values[k:].mean() * 1.03


def test_auto_is_not_the_strictest_cut_on_a_spectrum_without_a_tail():
    values = torch.arange(1, 257, dtype=torch.float64).pow(-1.0)
    strict, auto = choose_rank(values, "energy", 1e-3), choose_rank(values)
    assert strict.null_share < 0.05
    assert strict.gain > 1  # predicted to be worse than no projection at all
    assert auto.null_share > 0.2
    assert auto.gain < 0.6


def test_auto_on_a_flat_spectrum_says_that_there_is_little_to_gain():
    choice = choose_rank(torch.ones(64))
    assert choice.protected == 1
    assert "little to gain" in choice.reason


def test_auto_obeys_limits_and_says_which_one_holds_it():
    values = torch.logspace(0, -2, 200, dtype=torch.float64)
    wide = choose_rank(values, min_null_share=0.8)
    assert wide.null_share >= 0.8
    assert "min_null_share" in wide.reason
    tight = choose_rank(values, max_output_change=0.05)
    assert tight.energy_left <= 0.05**2
    assert "max_output_change" in tight.reason
    with pytest.raises(NoNullDirections, match="Relax one of the two"):
        choose_rank(values, min_null_share=0.8, max_output_change=0.01)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.floats(1e-3, 1e3))
def test_auto_minimises_rho_and_ignores_the_scale(values, scale):
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    choice = choose_rank(spectrum)
    if float(spectrum[0]) <= 1e-200:
        return
    assert 1 <= choice.protected < len(values)
    assert float(rho(spectrum)[choice.protected]) == pytest.approx(float(rho(spectrum)[1:].min()), rel=1e-9)
    scaled = choose_rank(spectrum * scale)
    assert float(rho(spectrum)[scaled.protected]) == pytest.approx(float(rho(spectrum)[choice.protected]), rel=1e-6)


@pytest.mark.parametrize(
    ("criterion", "threshold", "message"),
    [
        ("median", None, "must be one of auto, energy"),
        ("auto", 0.1, "takes no `threshold`"),
        ("energy", 1.0, r"must lie in \[0, 1\), got 1.0"),
        ("energy", -0.1, "got -0.1"),
        ("rank", 2.5, "whole number"),
    ],
)
def test_bad_settings_are_refused(criterion, threshold, message):
    with pytest.raises(ValueError, match=message):
        choose_rank(SPECTRUM, criterion, threshold)


def build(values, criterion, threshold):
    spectra = {n: Spectrum(values=v.double(), vectors=torch.eye(len(v)), tokens=9) for n, v in values.items()}
    return bases_from_spectra(spectra, BasisSettings(criterion=criterion, threshold=threshold))


def test_inputs_without_null_directions_are_named_together_with_a_value_that_leaves_one():
    spectra = {"a": SPECTRUM, "b": torch.tensor([1.0, 1.0]), "c": torch.tensor([1.0, 0.0])}
    with pytest.raises(NoNullDirections, match=r"2 of 3 layer inputs") as caught:
        build(spectra, "energy", 1e-6)
    assert "a (width 4): threshold >= 0.01" in str(caught.value)
    assert "b (width 2): threshold >= 0.5" in str(caught.value)
    assert choose_rank(SPECTRUM, "energy", 0.0101).protected == 3  # the advice holds


def test_a_criterion_that_protects_nothing_is_refused():
    with pytest.raises(NoNullDirections, match="nothing would be protected, its largest eigenvalue is 60"):
        build({"a": SPECTRUM}, "absolute", 100.0)
