"""Judged completions: how all ranks ask rewards and judge together, and what is shown of the answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nspo_lightning.evaluation.thoughts import answer_of
from nspo_lightning.rewards import Judge, Outcome, RewardError, RewardResult, RewardSet
from nspo_lightning.rewards.agreement import raise_on_all_ranks
from nspo_lightning.rewards.outcomes import checked_outcomes
from nspo_lightning.rewards.rules.refusal import reads_harm
from nspo_lightning.rewards.trainer_state import TrainerState

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class JudgedRollout:
    """What this rank's policy said to a batch of prompts, and what was made of it: one entry a completion.

    Attributes:
        prompts: A group's prompt is repeated.
        completions: Completions as text.
        result: Their rewards, with the columns that rewards reported.
        outcomes: What the judge calls each; None where it excluded one.
        guided: Which were drawn under another prompt; empty = none was.
        prefixes: What was begun of each; empty = none is in this training.
    """

    prompts: list[Any]
    completions: list[str]
    result: RewardResult
    outcomes: list[Outcome | None]
    guided: list[bool] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[JudgedRollout]) -> JudgedRollout:
        """Put several together."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            completions=[text for part in parts for text in part.completions],
            result=RewardResult.joined([part.result for part in parts]),
            outcomes=[outcome for part in parts for outcome in part.outcomes],
            guided=[one for part in parts for one in part.guided],
            prefixes=[one for part in parts for one in part.prefixes],
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict a completion, for tables; a reward's column of one of our names becomes `reported/<name>`."""
        columns: dict[str, list[Any]] = {
            "prompt": self.prompts,
            **({"prefix": self.prefixes} if self.prefixes else {}),
            "completion": self.completions,
            "reward": self.result.total.tolist(),
            "outcome": self.outcomes,
            **({"guided": self.guided} if self.guided else {}),
        }
        for name, values in self.result.extra.items():
            if len(values) == len(self.prompts):
                columns[name if name not in columns else f"reported/{name}"] = values
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Scores completions and names what they are; all ranks ask together.

    Attributes:
        reward: Scores them.
        judge: Names them.
        reward_names_outcomes: True = outcomes that the reward was made from stand, and the judge is not asked again.
    """

    reward: RewardSet
    judge: Judge
    reward_names_outcomes: bool

    @property
    def reads_harm(self) -> bool:
        """Whether the judge tells harm from a harmless answer."""
        return reads_harm(self.judge)

    def score(
        self,
        prompts: Sequence[Any],
        texts: list[str],
        columns: Mapping[str, Any],
        token_ids: list[list[int]],
        state: TrainerState,
    ) -> tuple[RewardResult, list[Outcome | None]]:
        """Return the rewards of completions, and what each is.

        Args:
            prompts: One for each completion.
            texts: The completions.
            columns: Other columns of the data, a value for each completion.
            token_ids: The completions as tokens.
            state: Says where training is, to rewards that ask.

        Raises:
            RewardError: If a reward or the judge fails on any rank.
        """
        result = self.reward(prompts, texts, columns, completion_ids=token_ids, trainer_state=state)
        own = result if self.reward_names_outcomes else None
        return result, name_outcomes(own, self.judge, prompts, texts, columns)

    def name(self, prompts: Sequence[Any], texts: list[str], columns: Mapping[str, Any]) -> list[Outcome | None]:
        """Return what the judge calls each completion, without a reward; see `name_outcomes`."""
        return name_outcomes(None, self.judge, prompts, texts, columns)


def name_outcomes(
    result: RewardResult | None, judge: Judge, prompts: Sequence[Any], texts: list[str], columns: Mapping[str, Any]
) -> list[Outcome | None]:
    """Name completions; if the judge fails on one rank, all raise together (cross-rank synchronisation).

    Args:
        result: Rewards of these completions. The outcomes that they were made from stand, if there are any: a guard
            model need not judge everything twice.
        judge: Names them otherwise.
        prompts: One for each completion.
        texts: The completions; a thought is not shown to the judge.
        columns: Other columns of the data, a value for each completion.

    Returns:
        What each completion is; None = could not be judged.
    """
    if result is not None and result.outcomes is not None:
        return result.outcomes
    outcomes: list[Outcome | None] = []
    failed: RewardError | None = None
    try:
        outcomes = ask_judge(judge, prompts, texts, columns)
    except RewardError as error:
        failed = error
    raise_on_all_ranks(failed)
    return outcomes


def ask_judge(
    judge: Judge, prompts: Sequence[Any], texts: Sequence[str], columns: Mapping[str, Any]
) -> list[Outcome | None]:
    """Name this rank's completions, without their thoughts; the arguments are those of `name_outcomes`.

    Returns:
        What each is; None = could not be judged.

    Raises:
        RewardError: If the judge fails, or says what is no outcome; on this rank alone.
    """
    said = judge.classify(prompts, [answer_of(text) for text in texts], **columns)
    return checked_outcomes(said, len(texts), () if reads_harm(judge) else ("answered",))


def repeated(values: Iterable[_T], times: int) -> list[_T]:
    """Return each value so many times in a row: what belongs to a prompt, for each of its completions.

    Example:
        >>> repeated(["a", "b"], 2)
        ['a', 'a', 'b', 'b']
    """
    return [value for value in values for _ in range(times)]


def repeated_columns(batch: Mapping[str, Any], times: int) -> dict[str, list[Any]]:
    """Return the other columns of a batch of prompts, with a value for each completion; see `repeated`."""
    return {name: repeated(values, times) for name, values in batch.get("columns", {}).items()}
