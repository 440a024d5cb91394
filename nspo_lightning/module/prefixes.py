"""Answers that are begun for the policy: which tokens stand there, and in which groups of a training.

A prefix is a part of the prompt: a group shares it, it is sampled from and scored like the prompt's own tokens, and the
loss has none of it. Its tokens are the first of an answer that complies: the row's target, where the data have one
(`HARMFUL_TARGET`), else an answer that the base samples, the policy with its adapter off. Which row gets one, how long
it is and what the base says depend on the run's seed and on the row, and on nothing that a process remembers: a resumed
run, other ranks and prompts that dynamic sampling takes find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nspo_lightning.datamodules.sources.rows import prompt_key
from nspo_lightning.datamodules.sources.source import HARMFUL_TARGET
from nspo_lightning.datamodules.text.collate import pad_token_ids
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.judging import ask_judge, repeated
from nspo_lightning.module.text_policy import PREFIX_IDS, TextPolicy
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.rewards import Judge, Outcome, RewardError
from nspo_lightning.rewards.agreement import raise_on_all_ranks
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.texts import whole_texts

Judged = Literal["continuation", "whole"]
TRIES = 4
"""Answers that the base gives, of which the first that complies is taken."""
_SLOTS = 1024  # rows share so many places of noise: a row's is found from the row alone
_BASE_SEED = 20_240_610


@dataclass(frozen=True)
class PrefixSettings:
    """Answers that are begun for the policy in training, and how begun answers are judged everywhere.

    Attributes:
        share: Share of the groups, between 0 and 1, whose answer is begun; 0 = none.
        max_tokens: A begun answer has 0 to so many tokens, each length equally likely.
        judged: What judges and rewards see of a begun answer: the `continuation` that the policy wrote, or the `whole`
            answer. The beginning is the attacker's and the same whatever the policy does, and most judges call any
            answer with a part that complies unsafe, so that with `whole` no recovery would ever be seen. With a judge
            that understands "Sure, take a ... no, I can't help with that", `whole` shows it what it is about.
    """

    share: float = 0.0
    max_tokens: int = 10
    judged: Judged = "continuation"

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"`prefixes.share` must lie in [0, 1], got {self.share}: it is the share of the groups whose answer is "
                "begun. 0.5 is a good start, 0 begins none."
            )
        if self.max_tokens < 1:
            raise ValueError(f"`prefixes.max_tokens` must be at least 1, got {self.max_tokens}.")
        if self.judged not in get_args(Judged):
            raise ValueError(f"`prefixes.judged` must be one of {', '.join(get_args(Judged))}, got {self.judged!r}.")

    def tokens_for(self, key: str, seed: int) -> int:
        """Return how many tokens the answer to a row begins with, from the row and the run's seed alone."""
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, key=f"prefix {seed}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        return int.from_bytes(digest[8:], "big") % (self.max_tokens + 1) if drawn < self.share else 0


