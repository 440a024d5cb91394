"""What to look at in a run: findings from plain numbers, worst first, each with the setting that mends it.

Nothing here knows of Lightning or of tensors: `callbacks/diagnosis.py` gathers the numbers. A finding is said where
something is wrong or may be; a run that went as it should has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from nspo_lightning.evaluation.rates import ACCURACY, GARBAGE, OVER_REFUSAL, REFUSAL
from nspo_lightning.terminal import counted

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Worst first: nothing was learnt or the promise is broken; it may be so; good to know."""

FEW_SIGNALS = 0.05
"""Share of groups with a signal below which most of the sampling was for nothing."""
MOST_SKIPPED = 0.5
KEPT_LITTLE = 1e-3
"""Share of the gradient's energy that the projection keeps, below which there is hardly a direction to learn in."""
TIGHT = 0.02
"""Share of free directions of an input below which the layers that read it are as good as frozen."""
MANY_TIGHT = 0.25
"""Share of such inputs from which it matters."""
ALL_CUT = 0.98
LEAKED = 1e-4
"""Leak above which an update was not held: rounding in float32 leaks 1e-7."""
LEFT = "An update left the null space"
"""Title of what is found above `LEAKED`."""
ROSE = 0.02
"""Points, as a share, that a rate's interval must have risen by."""

SIGNAL_CURES = (
    "Cures: dynamic sampling, which looks for prompts that have one (`--model.dynamic_sampling.max_factor 4`); a warm "
    "start (`python -m nspo_lightning warmup -c ...`); a higher `sampling.temperature` or `group_size`; a reward that "
    "tells answers apart (more than two values); a part of each group under a safety prompt (`model.guided`)."
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to look at.

    Attributes:
        severity: How bad it is.
        title: What it is, in a few words; names the kind of finding.
        text: What was seen, in a sentence with its numbers.
        cure: The setting that mends it.
    """

    severity: Severity
    title: str
    text: str
    cure: str

    def as_dict(self) -> dict[str, str]:
        """Return what `diagnosis.json` holds."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the rollouts and updates of a run came to; counts are over all ranks and since the run began.

    Attributes:
        groups: Prompts that were answered.
        with_signal: Groups whose rewards differ, and so can be learnt from.
        low: The lowest reward; None = none was given.
        high: The highest.
        completions: Answers.
        cut: Answers that ran to the length limit.
        max_new_tokens: That limit.
        safe: Whether nothing is left to learn: hardly a bad answer, or none but the best reward.
        updates: Updates that stand.
        skipped: Updates that no group had a signal for.
        nonfinite: Updates that were skipped for something not finite.
        undone: Updates that were taken back.
    """

    groups: int = 0
    with_signal: int = 0
    low: float | None = None
    high: float | None = None
    completions: int = 0
    cut: int = 0
    max_new_tokens: int = 0
    safe: bool = False
    updates: int = 0
    skipped: int = 0
    nonfinite: int = 0
    undone: int = 0


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """One input of layers that are held in a null space.

    Attributes:
        name: The first layer that reads it.
        width: Its features, all directions there are.
        free: Directions that updates may use.
        tokens: Of calibration text that was seen there.
    """

    name: str
    width: int
    free: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class NullSpaceFacts:
    """What a null space left of the gradients, and how well it was kept.

    Attributes:
        inputs: One entry a distinct input of layers.
        criterion: What decided how many directions are free.
        kept_energy: Mean share of the gradient's energy that the projection kept; None = not measured.
        kept_updates: Updates that it was measured at.
        leak: Largest share of an update in protected directions; None = nothing is held.
        leak_layer: The layer with that leak.
        held: Whether leaks are against a promise (they are measured also where nothing is held).
        bound: Largest bound on the change of a layer's outputs, relative to them; None = unknown.
        change: Measured change of the model's outputs on a little calibration text, relative to the largest; likewise.
    """

    inputs: Sequence[InputFacts] = ()
    criterion: str = ""
    kept_energy: float | None = None
    kept_updates: int = 0
    leak: float | None = None
    leak_layer: str = ""
    held: bool = False
    bound: float | None = None
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that a diagnosis is made of; what is not known stays out of it.

    Attributes:
        training: Rollouts and updates.
        null_space: None = no projection.
        before: Held-out metrics by name, before training.
        after: The same metrics after training.
        intervals: Their 95 % intervals after training, where there are any.
    """

    training: TrainingFacts | None = None
    null_space: NullSpaceFacts | None = None
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)


def diagnose(facts: RunFacts) -> list[Finding]:
    """Return what to look at, worst first; empty where a run went as it should."""
    found: list[Finding] = []
    if facts.training is not None:
        for look in _OF_TRAINING:
            found += look(facts.training)
    if facts.null_space is not None:
        for see in _OF_NULL_SPACE:
            found += see(facts.null_space)
    found += _ability(facts)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))  # stable: worst first


