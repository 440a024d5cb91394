"""What a warm start is taught and checked with.

Harmful prompts with refusals, general prompts whose answers are to stay, held-out prompts of both kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from nspo_lightning.datamodules.alignment import AlignmentDataModule
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.read import announce, usable_rows
from nspo_lightning.datamodules.sources.rows import PromptRow, hash_rank, rank_all, take_ranked
from nspo_lightning.datamodules.sources.source import PromptSource, as_sources
from nspo_lightning.datamodules.sources.splits import without
from nspo_lightning.datamodules.text.collate import collate_prompts, pad_token_ids
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.datamodules.text.text_rows import choose_calibration_rows
from nspo_lightning.terminal import counted

REFUSALS = Path(__file__).parent / "refusals.txt"
_T = TypeVar("_T")
_ROWS = 20_000  # rows of an epoch, which has no end for the few updates of a warm start
_KEPT = 4_096  # general rows that it goes through before one comes again
GENERAL_PROMPTS = "general"
"""In a batch: general prompts, as a batch of their own."""


@dataclass(kw_only=True)
class WarmupSettings:
    """How `warmup` teaches the first refusals, for GRPO to go on from.

    Attributes:
        refusal_share: Share of the answers to held-out harmful prompts that must be refusals for it to be done.
        max_updates: Updates after which it fails if they are not; rounded up to a whole number of checks.
        batch_size: Harmful prompts an update and rank.
        general_share: Share of general training prompts (and look-alikes among the safety prompts) in a whole batch, in
            [0, 1): they come beside the harmful ones, at 0.5 as many as there are. The policy is held to its base on
            the base's own answers to them. 0 = the null space alone keeps general answers.
        general_weight: Of that term, KL(base || policy) in nats a token, beside the refusals' nats a token.
        lr: Learning rate; null = that of `model.optimizer`.
        check_every: Updates between checks.
        check_prompts: Held-out prompts of each kind (harmful, general) that are answered at a check.
        max_general_refusals: Refused general prompts that stop it: this share above the start's.
        refusals: What is taught: a text file with one refusal a line, a list of texts, or a data source whose prompts
            and answers are taken in the place of `data.safety`'s; null = a dozen that come with the package.
        answer_tokens: Longer refusals are cut there; the first tokens decide.
    """

    refusal_share: float = 0.2
    max_updates: int = 60
    batch_size: int = 16
    general_share: float = 0.5
    general_weight: float = 10.0
    lr: float | None = 5e-4
    check_every: int = 4
    check_prompts: int = 32
    max_general_refusals: float = 0.1
    refusals: str | list[str] | PromptSource | None = None
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        for name in ("max_updates", "batch_size", "check_every", "check_prompts", "answer_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"`warmup.{name}` must be at least 1, got {vars(self)[name]}.")
        if not 0 < self.refusal_share <= 1:
            raise ValueError(f"`warmup.refusal_share` must be in (0, 1], got {self.refusal_share}. Use 0.2 for 20 %.")
        if not 0 <= self.max_general_refusals <= 1:
            raise ValueError(f"`warmup.max_general_refusals` must be in [0, 1], got {self.max_general_refusals}.")
        if not 0 <= self.general_share < 1:
            raise ValueError(
                f"`warmup.general_share` must be in [0, 1), got {self.general_share}: it is the share of general "
                "prompts in a batch. 0.5 gives as many as there are harmful ones, 0 none."
            )
        if not 0 < self.general_weight < math.inf:
            raise ValueError(
                f"`warmup.general_weight` must be positive, got {self.general_weight}. For no general prompts set "
                "`warmup.general_share: 0`."
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"`warmup.lr` must be positive, got {self.lr}. 5e-4 is the default.")

    @property
    def updates(self) -> int:
        """Updates at most."""
        return math.ceil(self.max_updates / self.check_every) * self.check_every

    @property
    def general_rows(self) -> int:
        """General prompts an update and rank, beside `batch_size` harmful ones; at least one if any are asked for."""
        wanted = self.batch_size * self.general_share / (1 - self.general_share)
        return max(round(wanted), 1) if wanted else 0


class WarmupDataModule(AlignmentDataModule):
    """The data of a run, as a warm start takes it; the arguments are those of `AlignmentDataModule`.

    Attributes:
        warmup: Settings of the warm start.
    """

    warmup = WarmupSettings()

    @override
    def train_dataloader(self) -> PromptLoader:
        rows, texts = self._taught()
        renderer, tokens = self.safety.renderer, self.warmup.answer_tokens
        passes: list[PromptRow] = []
        while len(passes) < _ROWS:
            number = len(passes) // len(rows)
            order = [rows[i] for i in rank_all(rows, f"warmup {self.safety.seed} {number}")]
            passes += [_with_refusal(row, texts, number) for row in order]
        kept = self._kept()
        if kept:
            ranks = self.safety.shard()[1]
            passes = interleaved(passes, kept, self.warmup.batch_size * ranks, self.warmup.general_rows * ranks)
        return PromptLoader(
            [passes],
            lambda batch: collate_warmup(batch, renderer, tokens),
            batch_size=self.warmup.batch_size + (self.warmup.general_rows if kept else 0),
            seed=self.safety.seed,
            shard=self.safety.shard,
            unfinished=self.safety.unfinished_batches,
        )

    def taught_answers(self) -> tuple[list[Any], list[str]]:
        """List some prompts, as judges see them, and the answers that are taught to them, at most 32."""
        rows, texts = self._taught()
        shown = [_with_refusal(row, texts, 0) for row in rows[:32]]
        return [row.prompt if row.request is None else row.request for row in shown], [row.answer for row in shown]

    @override
    def val_dataloader(self) -> list[PromptLoader]:
        harmful, general = self.eval_rows("validation")
        if not harmful:
            raise DataError(
                "warmup",
                "there is no held-out harmful prompt to see refusals on",
                "Set `data.val_size`, or give `data.safety_val`.",
            )
        return [self._checked(rows) for rows in (harmful, general)]

    test_dataloader = val_dataloader

    def _checked(self, rows: Sequence[PromptRow]) -> PromptLoader:
        size = min(self.warmup.check_prompts, len(rows))
        return self.safety.eval_loader([rows[i] for i in take_ranked(rows, size, "warmup 0")])

    def _kept(self) -> list[PromptRow]:
        """Return general training prompts, mixed as calibration mixes them, without their reference answers."""
        if not self.warmup.general_rows:
            return []
        general, seed = self.general.loaded(), self.safety.seed
        sources, weights = list(general.train), list(general.weights)
        if alike := self.safety.loaded().train_of("benign"):
            sources, weights = [*sources, alike], [*weights, sum(weights) / len(weights)]
        chosen, _ = choose_calibration_rows(sources, weights, _KEPT, seed, fits=lambda row: True)
        return [replace(chosen[i], answer="") for i in rank_all(chosen, f"warmup general {seed}")]

    def _taught(self) -> tuple[list[PromptRow], list[str]]:
        """Return prompts and the refusals to choose from; none where each row has its own."""
        held_out = [row for split in self.safety.loaded().held_out.values() for row in split]
        given = self.warmup.refusals
        if isinstance(given, str) and not given.endswith(".txt"):
            given = PromptSource(path=given)
        if isinstance(given, PromptSource):
            return self._answered(given, held_out), []
        rows = self.safety.loaded().train_of("harmful")
        if not rows:
            raise DataError(
                "warmup", "`data.safety` has no harmful training prompt", "Give some, or `warmup.refusals`."
            )
        texts = given if isinstance(given, list) else _lines(Path(given) if given is not None else REFUSALS)
        if not any(text.strip() for text in texts):
            raise DataError("`warmup.refusals`", "it holds no text", "Give one refusal a line, or leave it out.")
        return rows, [text.strip() for text in texts if text.strip()]

    def _answered(self, source: PromptSource, held_out: list[PromptRow]) -> list[PromptRow]:
        (source,) = as_sources(source, "warmup.refusals")
        if source.attacks is not None:
            raise DataError(
                source.label,
                "`attacks` of `warmup.refusals` would change nothing: its prompts are taught as they are",
                "Leave it out.",
            )
        read, report = usable_rows(source, "harmful")
        report.role = "warmup"
        rows = without([row for row in read if row.answer], held_out)
        report.splits = {"train": len(rows)}
        announce([report])
        if not rows:
            raise DataError(
                source.label,
                f"none of its {counted(len(read), 'row')} has an answer and a prompt that is not held out",
                "Name the column with the refusals as `answer_column`.",
            )
        return rows


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError("`warmup.refusals`", f"there is no file at '{path}'", "Mend the path, or leave it out.")
    return path.read_text(encoding="utf-8").splitlines()


def _with_refusal(row: PromptRow, texts: Sequence[str], number: int) -> PromptRow:
    """Give a row one of some refusals, another one in another pass; without any it keeps its own answer."""
    if not texts:
        return row
    choice = int.from_bytes(hash_rank(row.key, f"refusal {number}")[:4], "big") % len(texts)
    return replace(row, answer=texts[choice])


def interleaved(taught: Sequence[_T], kept: Sequence[_T], first: int, then: int) -> list[_T]:
    """Alternate `first` rows that are taught and `then` rows that are kept, these again from their start when they end.

    Ranks take every so-many-th row of a batch, so each gets its share of both. What does not fill a block is left out.

    Args:
        taught: At least one.
        kept: At least one.
        first: Rows of a batch of all ranks.
        then: Likewise.

    Returns:
        The rows in the order of batches.

    Example:
        >>> interleaved("ABCDE", "xyz", 2, 2)
        ['A', 'B', 'x', 'y', 'C', 'D', 'z', 'x']
    """
    endless, found = itertools.cycle(kept), list[_T]()
    for start in range(0, max(len(taught) - first, 0) + 1, first):
        found += [*taught[start : start + first], *itertools.islice(endless, then)]
    return found


def collate_warmup(rows: Sequence[PromptRow], renderer: ChatRenderer, tokens: int) -> dict[str, Any]:
    """Return what `collate_answers` makes of the rows with an answer and, as `general`, the other rows as prompts."""
    batch = collate_answers([row for row in rows if row.answer], renderer, tokens)
    kept = [row for row in rows if not row.answer]
    return {**batch, GENERAL_PROMPTS: collate_prompts(kept, renderer)} if kept else batch


def collate_answers(rows: Sequence[PromptRow], renderer: ChatRenderer, tokens: int) -> dict[str, Any]:
    """Return a batch of prompts (see `collate_prompts`) with answers to learn.

    It also has `answer_ids` and `answer_mask` (True = real token) of shape (rows, answer tokens), right-padded: what
    the policy would generate behind the prompt, with the token that ends its turn, cut after `tokens`.
    """
    batch = collate_prompts(rows, renderer)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    answers = [_generated(row, prompt, renderer)[:tokens] for row, prompt in zip(rows, prompts, strict=True)]
    ids, mask = pad_token_ids(answers, renderer.pad_token_id, "right")
    return {**batch, "answer_ids": ids, "answer_mask": mask}


def _generated(row: PromptRow, prompt: Sequence[int], renderer: ChatRenderer) -> list[int]:
    """Return the tokens of a row's answer as they are generated behind the ids of its prompt."""
    ids, start, stop = renderer.encode_answer(row.prompt, row.answer)
    if ids[: len(prompt)] == list(prompt):  # what the template puts before an answer is generated too
        start = len(prompt)
    return ids[start:stop]
