"""Several rewards as one: called side by side, checked, weighted and summed as TRL does it.

`total[b] = sum_k weight[k] * score_k[b]` over the rewards that scored sample b; a sample that none scored is NaN, which
the advantages leave out. B is the number of completions.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.rewards.agreement import raise_on_all_ranks
from nspo_lightning.rewards.function import as_reward
from nspo_lightning.rewards.messages import match_format
from nspo_lightning.rewards.part import RewardPart
from nspo_lightning.rewards.protocol import Judge, Outcome, Reward, RewardError, Text
from nspo_lightning.rewards.runner import DeadlineError, RewardRunner
from nspo_lightning.rewards.trainer_state import TrainerState
from nspo_lightning.terminal import counted

_RESERVED = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})
"""Columns that the arguments proper replace, as in TRL."""

_CALLERS = (
    *(str(Path(__file__).with_name(name)) for name in ("compose.py", "function.py", "part.py", "runner.py")),
    *(os.path.dirname(inspect.getfile(library)) for library in (asyncio, concurrent.futures)),
)
"""Files that call rewards: no news in a traceback."""
_FRAMES = 5

_Checked = tuple[Tensor, list[Outcome | None] | None]
"""One reward's scores, and the outcomes that they were made from, if it handed any out."""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The rewards of one batch of B completions.

    Attributes:
        total: Shape (B,), float32, CPU: the weighted sum; NaN for an excluded sample.
        per_reward: Name to shape (B,), unweighted; NaN where that reward gave None.
        metrics: Scalars that the rewards reported, by TensorBoard name (`judge/<name>/errors`, ...).
        extra: Columns that the rewards reported with TRL's `log_extra`, by name.
        outcomes: What a judge called each completion, from the first reward of the set that is made from outcomes;
            None if no reward is. None inside it stands for a completion that the judge excluded.
    """

    total: Tensor
    per_reward: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    outcomes: list[Outcome | None] | None = None

    @classmethod
    def joined(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """Put the results of several batches together, which the same rewards scored; reported scalars are averaged."""
        # A part may lack some: of scalars that rewards reported, the mean of those that did.
        reported = sorted({name for part in parts for name in part.metrics})
        outcomes = [part.outcomes for part in parts if part.outcomes is not None]
        extra = [name for name in parts[0].extra if all(name in part.extra for part in parts)]
        return cls(
            total=torch.cat([part.total for part in parts]),
            per_reward={name: torch.cat([part.per_reward[name] for part in parts]) for name in parts[0].per_reward},
            metrics={name: _mean(part.metrics[name] for part in parts if name in part.metrics) for name in reported},
            extra={name: [value for part in parts for value in part.extra[name]] for name in extra},
            outcomes=[one for part in outcomes for one in part] if len(outcomes) == len(parts) else None,
        )

    @property
    def excluded(self) -> Tensor:
        """Samples that no reward scored: shape (B,), bool."""
        return self.total.isnan()

    def statistics(self) -> dict[str, float]:
        """Return `rewards/<name>/mean` and `rewards/<name>/std` (Bessel-corrected) of each reward's scored samples.

        The mean is NaN if it scored none, std 0 if it scored one.
        """
        values: dict[str, float] = {}
        for name, scores in self.per_reward.items():
            scored = scores[~scores.isnan()]
            values[f"rewards/{name}/mean"] = scored.mean().item() if len(scored) else math.nan
            values[f"rewards/{name}/std"] = scored.std().item() if len(scored) > 1 else 0.0
        return values


class RewardSet:
    """Rewards by weight. Under `torch.distributed` all ranks raise together when one fails.

    Args:
        rewards: Callables of TRL's protocol, sync or async, or dotted paths of such; a dict gives their names.
        weights: One for each reward; all 1 by default.
        names: One for each reward (for TensorBoard and messages); from the callables by default.
        timeout_s: The longest that one reward may take for a batch. It must be shorter than the process group's own
            timeout. None runs sync rewards on the caller's thread without a limit, which is for those that need the
            main thread (`signal`).
    """

    def __init__(
        self,
        rewards: list[Reward | Callable[..., Any]] | dict[str, Reward | Callable[..., Any]],
        weights: list[float] | None = None,
        names: list[str] | None = None,
        timeout_s: float | None = 300.0,
    ) -> None:
        if isinstance(rewards, Mapping):
            if names is not None:
                raise ValueError("`names` and a dict of rewards both name them. Give one of the two.")
            names, rewards = list(rewards), list(rewards.values())
        if not rewards:
            raise ValueError("`rewards` must hold at least one reward, got none. Name one, such as RefusalReward.")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"`timeout_s` must be positive or null, got {timeout_s}.")
        self.rewards: list[Callable[..., Any]] = [as_reward(reward) for reward in rewards]
        if names is not None and len(names) != len(rewards):
            raise ValueError(f"`names` must have one name for each of the {len(rewards)} rewards, got {len(names)}.")
        given: Sequence[str | None] = [None] * len(rewards) if names is None else names
        self._parts = [RewardPart(reward, name) for reward, name in zip(self.rewards, given, strict=True)]
        self.names = [part.name for part in self._parts]
        _check_unique(self.names)
        self.weights = _checked_weights(weights, len(self.rewards))
        self.timeout_s = timeout_s
        self._runner = RewardRunner()

    @property
    def judge(self) -> Judge | None:
        """The first judge in the set: a reward that can judge, or the judge whose outcomes a reward is made from."""
        return next((part.judge for part in self._parts if part.judge is not None), None)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: TrainerState | None = None,
    ) -> RewardResult:
        """Return the weighted sum and each reward's scores; under `torch.distributed` all ranks must call it.

        Args:
            prompts: B prompts, one a completion (a group's prompt is repeated).
            completions: B completions; where the prompt is a chat, a string becomes an assistant message.
            columns: The rows' other columns, B values each.
            completion_ids: Token ids of each completion, for rewards that take them.
            trainer_state: Where training is, for rewards that take it; None where nothing is trained.

        Raises:
            RewardError: On all ranks, if a reward raised, hung, or returned anything but B finite numbers or None.
        """
        report = _Report()
        error: RewardError | None = None
        checked: list[_Checked] = []
        try:
            arguments = _arguments(prompts, completions, columns or {}, completion_ids, trainer_state)
            arguments |= {"log_extra": report.log_extra, "log_metric": report.log_metric}
            checked = self._checked(arguments, len(completions))
        except RewardError as failed:
            error = failed
        raise_on_all_ranks(error)
        scores = [found for found, _ in checked]
        stacked = torch.stack(scores)
        total = (stacked * torch.tensor(self.weights)[:, None]).nansum(0)
        total[stacked.isnan().all(0)] = math.nan
        return RewardResult(
            total=total,
            per_reward=dict(zip(self.names, scores, strict=True)),
            metrics=report.metrics() | self.metrics(),
            extra=report.extra,
            outcomes=next((outcomes for _, outcomes in checked if outcomes is not None), None),
        )

    def metrics(self) -> dict[str, float]:
        """Return the counters of rewards that keep some (server judges), as `judge/<name>/<counter>`."""
        return {key: value for part in self._parts for key, value in part.metrics().items()}

    def prepare(self) -> None:
        """Load models and check settings now, so that what is wrong with them ends a run before it trains."""
        for part in self._parts:
            part.prepare()

    def close(self) -> None:
        """End the threads. Calling the set again starts them anew."""
        self._runner.close()

    def _checked(self, arguments: dict[str, Any], batch_size: int) -> list[_Checked]:
        calls = [part.bound(arguments) for part in self._parts]
        found: dict[int, _Checked] = {}
        pending: dict[int, Future[Any]] = {}
        try:
            # Async ones first: they wait while the others work.
            for i, part in sorted(enumerate(self._parts), key=lambda numbered: not numbered[1].is_async):
                with _explained(part.name, batch_size, self.timeout_s):
                    returned = calls[i]() if part.is_async else self._runner.call(calls[i], self.timeout_s)
                    if inspect.isawaitable(returned):
                        pending[i] = self._runner.submit(returned, self.timeout_s)
                if i not in pending:
                    found[i] = part.checked(returned, batch_size)
            for i, future in pending.items():
                with _explained(self.names[i], batch_size, self.timeout_s):
                    returned = self._runner.collect(future, self.timeout_s)
                found[i] = self._parts[i].checked(returned, batch_size)
        finally:
            for future in pending.values():
                future.cancel()  # no effect on finished ones
        return [found[i] for i in range(len(calls))]


class _Report:
    """What rewards report by TRL's `log_extra` and `log_metric` during one call."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: list[Any]) -> None:
        self.extra[column] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(float(value))

    def metrics(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}


@contextlib.contextmanager
def _explained(name: str, batch_size: int, timeout_s: float | None) -> Iterator[None]:
    """Turn what a reward raises into a RewardError that names the reward; a signal is none of its doing."""
    try:
        yield
    except RewardError:
        raise
    except DeadlineError as error:
        raise RewardError(
            f"Reward '{name}' took longer than `timeout_s` = {timeout_s:g} s for "
            f"{counted(batch_size, 'completion')} and was given up. Raise `timeout_s`, or look for an endless loop, "
            "a dead server or a lock in it.",
            name,
        ) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise  # a signal came meanwhile (Lightning's SIGTERMException): the reward did not ask for the end
        raise RewardError(
            f"Reward '{name}' raised {type(error).__name__} on a batch of {counted(batch_size, 'completion')}: "
            f"{error}. Mend the reward, or have it return None for samples that it can't "
            f"score.{_hint(error)}{_where(error)}",
            name,
        ) from error


def _hint(error: BaseException) -> str:
    """Say what a function that was written for messages needs."""
    if not isinstance(error, TypeError) or "string ind" not in str(error):
        return ""
    return (
        " Prompts and completions come as text; a function that reads chat messages, as TRL's do where prompts are "
        "chats, says so by `messages: true` of FunctionReward, or by an attribute `messages = True`."
    )


def _where(error: BaseException) -> str:
    """Say where an error was raised: the last frames, without those that call rewards."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_CALLERS)]
    return f"\nIt was raised here:\n{''.join(traceback.format_list(frames[-_FRAMES:]))}".rstrip() if frames else ""


def _arguments(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None,
    trainer_state: TrainerState | None,
) -> dict[str, Any]:
    size = len(completions)
    arguments: dict[str, Any] = {"prompts": list(prompts)}
    arguments |= {key: list(values) for key, values in columns.items() if key not in _RESERVED}
    if completion_ids is not None:
        arguments["completion_ids"] = [list(ids) for ids in completion_ids]
    for key, values in arguments.items():
        if len(values) != size:
            raise RewardError(
                f"Every column must have one value a completion: '{key}' has {len(values)} for "
                f"{counted(size, 'completion')}. Repeat each prompt's columns group_size times."
            )
    arguments["completions"] = [match_format(p, c) for p, c in zip(arguments["prompts"], completions, strict=True)]
    if trainer_state is not None:
        arguments["trainer_state"] = trainer_state
    return arguments


def _check_unique(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Rewards need different names, since each has its own curves; got {', '.join(twice)} more than once. "
            f"Give `names`, or a dict of name to reward."
        )


def _checked_weights(weights: list[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(f"`weights` must have one number for each of the {count} rewards, got {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be finite numbers, got {weights}.")
    return [float(weight) for weight in weights]
