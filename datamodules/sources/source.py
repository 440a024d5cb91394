"""Where prompts come from: one frozen dataclass, the schema behind ``data.safety`` and ``data.general``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from nspo_lightning.attacks import data_attacks

Kind = Literal["harmful", "benign"]
AnswerUse = Literal["match", "text"]
"""Whether answers are compared with completions, or are free text, which is scored by its likelihood."""
BadRows = Literal["error", "drop"]
HARMFUL_TARGET = "harmful_target"
"""Column of a row that holds the beginning of an answer that complies, where the data have one."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """A set of prompts: a Hugging Face dataset, local files, a built-in world or a Python function.

    A bare string in a configuration stands for ``PromptSource(path=...)``.
    """

    path: str | None = None
    """A local file or folder (csv, json, jsonl, parquet; .gz too), a hub id such as `PKU-Alignment/PKU-SafeRLHF`,
    or a built-in world such as `toy/harmful`. May be left out where `preset` names a hub dataset."""
    preset: str | None = None
    """How to read the rows, by name (`advbench`, `gsm8k`, ...). Recognised from the columns when left out."""
    name: str | None = None
    """The configuration of a hub dataset (`main`, `alpaca-7b`), or the part of a built-in world."""
    split: str = "train"
    """The split to read. In a folder: the files whose name holds this word, when any does."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    rows: Callable[[str], Iterable[dict[str, Any]]] | None = None
    """A function that is given the split's name and returns rows (dicts or a `datasets.Dataset`), instead of `path`."""
    prompt_column: str | None = None
    """The column that holds the prompt (text), where no preset says it. Default: `prompt`."""
    messages_column: str | None = None
    """The column that holds a chat (a list of role and content). A last assistant turn becomes the answer."""
    answer_column: str | None = None
    """The column that holds the reference answer. Default: `answer`, where there is one."""
    target_column: str | None = None
    """The column that holds the beginning of an answer that complies, for attacks that begin the answer (`prefill_5`,
    `model.prefixes`). Default: as the preset says (`advbench`, `jailbreakbench`); without one the base's own answers
    are used."""
    attacks: list[str] | None = None
    """Templates that training puts around the prompts (`[role_play, for_research]`, a YAML file of your own): each row
    stands as it is or in one of them, with equal shares, as its text decides. Held-out rows stay as they are. Judges
    and rewards see the request itself."""
    only: dict[str, Any] | None = None
    """Columns and the values, one or a list, that a row must have to be read (`{type: [homonyms, definitions]}`): as if
    the others were not in the file. Values are compared as text, less the white space around it."""
    without: dict[str, Any] | None = None
    """Columns and the values, one or a list, of rows that are not read: the opposite of `only`."""
    answers: AnswerUse | None = None
    """Whether completions are compared with the answers (`match`), or these are free text that is scored by its
    likelihood (`text`). Default: as the preset or the row's `final_answer` says, else compared where they are short."""
    skill: str | None = None
    """The name under which results are reported. Default: the row's `skill`, else the preset's or the file's name."""
    kind: Kind | None = None
    """Whether a good policy refuses these prompts (`harmful`) or answers them (`benign`). Default: as the preset or the
    row's `kind` says (also unsafe, safe, true, 1, ...), else by where the source stands: `harmful` among safety
    prompts, `benign` among general data."""
    system_prompt: str | None = None
    """A system message put before every prompt that has none."""
    weight: float | None = None
    """The share of this source in a mixture, relative to the others'. Default: equal shares."""
    fraction: float | None = None
    """The share of the usable rows that training sees, in (0, 1]; chosen by `seed`, smaller ones inside larger ones."""
    count: int | None = None
    """The number of usable rows that training sees; all of them when there are fewer."""
    seed: int = 0
    """Decides which rows `fraction` and `count` choose, and the order in which a stream is shuffled."""
    deduplicate: bool = True
    """Keep the first of several rows with the same prompt."""
    max_prompt_tokens: int | None = None
    """Leave out, and report, rows whose rendered prompt is longer. Default: the datamodule's."""
    bad_rows: BadRows = "error"
    """What a row does that cannot be used (an empty, null, non-text or absurdly long prompt, an unknown `kind`): stop,
    or be left out and reported."""
    streaming: bool = False
    """Read rows as they come and stop after `count` usable ones (needs `count`)."""

    def check(self) -> None:
        """Check what can be checked without reading anything.

        The datamodules call this. It is no `__post_init__`, because jsonargparse wraps what is raised while a
        dataclass is built into pages about the other types that the value might have had.

        Raises:
            ValueError: If the fields contradict each other or lie outside their range.
        """
        label = self.label
        if self.path is None and self.preset is None and self.rows is None:
            raise ValueError("A prompt source needs `path`, `preset` or `rows`. Set one of them.")
        if self.rows is not None and self.path is not None:
            raise ValueError(f"`rows` and `path` ({self.path!r}) were both given. Keep one of them.")
        if self.fraction is not None and self.count is not None:
            raise ValueError(f"{label}: `fraction` and `count` were both given. Keep one of them.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"{label}: `fraction` must be in (0, 1], got {self.fraction}. Use 0.4 for 40 %.")
        for field, value in (("count", self.count), ("max_prompt_tokens", self.max_prompt_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{label}: `{field}` must be at least 1, got {value}.")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(
                f"{label}: `weight` must be positive, got {self.weight}. Remove the source to leave it out."
            )
        if self.streaming and self.count is None:
            raise ValueError(f"{label}: `streaming` needs `count`, the number of usable rows after which to stop.")
        if self.prompt_column is not None and self.messages_column is not None:
            raise ValueError(f"{label}: `prompt_column` and `messages_column` were both given. Keep one of them.")
        if self.preset is not None and self.named_columns:
            field = next(iter(self.named_columns))
            raise ValueError(f"{label}: `preset` ({self.preset}) names the columns, not `{field}`. Keep one.")
        for field, known in (("kind", get_args(Kind)), ("answers", get_args(AnswerUse))):
            if (given := vars(self)[field]) is not None and given not in known:
                raise ValueError(f"{label}: `{field}` must be one of {known} or left out, got {given!r}.")
        for field, columns in (("only", self.only), ("without", self.without)):
            if columns is not None and (not columns or not all(map(values_of, columns.values()))):
                raise ValueError(
                    f"{label}: `{field}` must name columns and values, such as {{type: [homonyms]}}, got {columns}."
                )
        if self.attacks is not None:
            data_attacks(self.attacks, label)
        if self.bad_rows not in get_args(BadRows):
            raise ValueError(f"{label}: `bad_rows` must be one of {get_args(BadRows)}, got {self.bad_rows!r}.")

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns that this source names itself, by the field that names them."""
        fields = {
            "prompt_column": self.prompt_column,
            "messages_column": self.messages_column,
            "answer_column": self.answer_column,
            "target_column": self.target_column,
        }
        return {field: column for field, column in fields.items() if column is not None}

    @property
    def label(self) -> str:
        """What messages and reports call this source."""
        if self.rows is not None:
            return getattr(self.rows, "__name__", type(self.rows).__name__)
        return str(self.path if self.path is not None else self.preset)


def values_of(value: Any) -> list[str]:
    """Return what a column is compared with, one value or a list, as text without white space around it."""
    return [str(item).strip() for item in value] if isinstance(value, (list, tuple)) else [str(value).strip()]


Sources = str | PromptSource | list[str | PromptSource]
"""What a configuration accepts: a path, a source, or a list of either (a mixture)."""


def as_sources(sources: Sources | None, key: str, system_prompt: str | None = None) -> list[PromptSource]:
    """Return what a configuration holds (a path, a source, a list of either, or None) as a list of sources.

    Args:
        sources: What the configuration holds.
        key: The configuration key, for messages.
        system_prompt: The system prompt of sources that have none of their own.

    Raises:
        ValueError: If the list is empty, or a source's fields are wrong.
        TypeError: If an entry is neither text nor a source.
    """
    if sources is None:
        return []
    entries = sources if isinstance(sources, list) else [sources]
    if not entries:
        raise ValueError(f"`{key}` is an empty list. Name at least one source, or leave the key out.")
    result = []
    for entry in entries:
        if not isinstance(entry, (str, PromptSource)):
            raise TypeError(f"`{key}` must hold paths or PromptSource entries, got {type(entry).__name__}.")
        source = PromptSource(path=entry) if isinstance(entry, str) else entry
        source.check()
        if system_prompt is not None:
            source = replace(source, system_prompt=source.system_prompt or system_prompt)
        result.append(source)
    return result
