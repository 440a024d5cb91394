"""What a merge says of rounding: of an update that is zero, and of one that it takes out of the null space."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.export.card import broken_promise, rounding_sentences
from nspo_lightning.export.merge import MergedLayer, _merge_low_rank_
from nspo_lightning.export.trained import LowRank
from nspo_lightning.nullspace import LayerCertificate


def certificate(leak):
    return LayerCertificate(name="q_proj", protected=4, null_dims=4, leak=leak, update_norm=1.0, output_change=leak)


def layer(rounding, leak_after=1e-7):
    return MergedLayer(name="q_proj", before=certificate(1e-7), after=certificate(leak_after), rounding=rounding)


class Base(torch.nn.Sequential):
    def get_input_embeddings(self):
        return None

    get_output_embeddings = get_input_embeddings


def merged(scale):
    torch.manual_seed(0)
    base = Base(torch.nn.Linear(16, 16, bias=False))
    update = LowRank(down=torch.randn(2, 16), up=torch.randn(16, 2) * scale, scale=1.0)
    return _merge_low_rank_(base, None, "policy.base_model.model.0", update, torch.bfloat16)


@pytest.mark.parametrize(
    ("scale", "low", "high"), [(0.0, float("inf"), float("inf")), (1e-9, 1e3, 1e12), (1.0, 0, 0.01)]
)
def test_rounding_is_beside_the_update_however_small_that_is(scale, low, high):
    assert low <= merged(scale).rounding <= high


def test_a_zero_update_is_said_and_no_percentage_of_it():
    said = " ".join(rounding_sentences([layer(float("inf"), 0.86)] * 3, "bfloat16", ""))
    assert "The update of 3 of 3 matrices is zero" in said
    assert " 0 %" not in said
    assert "inf" not in said


def test_a_promise_that_is_rounded_away_is_a_warning_with_the_way_out():
    said = broken_promise([layer(0.8, 0.63)], "bfloat16") or ""
    assert "does NOT keep the promise" in said
    assert "0.63" in said
    assert "without `--merge`" in said
    assert "--dtype float32" in said
    assert broken_promise([layer(1e-4, 1e-4)], "float32") is None
    assert broken_promise([MergedLayer(name="q_proj", before=None, after=None, rounding=0.8)], "bfloat16") is None
