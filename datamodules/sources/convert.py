"""From raw rows to prompt rows: which column is the prompt, and is it fit to be one?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nspo_lightning.datamodules.sources.errors import DataError, clip, listing
from nspo_lightning.datamodules.sources.presets import Preset, Row, TextField, nearest
from nspo_lightning.datamodules.sources.rows import Message, Prompt, PromptRow, RawRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource

MAX_PROMPT_CHARS = 1_000_000
RESERVED_COLUMNS = ("prompt", "prompts", "completion", "completions", "prompt_ids", "completion_ids", "trainer_state")
_ROLES = ("system", "user", "assistant", "tool")
_CHAT_COLUMNS = ("messages", "conversations")


class BadRow(ValueError):
    """A row whose prompt cannot be used: `bad_rows` decides whether it stops the run."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one source's rows are read: a preset's rules, or the names of a plain file's columns.

    Attributes:
        source: The configured source.
        preset: The preset, if any.
        prompt_column: The prompt's column, without a preset.
        messages_column: The chat's column, without a preset.
        answer_column: The answer's column, without a preset.
        default_kind: What rows are when neither source nor preset says it.
        default_skill: Likewise for the skill.
        recognised: Whether the preset was found by the columns alone.
        part_kind: What the preset says about this split, configuration or file.
    """

    source: PromptSource
    preset: Preset | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    answer_column: str | None = None
    default_kind: Kind
    default_skill: str
    recognised: bool = False
    part_kind: Kind | None = None

    @property
    def id_column(self) -> str | None:
        """The column whose values must differ."""
        return self.preset.id_column if self.preset is not None else "id"


def plan_plain(source: PromptSource, row: RawRow, default_kind: Kind, default_skill: str) -> Reading:
    """Choose the columns of a source without a preset by its first row.

    Args:
        source: The configured source.
        row: The first row.
        default_kind: What its rows are unless it says otherwise.
        default_skill: Their skill unless they say otherwise.

    Returns:
        The plan.

    Raises:
        DataError: If no column can be the prompt.
    """
    columns = row.data
    messages = source.messages_column
    prompt = source.prompt_column or (None if messages else "prompt" if "prompt" in columns else None)
    if prompt is None and messages is None:
        messages = next((name for name in _CHAT_COLUMNS if name in columns), None)
    if prompt is None and messages is None:
        close = nearest(columns)
        hint = f" Presets with similar columns: {'; '.join(close)}." if close else ""
        raise DataError(
            row.where,
            f"no preset fits the columns {listing(list(columns))}, and there is no column `prompt` or `messages`",
            f"Name the prompt's column (`prompt_column: ...`) or a `preset`.{hint}",
        )
    for field, name in (
        ("prompt_column", source.prompt_column),
        ("messages_column", source.messages_column),
        ("answer_column", source.answer_column),
    ):
        if name is not None and name not in columns:
            raise DataError(
                row.where,
                f"there is no column {name!r}; the columns are {listing(list(columns))}",
                f"Set `{field}` to one of them.",
            )
    answer = source.answer_column or ("answer" if "answer" in columns else None)
    return Reading(
        source=source,
        prompt_column=prompt,
        messages_column=messages,
        answer_column=answer,
        default_kind=default_kind,
        default_skill=default_skill,
    )


def convert(reading: Reading, raw: RawRow) -> PromptRow | str:
    """Turn one raw row into a prompt row.

    Args:
        reading: How the source is read.
        raw: The row.

    Returns:
        The row, or the reason why the preset leaves it out.

    Raises:
        DataError: If the row lacks a column.
        BadRow: If its prompt is missing, empty, not text or absurdly long.
    """
    result = _by_columns(reading, raw) if reading.preset is None else _by_preset(reading, reading.preset, raw)
    system = reading.source.system_prompt
    if isinstance(result, str) or system is None:
        return result
    turns = [{"role": "user", "content": result.prompt}] if isinstance(result.prompt, str) else result.prompt
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return replace(result, prompt=turns)


def _by_columns(reading: Reading, raw: RawRow) -> PromptRow:
    row = raw.data
    column = reading.prompt_column or reading.messages_column
    if column not in row:
        raise DataError(
            raw.where,
            f"the row lacks the column {column!r}, which earlier rows have; it has {listing(list(row))}",
            "Fill the column in every row.",
        )
    answer: Any = row.get(reading.answer_column) if reading.answer_column else None
    prompt: Prompt
    if reading.messages_column is not None:
        prompt, last = split_chat(row[column])
        answer = last if answer is None else answer
    else:
        prompt = check_prompt(row[column])
    taken = {
        reading.prompt_column,
        reading.messages_column,
        reading.answer_column,
        "skill",
        "kind",
        "source",
        *RESERVED_COLUMNS,
    }
    kinds: dict[Any, Kind] = {"harmful": "harmful", "benign": "benign"}
    own_kind = row.get("kind")
    kind = kinds.get(own_kind, reading.default_kind) if isinstance(own_kind, str) else reading.default_kind
    return PromptRow(
        prompt=prompt,
        answer=_text(answer),
        skill=reading.source.skill or _text(row.get("skill")) or reading.default_skill,
        kind=reading.source.kind or kind,
        source=reading.default_skill,
        where=raw.where,
        columns={name: value for name, value in row.items() if name not in taken},
    )


def _by_preset(reading: Reading, preset: Preset, raw: RawRow) -> PromptRow | str:
    row = raw.data
    if not preset.fits(row):
        needed = " or ".join(f"({', '.join(names)})" for names in preset.requires)
        raise DataError(
            raw.where,
            f"preset {preset.name!r} needs the columns {needed}; the row has {listing(list(row), 20)}",
            "Set the preset that fits, or `prompt_column` without a preset.",
        )
    try:
        return _apply(reading, preset, raw)
    except BadRow:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadRow(f"preset {preset.name} cannot read it: {error}") from error


def _apply(reading: Reading, preset: Preset, raw: RawRow) -> PromptRow | str:
    row = raw.data
    if preset.skip is not None and (reason := preset.skip(row)) is not None:
        return reason
    value = row[preset.prompt] if isinstance(preset.prompt, str) else preset.prompt(row)
    prompt: Prompt = split_chat(value)[0] if isinstance(value, list) else check_prompt(value)
    kind = preset.kind if isinstance(preset.kind, str) else preset.kind(row)
    if preset.shared_layout and reading.recognised:
        kind = reading.default_kind
    kind = reading.part_kind or kind
    columns = {name: row[name] for name in preset.keep if name in row and name not in RESERVED_COLUMNS}
    if preset.final_answer is not None:
        columns["final_answer"] = _field(preset.final_answer, row)
    return PromptRow(
        prompt=prompt,
        answer=_field(preset.answer, row),
        skill=reading.source.skill or (preset.skill(row) if callable(preset.skill) else preset.skill) or preset.name,
        kind=reading.source.kind or kind,
        source=preset.name,
        where=raw.where,
        columns=columns,
    )


def _field(field: TextField | None, row: Row) -> str:
    if field is None:
        return ""
    if callable(field):
        return field(row)
    return _text(row.get(field))


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise BadRow(f"the answer is {type(value).__name__}, not text: {clip(repr(value), 60)}")
    return "" if value is None else value if isinstance(value, str) else str(value)


def check_prompt(value: Any) -> str:
    """Make sure that a value can be a prompt.

    Args:
        value: What stands in the prompt's column.

    Returns:
        The text, unchanged.

    Raises:
        BadRow: If it is null, not text, empty or absurdly long.
    """
    if value is None:
        raise BadRow("the prompt is null")
    if not isinstance(value, str):
        raise BadRow(f"the prompt is {type(value).__name__}, not text: {clip(repr(value), 60)}")
    if not value.strip():
        raise BadRow("the prompt is empty")
    if len(value) > MAX_PROMPT_CHARS:
        raise BadRow(f"the prompt has {len(value):,} characters, more than {MAX_PROMPT_CHARS:,}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow("the prompt holds half of a surrogate pair, which no UTF-8 text can")
    return value


def split_chat(value: Any) -> tuple[list[Message], str | None]:
    """Check a chat and take a final assistant turn off it.

    Args:
        value: A list of ``{"role": ..., "content": ...}`` (or ``from``/``value``).

    Returns:
        The turns up to the last user turn, and the assistant's turn after it, if any.

    Raises:
        BadRow: If it is no such list, or has no user turn.
    """
    if value is None:
        raise BadRow("the messages are null")
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"the messages are {'empty' if value == [] else type(value).__name__}, not a list of role and content"
        )
    turns = [_turn(entry) for entry in value]
    answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("the messages do not end with a user turn")
    check_prompt(turns[-1]["content"])
    return turns, answer


def _turn(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise BadRow(f"a message is {type(entry).__name__}, not an object with role and content")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES or not isinstance(content, str):
        raise BadRow(
            f"a message needs a role ({', '.join(_ROLES)}) and text, "
            f"got role {clip(repr(role), 30)} and {type(content).__name__}"
        )
    return {"role": role, "content": content}