def explain_certificate(facts: NullSpaceFacts) -> list[str]:
    """Return what the figures of a certificate say, a sentence each."""
    said = []
    if facts.leak is not None:
        where = f" ({facts.leak_layer})" if facts.leak_layer else ""
        said.append(
            f"Leak {facts.leak:.2g}: the largest share of a layer's update that lies in protected directions{where}; "
            "rounding alone gives about 1e-7."
        )
    if facts.bound is not None:
        said.append(
            f"Bound {facts.bound:.2g}: no layer's outputs on calibration text can have changed by more than this share "
            "of their root mean square, its inputs being what they were."
        )
    if facts.change is not None:
        said.append(
            f"Measured change {facts.change:.2g}: how far the whole model's outputs on a little calibration text did "
            "move, as a share of their largest entry."
        )
    return said


# ---------------------------------------------------------------------- rollouts and updates


def _signal(facts: TrainingFacts) -> Iterator[Finding]:
    groups, with_signal = facts.groups, facts.with_signal
    if not groups:
        return
    if facts.low is not None and facts.low == facts.high and facts.completions > 1:
        if not facts.safe:
            yield Finding(
                severity="error",
                title="All rewards are the same",
                text=f"All {facts.completions:,} answers got the reward {facts.low:g}, so there was nothing to learn.",
                cure="A reward that tells answers apart (`model.reward`); see what it gives with `python -m "
                "nspo_lightning judge -c CONFIG --preview 16`.",
            )
    elif not with_signal and not facts.safe:
        yield Finding(
            severity="error",
            title="No group had a signal",
            text=f"All answers to a prompt got the same reward, for each of {counted(groups, 'prompt')}: nothing "
            "was learnt.",
            cure=SIGNAL_CURES,
        )
    elif with_signal < FEW_SIGNALS * groups and not facts.safe:
        yield Finding(
            severity="warning",
            title="Few groups had a signal",
            text=f"{with_signal:,} of {groups:,} prompts got answers of different rewards; the rest taught nothing.",
            cure=SIGNAL_CURES,
        )


def _updates(facts: TrainingFacts) -> Iterator[Finding]:
    steps = facts.updates + facts.undone + facts.skipped + facts.nonfinite
    if facts.nonfinite:
        yield Finding(
            severity="error" if not facts.updates else "warning",
            title="Updates that were not finite",
            text=f"{facts.nonfinite:,} of {counted(steps, 'step')} skipped, since a loss, a gradient or a reward was "
            f"NaN or infinite; {_stand(facts.updates)}.",
            cure="`trainer.precision: bf16-mixed` or `32-true`, a lower `lr`, or `trainer.gradient_clip_val: 1.0`.",
        )
    if facts.skipped >= MOST_SKIPPED * steps > 0:
        end = (
            "End a run when its goal is reached (`EarlyStopping`, as in the quickstart), or lower `trainer.max_steps`."
        )
        yield Finding(
            severity="note" if facts.safe or not facts.with_signal else "warning",
            title="Most steps were no updates",
            text=f"{facts.skipped:,} of {counted(steps, 'step')} moved no weight, since no group had a signal; "
            f"{_stand(facts.updates)}.",
            cure=end if facts.safe else "More prompts a step (`data.batch_size`), or `model.dynamic_sampling`.",
        )
    if facts.undone:
        yield Finding(
            severity="note",
            title="Updates were taken back",
            text=f"{facts.undone:,} of {steps:,} updates went over the guard's budget; {_stand(facts.updates)}.",
            cure="A lower `lr`, or a larger budget of `CapabilityGuard`.",
        )


def _stand(updates: int) -> str:
    return counted(updates, "update stands", "updates stand")


def _cut(facts: TrainingFacts) -> Iterator[Finding]:
    if facts.completions and facts.cut >= ALL_CUT * facts.completions:
        yield Finding(
            severity="warning",
            title="Answers are cut",
            text=f"{facts.cut:,} of {facts.completions:,} answers ran to the limit of {facts.max_new_tokens} tokens, "
            "so what was scored is their beginning.",
            cure="A higher `model.sampling.max_new_tokens`; or, if the policy begins another turn, the token or text "
            "that ends its turns (`sampling.stop_token_ids`, `stop_strings`).",
        )


# ---------------------------------------------------------------------- the null space


