"""What is used of jsonargparse beyond its API: the texts of its messages.

It raises plain errors whose text alone says which key is meant and what each type had against a value. The forms that
are read here are those of `raise_union_unexpected_value`, `ActionTypeHint` (jsonargparse/_typehints.py) and
`ArgumentParser.validate` (jsonargparse/_core.py).
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, replace

_UNION = "Does not validate against any of the Union subtypes"
_NO_CLASS = ("Not a valid subclass", "Unable to import", "Import path ", "Type typing.Callable", "Type collections.abc")
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\n(?P<rest>.*)", re.DOTALL)
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option|Subcommand '[^']+' does not accept option|Option) "
    r"'(?P<key>[^']+)'(?: is not accepted.*)?$"
)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<given>.*))?$", re.DOTALL)
_CALLABLE = re.compile(
    r"Type \S*Callable.* expects a function or a callable class: (?P<reason>.*?)(?:\. Got value: (?P<given>.*))?$",
    re.DOTALL,
)
_NAMED = re.compile(r"class_path='([^']+)'")
_NESTED = re.compile(r"NestedArg\(key='[^']*', val=(?P<value>.*)\)$", re.DOTALL)
_NO_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_NO_IMPORT = re.compile(r"module '[^']+' has no attribute|No module named|not enough values to unpack|Import path")


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """What a parser has against a configuration.

    Attributes:
        path: Keys down to where it is, without `init_args`.
        class_path: The innermost class that was named on the way.
        unknown: A setting that there is none of, at `path`.
        expected: Types of which none fits, as jsonargparse writes them.
        given: The value, as text.
        no_import: Whether `class_path` (or `given`) can't be imported.
        reason: Anything else, in the words of whoever raised it.
    """

    path: tuple[str, ...] = ()
    class_path: str | None = None
    unknown: str | None = None
    expected: tuple[str, ...] = ()
    given: str | None = None
    no_import: bool = False
    reason: str = ""

    @property
    def weight(self) -> int:
        """How much it says: what a named class has against its settings, before what another type expects."""
        if self.unknown or (self.reason and self.class_path):
            return 3 + len(self.path)
        if self.path:
            return 2 + len(self.path)
        return 2 if self.no_import else 1 if self.reason else 0


def read_complaint(text: str) -> Complaint:
    """Read what one message complains of; of a union, what the type had against the value that the value names."""
    text = text.strip()
    if found := _KEY.match(text):
        inner = read_complaint(textwrap.dedent(found["rest"]))
        return replace(inner, path=(*found["key"].split("."), *inner.path))
    if text.startswith("- Expected a path but "):  # a value that could have been a file with settings
        return read_complaint(textwrap.dedent("    " + text.partition("\n  - ")[2]) or text)
    if text.startswith(_UNION):
        return _of_union(text)
    if found := _CALLABLE.match(text):
        inner, named = read_complaint(found["reason"]), _NAMED.search(found["given"] or "")
        return replace(inner, class_path=inner.class_path or (named[1] if named else None))
    if found := _CLASS.match(text):
        inner = read_complaint(textwrap.dedent(found["rest"]))
        return replace(inner, class_path=inner.class_path or found["path"])
    if found := _UNKNOWN.match(text):
        keys = [key for key in f"{found['group'] or ''}.{found['key']}".split(".") if key]
        return Complaint(path=tuple(keys[:-1]), unknown=keys[-1])
    if (found := _EXPECTED.match(text)) and not found["type"].startswith("'"):
        return Complaint(expected=(found["type"],), given=found["given"])
    named = _NO_ATTRIBUTE.search(text)
    class_path = f"{named[1]}.{named[2]}" if named else None
    return Complaint(reason=text, no_import=bool(_NO_IMPORT.search(text)), class_path=class_path)


def _of_union(text: str) -> Complaint:
    first, line_break, rest = text.partition("\n")
    head, _, given = (first + line_break + textwrap.dedent(rest)).partition("\nGiven value type:")
    types, _, listed = head.partition("Subtypes: [")[2].partition("]\nErrors:")
    errors = re.split(r"\n {2}- ", listed)[1:]
    found = [read_complaint(textwrap.dedent("    " + error)) for error in errors if not error.startswith(_NO_CLASS)]
    value = given.partition("Given value: ")[2].strip()
    if nested := _NESTED.search(value):
        value = nested["value"].strip("'\"")
    best = max(found, key=lambda complaint: complaint.weight, default=Complaint())
    if best.weight:
        return best if best.given is not None else replace(best, given=value)
    return Complaint(expected=tuple(_split(types)), given=value)


def _split(types: str) -> list[str]:
    """Split at commas outside of brackets."""
    depth, parts = 0, [""]
    for sign in types:
        depth += (sign in "[(") - (sign in "])")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def told_reason(text: str) -> str:
    """Return what the subtype that a value names had against it; any other message is returned as it is."""
    if not text.startswith(_UNION):
        return text
    return read_complaint(text).reason or text
