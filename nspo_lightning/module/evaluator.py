"""Validation, test and prediction: how prompts are answered there, and what is counted of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from nspo_lightning.attacks import ATTACK, LOOKALIKES
from nspo_lightning.evaluation.attacked import AttackedAnswers
from nspo_lightning.evaluation.loaders import HARMFUL
from nspo_lightning.evaluation.rates import TRUNCATED, Answers, Rate, RateTable, Seen, general_outcomes, safety_outcomes
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.judging import Judging, repeated, repeated_columns
from nspo_lightning.module.prefixes import Begun, Prefixes
from nspo_lightning.module.scorer import answers_as_text
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.identity import describe
from nspo_lightning.rewards.trainer_state import TrainerState
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.places import Places, places_among_ranks
from nspo_lightning.rollout.room import RolloutMemoryError

EVALUATION_SEED = 20_251_211


@dataclass(kw_only=True)
class Evaluator:
    """Answers prompts and counts; all ranks do it together.

    The noise depends on the place of a prompt alone, whatever the number of ranks that share a batch.

    Attributes:
        policy: Answers.
        judging: Names the answers, and scores them in `predict`.
        harmful: How harmful prompts are answered.
        general: How general prompts are answered.
        over_refusal_skills: General skills whose refusals count as over-refusal; empty = all.
        prefixes: Begins answers, for attacks that do.
        rates: What was counted since the epoch began.
        told_of_thoughts: Whether the warning of `tell_of_thoughts` was given.
    """

    policy: TextPolicy
    judging: Judging
    harmful: SamplingConfig
    general: SamplingConfig
    over_refusal_skills: Sequence[str]
    prefixes: Prefixes
    rates: RateTable = field(default_factory=RateTable)
    told_of_thoughts: bool = False

    def answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers:
        """Answer a batch of prompts, and judge the answers.

        Args:
            batch: See `TextPolicy.generate`; with `prompt` and maybe `columns`.
            dataloader_idx: What the prompts are, see `evaluation.loaders`.
            batch_idx: The batch's number.

        Returns:
            Completions, what the judge calls them, and what is counted.
        """
        if ATTACK in batch:
            return self._attacked(batch, batch_idx).worst()
        columns = batch.get("columns", {})
        _, texts = self._complete(batch, dataloader_idx, batch_idx)
        outcomes = self.judging.name(batch["prompt"], texts, columns)
        if dataloader_idx == HARMFUL:
            known = self.judging.reads_harm
            seen = safety_outcomes(outcomes, reads_harm=known)
            return Answers(completions=texts, outcomes=outcomes, observations=seen, reads_harm=known)
        refused = [outcome == "refusal" for outcome in outcomes]
        observations = general_outcomes(texts, refused, columns, self.over_refusal_skills)
        return Answers(completions=texts, outcomes=outcomes, observations=observations)

    def base_answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers | None:
        """Answer as the base does, the policy with its adapter off, with the same noise; None without an adapter."""
        if not has_adapter(self.policy.require()):
            return None
        with adapters_off(self.policy.require()):
            return self.answer(batch, dataloader_idx, batch_idx)

    def base_text(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Return harmful prompts with the base's answers, as text whose answers are to be scored (see `score_text`).

        They are drawn from the base's own distribution, whatever temperature validation answers at, with the same noise
        each time: the mean of a KL to the base is over what the base says. None without an adapter.
        """
        if not has_adapter(self.policy.require()):
            return None
        own = replace(self.harmful, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
        with adapters_off(self.policy.require()):
            rollout, _ = self._drawn(batch, own, batch_idx)
        return answers_as_text(rollout)

    def count(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers:
        """Answer a batch and count the answers among `rates`."""
        answers = self.answer(batch, dataloader_idx, batch_idx)
        self.rates.update(answers.observations, self.policy.device)
        return answers

    def measure(
        self, dataloaders: Sequence[Iterable[Any]], to_device: Callable[[Any], Any], seen: Seen | None = None
    ) -> dict[str, Rate]:
        """Answer all batches outside of an epoch, harmful prompts and then general ones; return rates over ranks."""
        table = RateTable()
        for index, loader in enumerate(dataloaders):
            for batch_idx, batch in enumerate(loader):
                answers = self.answer(to_device(batch), index, batch_idx)
                table.update(answers.observations, self.policy.device)
                if seen is not None:
                    seen(batch, index, answers)
        return self.finished(table)

    def finished(self, table: RateTable) -> dict[str, Rate]:
        """Return the rates of a table, over ranks, and empty it."""
        found = table.compute_counts(self.policy.device)
        self.tell_of_thoughts(found[TRUNCATED].value if TRUNCATED in found else 0.0, 1)
        return found

    def tell_of_thoughts(self, cut: float, of: int) -> None:
        """Warn once if most answers to general prompts are thoughts (reasoning before the answer) that were cut.

        Args:
            cut: How many of them are, or the mean share of several batches.
            of: Of how many; 1 for a share.
        """
        share = cut / max(of, 1)
        if share <= 0.5 or self.told_of_thoughts:
            return
        self.told_of_thoughts = True
        rank_zero_warn(
            f"{100 * share:.0f} % of the completions to general prompts are thoughts that do not end within "
            f"{self.general.max_new_tokens} tokens. They have no answer, so nothing can be said of it "
            "(`general/truncated`). Raise `general_max_new_tokens`."
        )

    def predict(
        self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int, state: TrainerState
    ) -> list[dict[str, Any]]:
        """Return answers to a batch with their scores: a dict a prompt, whose `reward` is None where nothing scored.

        `state` says where training was, to rewards that ask.
        """
        if ATTACK in batch:
            return self._attacked(batch, batch_idx).rows()
        prompts, columns = batch["prompt"], batch.get("columns", {})
        rollout, texts = self._complete(batch, dataloader_idx, batch_idx)
        result, outcomes = self.judging.score(prompts, texts, columns, rollout.completion_tokens(), state)
        rewards = [None if math.isnan(reward) else reward for reward in result.total.tolist()]
        return [
            {"prompt": prompt, "completion": text, "reward": reward, "outcome": outcome}
            for prompt, text, reward, outcome in zip(prompts, texts, rewards, outcomes, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """Say who judges and how prompts are answered, as plain values."""
        sampling = {"harmful": self.harmful, "general": self.general}
        decoding: dict[str, Any] = {kind: describe(settings.numbers()) for kind, settings in sampling.items()}
        decoding["seed"] = EVALUATION_SEED
        if (judged := self.prefixes.settings.judged) != "continuation":
            decoding["begun_answers_judged"] = judged
        return {"judge": describe(self.judging.judge), "decoding": decoding}

    def _attacked(self, batch: Mapping[str, Any], batch_idx: int) -> AttackedAnswers:
        """Answer a batch of prompts under attack, as often as the attack tries, and judge the answers."""
        attack, size = batch[ATTACK], len(batch["prompt"])
        tokens, texts = batch.get("prefix_tokens") or [0] * size, batch.get("prefix_text") or [""] * size
        begun = self.prefixes.begun(batch, tokens, texts)
        sampling = attack.sampling(self.harmful)
        places = places_among_ranks(size)
        seed = EVALUATION_SEED + batch_idx
        written, seen = self._tried(begun, sampling, attack.tries, seed, places)
        asked = repeated(batch.get("request", batch["prompt"]), attack.tries)
        return AttackedAnswers(
            attack=attack.name,
            lookalikes=bool(batch[LOOKALIKES]),
            prompts=list(batch["prompt"]),
            completions=written,
            outcomes=self.judging.name(asked, seen, repeated_columns(batch, attack.tries)),
            prefixes=begun.texts,
            complete=begun.complete,
            reads_harm=self.judging.reads_harm,
        )

    def _tried(
        self, begun: Begun, sampling: SamplingConfig, tries: int, seed: int, places: Places
    ) -> tuple[list[str], list[str]]:
        """Answer each prompt of a batch several times, in parts where the device has no room for all; the same answers.

        Returns:
            The answers, prompt by prompt, and what a judge sees of them.

        Raises:
            RolloutMemoryError: If there is no room for one answer to each.
        """
        written: list[list[str]] = [[] for _ in begun.texts]
        seen: list[list[str]] = [[] for _ in begun.texts]
        first, most = 0, tries
        while first < tries:
            number = min(most, tries - first)
            part = replace(places, group_size=tries, first=first)
            try:
                rollout, texts = self.policy.generate(begun.batch, sampling, number, seed, part, exact=True)
            except RolloutMemoryError:
                if number == 1:
                    raise
                most = (number + 1) // 2
                continue
            shown = self.prefixes.judged(begun, rollout, texts, sampling)
            for row, (own, judged) in enumerate(zip(written, seen, strict=True)):
                own += texts[row * number : (row + 1) * number]
                judged += shown[row * number : (row + 1) * number]
            first += number
        return [text for own in written for text in own], [text for own in seen for text in own]

    def _complete(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> tuple[Rollout, list[str]]:
        return self._drawn(batch, self.harmful if dataloader_idx == HARMFUL else self.general, batch_idx)

    def _drawn(self, batch: Mapping[str, Any], sampling: SamplingConfig, batch_idx: int) -> tuple[Rollout, list[str]]:
        places = places_among_ranks(len(batch["prompt_ids"])) if sampling.temperature > 0 else None
        return self.policy.generate(batch, sampling, 1, EVALUATION_SEED + batch_idx, places, exact=True)
