"""What callbacks ask of modules, datamodules and other callbacks; whoever has the methods may take part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from torch import Tensor

from nspo_lightning.attacks import Attack
from nspo_lightning.evaluation.diagnosis import Finding, NullSpaceFacts, TrainingFacts
from nspo_lightning.evaluation.rates import Answers, Rate, Seen
from nspo_lightning.policy.divergence import TextLoss, TextScores
from nspo_lightning.policy.warm_start import WarmStart


@runtime_checkable
class FailsAgain(Protocol):
    """An exception that a run which goes on with the same settings would meet again."""

    fails_again: bool


@runtime_checkable
class HearsSignals(Protocol):
    """A callback that handles signals; all ranks ask it together."""

    def is_told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Return whether a signal has come to any rank (cross-rank synchronisation)."""

    def stop_if_told(self, trainer: pl.Trainer) -> None:
        """Raise what ends the run if a signal has come to any rank (cross-rank synchronisation)."""


@runtime_checkable
class Evaluable(Protocol):
    """A module that measures itself and saves what was trained."""

    def evaluate(self, dataloaders: Any) -> dict[str, float]:
        """Return metrics by name."""

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained."""


@runtime_checkable
class CountsRates(Evaluable, Protocol):
    """A module that also says of how many prompts its rates are."""

    def measure(self, dataloaders: Any, seen: Seen | None = None) -> dict[str, Rate]:
        """Return rates by name, those that are shares of prompts; tell `seen` each batch and its answers."""


@runtime_checkable
class CountsUpdates(Protocol):
    """A module that skips updates, and counts those that it takes; `trainer.global_step` counts both."""

    @property
    def updates(self) -> int:
        """Updates that were taken so far, less those that were taken back."""


@runtime_checkable
class GoesBack(CountsUpdates, Protocol):
    """A module that counts the updates that stand, and wants to know when earlier weights were put back."""

    @property
    def updates_undone(self) -> int:
        """Updates that were taken and taken back."""

    def go_back(self, updates: int) -> None:
        """Go on from weights as they were after so many updates; all ranks must ask together."""


@runtime_checkable
class TellsTraining(Protocol):
    """A module that says what its rollouts and updates came to."""

    def training_facts(self) -> TrainingFacts:
        """Return counts since the run began, of all ranks."""


@runtime_checkable
class TellsNullSpace(Protocol):
    """A callback that holds updates in a null space and says what that left of them."""

    def null_space_facts(self) -> NullSpaceFacts | None:
        """Return what is known so far; None where nothing is held."""

    def measure_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure once, at the end of a fit and with the weights that are left, how far outputs moved; all ranks do."""


@runtime_checkable
class TellsFindings(Protocol):
    """A callback that says what to look at in a run, on the way and at its end."""

    findings: list[Finding]
    """Of the last fit, worst first."""


@runtime_checkable
class TellsMeasured(Protocol):
    """A callback that measured a fit."""

    before: dict[str, float]
    """Held-out metrics by name."""
    after: dict[str, float]
    intervals: dict[str, dict[str, list[float]]]
    """Of `before` and `after`, at 95 %."""


@runtime_checkable
class ScoresText(Protocol):
    """A module that compares itself with its base on given text."""

    def text_scores(self, batch: Mapping[str, Any]) -> TextScores:
        """Score the rows of one batch of this rank's text."""


@runtime_checkable
class LearnsFromText(Protocol):
    """A module that can be held to given text by a gradient."""

    def text_loss(self, batch: Mapping[str, Any], kind: TextLoss) -> tuple[Tensor, int]:
        """Return the sum over a batch's tokens, with a gradient, of the KL to the base or of -log q; and how many."""


@runtime_checkable
class KeepsBaseStates(Protocol):
    """A module that keeps the base's hidden states of texts that it saw."""

    @property
    def base_states_bytes(self) -> int:
        """How much it keeps of all texts, on this rank, now."""


@runtime_checkable
class BoundsMicrobatches(Protocol):
    """A module that says how many tokens may be in one forward and backward pass."""

    @property
    def tokens_per_microbatch(self) -> int | None:
        """Most tokens, padding included; None = no bound."""


@runtime_checkable
class HasTextToLearnFrom(Protocol):
    """A datamodule with general text that may be trained on."""

    def reference_dataloader(self, rows: int, answer_fn: Any = None) -> Iterable[Any]:
        """Return batches of general training rows, whose answers are to be scored; `answer_fn` as in calibration."""


@runtime_checkable
class HoldsMemory(Protocol):
    """A callback that keeps something as large as weights."""

    def held_bytes(self) -> int:
        """Return how much, on this rank, now."""


