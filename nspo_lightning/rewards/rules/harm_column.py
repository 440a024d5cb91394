"""Which prompts are harmful: one column, in the spellings that public sets use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nspo_lightning.rewards.protocol import RewardError

__all__ = ["harmful_rows", "picked_rows", "truth_value"]

_TRUE = frozenset({"true", "yes", "1", "harmful", "unsafe", "malicious", "toxic", "bad"})
_FALSE = frozenset({"false", "no", "0", "harmless", "unharmful", "benign", "general", "safe", "good"})


def truth_value(value: Any) -> bool | None:
    """Read a label in any of the spellings of public sets.

    Args:
        value: A bool, 0 or 1, or a word ("harmful", "unsafe", "benign", "safe", ...).

    Returns:
        True for harmful/unsafe, False for benign/safe, None for anything else.
    """
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def harmful_rows(column: str, columns: Mapping[str, Sequence[Any]], size: int) -> list[bool]:
    """Read which of a batch's prompts are harmful.

    Args:
        column: The column's name. A batch without it holds harmful prompts only.
        columns: The batch's columns.
        size: How many samples there are.

    Returns:
        One bool a sample.

    Raises:
        RewardError: If a value can't be read as yes or no.
    """
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
