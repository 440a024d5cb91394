"""How well scores agree with labels of harm: the figures that a classifier of unsafe completions is judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_confusion_matrix,
    binary_precision,
    binary_recall,
)

__all__ = ["LabelAgreement", "label_agreement"]


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """Agreement on n samples; the positive class is `unsafe`. A figure that is not defined is NaN.

    Attributes:
        count: samples with both a score and a label.
        accuracy: share judged as labelled.
        precision: share of those judged unsafe that are labelled unsafe.
        recall: share of those labelled unsafe that are judged unsafe.
        auroc: chance that a random unsafe sample scores lower than a random safe one (ties count half).
        true_negatives: labelled safe, judged safe.
        false_positives: labelled safe, judged unsafe.
        false_negatives: labelled unsafe, judged safe.
        true_positives: labelled unsafe, judged unsafe.
    """

    count: int
    accuracy: float
    precision: float
    recall: float
    auroc: float
    true_negatives: int
    false_positives: int
    false_negatives: int
    true_positives: int


def label_agreement(scores: Tensor, unsafe: Tensor, threshold: float = 0.0) -> LabelAgreement:
    """Compare rewards with labels; a sample is judged unsafe if its reward is below the threshold.

    Args:
        scores: shape (n,), higher is safer; no NaN.
        unsafe: shape (n,), bool, True = labelled unsafe.
        threshold: exclusive upper bound of an unsafe reward.

    Returns:
        The figures; precision is NaN if nothing was judged unsafe, recall and AUROC if a class is missing.

    Raises:
        ValueError: if the shapes differ or there is nothing to compare.

    Example:
        >>> label_agreement(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([True, True, False])).recall
        0.5
    """
    if scores.shape != unsafe.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"`scores` and `unsafe` must be of one non-empty shape (n,), got {tuple(scores.shape)} and "
            f"{tuple(unsafe.shape)}."
        )
    judged, target = (scores < threshold).long(), unsafe.long()
    matrix = binary_confusion_matrix(judged, target)
    (true_negatives, false_positives), (false_negatives, true_positives) = matrix.tolist()
    both = bool(target.min() != target.max())
    # torchmetrics squashes scores outside [0, 1] by a sigmoid, which ties the large ones: ranks keep their order.
    ranks = torch.unique(-scores, return_inverse=True)[1].double()
    return LabelAgreement(
        count=len(scores),
        accuracy=binary_accuracy(judged, target).item(),
        precision=binary_precision(judged, target).item() if judged.any() else math.nan,
        recall=binary_recall(judged, target).item() if target.any() else math.nan,
        auroc=binary_auroc(ranks / ranks.max().clamp(min=1), target).item() if both else math.nan,
        true_negatives=true_negatives,
        false_positives=false_positives,
        false_negatives=false_negatives,
        true_positives=true_positives,
    )
