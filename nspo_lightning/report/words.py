"""Figures as text, and the sentences of a page."""

from __future__ import annotations

from collections.abc import Sequence

from nspo_lightning.evaluation.diagnosis import NullSpaceFacts, explain_certificate
from nspo_lightning.evaluation.rates import ACCURACY, ANSWERED, OVER_REFUSAL, REFUSAL, UNSAFE
from nspo_lightning.evaluation.text_means import KL
from nspo_lightning.report.attacks import worst
from nspo_lightning.report.measurements import says_something
from nspo_lightning.report.records import Answers, Curve, Measure, Measurement, Run, Unit, Value
from nspo_lightning.terminal import counted, duration, percent

STAYED = {"share": 0.0005, "nats": 5e-5, "number": 0.0}
"""What a change is below that no digit shows."""
_REFUSED = {REFUSAL: "ordinary prompts", OVER_REFUSAL: "harmless look-alikes"}
_OF = {UNSAFE: "unsafe", ANSWERED: "answered", ACCURACY: "of general tasks right"} | {
    name: f"of {what} refused" for name, what in _REFUSED.items()
}
_FEW = 10


def figure(value: float, unit: Unit) -> str:
    """Return a value with its unit.

    Example:
        >>> figure(0.0187, "share"), figure(0.00042, "nats"), figure(-0.5, "number")
        ('1.9 %', '0.0004', '-0.5')
    """
    if unit == "share":
        return f"{round(100 * value, 1) + 0.0:.1f} %"  # adding 0 turns -0.0 into 0.0
    return f"{round(value, 4) + 0.0:.4f}" if unit == "nats" else f"{value:.4g}"


def change(measure: Measure) -> str:
    """Return after less before, with its sign; "" where one of them is missing."""
    if measure.change is None:
        return ""
    digits, factor = (1, 100) if measure.unit == "share" else (4, 1)
    return f"{round(factor * measure.change, digits) + 0.0:+.{digits}f}"


def interval(value: Value | None, unit: Unit) -> str:
    """Return the 95 % interval; "" where it is not known."""
    if value is None or value.interval is None:
        return ""
    low, high = (figure(end, unit).removesuffix(" %") for end in value.interval)
    return f"{low} to {high}"


def verdict(measure: Measure) -> str:
    """Return ``good`` or ``bad`` if a measure went where it should or not, by more than its interval; else ``same``."""
    if measure.change is None or abs(measure.change) <= STAYED[measure.unit] or measure.better == "same":
        return "same"
    ends = measure.after.interval if measure.after is not None else None
    before = measure.before.value if measure.before is not None else 0.0
    if ends is None or ends[0] <= before <= ends[1]:
        return "same"
    return "good" if (measure.change < 0) == (measure.better == "less") else "bad"


def headline(run: Run) -> str:
    """Return what a run came to, in one sentence: safety, and general ability, whatever it cost of it."""
    measured = run.measured
    if measured is None:
        return _without_measures(run)
    parts = [_safety(measured), _under_attack(measured), *_ability(measured)]
    said = [part for part in parts if part]
    return "; ".join(said) + "." if said else _without_measures(run)


def _safety(measured: Measurement) -> str:
    unsafe, answered = measured.get(UNSAFE), measured.get(ANSWERED)
    if unsafe is not None:
        return _moved("Unsafe answers to harmful prompts", unsafe)
    return "" if answered is None else _moved("Answers to harmful prompts", answered)


def _under_attack(measured: Measurement) -> str:
    """Return what the worst attack came to; "" without any."""
    attack = worst(measured.attacks)
    if attack is None or attack.harm is None or attack.harm.after is None:
        return ""
    tried = sum(one.harm is not None for one in measured.attacks)
    of = f", the worst of {tried} attacks," if tried > 1 else ""
    before = "" if attack.harm.before is None else f" (before {figure(attack.harm.before.value, 'share')})"
    return f"under {attack.name}{of} {figure(attack.harm.after.value, 'share')}{before}"


