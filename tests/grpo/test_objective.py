"""The objective against hand arithmetic and against TRL's formulas written out in float64."""

import math

import pytest
import torch

from nspo_lightning.grpo import Normaliser, ObjectiveConfig, ObjectiveMetrics, loss_mask, objective, token_weights

LOSS_TYPES = ["grpo", "dapo", "bnpo", "dr_grpo"]
LIMIT = 6


def make_rows(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows, length = 5, 4
    lengths = torch.tensor([4, 1, 3, 2, 4])
    mask = torch.arange(length) < lengths[:, None]

    def random(scale):
        return torch.randn(rows, length, generator=generator, dtype=dtype) * scale

    log_probs = (random(1) - 2).requires_grad_()
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs.detach() + random(0.3),
        "reference_log_probs": log_probs.detach() + random(0.5),
        "advantages": torch.randn(rows, generator=generator, dtype=dtype),
        "mask": mask,
    }


def reference_loss(rows, config, limit=LIMIT):
    """A loop over rows and tokens, as one would write it on a blackboard."""
    per_row = []
    for r in range(len(rows["mask"])):
        n = int(rows["mask"][r].sum())
        log_ratio = (rows["log_probs"] - rows["old_log_probs"])[r, :n]
        if config.ratio_level == "sequence":
            log_ratio = log_ratio.mean().expand(n)
        losses = []
        for t in range(n):
            ratio = log_ratio[t].exp()
            clipped = ratio.clamp(1 - config.clip_epsilon, 1 + config.epsilon_high)
            if config.delta is not None:
                ratio = ratio.clamp(max=config.delta)
            loss = -torch.min(ratio * rows["advantages"][r], clipped * rows["advantages"][r])
            difference = (rows["reference_log_probs"] - rows["log_probs"])[r, t]
            losses.append(loss + config.beta * (difference.exp() - difference - 1))
        per_row.append(torch.stack(losses))
    tokens = sum(len(row) for row in per_row)
    if config.loss_type == "grpo":
        return sum(row.mean() for row in per_row) / len(per_row)
    if config.loss_type == "dr_grpo":
        return sum(row.sum() for row in per_row) / (len(per_row) * limit)
    return sum(row.sum() for row in per_row) / tokens


def run(rows, config, normaliser=None):
    normaliser = normaliser or Normaliser.of(rows["mask"], LIMIT)
    weights = token_weights(rows["mask"], config.loss_type, normaliser)
    return objective(
        rows["log_probs"],
        mask=rows["mask"],
        weights=weights.to(rows["log_probs"].dtype),
        advantages=rows["advantages"],
        config=config,
        old_log_probs=rows["old_log_probs"],
        reference_log_probs=rows["reference_log_probs"],
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_loss_and_gradient_equal_the_blackboard(loss_type, ratio_level, beta, delta):
    config = ObjectiveConfig(
        loss_type=loss_type, ratio_level=ratio_level, beta=beta, delta=delta, clip_epsilon_high=0.28
    )
    rows = make_rows()
    loss = run(rows, config).loss
    expected = reference_loss(rows, config)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # the weights are float32
    ours = torch.autograd.grad(loss, rows["log_probs"])[0]
    theirs = torch.autograd.grad(expected, rows["log_probs"])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_in_any_pieces_sum_to_the_whole(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, beta=0.05)
    rows = make_rows()
    normaliser = Normaliser.of(rows["mask"], LIMIT)
    whole = run(rows, config)
    parts = [run({k: v[piece] for k, v in rows.items()}, config, normaliser) for piece in ([0, 3], [1], [2, 4])]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-6, atol=1e-9)
    merged = ObjectiveMetrics.merge([part.metrics for part in parts]).means()
    for name, value in whole.metrics.means().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-9)


