"""One reward of a set in the form that the set works with: which arguments it is called with, what it may return.

Arguments follow TRL's rules, minus the need for `**kwargs`. What a reward returns is checked before it can become a
gradient.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nspo_lightning.rewards.function import FunctionReward, is_async, reward_name, takes_messages
from nspo_lightning.rewards.messages import as_plain_text
from nspo_lightning.rewards.outcomes import JudgedReward, checked_outcomes
from nspo_lightning.rewards.protocol import (
    Judge,
    Judged,
    NonFiniteRewardError,
    Outcome,
    RewardError,
    judge_in,
    metrics_of,
    prepare,
)
from nspo_lightning.terminal import counted

_LARGEST = 1e30  # float32 holds little more, and weighted sums and deviations must fit too

_NOT_GIVEN = {
    "trainer_state": "which says where training is, and nothing is trained now.",
    "completion_ids": "and a file of texts has no token ids.",
    "environments": "which TRL gives to agents alone (`environment_factory`): there are no tools or environments here.",
}
"""TRL's arguments that are not always there, and why."""


class RewardPart:
    """A reward of any form a user may give: a function, sync or async, or an object, ours or of theirs.

    `name` is what TensorBoard and messages call it; by default its own name.
    """

    def __init__(self, reward: Callable[..., Any], name: str | None = None) -> None:
        self.reward = reward
        self.name = reward_name(reward) if name is None else name
        self.is_async = is_async(reward)
        self.messages = takes_messages(reward)
        # A class that a YAML names by its path alone can do what it could if it were named by `class_path`.
        self._inner = reward.function if isinstance(reward, FunctionReward) and not reward.kwargs else reward
        self.judge: Judge | None = judge_in(self._inner)

    def prepare(self) -> None:
        """Prepare the reward and the judge in it."""
        for thing in {id(thing): thing for thing in (self._inner, self.judge)}.values():
            prepare(thing)

    def metrics(self) -> dict[str, float]:
        """Return the reward's counters as `judge/<name>/<counter>`."""
        return {f"judge/{self.name}/{key}": float(value) for key, value in metrics_of(self._inner).items()}

    def bound(self, arguments: Mapping[str, Any]) -> Callable[[], Any]:
        """Return the reward's call with the arguments that it can take: with `**kwargs` all, else those it names.

        Prompts and completions are text, unless the reward takes messages.
        """
        accepted = self._accepted(arguments if self.messages else as_plain_text(arguments))
        # A class of the user's own may build on one of ours by a `__call__` of its own, which must then be called.
        if isinstance(self._inner, JudgedReward) and type(self._inner).__call__ is JudgedReward.__call__:
            judged = self._inner.judged
            return lambda: judged(**accepted)
        return lambda: self.reward(**accepted)

    def checked(self, returned: Any, batch_size: int) -> tuple[Tensor, list[Outcome | None] | None]:
        """Turn what the reward returned into a tensor, or say what is wrong with it.

        Args:
            returned: A list, tuple, array or 1-dim tensor of numbers and None, or such scores with their outcomes.
            batch_size: B, how many numbers there must be.

        Returns:
            Scores of shape (B,), float32 on the CPU, NaN where the reward gave None; and the outcomes that they were
            made from, if it handed any out.

        Raises:
            RewardError: If it is no sequence, has the wrong length, or holds anything but finite numbers and None.
        """
        scores, outcomes = (returned.scores, returned.outcomes) if isinstance(returned, Judged) else (returned, None)
        if isinstance(scores, Tensor):
            scores = scores.detach().cpu()
        if isinstance(scores, (str, bytes, dict)) or not isinstance(scores, Iterable):
            raise RewardError(
                f"Reward '{self.name}' must return a list of {counted(batch_size, 'number')} or None (one a "
                f"completion), got {_shown(scores)} of type {type(scores).__name__}. Return `[score, ...]` from it.",
                self.name,
            )
        values = scores.tolist() if isinstance(scores, _Array) else list(scores)
        if not isinstance(values, list):  # a 0-dim tensor or array
            values = [values]
        if len(values) != batch_size:
            raise RewardError(
                f"Reward '{self.name}' must return {counted(batch_size, 'number')}, one a completion in their "
                f"order, got {len(values)}. Return None for a completion that it can't score instead of leaving it "
                "out.",
                self.name,
            )
        numbers_ = [self._number(i, value) for i, value in enumerate(values)]
        checked = None if outcomes is None else checked_outcomes(outcomes, batch_size)
        return torch.tensor(numbers_, dtype=torch.float32), checked

    def _accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            parameters = inspect.signature(self.reward).parameters.values()
        except (TypeError, ValueError):  # builtins without a signature
            return dict(arguments)
        takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
        named = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        accepted = {key: value for key, value in arguments.items() if takes_all or key in named}
        for parameter in parameters:
            if parameter.kind is Parameter.POSITIONAL_ONLY:
                raise RewardError(
                    f"Reward '{self.name}' must take its arguments by keyword, as TRL passes them, but "
                    f"'{parameter.name}' is positional only. Remove the `/` from its signature.",
                    self.name,
                )
            if parameter.name in named and parameter.default is Parameter.empty and parameter.name not in accepted:
                raise RewardError(
                    f"Reward '{self.name}' needs the argument '{parameter.name}', "
                    + self._why_not(parameter.name, arguments),
                    self.name,
                )
        return accepted

    @staticmethod
    def _why_not(name: str, arguments: Mapping[str, Any]) -> str:
        if name in _NOT_GIVEN:
            return f"{_NOT_GIVEN[name]} Give it a default (`{name}=None`)."
        return (
            f"but the batch has only {', '.join(sorted(arguments))}. Add the column to the data, or give the argument "
            "a default."
        )

    def _number(self, index: int, value: Any) -> float:
        if value is None:
            return math.nan
        if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.nbytes == value.itemsize:
            value = value.item()  # the one number of a tensor, an array, a NumPy scalar (np.bool_ is no Python number)
        if not isinstance(value, (numbers.Real, bool)):
            raise RewardError(
                f"Reward '{self.name}' must return numbers or None, but sample {index} got {_shown(value)} of type "
                f"{type(value).__name__}. Convert it with float().",
                self.name,
            )
        number = float(value)
        if not math.isfinite(number) or abs(number) > _LARGEST:
            raise NonFiniteRewardError(
                f"Reward '{self.name}' returned {number} for sample {index}; a reward must be finite, since one such "
                f"value spoils its whole group's update. Return None to exclude the sample, or mend the arithmetic "
                f"(division by zero, log of zero, overflow).",
                self.name,
            )
        return number


@runtime_checkable
class _Array(Protocol):
    """A tensor, array or series."""

    def tolist(self) -> Any: ...


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
