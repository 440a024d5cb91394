"""Second moments: against dense float64, masked, and in float32 at least whatever comes in."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning import ranks
from nspo_lightning.nullspace.covariance import SecondMoment, add_gram_, mirror_, select_rows

FLOAT32_PRODUCT = 2e-6  # float32 products of a few thousand terms, relative to the largest entry
FLOAT64_PRODUCT = 1e-13


def dense(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().T @ rows.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("width", [3, 511, 512, 700, 1030])
def test_gram_equals_the_dense_product_and_is_symmetric(width):
    rows = torch.randn(50, width)
    result = mirror_(add_gram_(torch.zeros(width, width), rows))
    assert torch.equal(result, result.T)
    assert relative(result, dense(rows)) < FLOAT32_PRODUCT
    exact = mirror_(add_gram_(torch.zeros(width, width, dtype=torch.float64), rows.double()))
    assert relative(exact, dense(rows)) < FLOAT64_PRODUCT


def test_few_tokens_are_summed_in_float64():
    rows = torch.randn(60, 300) * torch.logspace(0, -5, 300)
    moment = SecondMoment(300)
    for part in rows.split(7):
        moment.update(part)
    assert relative(moment.total(), dense(rows)) < FLOAT64_PRODUCT
    assert moment.resolution == torch.finfo(torch.float64).eps


def test_many_tokens_are_summed_in_float32_products_and_float64_sums():
    rows = torch.randn(9000, 300)
    moment = SecondMoment(300)
    for part in rows.split(900):
        moment.update(part)
    assert moment.rows == 9000
    assert moment.total().dtype == torch.float64
    assert relative(moment.take(), dense(rows) / 9000) < FLOAT32_PRODUCT
    assert moment.resolution == torch.finfo(torch.float32).eps


def test_bfloat16_inputs_are_not_summed_in_bfloat16():
    rows = torch.randn(4096, 64).bfloat16()
    moment = SecondMoment(64)
    moment.update(rows)
    assert relative(moment.total(), dense(rows)) < FLOAT32_PRODUCT


def test_pending_rows_are_copies():
    rows = torch.ones(2, 3)
    moment = SecondMoment(3)
    moment.update(rows)
    rows.zero_()  # what an in-place activation would do to a layer's input
    assert torch.equal(moment.total(), torch.full((3, 3), 2.0, dtype=torch.float64))


def test_masked_rows_never_count():
    inputs = torch.randn(2, 5, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    poisoned = inputs.clone()
    poisoned[mask == 0] = 1e6
    assert torch.equal(select_rows(poisoned, mask), inputs[mask.bool()])
    assert select_rows(inputs, None).shape == (10, 4)


def test_a_mask_that_does_not_fit_is_refused_by_layer_name():
    with pytest.raises(ValueError, match=r"enter experts\.3: they are \(7,\), the mask is \(2, 5\)"):
        select_rows(torch.randn(7, 4), torch.tensor([[1] * 5, [1] * 4 + [0]]), layer="experts.3")
    assert select_rows(torch.randn(7, 4), torch.ones(2, 5)).shape == (7, 4)


def test_an_input_never_seen_has_a_zero_moment():
    assert torch.equal(SecondMoment(3).take(), torch.zeros(3, 3, dtype=torch.float64))


def test_ranks_add_up(monkeypatch):
    rows = torch.randn(40, 6)
    first, second, whole = SecondMoment(6), SecondMoment(6), SecondMoment(6)
    first.update(rows[:15])
    second.update(rows[15:])
    whole.update(rows)
    others = iter([second.total(), torch.tensor([second.rows, 0.0], dtype=torch.float64)])
    monkeypatch.setattr(ranks, "all_reduce_sum", lambda tensor: tensor + next(others))
    first.all_reduce()
    assert first.rows == 40
    assert relative(first.take(), whole.take()) < FLOAT64_PRODUCT
