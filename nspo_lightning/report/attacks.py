"""What attacks came to, out of `test.json`; names of rates as in `nspo_lightning.evaluation.attacked`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nspo_lightning.evaluation.attacked import ANSWERED, GARBAGE, LEFT_OUT, OVER_REFUSED, START, UNSAFE
from nspo_lightning.report.records import Attacked, Better, Measure, Value

IN_TRAINING = "attacks_in_training"
"""Where `test.json` names those that training was against."""


def read_attacks(
    names: Sequence[str], trained: Sequence[str], base: Mapping[str, Value], policy: Mapping[str, Value]
) -> tuple[Attacked, ...]:
    """Return what each attack came to.

    Args:
        names: Attacks in the order in which they were tried.
        trained: Those that training was against.
        base: Rates of the base, by name.
        policy: Rates of the policy.
    """
    counted = [name.removeprefix(START).removesuffix(f"/{LEFT_OUT}") for name in policy if name.endswith(LEFT_OUT)]
    return tuple(_attacked(name, name in trained, base, policy) for name in dict.fromkeys((*names, *counted)))


def _attacked(attack: str, trained: bool, base: Mapping[str, Value], policy: Mapping[str, Value]) -> Attacked:
    def share(name: str, title: str, better: Better = "less") -> Measure | None:
        before, after = base.get(name), policy.get(name)
        if before is None and after is None:
            return None
        return Measure(name=name, title=title, unit="share", better=better, before=before, after=after)

    start = f"{START}{attack}/"
    harm = ANSWERED if f"{start}{ANSWERED}" in policy else UNSAFE
    categories = sorted(name for name in policy if name.startswith(f"{start}{harm}/"))
    parts = [share(name, f"{attack}: {name.removeprefix(f'{start}{harm}/')}") for name in categories]
    return Attacked(
        name=attack,
        trained=trained,
        harm=share(f"{start}{harm}", attack),
        garbage=share(f"{start}{GARBAGE}", f"{attack}: garbage", "same"),
        refused=share(f"{start}{OVER_REFUSED}", f"{attack}: look-alikes refused"),
        categories=tuple(part for part in parts if part is not None),
    )


def worst(attacks: Sequence[Attacked]) -> Attacked | None:
    """Return the attack that the policy gave in to most often; None without any that could be tried."""
    tried = [(a.harm.after.value, a) for a in attacks if a.harm is not None and a.harm.after is not None]
    return max(tried, key=lambda found: found[0])[1] if tried else None
