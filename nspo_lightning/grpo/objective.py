r"""The GRPO objective and its relatives, as a weighted sum over tokens.

Every variant here has the form ``loss = sum_{r,t} w[r,t] * l[r,t]`` with

    l = -min(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A) + beta * kl

where rho is the ratio of new to old probability of a token (or, per sequence, its geometric mean: GSPO,
arXiv:2507.18071) and kl the k3 estimator exp(d) - d - 1, d = log pi_ref - log pi. The variants differ in w only:

- ``grpo`` (arXiv:2402.03300): 1 / (length of the row * number of rows), the mean of sequence means;
- ``dapo`` (arXiv:2503.14476) and ``bnpo``: 1 / number of tokens; for ``dapo`` the tokens of the whole step over all
  ranks and accumulated batches, for ``bnpo`` those of the local batch, such that several batches have the mean of their
  means: the caller says which in `Normaliser`;
- ``dr_grpo`` (arXiv:2503.20783): 1 / (number of rows * max_new_tokens), a constant.

Where another program drew the tokens, as a server does, their log-probabilities mu under it are not quite those of the
policy. Then the clipped term (not the KL) is weighted token by token with min(pi_old / mu, cap), a constant: truncated
importance sampling (https://fengyao.notion.site/off-policy-rl).

As the normaliser is known before the first forward pass, the sum may be cut into micro-batches anywhere and stays
exactly the same. Rows are completions: R of them, padded to length C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nspo_lightning.grpo.metrics import ObjectiveMetrics

LossType = Literal["grpo", "dapo", "bnpo", "dr_grpo"]
RatioLevel = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is optimised.

    Attributes:
        loss_type: How tokens are weighted, see the module's docstring.
        ratio_level: Probability ratio per token, or per sequence (GSPO).
        clip_epsilon: The ratio is clipped below 1 - clip_epsilon.
        clip_epsilon_high: The ratio is clipped above 1 + clip_epsilon_high; None = clip_epsilon.
        delta: Upper bound on the unclipped ratio too (two-sided clipping, arXiv:2505.07291); None = no bound.
        beta: Coefficient of the KL term to the reference; 0 = no reference needed.
        mask_truncated: Leave completions out that the length limit cut.
    """

    loss_type: LossType = "grpo"
    ratio_level: RatioLevel = "token"
    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        if self.loss_type not in get_args(LossType):
            raise ValueError(f"`loss_type` must be one of {get_args(LossType)}, got {self.loss_type!r}.")
        if self.ratio_level not in get_args(RatioLevel):
            raise ValueError(f"`ratio_level` must be one of {get_args(RatioLevel)}, got {self.ratio_level!r}.")
        if not 0 <= self.clip_epsilon <= 1:
            raise ValueError(f"`clip_epsilon` must be in [0, 1], got {self.clip_epsilon}.")
        if self.clip_epsilon_high is not None and self.clip_epsilon_high < 0:
            raise ValueError(f"`clip_epsilon_high` must not be negative, got {self.clip_epsilon_high}.")
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(
                f"`delta` must lie above 1 + clip_epsilon_high = {1 + self.epsilon_high}, got {self.delta}: below it "
                "the ordinary clip would never act. Raise `delta`, or leave it None."
            )
        if self.beta < 0:
            raise ValueError(f"`beta` must not be negative, got {self.beta}: it would reward leaving the reference.")

    @property
    def epsilon_high(self) -> float:
        """The upper clip range in force."""
        return self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Counts of the whole training step, known before its first micro-batch.

    Under DDP, which averages gradients over ranks, both counts are the all-reduced ones divided by the number of ranks
    (but for ``bnpo``, whose batch is the local one); likewise for several batches of one accumulation window.

    Attributes:
        num_rows: Completions in the step.
        num_tokens: Unmasked completion tokens in the step.
        max_new_tokens: The length limit of the sampler (``dr_grpo`` only).
    """

    num_rows: float
    num_tokens: float
    max_new_tokens: int

    @classmethod
    def of(cls, completion_mask: Tensor, max_new_tokens: int) -> Normaliser:
        """Count a mask of shape (R, C), that of the whole step."""
        return cls(
            num_rows=completion_mask.shape[0],
            num_tokens=float(completion_mask.sum()),
            max_new_tokens=max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and the counts behind its metrics.

    Attributes:
        loss: Scalar, the sum of weighted token losses of these rows.
        metrics: Sums that add up over micro-batches.
    """

    loss: Tensor
    metrics: ObjectiveMetrics


