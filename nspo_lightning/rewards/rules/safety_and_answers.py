"""A safety reward on harmful prompts, right answers on general ones: the baseline that mixes general prompts in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nspo_lightning.evaluation.answers import is_right
from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.rewards.function import takes_messages
from nspo_lightning.rewards.messages import as_plain_text, as_text, without_thought
from nspo_lightning.rewards.protocol import Judge, Reward, RewardError, Text, judge_in
from nspo_lightning.rewards.rules.labels import harmful_rows, picked_rows


class SafetyAndAnswers(Reward):
    """Scores harmful prompts with another reward, and general ones by their reference answers.

        harmful prompt: what `safety` says
        general prompt: 1 for the right answer, -1 for anything else

    A general prompt without a reference answer, or with free text as one (see `is_right`), is not scored, nor is a
    thought that does not end; `answers/unscored` is the share of those among general prompts.

    Args:
        safety: Scores the completions of harmful prompts.
        answers_count: False = an answer need not be right: 1 unless `judge` calls it a refusal, then -1 (for policies
            too small to answer).
        judge: Names refusals, for `answers_count: false`; by default `safety`, if it can judge.
        harmful_column: Column that says which prompts are harmful.
        name: What TensorBoard and messages call it.
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
        self.judge = judge or judge_in(safety)
        if self.judge is None and not answers_count:
            raise ValueError("`answers_count: false` needs a `judge` that tells refusals from answers. Name one.")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """Score one batch; None where a general prompt has no answer that can be compared, or a thought was cut."""
        kinds = harmful_rows(self.harmful_column, columns, len(completions))
        harmful = [i for i, is_harmful in enumerate(kinds) if is_harmful]
        general = [i for i, is_harmful in enumerate(kinds) if not is_harmful]
        scores: list[float | None] = [None] * len(kinds)
        if harmful:
            chosen = picked_rows(harmful, {**columns, "prompts": prompts, "completions": completions})
            found = self.safety(**(chosen if takes_messages(self.safety) else as_plain_text(chosen)))
            if not isinstance(found, (list, tuple)):
                raise RewardError("`safety` must return its scores at once, not later. Use another reward.", self.name)
            for i, score in zip(harmful, found, strict=True):
                scores[i] = score
        if self.answers_count:
            for i in general:
                scores[i] = _answer_score(i, completions[i], columns)
            if general and callable(log_metric := columns.get("log_metric")):
                log_metric("answers/unscored", sum(scores[i] is None for i in general) / len(general))
        elif self.judge is not None and (
            finished := [i for i in general if not is_unfinished(as_text(completions[i]))]
        ):
            answers = [without_thought(completion) for completion in completions]
            said = self.judge.classify(*_texts(finished, prompts, answers), **picked_rows(finished, columns))
            for i, outcome in zip(finished, said, strict=True):
                scores[i] = -1.0 if outcome == "refusal" else 1.0
        return scores


def _answer_score(index: int, completion: Text, columns: Mapping[str, Any]) -> float | None:
    final, answer = ((columns.get(name) or {index: None})[index] for name in ("final_answer", "answer"))
    right = is_right(as_text(completion), answer, final)
    return None if right is None else 1.0 if right else -1.0


def _texts(chosen: Sequence[int], *texts: Sequence[Text]) -> list[list[Text]]:
    return [[values[i] for i in chosen] for values in texts]