@runtime_checkable
class AnswersAsBase(ScoresText, Protocol):
    """A module whose base answers harmful prompts."""

    def base_text(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Return prompts with the base's answers, as `text_scores` takes them; None where there is no base."""


@runtime_checkable
class LimitsContext(Protocol):
    """A module that says how long its texts may be."""

    context_tokens: int | None


@runtime_checkable
class AnswersTests(ScoresText, Protocol):
    """A module whose `test_step` returns ``{"answers": Answers}``, and whose base answers too."""

    def base_answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers | None:
        """Answer a batch as the base does; None without an adapter."""

    def test_identity(self) -> dict[str, Any]:
        """Say what the module measures: policy, judge, decoding."""


@runtime_checkable
class HasAttacks(Protocol):
    """A datamodule whose test loaders also hold prompts under attack."""

    test_attacks: Sequence[Attack] | None
    """What is done to them; None = nothing."""
    attack_rows: int | None
    """Prompts of each kind at most."""

    @property
    def trained_attacks(self) -> Sequence[Attack]:
        """Those that training prompts stand in."""


@runtime_checkable
class TrainsOnPrefixes(Protocol):
    """A module that may be trained on answers that are begun for it."""

    @property
    def trained_prefix_tokens(self) -> int:
        """The most tokens of a begun answer in training; 0 = none is begun."""


@runtime_checkable
class AnswersPrompts(Protocol):
    """A module that answers prompts for calibration."""

    def calibration_answers(self, prompts: Sequence[Any], max_new_tokens: int | None = None) -> list[str]:
        """Return one answer a prompt: what is written behind the rendered prompt, thoughts too.

        Of at most ``max_new_tokens``; None = as many as the module gives a general answer.
        """


class HasRows(Protocol):
    """A judged rollout."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict a completion, with `prompt` and `completion`."""


@runtime_checkable
class KeepsRollout(Protocol):
    """A module that remembers what it rolled out last."""

    last_rollout: HasRows | None
    """None before the first rollout."""


@runtime_checkable
class KeepsStepState(Protocol):
    """A module with state that a training step changes before the weights change (a buffer, counters)."""

    step_state_to_save: dict[str, Any] | None
    """What a checkpoint shall hold instead of the present state, once; the module sets it back to None."""

    def step_state(self) -> dict[str, Any]:
        """Return a copy of that state, cheap and in memory."""


@runtime_checkable
class HasCalibrationText(Protocol):
    """A datamodule or module with text to protect."""

    def calibration_dataloader(self) -> Iterable[Any]:
        """Return batches; may take ``answer_fn``, see `AnswersPrompts`, ``to_learn`` and ``starts``.

        With ``to_learn`` true, batches of the prompts that are trained on come too, their ``domain`` being `TO_LEARN`.
        With ``starts`` true, so do the starts of answers to further general prompts, see `domains.starts_of`.
        """


@runtime_checkable
class CountsCalibrationStarts(Protocol):
    """A datamodule that knows how many starts of answers its calibration text will have before any is answered."""

    def count_calibration_starts(self) -> int:
        """Return the rows that ``starts`` asks for."""


@runtime_checkable
class HasCalibrationForward(Protocol):
    """A module with a forward for calibration that is cheaper than its own and reaches the same layers."""

    def calibration_forward(self, **inputs: Any) -> Any:
        """Run the layers over a batch; what it returns is not used."""


@runtime_checkable
class HasHeldOutText(Protocol):
    """A datamodule with general text that training does not see."""

    def text_dataloader(
        self, split: str, rows: int | None = None, max_tokens: int | None = None, limit_batches: float = 1.0
    ) -> Iterable[Any]:
        """Return batches of the ``validation`` or ``test`` split; the limit is as in Lightning's Trainer."""


@runtime_checkable
class KnowsBatchSizes(Protocol):
    """A loader that knows its batches before it gives them."""

    def batch_sizes(self) -> list[int]:
        """Return the rows of each batch of this rank."""


@runtime_checkable
class HasEvalRows(Protocol):
    """A datamodule that can name the rows it evaluates on."""

    def eval_rows(self, split: str) -> Sequence[Sequence[Any]]:
        """Return the rows of each evaluation loader."""


@runtime_checkable
class StartsWarm(Protocol):
    """A module whose adapter was trained before this fit."""

    warm_start: WarmStart | None
    """What it says of itself; None = a fresh adapter, or a checkpoint's."""


@runtime_checkable
class HoldsInNullSpace(Protocol):
    """A callback that keeps updates in a null space."""

    def held_in(self) -> tuple[Mapping[str, Any], float] | None:
        """Return the fingerprint of its basis and the largest leak out of it; None if it holds nothing."""


@runtime_checkable
class Certifies(Protocol):
    """A callback that promises to keep updates out of something."""

    def certificate(self) -> dict[str, float]:
        """Return layer -> leak."""
