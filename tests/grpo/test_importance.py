"""The truncated importance ratio against hand arithmetic."""

import math
from typing import Any

import pytest
import torch

from nspo_lightning.grpo import Normaliser, ObjectiveConfig, ObjectiveMetrics, objective, token_weights


def rows():
    mask = torch.tensor([[True, True], [True, False]])
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor([[-1.2, -4.0], [-0.2, math.nan]], dtype=torch.float64)
    return mask, log_probs, sampled, torch.tensor([1.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_each_token_weighs_by_its_capped_ratio(beta):
    mask, log_probs, sampled, advantages = rows()
    weights = token_weights(mask, "bnpo", Normaliser.of(mask, 4))
    reference = log_probs.detach() - 0.3
    result = objective(
        log_probs,
        mask=mask,
        weights=weights,
        advantages=advantages,
        config=ObjectiveConfig(loss_type="bnpo", beta=beta),
        reference_log_probs=reference if beta else None,
        sampling_log_probs=sampled,
        importance_cap=2.0,
    )
    ratios = [math.exp(0.2), 2.0, math.exp(-0.3)]  # exp(2) is cut to 2
    kl = math.exp(-0.3) + 0.3 - 1
    expected = -(ratios[0] * 1 + ratios[1] * 1 + ratios[2] * -2) / 3 + beta * kl
    assert float(result.loss) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    pull = beta * (1 - math.exp(-0.3))
    wanted = [[-ratios[0] / 3 + pull / 3, -ratios[1] / 3 + pull / 3], [2 * ratios[2] / 3 + pull / 3, 0.0]]
    assert torch.allclose(gradient, torch.tensor(wanted, dtype=torch.float64))
    logged = result.metrics.means()
    assert float(logged["sampling/sampling_logp_difference/mean"]) == pytest.approx((0.2 + 2.0 + 0.3) / 3)
    assert float(logged["sampling/sampling_logp_difference/max"]) == pytest.approx(2.0)
    assert float(logged["sampling/importance_sampling_ratio/min"]) == pytest.approx(ratios[2])
    assert float(logged["sampling/importance_sampling_ratio/mean"]) == pytest.approx(sum(ratios) / 3)
    assert float(logged["sampling/importance_sampling_ratio/max"]) == pytest.approx(2.0)


def test_the_ratio_is_that_of_the_policy_that_sampled_not_of_the_current_one():
    mask, log_probs, sampled, advantages = rows()
    old = log_probs.detach() + 0.1
    common: dict[str, Any] = {
        "mask": mask,
        "weights": mask.double(),
        "advantages": advantages,
        "config": ObjectiveConfig(),
    }
    common |= {"old_log_probs": old, "sampling_log_probs": sampled}
    metrics = objective(log_probs, **common).metrics.means()
    assert float(metrics["sampling/sampling_logp_difference/max"]) == pytest.approx(2.1)


def test_micro_batches_add_up():
    mask, log_probs, sampled, advantages = rows()
    common: dict[str, Any] = {"config": ObjectiveConfig(), "importance_cap": 2.0}

    def part(chosen):
        return objective(
            log_probs[chosen],
            mask=mask[chosen],
            weights=mask[chosen].double(),
            advantages=advantages[chosen],
            sampling_log_probs=sampled[chosen],
            **common,
        ).metrics

    whole = part(slice(None)).means()
    merged = ObjectiveMetrics.merge([part(slice(0, 1)), part(slice(1, 2))]).means()
    assert all(float(merged[name]) == pytest.approx(float(value)) for name, value in whole.items())
    assert "sampling/importance_sampling_ratio/mean" in merged
