"""A judge's prompt keeps its structure, whatever is written in the texts that it is about.

A policy that writes a guard's control tokens could end its turn and write the verdict itself. So marks are broken by a
space wherever a text holds one, also one that only a tolerant tokenizer would read as a mark: in another case, in
fullwidth letters, with accents or with characters inside that nobody sees. `Structure` then looks at the outcome: the
prompt's control tokens and marks must be those of the same prompt about a harmless text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nspo_lightning.policy.turns import special_ids

Chat = list[dict[str, Any]]

TURN_MARKS = (
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>"),
    *("<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<BEGIN CONVERSATION>", "<END CONVERSATION>"),
    *("<BEGIN UNSAFE CONTENT CATEGORIES>", "<END UNSAFE CONTENT CATEGORIES>"),
)
"""Marks of the known families of models, beside everything of the form `<|...|>`."""
HARMLESS = "nothing said"
_ANY_CONTROL = r"<\|[^<>|\n]{1,60}\|>"
_IN_TEMPLATES = re.compile(r"<[^<>\s][^<>\n]{0,80}>|\[/?[A-Z][^\[\]\n{}]{0,40}\]")
_LABEL_IN_TEMPLATES = re.compile(r"^[ \t]*([A-Za-z][\w' ]{0,30}:)", re.MULTILINE)
_LINE_ENDS = frozenset("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
_UNSEEN = frozenset("\u115f\u1160\u3164\uffa0\u17b4\u17b5\ufffd")  # no format characters, yet dropped or not drawn
_TRIES = 8


class Marks:
    """Texts that mean something to a judge, and how to take their meaning away.

    Args:
        marks: Wherever they stand.
        labels: At the beginning of a line, as `User:`.
        templates: Marks and labels in these count too.
    """

    def __init__(self, marks: Iterable[str], labels: Iterable[str] = (), templates: Iterable[str] = ()) -> None:
        all_marks, all_labels = {*TURN_MARKS, *marks}, set(labels)
        for template in templates:
            all_marks.update(mark for mark in _IN_TEMPLATES.findall(template) if HARMLESS not in mark)
            all_labels.update(label for label in _LABEL_IN_TEMPLATES.findall(template) if HARMLESS not in label)
        words = sorted({word for mark in all_marks if len(word := folded(mark)[0].strip()) > 1}, key=len, reverse=True)
        lines = sorted(
            {word for label in all_labels if len(word := folded(label)[0].strip()) > 1}, key=len, reverse=True
        )
        pattern = "|".join([_ANY_CONTROL, *map(re.escape, words)])
        if lines:
            pattern += rf"|(?:(?<=\n)|\A)[ \t]*(?P<label>{'|'.join(map(re.escape, lines))})"
        self._pattern = re.compile(pattern)

    def found(self, text: str) -> list[str]:
        """List the marks in a text, in their order, as the most tolerant reader sees them."""
        return [match.group().strip() for match in self._pattern.finditer(folded(text)[0])]

    def broken(self, text: str) -> str:
        """Return the text with a space inside each mark; all else stays as it is."""
        for _ in range(_TRIES):
            seen, places = folded(text)
            cuts = {places[_middle(match)] for match in self._pattern.finditer(seen)}
            if not cuts:
                return text
            for cut in sorted(cuts, reverse=True):
                text = f"{text[:cut]} {text[cut:]}"
        return re.sub(r"[<>\[\]{}|:]", " ", folded(text)[0])  # a mark out of one character


def _middle(match: re.Match[str]) -> int:
    """Return where a mark is cut: after its first character, and a label before its colon."""
    return match.end() - 1 if match.groupdict().get("label") else match.start() + 1


def folded(text: str) -> tuple[str, Sequence[int]]:
    """Return the text as a tokenizer that normalises everything may read it, and each character's place in it."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text.lower(), range(len(text))
    characters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        read = _folded(character)
        characters.append(read)
        places += [place] * len(read)
    return "".join(characters), places


@functools.lru_cache(maxsize=65536)
def _folded(character: str) -> str:
    if character in _LINE_ENDS:
        return "\n"
    if character == "\t":
        return character
    plain = unicodedata.normalize("NFKD", character).casefold()
    return "".join(
        " " if unicodedata.category(c) == "Zs" else c
        for c in unicodedata.normalize("NFKD", plain)
        if unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Mn", "Me") and c not in _UNSEEN
    )


def harmless(chat: Chat) -> Chat:
    """Return a conversation of the same turns that says nothing."""
    return [{"role": turn["role"], "content": HARMLESS} for turn in chat]


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return a tokenizer's control tokens with their numbers: special ones, and added ones that look like marks."""
    special = {str(tokenizer.convert_ids_to_tokens(number)): number for number in special_ids(tokenizer)}
    added = {str(token): int(number) for token, number in tokenizer.get_added_vocab().items()}
    numbers = {**added, **special}
    looks = re.compile(r"\s*(?:[<\[{|].*|.*[>\]}|])\s*", re.DOTALL)
    return {
        token: number
        for token, number in numbers.items()
        if token != tokenizer.unk_token and (token in special or looks.fullmatch(token))
    }


@dataclass(frozen=True)
class Structure:
    """The control tokens and marks of one kind of prompt.

    Attributes:
        marks: What texts must not hold.
        controls: Numbers of control tokens.
        encode: Gives a prompt's token numbers.
        expected: What the prompt about a harmless text has.
    """

    marks: Marks
    controls: frozenset[int]
    encode: Callable[[str], Sequence[int]]
    expected: tuple[list[int], list[str]]

    @classmethod
    def of(cls, tokenizer: Any, skeleton: str, labels: Iterable[str] = ()) -> Structure:
        """Read it off a prompt about a harmless text."""
        tokens = control_tokens(tokenizer)

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        found = Marks(tokens, labels, [skeleton])
        controls = frozenset(tokens.values())
        return cls(found, controls, encode, _read(skeleton, found, controls, encode))

    def is_kept(self, text: str) -> bool:
        """Say whether a prompt has this structure and no other."""
        return _read(text, self.marks, self.controls, self.encode) == self.expected


def _read(
    text: str, marks: Marks, controls: frozenset[int], encode: Callable[[str], Sequence[int]]
) -> tuple[list[int], list[str]]:
    return [number for number in encode(text) if number in controls], marks.found(text)
