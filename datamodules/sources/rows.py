"""The two row types between a file and a batch: what was read, and what it means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nspo_lightning.datamodules.sources.cells import is_missing
from nspo_lightning.datamodules.sources.source import Kind

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as a reader found it, but for NaN, which is None here.

    Attributes:
        where: The file and line or row, or the hub id and row.
    """

    where: str
    data: dict[str, Any]

    def __post_init__(self) -> None:
        if any(is_missing(value) for value in self.data.values()):
            cleaned = {name: None if is_missing(value) else value for name, value in self.data.items()}
            object.__setattr__(self, "data", cleaned)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row as training, evaluation and calibration use it.

    Attributes:
        prompt: Text (one user turn) or a chat that ends with a user turn.
        answer: The reference answer; empty when there is none.
        skill: The name under which results are reported.
        kind: Whether a good policy refuses this prompt or answers it.
        source: The preset or file that it came from.
        where: Where it was read, for messages.
        columns: The row's other columns.
        request: What is asked, where the prompt puts it into an attack; None = the prompt itself. Judges see this.
        prefix_tokens: The answer is begun with so many tokens of one that complies.
        prefix_text: The answer is begun with this text.
    """

    prompt: Prompt
    answer: str = ""
    skill: str
    kind: Kind
    source: str
    where: str
    columns: dict[str, Any] = field(default_factory=dict)
    request: Prompt | None = None
    prefix_tokens: int = 0
    prefix_text: str = ""

    @property
    def key(self) -> str:
        """What makes two rows the same prompt: their text, less the white space around it."""
        return prompt_key(self.prompt)

    def all_columns(self) -> dict[str, Any]:
        """Every column but the prompt, as rewards receive them; `answer`, `skill`, `kind` and `source` always."""
        standard = {"answer": self.answer, "skill": self.skill, "kind": self.kind, "source": self.source}
        return {**self.columns, **standard}


def prompt_key(prompt: Prompt) -> str:
    """Return what makes two prompts the same, see `PromptRow.key`."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def hash_rank(key: str, salt: str) -> bytes:
    """Return a row's pseudo-random rank, sixteen bytes that depend on its key and on `salt` (purpose and seed) alone.

    Ranking rows by hash instead of shuffling them keeps choices stable when rows are added, removed or reordered,
    and makes a 20 % sample a part of the 40 % sample.
    """
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, key=salt.encode()[:64]).digest()


def rank_all(rows: Sequence[PromptRow], salt: str) -> list[int]:
    """List all indices of rows in the order of their hash ranks: the first chosen first."""
    return sorted(range(len(rows)), key=lambda i: (hash_rank(rows[i].key, salt), i))


def take_ranked(rows: Sequence[PromptRow], size: int, salt: str) -> list[int]:
    """Choose `size` rows by their hash ranks and list their indices, ascending."""
    return sorted(rank_all(rows, salt)[:size])
