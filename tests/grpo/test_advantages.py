import math
from typing import Any

import pytest
import torch

from nspo_lightning.grpo import group_advantages, rows_with_signal

EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


def test_group_scale_by_hand():
    # Group (0, 1): mean 0.5, Bessel std sqrt(0.5). Group (2, 6): mean 4, std sqrt(8).
    advantages = group_advantages(torch.tensor([0.0, 1.0, 2.0, 6.0]), group_size=2)
    small, large = 0.5 / (math.sqrt(0.5) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([-small, small, -large, large]), **EXACT)


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    rewards = torch.tensor([0.0, 1.0, 2.0, 6.0])
    advantages = group_advantages(rewards, group_size=2, scale="batch")
    expected = torch.tensor([-0.5, 0.5, -2.0, 2.0]) / (rewards.std() + 1e-4)
    torch.testing.assert_close(advantages, expected, **EXACT)


def test_none_scale_only_centres():
    advantages = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2, scale="none")
    assert advantages.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_nan_rewards_count_in_no_statistic_and_get_zero():
    with_nan = group_advantages(torch.tensor([1.0, math.nan, 3.0]), group_size=3)
    without = group_advantages(torch.tensor([1.0, 3.0]), group_size=2)
    torch.testing.assert_close(with_nan[[0, 2]], without, **EXACT)
    assert with_nan[1] == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_signal_are_exactly_zero(scale):
    # 0.1 has no exact mean over seven: rounding dust must not become a signal.
    rewards = torch.tensor([0.1] * 7 + [0.0] * 6 + [1.0] + [math.nan] * 7)
    advantages = group_advantages(rewards, group_size=7, scale=scale)
    assert advantages[:7].eq(0).all()
    assert advantages[14:].eq(0).all()
    rows = rows_with_signal(advantages, torch.ones(21, 2, dtype=torch.bool), has_kl=False)
    assert rows.view(3, 7).any(1).tolist() == [False, True, False]


def test_signal_is_a_trained_token_with_an_advantage_or_a_kl_term():
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    advantages = torch.tensor([0.0, 1.0, -1.0])
    assert rows_with_signal(advantages, mask, has_kl=False).tolist() == [False, False, True]
    assert rows_with_signal(advantages, mask, has_kl=True).tolist() == [True, False, True]


def test_a_single_completion_has_no_signal():
    assert group_advantages(torch.tensor([3.0, 4.0]), group_size=1).tolist() == [0.0, 0.0]


def test_wrong_shapes_and_scales_are_refused():
    with pytest.raises(ValueError, match="multiple of group_size=2"):
        group_advantages(torch.zeros(3), group_size=2)
    with pytest.raises(ValueError, match="`scale` must be"):
        group_advantages(torch.zeros(4), group_size=2, scale="max")  # type: ignore[arg-type]
