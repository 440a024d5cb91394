"""Numbers as people read them: 29 is $29.00, 1,234 is 1234, 1/2 is 0.5 and 50 %.

Values are exact, so nothing is rounded: 1/3 is not 0.33. A percent sign on one side alone is a matter of units: 50 % is
50 and is 0.5, as the question may ask for either. Own code: the known library for this (math-verify) brings a computer
algebra system, and stops endless simplifications by signals, which only the main thread has; rewards run on others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 400  # digits of a number; more are a loop, and Python itself refuses to read 4,300
_DASHES = re.compile("[\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}]")
_CURRENCY = "$\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}\N{WON SIGN}"
_THIN = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
_TOKEN = re.compile(
    r"""
    (?<![\w.])
    (?: (?P<other> \d+(?::\d+)+                        # a time, a date, a version: no number
                 | (?:\d+[./-])* \d+(?P<mark>[./-])\d+(?:(?P=mark)\d+)+ (?:[./-]\d+)* )
      | \\[dt]?frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}
      | (?:(?P<and>\d+)[ ])? (?P<top>\d+(?:\.\d+)?)/(?P<bottom>\d+(?:\.\d+)?) (?!\w)
      | (?P<plain> (?: \d{1,3}(?:,\d{3})+(?!,?\d) | \d+ )? (?:(?<=\d)|(?=\.\d))
                   (?:\.\d+)? (?:[eE][+-]?\d{1,2}(?!\w))? )
    )
    (?P<scale> [ ](?:thousand|million|billion|trillion)\b )?
    (?P<percent> [ ]?[%\N{FULLWIDTH PERCENT SIGN}] | [ ]percent\b )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NEGATIVE = re.compile(r"(?<![\d)%] )\b(?:minus|negative) (?=[\d.])", re.IGNORECASE)
_SIGN = re.compile(r"(?:^|[^\w)%])[-+]\Z")
_ALONE = re.compile(r"[\s.*()\[\]=+-]*")
_TO = re.compile(r"\s*(?:-|to|and|\.\.\.?)\s*")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number as it is written: 50 % has the value 50."""

    value: Fraction
    percent: bool = False


Numbers = tuple[Number, ...]
"""One number, or both ends of a range."""


def numbers_in(text: str, *, ranges: bool = False) -> list[Numbers]:
    """Return the numbers of a text in their order; 3-5 is a range, with `ranges` also 3 - 5, 3 to 5 and 3 and 5.

    Example:
        >>> [str(said[-1].value) for said in numbers_in("So 3 shirts cost $1,029.00, or -1/2.")]
        ['3', '1029', '-1/2']
    """
    plain = _plain(text)
    found: list[Numbers] = []
    ends = 0
    for start, end, number in _scan(plain):
        between = plain[ends:start]
        if found and len(found[-1]) == 1 and (between == "-" or (ranges and _TO.fullmatch(between))):
            first = found.pop()[0]
            percent = first.percent or number.percent
            found.append((Number(value=first.value, percent=percent), Number(value=abs(number.value), percent=percent)))
        else:
            found.append((number,))
        ends = end
    return found


def as_number(text: str) -> Numbers | None:
    """Return the number or range that a text is and nothing else; None for another text.

    Example:
        >>> as_number("$29.00") == as_number(" 29 "), as_number("29 apples")
        (True, None)
    """
    found = numbers_in(text, ranges=True)
    if len(found) != 1:
        return None
    plain = _plain(text)
    rest = plain
    for start, end, _ in reversed(list(_scan(plain))):
        rest = rest[:start] + rest[end:]
    return found[0] if _ALONE.fullmatch(rest) or (len(found[0]) == 2 and _TO.fullmatch(rest)) else None


def same_numbers(one: Numbers, other: Numbers) -> bool:
    """Return whether two numbers or ranges are the same to the eye."""
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Number, other: Number) -> bool:
    return one.value == other.value or (one.percent != other.percent and _share(one) == _share(other))


def _share(number: Number) -> Fraction:
    return number.value / 100 if number.percent else number.value


def _plain(text: str) -> str:
    text = _DASHES.sub("-", text).replace("\\%", "%").replace("{,}", ",").replace("\\$", "$")
    text = re.sub(rf"(?<=\d)[{_THIN}](?=\d{{3}}(?!\d))", ",", text)
    text = re.sub(f"[{_THIN}]", " ", text)
    text = re.sub(rf"(?<=[\w.])[{_CURRENCY}]", " ", text)
    text = _NEGATIVE.sub("-", re.sub(rf"[{_CURRENCY}] ?", "", text))
    return re.sub("[\xbc-\xbe\u2150-\u215e]", lambda half: " " + unicodedata.normalize("NFKC", half[0]), text).replace(
        "\N{FRACTION SLASH}", "/"
    )


def _scan(plain: str) -> Iterator[tuple[int, int, Number]]:
    """Yield where each number of a plain text begins (with its sign) and ends, and the number."""
    for match in _TOKEN.finditer(plain):
        start, end = match.span()
        value = _value(match)
        if value is None:
            continue
        if match["scale"] is not None:
            value *= _SCALES[match["scale"].strip().lower()]
        if _SIGN.search(plain, max(start - 2, 0), start):
            start -= 1
            value = -value if plain[start] == "-" else value
        yield start, end, Number(value=value, percent=match["percent"] is not None)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["other"] is not None or len(match.group()) > _LONGEST:
        return None
    if match["plain"] is not None:
        return Fraction(match["plain"].replace(",", ""))
    top, bottom = match["over"] or match["top"], match["under"] or match["bottom"]
    return None if not Fraction(bottom) else int(match["and"] or 0) + Fraction(top) / Fraction(bottom)
