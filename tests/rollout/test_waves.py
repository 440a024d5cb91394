"""Waves of rows for bitsandbytes' fused 4-bit product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sampler import draw
from tiny_policies import tiny_base, with_adapter

from nspo_lightning.rollout import waves as module
from nspo_lightning.rollout.waves import DEQUANTISED_BYTES, FUSED_BYTES, products_in_waves, waves

ALWAYS, WIDE = 4, 48  # rows that are fused in any layer, and in a wide one, on an H100


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        (1, ALWAYS, [1]),
        (4, ALWAYS, [4]),
        (5, ALWAYS, [3, 2]),
        (16, ALWAYS, [4, 4, 4, 4]),
        (17, ALWAYS, [17]),  # five waves would be 2.5 bytes a parameter at half the bandwidth, against 4.5
        (48, WIDE, [48]),
        (64, WIDE, [32, 32]),
        (97, WIDE, [33, 32, 32]),
        (192, WIDE, [48] * 4),
        (193, WIDE, [193]),
        (4096, WIDE, [4096]),  # a prefill
        (64, 0, [64]),
    ],
)
def test_the_fewest_fused_waves_or_none(rows, most, expected):
    assert waves(rows, lambda rows: rows <= most) == expected


@given(rows=st.integers(1, 600), fused=st.sets(st.integers(1, 600)))
def test_whatever_the_rule(rows, fused):
    """Every row once; several waves only if all are fused and read less than half of what one product does."""
    cut = waves(rows, fused.__contains__)
    assert sum(cut) == rows
    assert max(cut) - min(cut) <= 1
    if len(cut) > 1:
        assert fused.issuperset(cut)
        assert rows not in fused
        assert 2 * len(cut) * FUSED_BYTES <= DEQUANTISED_BYTES


@pytest.mark.parametrize("most", [ALWAYS, 7])
@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_waves_draw_the_same_tokens(monkeypatch, most, decoding):
    policy = with_adapter(tiny_base("llama"))
    plain = draw(policy, decoding=decoding, eos=[], with_log_probs=True)
    layer = policy.get_base_model().model.layers[0].mlp.up_proj.base_layer
    rows: list[int] = []
    monkeypatch.setattr(type(layer), "forward", counted(type(layer).forward, layer, rows))
    monkeypatch.setattr(module, "rule_for_fused_rows", lambda it: (lambda n: n <= most) if it is layer else None)
    again = draw(policy, decoding=decoding, eos=[], with_log_probs=True)
    assert again.completion_ids.equal(plain.completion_ids)
    assert (again.log_probs - plain.log_probs).abs().max() <= 1e-5
    prompts, step = (waves(n, lambda rows: rows <= most) for n in (17, 12))  # all tokens of the prompts, one a row
    assert len(step) > 1
    assert rows == prompts + 8 * step
    assert "forward" not in vars(layer)


def counted(forward, watched, rows):
    def run(self, x):
        if self is watched:
            rows.append(x.numel() // x.shape[-1])
        return forward(self, x)

    return run


def test_layers_that_are_not_four_bit_for_now_are_left_alone(monkeypatch):
    """Another forward in the layer's place means other weights: nothing to fuse."""
    layer = torch.nn.Linear(3, 3)
    other = torch.relu
    vars(layer)["forward"] = other
    monkeypatch.setattr(module, "rule_for_fused_rows", lambda _: lambda rows: rows <= 2)
    with products_in_waves(layer):
        assert layer.forward is other
    assert layer.forward is other
    with products_in_waves(changed := torch.nn.Linear(3, 3)):
        assert "forward" in vars(changed)
    assert "forward" not in vars(changed)