def _ability(measured: Measurement) -> list[str]:
    said = [
        _moved("right answers to general tasks", measure, "went", "went")
        if measure.name == ACCURACY
        else _moved(f"refusals of {_REFUSED[measure.name]}", measure)
        for measure in _telling(measured)
    ]
    distance = measured.get(KL)
    if not said and distance is not None and distance.after is not None:
        said.append(f"general answers moved {figure(distance.after.value, 'nats')} nats a token from the base")
    return said


def _telling(measured: Measurement) -> list[Measure]:
    """Return what tells of general ability: accuracy, if it can fall; refusals, if they rose or nothing else tells."""
    accuracy = measured.get(ACCURACY)
    told = [accuracy] if accuracy is not None and says_something(accuracy) else []
    refused = [measure for name in _REFUSED if (measure := measured.get(name)) is not None]
    return told + ([measure for measure in refused if verdict(measure) == "bad"] or ([] if told else refused[:1]))


def _moved(what: str, measure: Measure, down: str = "fell", up: str = "rose") -> str:
    after = measure.after
    if after is None:
        return f"{what}: {figure(measure.before.value, measure.unit)} before" if measure.before is not None else ""
    if measure.before is None:
        return f"{what}: {figure(after.value, measure.unit)} after"
    old, new = figure(measure.before.value, measure.unit), figure(after.value, measure.unit)
    if old == new:
        return f"{what} stayed at {new}"
    return f"{what} {down if after.value < measure.before.value else up} from {old} to {new}"


def _without_measures(run: Run) -> str:
    if run.measurements and not run.measured:
        what = "Nothing was measured before and after this run"
    else:
        what = "There are no figures from before and after"
    reward = reward_moved(run.curves.get("reward"))
    return f"{what}{f'; {reward}' if reward else ''}."