def test_on_policy_step_has_ratio_one_and_the_policy_gradient():
    rows = make_rows()
    config = ObjectiveConfig(loss_type="dapo")
    weights = token_weights(rows["mask"], "dapo", Normaliser.of(rows["mask"], LIMIT))
    result = objective(
        rows["log_probs"], mask=rows["mask"], weights=weights, advantages=rows["advantages"], config=config
    )
    gradient = torch.autograd.grad(result.loss, rows["log_probs"])[0]
    torch.testing.assert_close(gradient, (-rows["advantages"][:, None] * weights).double())
    assert result.metrics.means()["clip_ratio/region_mean"] == 0


def test_clipping_cuts_the_gradient_only_on_the_side_that_it_should():
    # Ratios 1.5 and 0.5 with either sign of the advantage: a clipped token keeps no gradient.
    log_probs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()[:, None].requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    result = objective(
        log_probs,
        mask=mask,
        weights=torch.ones(4, 1),
        advantages=advantages,
        config=ObjectiveConfig(clip_epsilon=0.2, clip_epsilon_high=0.3),
        old_log_probs=torch.zeros(4, 1),
    )
    torch.testing.assert_close(result.loss, torch.tensor(-1.3 + 1.5 - 0.5 + 0.8))
    assert torch.autograd.grad(result.loss, log_probs)[0].flatten().tolist() == pytest.approx([0, 1.5, -0.5, 0])
    means = {name: value.item() for name, value in result.metrics.means().items()}
    assert means["clip_ratio/high_mean"] == means["clip_ratio/low_mean"] == 0.25
    assert means["clip_ratio/region_mean"] == 0.5
    assert (means["clip_ratio/low_min"], means["clip_ratio/high_max"]) == (0, 1)


def test_garbage_in_padding_reaches_nothing():
    rows = make_rows()
    config = ObjectiveConfig(beta=0.1)
    clean = run(rows, config).loss
    dirty = {k: v for k, v in rows.items()}
    for name in ("old_log_probs", "reference_log_probs"):
        dirty[name] = rows[name].masked_fill(~rows["mask"], math.nan)
    result = run(dirty, config)
    assert result.loss == clean
    assert torch.autograd.grad(result.loss, rows["log_probs"])[0].isfinite().all()
    assert result.metrics.means()["kl"].isfinite()


def test_kl_and_entropy_are_token_means():
    rows = make_rows()
    entropy = torch.where(rows["mask"], 2.0, math.nan)
    result = objective(
        rows["log_probs"],
        mask=rows["mask"],
        weights=rows["mask"].double(),
        advantages=rows["advantages"],
        config=ObjectiveConfig(beta=1.0),
        reference_log_probs=rows["reference_log_probs"],
        entropy=entropy,
    )
    d = (rows["reference_log_probs"] - rows["log_probs"].detach())[rows["mask"]]
    torch.testing.assert_close(result.metrics.means()["kl"], (d.exp() - d - 1).mean())
    assert result.metrics.means()["entropy"] == 2


def test_truncated_completions_can_be_left_out():
    mask = torch.ones(2, 3, dtype=torch.bool)
    finished = torch.tensor([True, False])
    assert loss_mask(mask, finished, ObjectiveConfig()).equal(mask)
    masked = loss_mask(mask, finished, ObjectiveConfig(mask_truncated=True))
    assert masked.tolist() == [[True] * 3, [False] * 3]
    # Like TRL, the row still counts in the mean over rows.
    weights = token_weights(masked, "grpo", Normaliser.of(masked, 3))
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "`loss_type` must be one of"),
        ({"ratio_level": "word"}, "`ratio_level` must be one of"),
        ({"clip_epsilon": 1.2}, "`clip_epsilon` must be in"),
        ({"clip_epsilon_high": -0.1}, "`clip_epsilon_high` must not be negative"),
        ({"delta": 1.1}, "`delta` must lie above"),
        ({"beta": -1.0}, "`beta` must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**change)


def test_kl_without_a_reference_is_refused():
    rows = make_rows()
    with pytest.raises(ValueError, match="needs `reference_log_probs`"):
        objective(
            rows["log_probs"],
            mask=rows["mask"],
            weights=rows["mask"].double(),
            advantages=rows["advantages"],
            config=ObjectiveConfig(beta=0.1),
        )


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        ObjectiveMetrics.merge([])