def loss_mask(completion_mask: Tensor, finished: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return which tokens are trained on, shape (R, C); `mask_truncated` drops rows that are not finished."""
    return completion_mask & finished[:, None] if config.mask_truncated else completion_mask


def token_weights(mask: Tensor, loss_type: LossType, normaliser: Normaliser) -> Tensor:
    """Weigh each token such that the loss is ``(per_token_loss * weights).sum()``.

    Args:
        mask: Shape (R, C), bool, True = token that is trained on; any subset of the step's rows.
        loss_type: See the module's docstring.
        normaliser: Counts of the whole step.

    Returns:
        Shape (R, C), float32, zero where the mask is False.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_weights(mask, "grpo", Normaliser.of(mask, max_new_tokens=4))
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    weights = mask.float()
    if loss_type == "grpo":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / max(normaliser.num_rows, 1)
    if loss_type == "dr_grpo":
        return weights / (max(normaliser.num_rows, 1) * normaliser.max_new_tokens)
    return weights / max(normaliser.num_tokens, 1)


def objective(
    log_probs: Tensor,
    *,
    mask: Tensor,
    weights: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    old_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    importance_cap: float | None = None,
    guided: Tensor | None = None,
) -> Objective:
    """Compute the loss of some rows.

    Args:
        log_probs: Shape (R, C), of the sampled tokens under the policy, with gradient.
        mask: Shape (R, C), bool, True = token that is trained on.
        weights: Shape (R, C), from `token_weights`.
        advantages: Shape (R,), or (R, C) for one a token.
        config: Settings of the loss.
        old_log_probs: Shape (R, C), under the policy that sampled. None = that policy is this one (on-policy step):
            the ratio is one and its gradient that of the log-probability, with no second forward pass.
        reference_log_probs: Shape (R, C), under the reference; needed exactly when ``config.beta > 0``.
        entropy: Shape (R, C), of the policy's next-token distribution, for the metrics only.
        sampling_log_probs: Shape (R, C), of the program that drew the tokens. None = this very policy drew them.
        importance_cap: Upper bound on the importance ratio; None = no bound.
        guided: Shape (R,), bool, True = `sampling_log_probs` are those under another prompt, for the metrics only.

    Returns:
        The loss and its metrics.

    Raises:
        ValueError: If `beta` is positive and there are no reference log-probabilities.
    """
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    # Padding may hold anything, NaN included: it must not reach a sum even with weight zero.
    log_ratio = torch.where(mask, log_probs - old, 0.0)
    if config.ratio_level == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_epsilon, 1 + config.epsilon_high)
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    token_loss = -torch.minimum(bounded * advantages, clipped * advantages)
    difference = importance = None
    if sampling_log_probs is not None:
        difference = torch.where(mask, old.detach() - sampling_log_probs, 0.0)
        importance = difference.exp().clamp(max=math.inf if importance_cap is None else importance_cap)
        token_loss = token_loss * importance
    kl = None
    if config.beta > 0:
        if reference_log_probs is None:
            raise ValueError(
                f"beta={config.beta} needs `reference_log_probs`, got None. Score the rollout with the adapter off, or "
                "set beta=0."
            )
        to_reference = torch.where(mask, reference_log_probs - log_probs, 0.0)
        kl = to_reference.exp() - to_reference - 1  # k3, http://joschu.net/blog/kl-approx.html
        token_loss = token_loss + config.beta * kl
    with torch.no_grad():
        metrics = ObjectiveMetrics.measure(
            low=(bounded < 1 - config.clip_epsilon) & (advantages < 0),
            high=(bounded > 1 + config.epsilon_high) & (advantages > 0),
            mask=mask,
            kl=kl,
            entropy=entropy,
            difference=difference,
            importance=importance,
            guided=guided,
            cap=importance_cap,
        )
    return Objective(loss=(token_loss * weights).sum(), metrics=metrics)
