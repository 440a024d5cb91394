"""The attacks that there are, by name, and what a list of names stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from nspo_lightning.attacks.decoding import BEST_OF, TEMPERATURES, TOP_P, Decoding
from nspo_lightning.attacks.many_shot import SHOTS, ManyShot
from nspo_lightning.attacks.prefill import TOKENS, Prefill
from nspo_lightning.attacks.protocol import Attack, AttackError
from nspo_lightning.attacks.templates import read_templates, shipped_templates

Given = str | Sequence[str | Attack]
"""What a configuration may say: a name, or a list of names, files of templates and attacks."""

_NUMBERED: dict[str, Callable[[str], Attack]] = {
    r"prefill_(\d+)": lambda number: Prefill(int(number)),
    r"many_shot_(\d+)": lambda number: ManyShot(int(number)),
    r"best_of_(\d+)": lambda number: Decoding(f"best_of_{number}", tries=int(number)),
    r"temperature_(\d+(?:\.\d+)?)": lambda number: Decoding(f"temperature_{number}", temperature=float(number)),
    r"top_p_(\d*\.?\d+)": lambda number: Decoding(f"top_p_{number}", top_p=float(number)),
}
_FORMS = ("prefill_N", "many_shot_N", "best_of_N", "temperature_X", "top_p_X")


def groups() -> dict[str, list[str]]:
    """Return the names that stand for several attacks, and which."""
    found = {
        "prefill": [f"prefill_{tokens}" for tokens in TOKENS],
        "decoding": [*(f"temperature_{t}" for t in TEMPERATURES), f"top_p_{TOP_P}", f"best_of_{BEST_OF}"],
        "templates": [*shipped_templates(), *(f"many_shot_{shots}" for shots in SHOTS)],
    }
    return {"default": [name for names in found.values() for name in names], **found}


def find_attacks(given: Given) -> list[Attack]:
    """Return the attacks that a list names, each once, in its order.

    Args:
        given: Names (`prefill_5`, `role_play`, ...), groups of them (`default`, `prefill`, `decoding`, `templates`),
            YAML files of templates, or attacks.

    Raises:
        AttackError: If there is none of a name (those that there are are listed), or two have the same.
    """
    entries = [one.strip() for one in given.split(",")] if isinstance(given, str) else list(given)
    if not entries:
        raise AttackError(f"`attacks` is an empty list. {_known()}")
    found: dict[str, Attack] = {}
    for attack in (attack for entry in entries for attack in _attacks_of(entry)):
        known = found.setdefault(attack.name, attack)
        if not attack.name.strip() or set(attack.name) & set("/,"):
            raise AttackError(
                f"{attack.name!r} can't be the name of an attack ({type(attack).__name__}): it stands in lists and in "
                "names of metrics, so it must have a letter, no comma and no slash. Give it another one."
            )
        if not known.is_same_as(attack):
            raise AttackError(f"Two attacks are called `{attack.name}`. Give one of them another name.")
    for attack in found.values():
        attack.check()
    return list(found.values())


def is_template_file(name: str) -> bool:
    """Whether a name in a list of attacks is that of a file of templates."""
    return name.endswith((".yaml", ".yml"))


def data_attacks(names: Sequence[str], where: str) -> list[Attack]:
    """Return the attacks that a data source names: those that change prompts alone.

    Raises:
        AttackError: If there is none of a name, or one that is no change of a prompt.
    """
    attacks = find_attacks(names)
    if wrong := [attack.name for attack in attacks if not attack.changes_prompts]:
        raise AttackError(
            f"{where}: `attacks` of a data source change its prompts, and `{wrong[0]}` does something else. Give "
            f"templates: {', '.join(groups()['templates'])}, or a YAML file of your own. Beginnings of answers are "
            "trained against by `model.prefixes`."
        )
    return attacks


def _attacks_of(entry: str | Attack) -> list[Attack]:
    if isinstance(entry, Attack):
        return [entry]
    if not isinstance(entry, str):
        raise AttackError(f"`attacks` must hold names or attacks, got {type(entry).__name__}. {_known()}")
    if is_template_file(entry):
        return _own_templates(Path(entry))
    if entry in groups():
        return [attack for name in groups()[entry] for attack in _attacks_of(name)]
    if entry in shipped_templates():
        return [shipped_templates()[entry]]
    for pattern, make in _NUMBERED.items():
        if match := re.fullmatch(pattern, entry):
            return [make(match[1])]
    near = get_close_matches(entry.lower(), [*groups(), *groups()["default"]], n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    raise AttackError(f"There is no attack '{entry[:60]}'.{meant} {_known()}")


def _own_templates(path: Path) -> list[Attack]:
    """Read a user's templates; a name that stands for another kind of attack is refused."""
    found = read_templates(path)
    for name in found:
        if name in groups() or any(re.fullmatch(pattern, name) for pattern in _NUMBERED):
            raise AttackError(
                f"{path}: '{name}' can't be the name of a template: it is that of "
                f"{'a group of attacks' if name in groups() else 'another attack'}. Give it another one."
            )
    return list(found.values())


def _known() -> str:
    names = groups()
    lines = [f"  {name}: {', '.join(members)}" for name, members in names.items() if name != "default"]
    return "\n".join([
        "There are, by group:",
        *lines,
        "  default: all of these",
        f"  any number in {', '.join(_FORMS)}; a YAML file of templates; an attack by its class path "
        "(nspo_lightning.attacks.Pair, nspo_lightning.attacks.GCG)",
    ])
