"""Templates: a request inside another text, read from a YAML file that users extend by files of their own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from nspo_lightning.attacks.places import PLACES, filled, misspelt_places, places_in
from nspo_lightning.attacks.protocol import Attack, AttackError, AttackRow, Victim
from nspo_lightning.rewards.messages import as_text, with_last
from nspo_lightning.rewards.protocol import Text

SHIPPED = Path(__file__).parent / "templates.yaml"
_PARTS = ("user", "system", "prefix")
_EXAMPLE = 'name: "Some words. {request}", or name: {system: ..., user: "... {request} ...", prefix: ...}'


class Template(Attack):
    """Put the request into a text.

    Args:
        name: Its name in tables.
        user: What the user says, with at least one place for the request (`{request}`, see `PLACES`).
        system: A system message before it, in the place of the row's own; may have places too.
        prefix: Text that the answer begins with; may have places too.
        source: The file that it is from, for messages.

    Raises:
        AttackError: If there is no place for the request, or a misspelt one.
    """

    def __init__(
        self, name: str, user: str, system: str | None = None, prefix: str = "", source: str = "templates"
    ) -> None:
        self.name, self.user, self.system, self.prefix, self.source = name, user, system, prefix, source
        places = places_in(user) + places_in(system or "")
        known = _listed(PLACES)
        if not any(place in PLACES for place in places):
            raise AttackError(
                f"{source}: template '{name}' has no place for the request: expected at least one of {known} in "
                f"`user`, found {_listed(places) or 'none'}. Write the request's place into the text."
            )
        if wrong := misspelt_places("\n".join([user, system or "", prefix])):
            raise AttackError(
                f"{source}: template '{name}' has {_listed(wrong)}, which is no place for a request and would stand "
                f"in the text as it is. There are {known}. Mend it, or write it in another way."
            )

    @override
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        return [
            replace(row, prompt=self.around(row.prompt), prefix_text=filled(self.prefix, as_text(row.prompt)))
            for row in rows
        ]

    def around(self, prompt: Text) -> Text:
        """Return a prompt with the request, its last user turn, inside the template."""
        request = as_text(prompt)
        user = filled(self.user, request)
        if self.system is None:
            return with_last(prompt, user)
        turns = [] if isinstance(prompt, str) else [turn for turn in prompt[:-1] if turn.get("role") != "system"]
        return [{"role": "system", "content": filled(self.system, request)}, *turns, {"role": "user", "content": user}]

    @property
    @override
    def changes_prompts(self) -> bool:
        return not self.prefix


def read_templates(path: Path) -> dict[str, Template]:
    """Return what a YAML file of templates holds: name to text, or to `user`, `system` and `prefix`.

    Raises:
        AttackError: If it is not there, or holds something else.
    """
    content = read_yaml(path)
    found = content.get("templates")
    if not isinstance(found, Mapping) or not found:
        raise AttackError(f"{path}: expected `templates:` with at least one entry ({_EXAMPLE}), found none.")
    if others := [str(key) for key in content if key != "templates"]:
        raise AttackError(
            f"{path}: expected `templates:` alone, found `{others[0]}` too, which would change nothing. Put templates "
            "under `templates:`, or leave it out; the turns of `many_shot_N` are the package's."
        )
    return {str(name): _template(str(name), entry, path) for name, entry in found.items()}


@functools.cache
def shipped_templates() -> dict[str, Template]:
    """Return the templates of the package by name."""
    entries = read_yaml(SHIPPED)["templates"]
    return {name: _template(name, entry, SHIPPED) for name, entry in entries.items()}


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file that holds settings by name; AttackError if it is not there or holds something else."""
    if not path.expanduser().is_file():
        raise AttackError(f"There is no file of attack templates at '{path}'. Mend the path.")
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        _refuse_doubles(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AttackError(f"{path} is no YAML in UTF-8: {error}") from error
    if not isinstance(content, Mapping):
        raise AttackError(f"{path}: expected `templates:` with entries ({_EXAMPLE}), found {type(content).__name__}.")
    return content


def _refuse_doubles(node: yaml.Node | None) -> None:
    """Raise YAMLError where a name stands twice in one section, of which YAML would keep the last."""
    left, seen = [node], set[int]()
    while left:
        section = left.pop()
        if not isinstance(section, yaml.MappingNode) or id(section) in seen:  # an alias may name what it stands in
            continue
        seen.add(id(section))
        names = [key.value for key, _ in section.value]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise yaml.YAMLError(f"'{twice}' stands twice in one section. Give one of them another name")
        left += [inner for _, inner in section.value]


def _listed(places: Iterable[str]) -> str:
    return ", ".join(f"{{{place}}}" for place in places)


def _template(name: str, entry: Any, path: Path) -> Template:
    parts = {"user": entry} if isinstance(entry, str) else entry
    fits = isinstance(parts, Mapping) and "user" in parts and set(parts) <= set(_PARTS)
    if not fits or not all(isinstance(text, str) for text in parts.values()):
        raise AttackError(f"{path}: template '{name}' can't be read: expected {_EXAMPLE}, found {str(entry)[:200]!r}.")
    return Template(name, **parts, source=str(path))