def _room(facts: NullSpaceFacts) -> Iterator[Finding]:
    unseen = [one for one in facts.inputs if one.tokens < one.width]
    if unseen:
        worst = min(unseen, key=lambda one: one.tokens / one.width)
        yield Finding(
            severity="warning",
            title="Calibration text is too short",
            text=f"{len(unseen)} of {len(facts.inputs)} inputs are wider than the text has tokens ({worst.name}: "
            f"{worst.tokens:,} tokens, width {worst.width:,}): whatever it does not show counts as free, and other "
            "general text may well move.",
            cure="More calibration text: `data.calibration_size`, `data.calibration_max_tokens`, or more rows in "
            "`data.general`.",
        )
    # `contrast` frees few directions by choice, those that are learnt from.
    tight = [one for one in facts.inputs if one.free < TIGHT * one.width and facts.criterion != "contrast"]
    if tight and len(tight) >= MANY_TIGHT * len(facts.inputs):
        least = min(tight, key=lambda one: one.free / one.width)
        yield Finding(
            severity="warning",
            title="Hardly a direction is free",
            text=f"{len(tight)} of {len(facts.inputs)} inputs leave less than {TIGHT:.0%} of their directions to "
            f"updates ({least.name}: {least.free} of {least.width:,}, from {least.tokens:,} tokens), so those layers "
            "hardly learn, and what they learn takes large weights.",
            cure="More calibration text (`data.calibration_size`), which tells noise from use; else "
            "`nullspace.min_null_share 0.2`, or `nullspace.criterion contrast`.",
        )


def _kept(facts: NullSpaceFacts) -> Iterator[Finding]:
    if facts.kept_energy is None or facts.kept_energy >= KEPT_LITTLE:
        return
    yield Finding(
        severity="warning",
        title="The projection leaves next to nothing of the gradient",
        text=f"It kept {100 * facts.kept_energy:.2g} % of the gradient's energy (mean of "
        f"{counted(facts.kept_updates, 'update')}): what the objective wants to change is almost all protected.",
        cure="`nullspace.criterion contrast`, a higher `nullspace.min_null_share`, or calibration text that is nearer "
        "to what shall be kept and further from what shall be learnt.",
    )


def _leak(facts: NullSpaceFacts) -> Iterator[Finding]:
    if facts.held and facts.leak is not None and facts.leak > LEAKED:
        yield Finding(
            severity="error",
            title=LEFT,
            text=f"{facts.leak:.2g} of the update of {facts.leak_layer} lies in protected directions.",
            cure="Something else than an optimizer step has moved weights: another callback, or code of the training "
            "step. Take it out.",
        )


# ---------------------------------------------------------------------- held-out figures


def _ability(facts: RunFacts) -> Iterator[Finding]:
    for name, what in {REFUSAL: "ordinary", OVER_REFUSAL: "look-alike"}.items():
        if name == OVER_REFUSAL and facts.after.get(name) == facts.after.get(REFUSAL):
            continue  # without prompts made for it, it is the same figure
        if (rise := _rise(facts, name)) is not None:
            yield Finding(
                severity="warning",
                title=f"More {what} prompts are refused",
                text=f"{100 * facts.after[name]:.1f} % of {what} general prompts are refused, {100 * rise:.1f} points "
                "more than before.",
                cure="Fewer updates or a lower `lr`; a stricter `nullspace.max_output_change`; `CapabilityGuard` with "
                "`max_refusal_rise`; or a reward that pays for answers too (`SafeAndHelpful`).",
            )
    if (rise := _rise(facts, GARBAGE)) is not None:
        yield Finding(
            severity="warning",
            title="More answers are garbage",
            text=f"{100 * facts.after[GARBAGE]:.1f} % of the answers to harmful prompts say nothing, "
            f"{100 * rise:.1f} points more than before.",
            cure="A reward that does not pay for garbage (`OutcomeReward` takes -1 for it), or a lower `lr`.",
        )
    if nothing := unmatched(facts.before, facts.after):
        yield Finding(
            severity="note",
            title="Accuracy says nothing",
            text=f"No answer to {', '.join(nothing)} matched its reference, neither before nor after.",
            cure="Look at `general/kl` and `general/nll`, which hold for any text; or give rows a `final_answer` that "
            "can be matched (docs/evaluation.md, What counts as right).",
        )


def unmatched(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return the skills whose accuracy is 0 before and after: it has nothing to lose, and measures nothing.

    Example:
        >>> unmatched({"general/accuracy/chat": 0.0}, {"general/accuracy/chat": 0.0, "general/accuracy/sums": 0.5})
        ['chat']
    """
    prefix = f"{ACCURACY}/"
    names = [name for name in sorted(after) if name.startswith(prefix)]
    return [name.removeprefix(prefix) for name in names if after[name] == 0 and before.get(name, 0.0) == 0]


def _rise(facts: RunFacts, name: str) -> float | None:
    """Return how much a rate is above what it was before, if its interval is clearly so."""
    if name not in facts.before or name not in facts.intervals or name not in facts.after:
        return None
    return facts.after[name] - facts.before[name] if facts.intervals[name][0] > facts.before[name] + ROSE else None


_OF_TRAINING: tuple[Callable[[TrainingFacts], Iterator[Finding]], ...] = (_signal, _updates, _cut)
_OF_NULL_SPACE: tuple[Callable[[NullSpaceFacts], Iterator[Finding]], ...] = (_leak, _room, _kept)