@dataclass(frozen=True)
class _Answer:
    """What an answer may begin with: not the end of one, behind which nothing would follow.

    Attributes:
        ids: Its tokens.
        is_target: Whether the data say so, who need not have written more.
    """

    ids: list[int]
    is_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A batch whose answers are begun.

    Attributes:
        batch: With the prefixes at the end of `prompt_ids`, and as `PREFIX_IDS`.
        texts: The prefixes as text, one a row; "" where there is none.
        complete: Whether each row has as many tokens as were asked for (a target may be shorter than that).
    """

    batch: Mapping[str, Any]
    texts: list[str]
    complete: list[bool]

    @property
    def begins(self) -> list[bool]:
        """Whether anything is begun, row by row."""
        return [bool(ids) for ids in self.batch.get(PREFIX_IDS) or [()] * len(self.texts)]


@dataclass(kw_only=True)
class Prefixes:
    """Begins answers; all ranks do it together, each for its own rows.

    Attributes:
        policy: Whose answers they are.
        judge: Says which of the base's answers comply.
        settings: Settings of begun answers.
        sampling: How the base's answers are drawn.
        run_seed: Gives the run's seed.
    """

    policy: TextPolicy
    judge: Judge
    settings: PrefixSettings
    sampling: SamplingConfig
    run_seed: Callable[[], int]
    _known: dict[tuple[str, bool], _Answer] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def for_training(self, batch: Mapping[str, Any], *, alike: bool = True) -> Begun:
        """Begin the answers to a training batch where the settings say so; those to look-alikes too, if `alike`."""
        if not self.settings.share or not batch["prompt"]:
            return Begun(batch=batch, texts=[""] * len(batch["prompt"]), complete=[True] * len(batch["prompt"]))
        seed = self.run_seed()
        wanted = [
            self.settings.tokens_for(prompt_key(prompt), seed) if alike or bad else 0
            for prompt, bad in zip(batch["prompt"], _are_harmful(batch), strict=True)
        ]
        return self.begun(batch, wanted, [""] * len(wanted), training=True)

    def begun(
        self, batch: Mapping[str, Any], tokens: Sequence[int], texts: Sequence[str], *, training: bool = False
    ) -> Begun:
        """Begin the answers to a batch.

        Args:
            batch: `prompt`, `prompt_ids`, `prompt_mask` and `columns`.
            tokens: How many tokens of an answer that complies each answer begins with.
            texts: What it begins with instead, where that is not "".
            training: Whether there must be a base.

        Returns:
            The batch and what was done; a row of whose answers none complies, or none is longer, stays as it is.
        """
        answers = self._answers(batch, [bool(n) and not text for n, text in zip(tokens, texts, strict=True)], training)
        begun = list(zip(self._encode(batch["prompt"], texts), answers, tokens, strict=True))
        ids = [fixed or answer.ids[:number] for fixed, answer, number in begun]
        complete = [bool(fixed) or len(answer.ids) >= number or answer.is_target for fixed, answer, number in begun]
        return Begun(
            batch=with_prefix_ids(batch, ids, int(self.policy.tokenizer.pad_token_id)),
            texts=[self.policy.tokenizer.decode(one, skip_special_tokens=True) if one else "" for one in ids],
            complete=complete,
        )

    def judged(self, begun: Begun, rollout: Rollout, texts: Sequence[str], sampling: SamplingConfig) -> list[str]:
        """Return what a judge sees of the answers to a batch.

        Args:
            begun: The batch.
            rollout: P * G completions of it.
            texts: These as text.
            sampling: How they were drawn.
        """
        if self.settings.judged == "continuation" or not any(begun.begins):
            return list(texts)
        return whole_texts(self.policy.tokenizer, rollout, sampling, begun.batch[PREFIX_IDS])

    def compliant_answers(self, batch: Mapping[str, Any]) -> list[list[int]]:
        """Return the tokens that the answer to each row of a batch may begin with, as far as they are known."""
        return [answer.ids for answer in self._answers(batch, [True] * len(batch["prompt"]), training=False)]

    def _answers(self, batch: Mapping[str, Any], wanted: Sequence[bool], training: bool) -> list[_Answer]:
        """Return what the answers may begin with, row by row: nothing where nothing is wanted, or there is nothing."""
        columns, size = batch.get("columns", {}), len(batch["prompt"])
        harmful = _are_harmful(batch)
        targets, references = (columns.get(name) or [None] * size for name in (HARMFUL_TARGET, "answer"))
        given = [targets[i] if harmful[i] else references[i] for i in range(size)]
        told = self._encode(batch["prompt"], [str(given[i]) if wanted[i] and given[i] else "" for i in range(size)])
        keys = [(prompt_key(prompt), bad) for prompt, bad in zip(batch["prompt"], harmful, strict=True)]
        missing = [i for i in range(size) if wanted[i] and not told[i] and keys[i] not in self._known]
        self._sample_base(batch, missing, [keys[i] for i in missing], training)
        return [
            _Answer(told[i] if harmful[i] else told[i][:-1], is_target=harmful[i])
            if told[i]
            else self._known[keys[i]]
            if wanted[i]
            else _Answer([])
            for i in range(size)
        ]

    def _sample_base(
        self, batch: Mapping[str, Any], rows: Sequence[int], keys: Sequence[tuple[str, bool]], training: bool
    ) -> None:
        """Let the base answer some rows of a batch, and keep what complies; judges fail on all ranks together."""
        failed: RewardError | None = None
        try:
            if rows:
                self._keep_base_answers(batch, rows, keys, training)
        except RewardError as error:
            failed = error
        raise_on_all_ranks(failed)

    def _keep_base_answers(
        self, batch: Mapping[str, Any], rows: Sequence[int], keys: Sequence[tuple[str, bool]], training: bool
    ) -> None:
        model = self.policy.require()
        if training and not has_adapter(model):
            raise PolicyError(
                "`model.prefixes` begins answers with what the base says, and without an adapter there is no base left "
                "(`policy.lora` is null). Set `policy.lora`, or give the safety prompts a column with the beginning of "
                "a harmful answer (`target_column`)."
            )
        self._tell("" if has_adapter(model) else " (the policy's own: it has no adapter)")
        part = {name: batch[name][list(rows)] for name in ("prompt_ids", "prompt_mask")}
        noise = Places(total=_SLOTS, mine=tuple(_slot(key) for key, _ in keys))
        with adapters_off(model):
            rollout, texts = self.policy.generate(part, self.sampling, TRIES, _BASE_SEED, noise, exact=True)
        asked = batch.get("request", batch["prompt"])  # the judge sees the request, not the template around it
        prompts = repeated([asked[i] for i in rows], TRIES)
        columns = {
            name: repeated([values[i] for i in rows], TRIES) for name, values in batch.get("columns", {}).items()
        }
        outcomes = ask_judge(self.judge, prompts, texts, columns)
        ids, finished = rollout.completion_tokens(), rollout.finished.tolist()
        for place, key in enumerate(keys):
            own = range(place * TRIES, (place + 1) * TRIES)
            answers = [ids[i][:-2] if finished[i] else ids[i] for i in own if _complies(outcomes[i], key[1])]
            self._known[key] = _Answer(next(filter(None, answers), []))

    def _encode(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[list[int]]:
        renderer = ChatRenderer(self.policy.tokenizer, check=self.policy.check_tokens)
        return [
            renderer.encode_beginning(prompt, text) if text else [] for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _tell(self, note: str) -> None:
        if note not in self._told:
            self._told.add(note)
            rank_zero_info(
                "Where a row has no column with a harmful answer's beginning (`target_column`), its answer is begun "
                f"with what the base itself says{note}: the first of {TRIES} sampled answers that complies."
            )


def with_prefix_ids(batch: Mapping[str, Any], ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Any]:
    """Return a batch with tokens behind each row's prompt, and these as `PREFIX_IDS`."""
    new = {**batch, PREFIX_IDS: [list(one) for one in ids]}
    if any(ids):
        prompts: list[Tensor] = [
            row[mask] for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        ]
        rows = [[*prompt.tolist(), *own] for prompt, own in zip(prompts, ids, strict=True)]
        padded, mask = pad_token_ids(rows, pad_token_id, "left")
        device = batch["prompt_ids"].device
        new |= {"prompt_ids": padded.to(device), "prompt_mask": mask.to(device)}
    return new


def _are_harmful(batch: Mapping[str, Any]) -> list[bool]:
    kinds = batch.get("columns", {}).get("kind") or ["harmful"] * len(batch["prompt"])
    return [kind != "benign" for kind in kinds]


def _slot(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") % _SLOTS


def _complies(outcome: Outcome | None, harmful: bool) -> bool:
    return (
        outcome in ("unsafe", "answered") if harmful else outcome is not None and outcome not in ("refusal", "garbage")
    )