def reward_moved(curve: Curve | None) -> str:
    """Return how the mean reward moved, by the first and the last points of its curve; "" without any."""
    if curve is None or len(curve.points) < 2:
        return ""
    few = min(_FEW, len(curve.points) // 2)
    values = [value for _, value in curve.points]
    first, last = sum(values[:few]) / few, sum(values[-few:]) / few
    return f"the mean reward went from {first:.3g} to {last:.3g} (first and last {counted(few, 'logged step')})"


def standing(run: Run) -> list[str]:
    """Return what a reader must know before the figures: not finished, not measured."""
    said: list[str] = []
    if not run.finished and any(m.job == "test" for m in run.measurements):
        return said  # a test alone is whole
    if not run.finished:
        where = f" Its last logged step is {run.last_step}." if run.last_step is not None else ""
        how = f"go on with `{_going_on(run)}`" if run.resumable else "it left no checkpoint to go on from"
        said.append(
            f"This run is not finished: {_job(run)} has written no summary.json yet.{where} What follows is what there "
            f"is; {how}."
        )
    elif run.went_on:
        said.append(
            f"This run was trained further and is not finished: what {_job(run)} measured after training is of step "
            f"{run.steps}, and the last logged step is {run.last_step}. Go on with `{_going_on(run)}`, or measure what "
            "there is with `test ... --ckpt_path last`."
        )
    if run.finished and run.measured is None:
        said.append(
            "Nothing was measured before and after (`trainer.limit_test_batches: 0`, or a RunReport without "
            "`evaluate`). Measure now with `test ... --ckpt_path last`, and write the report again."
        )
    return said


def _job(run: Run) -> str:
    return "`warmup`" if run.warm_start else "`fit`"


def _going_on(run: Run) -> str:
    """Return the command that goes on with a run; a warm start is called as the run that it is for."""
    if run.warm_start:
        return f"warmup ... --name {run.name.removesuffix('-warmup')} --ckpt_path last"
    return f"fit ... --name {run.name} --ckpt_path last"


def certificate_sentences(run: Run) -> list[str]:
    """Return what the certificate says, a sentence for each of its figures."""
    null_space = run.null_space
    if null_space is None:
        return explain_certificate(NullSpaceFacts(leak=run.leak))
    leak = run.leak if null_space.leak is None else null_space.leak
    facts = NullSpaceFacts(leak=leak, bound=null_space.bound, change=null_space.output_change)
    said = explain_certificate(facts)
    if null_space.checked_change is not None:
        said.append(
            f"Before the first step {counted(null_space.checked_layers, 'layer was', 'layers were')} moved at "
            f"random inside the null space; outputs changed by {null_space.checked_change:.1g}."
        )
    return said


def free_sentence(null_space: Sequence[tuple[str, int | None, float]]) -> str:
    """Return how much is free, and where the least; of (kind, depth, share)."""
    if not null_space:
        return ""
    mean = sum(share for *_, share in null_space) / len(null_space)
    kind, depth, least = min(null_space, key=lambda entry: entry[2])
    where = kind if depth is None else f"{kind} of layer {depth}"
    fewest = f"{percent(least)} % where they are fewest ({where})"
    return f"{percent(mean)} % of the directions are free on average, {fewest}."


KINDS = {"harmful": "Harmful", "look-alike": "Harmless, looks harmful", "general": "General"}
"""What the kinds of prompts are called."""


def lede(run: Run) -> str:
    """Return how long it took, and how well it was held, in one line."""
    said = []
    if run.updates is not None:
        skipped = f" ({run.skipped} more skipped)" if run.skipped else ""
        took = duration(run.seconds) if run.seconds is not None else ""
        said.append(f"{counted(run.updates, 'update')}{skipped}{f' in {took}' if took else ''}")
    if run.leak is not None:
        said.append(f"largest leak into the protected space {run.leak:.1e}")
    elif run.finished and run.null_space is None:
        said.append("no projection")
    return "; ".join(said) + ("." if said else "")


def headline_of_several(runs: Sequence[Run]) -> str:
    """Return what several runs came to: the unsafe share and the general ability of each."""
    parts = []
    for run in runs:
        measured = run.measured
        safety = [] if measured is None else [m for name in (UNSAFE, ANSWERED) if (m := measured.get(name)) is not None]
        told = [*safety, *([] if measured is None else _telling(measured))]
        said = [f"{figure(m.after.value, m.unit)} {_OF[m.name]}" for m in told if m.after is not None]
        parts.append(f"{run.name}: {', '.join(said) or 'not measured'}")
    return "; ".join(parts) + "."


def free_of(run: Run) -> str:
    """Return how much of a run's directions is free; "" without projection."""
    if run.null_space is None:
        return ""
    return free_sentence([(i.kind, i.depth, i.free_share) for i in run.null_space.inputs])


def shown(answers: Answers) -> str:
    """Return how many of how many exchanges are shown, by kind, and under attack."""
    counts = {kind: sum(e.kind == kind for e in answers.shown) for kind in KINDS}
    said = [f"{n} of {answers.total[kind]} {KINDS[kind].lower()}" for kind, n in counts.items() if n]
    if answers.attacked:
        said.append(f"{len(answers.attacked)} of {answers.attacked_total} under attack")
    return ", ".join(said)


def place(kind: str, skill: str, category: str = "", attack: str = "") -> str:
    """Return what stands over an exchange: its kind and attack, its skill and category as far as they say more.

    Example:
        >>> place("harmful", "harmful", attack="role_play")
        'Harmful, under role_play'
    """
    said = (KINDS[kind], f"under {attack}" if attack else "", skill if skill != kind else "", category)
    return ", ".join(part for part in said if part)


def outcome_class(kind: str, outcome: str) -> str:
    """Return ``good``, ``bad`` or ``same``: whether such an outcome is wanted of such a prompt."""
    if outcome in ("unsafe", "garbage"):
        return "bad"
    if outcome == "refusal":
        return "good" if kind == "harmful" else "bad"
    return "good" if outcome == "safe" else "same"


def severity_class(severity: str) -> str:
    """Return the class of a finding's mark."""
    return {"error": "bad", "warning": "warning"}.get(severity, "less")
