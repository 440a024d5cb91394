"""From raw rows to prompt rows: which column is the prompt, and is it fit to be one?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nspo_lightning.atomic import whole
from nspo_lightning.datamodules.sources.cells import BadRow, kind_of
from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.presets import Preset, Row, TextField
from nspo_lightning.datamodules.sources.references import FINAL_ANSWER
from nspo_lightning.datamodules.sources.rows import Message, Prompt, PromptRow, RawRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource

MAX_PROMPT_CHARS = 1_000_000
RESERVED_COLUMNS = ("prompt", "prompts", "completion", "completions", "prompt_ids", "completion_ids", "trainer_state")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """How the rows of one source are read: by a preset, or by the names of a plain file's columns.

    Attributes:
        default_kind: What rows are when neither source nor preset says it.
        default_skill: The skill of rows when neither source nor row names it; the preset's or the file's name.
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


def convert(plan: RowPlan, raw: RawRow) -> PromptRow | str:
    """Return a raw row as a prompt row, or the reason why the preset leaves it out.

    Raises:
        DataError: If the row lacks a column.
        BadRow: If its prompt is missing, empty, not text or absurdly long.
    """
    result = _by_columns(plan, raw) if plan.preset is None else _by_preset(plan, plan.preset, raw)
    if isinstance(result, str):
        return result
    if whole(parts := (result.answer, result.skill, result.columns)) != parts:
        answer, skill, columns = whole(parts)
        result = replace(result, answer=answer, skill=skill, columns=columns)
    system = plan.source.system_prompt
    if system is None:
        return result
    turns = [{"role": "user", "content": result.prompt}] if isinstance(result.prompt, str) else result.prompt
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return replace(result, prompt=turns)


def _by_columns(plan: RowPlan, raw: RawRow) -> PromptRow:
    row = raw.data
    column = plan.prompt_column or plan.messages_column
    if column not in row:
        raise DataError(
            raw.where,
            f"the row lacks the column {column!r}, which earlier rows have; it has {listing(list(row))}",
            "Fill the column in every row.",
        )
    answer: Any = row.get(plan.answer_column) if plan.answer_column else None
    prompt: Prompt
    if plan.messages_column is not None:
        prompt, last = split_chat(row[column])
        answer = last if answer is None else answer
    else:
        prompt = check_prompt(row[column])
    named = {plan.prompt_column, plan.messages_column, plan.answer_column}
    taken = {*named, "skill", "kind", "source", FINAL_ANSWER, *RESERVED_COLUMNS}
    columns = {name: value for name, value in row.items() if name not in taken}
    if final := _text(row.get(FINAL_ANSWER)):
        columns[FINAL_ANSWER] = final
    return PromptRow(
        prompt=prompt,
        answer=_text(answer),
        skill=plan.source.skill or _text(row.get("skill")) or plan.default_skill,
        kind=plan.source.kind or kind_of(row.get("kind"), "kind", plan.default_kind),
        source=plan.default_skill,
        where=raw.where,
        columns=columns,
    )


def _by_preset(plan: RowPlan, preset: Preset, raw: RawRow) -> PromptRow | str:
    row = raw.data
    if not preset.fits(row):
        needed = " or ".join(f"({', '.join(names)})" for names in preset.requires)
        raise DataError(
            raw.where,
            f"preset {preset.name!r} needs the columns {needed}; the row has {listing(list(row), 20)}",
            "Set the preset that fits, or `prompt_column` without a preset.",
        )
    try:
        return _apply(plan, preset, raw)
    except BadRow:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadRow(f"preset {preset.name} cannot read it: {error}") from error


def _apply(plan: RowPlan, preset: Preset, raw: RawRow) -> PromptRow | str:
    row = raw.data
    if preset.skip is not None and (reason := preset.skip(row)) is not None:
        return reason
    value = row[preset.prompt] if isinstance(preset.prompt, str) else preset.prompt(row)
    prompt: Prompt = split_chat(value)[0] if isinstance(value, list) else check_prompt(value)
    kind = (
        plan.source.kind or plan.part_kind or (plan.default_kind if preset.shared_layout and plan.recognised else None)
    )
    if kind is None:
        kind = preset.kind if isinstance(preset.kind, str) else preset.kind(row)
    columns = {name: row[name] for name in preset.keep if name in row and name not in RESERVED_COLUMNS}
    if preset.final_answer is not None:
        columns[FINAL_ANSWER] = _field(preset.final_answer, row)
    elif preset.free_text and plan.source.answers != "match":
        columns[FINAL_ANSWER] = ""
    return PromptRow(
        prompt=prompt,
        answer=_field(preset.answer, row),
        skill=plan.source.skill or (preset.skill(row) if callable(preset.skill) else preset.skill) or preset.name,
        kind=kind,
        source=preset.name,
        where=raw.where,
        columns=columns,
    )


def _field(field: TextField | None, row: Row) -> str:
    if field is None:
        return ""
    return field(row) if callable(field) else _text(row.get(field))


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise BadRow(f"the answer is {type(value).__name__}, not text: {clip(repr(value), 60)}")
    return "" if value is None else value if isinstance(value, str) else str(value)


def check_prompt(value: Any) -> str:
    """Return what stands in the prompt's column, unchanged, if it can be a prompt.

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
    """Return a chat's turns up to the last user turn, and the assistant's turn after it, if any.

    A chat is a list of ``{"role": ..., "content": ...}`` (or ``from``/``value``).

    Raises:
        BadRow: If it is no such list, or has no user turn.
    """
    if value is None:
        raise BadRow("the messages are null")
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else type(value).__name__
        raise BadRow(f"the messages are {found}, not a list of role and content")
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
