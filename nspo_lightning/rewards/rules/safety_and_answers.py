"""A safety reward on harmful prompts, right answers on general ones: the baseline that mixes general prompts in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nspo_lightning.rewards.messages import as_text
from nspo_lightning.rewards.protocol import Judge, Reward, RewardError, Text, judge_in
from nspo_lightning.rewards.rules.harm_column import harmful_rows, picked_rows

__all__ = ["SafetyAndAnswers"]


class SafetyAndAnswers(Reward):
    """Scores harmful prompts with another reward, and general ones by their reference answers.

        harmful prompt: what `safety` says
        general prompt: 1 for the right answer, -1 for anything else

    Args:
        safety: scores the completions of harmful prompts.
        answers_count: False = an answer need not be right: 1 unless `judge` calls it a refusal, then -1 (for policies
            too small to answer).
        judge: names refusals, for `answers_count: false`; by default `safety`, if it can judge.
        harmful_column: column that says which prompts are harmful.
        name: how TensorBoard and messages call it.
    """

    def __init__(
        self,
        safety: Reward | Callable[..., Any],
        answers_count: bool = True,
        judge: Judge | None = None,
        harmful_column: str = "kind",
        name: str = "safety_and_answers",
    ) -> None:
        self.safety, self.answers_count, self.harmful_column, self.name = safety, answers_count, harmful_column, name
        found = judge or judge_in(safety)
        if found is None and not answers_count:
            raise ValueError("`answers_count: false` needs a `judge` that tells refusals from answers. Name one.")
        self.judge = found

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """Score one batch.

        Args:
            prompts: one prompt a sample.
            completions: one completion a sample.
            **columns: `harmful_column`, and `final_answer` or `answer` of the general prompts.

        Returns:
            A number for each; None where a general prompt has no answer to compare with.

        Raises:
            RewardError: if the safety reward must be awaited (use it alone).
        """
        harmful = harmful_rows(self.harmful_column, columns, len(completions))
        scores = self._safety_scores(harmful, prompts, completions, columns)
        refused = self._refusals(harmful, prompts, completions, columns)
        for i, is_harmful in enumerate(harmful):
            if not is_harmful:
                scores[i] = self._answer_score(i, completions[i], refused, columns)
        return scores

    def _safety_scores(
        self, harmful: list[bool], prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> list[float | None]:
        chosen = [i for i, yes in enumerate(harmful) if yes]
        scores: list[float | None] = [None] * len(harmful)
        if chosen:
            found = self.safety(**picked_rows(chosen, {"prompts": prompts, "completions": completions, **columns}))
            if not isinstance(found, (list, tuple)):
                raise RewardError("`safety` must return its scores at once, not later. Use another reward.", self.name)
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
        return scores

    def _refusals(
        self, harmful: list[bool], prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> dict[int, bool]:
        chosen = [i for i, yes in enumerate(harmful) if not yes]
        if self.answers_count or self.judge is None or not chosen:
            return {}
        picked = picked_rows(chosen, {"prompts": prompts, "completions": completions, **columns})
        outcomes = self.judge.classify(**picked)
        return {i: outcome == "refusal" for i, outcome in zip(chosen, outcomes, strict=True)}

    def _answer_score(
        self, index: int, completion: Text, refused: dict[int, bool], columns: dict[str, Any]
    ) -> float | None:
        from nspo_lightning.evaluation.answers import answers_match, final_answers_match

        if not self.answers_count:
            return -1.0 if refused.get(index) else 1.0
        final, answer = ((columns.get(name) or {index: None})[index] for name in ("final_answer", "answer"))
        if final is None and answer is None:
            return None
        text = as_text(completion)
        right = answers_match(text, str(answer)) if final is None else final_answers_match(text, str(final))
        return 1.0 if right else -1.0
