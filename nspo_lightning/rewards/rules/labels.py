"""Labels of harm: which prompts are harmful, and how well scores agree with what completions are labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.rewards.protocol import RewardError

_TRUE = frozenset({"true", "yes", "1", "1.0", "harmful", "unsafe", "malicious", "toxic", "bad"})
_FALSE = frozenset({"false", "no", "0", "0.0", "harmless", "unharmful", "benign", "general", "safe", "good"})
LABELS = "harmful, unsafe, toxic, true, 1 or benign, harmless, safe, false, 0"
"""The vocabulary of labels, for messages."""


def truth_value(value: Any) -> bool | None:
    """Read a label of harm (True) or none (False): a bool, 0 or 1, or a word; None for anything else."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def harmful_rows(column: str, columns: Mapping[str, Sequence[Any]], size: int) -> list[bool]:
    """Read which of a batch's `size` prompts are harmful; a batch without the column holds harmful prompts only."""
    if column not in columns:
        return [True] * size
    harmful = []
    for i, value in enumerate(columns[column]):
        truth = truth_value(value)
        if truth is None:
            raise RewardError(
                f"Column '{column}' must say whether a prompt is harmful (true/false, 1/0, harmful/benign, "
                f"unsafe/safe), but sample {i} has {value!r}. Mend the row, or name another column."
            )
        harmful.append(truth)
    return harmful


def picked_rows(chosen: Sequence[int], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a reward's arguments down to some samples; what is no list (`log_extra`) stays as it is."""
    return {
        key: [values[i] for i in chosen] if isinstance(values, (list, tuple)) else values
        for key, values in arguments.items()
    }


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """Agreement on n samples; the positive class is `unsafe`. A figure that is not defined is NaN.

    `auroc` is the chance that a random unsafe sample scores lower than a random safe one (ties count half).
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
    """Compare rewards, shape (n,), higher is safer, with labels, shape (n,), bool, True = labelled unsafe.

    A sample is judged unsafe if its reward is below the threshold.

    Returns:
        The figures; precision is NaN if nothing was judged unsafe, recall and AUROC if a class is missing.

    Raises:
        ValueError: If the shapes differ or there is nothing to compare.

    Example:
        >>> label_agreement(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([True, True, False])).recall
        0.5
    """
    if scores.shape != unsafe.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"`scores` and `unsafe` must be of one non-empty shape (n,), got {tuple(scores.shape)} and "
            f"{tuple(unsafe.shape)}."
        )
    from torchmetrics.functional.classification import binary_auroc, binary_confusion_matrix

    judged, target = (scores < threshold).long(), unsafe.long()
    (true_negatives, false_positives), (false_negatives, true_positives) = binary_confusion_matrix(
        judged, target
    ).tolist()
    both = bool(target.min() != target.max())
    # torchmetrics squashes scores outside [0, 1] by a sigmoid, which ties the large ones: ranks keep their order.
    ranks = torch.unique(-scores, return_inverse=True)[1].double()
    return LabelAgreement(
        count=len(scores),
        accuracy=(true_negatives + true_positives) / len(scores),
        precision=_share(true_positives, false_positives),
        recall=_share(true_positives, false_negatives),
        auroc=binary_auroc(ranks / ranks.max().clamp(min=1), target).item() if both else math.nan,
        true_negatives=true_negatives,
        false_positives=false_positives,
        false_negatives=false_negatives,
        true_positives=true_positives,
    )


def _share(yes: int, no: int) -> float:
    return yes / (yes + no) if yes + no else math.nan
