"""From raw rows to prompt rows: which column is the prompt, and is it fit to be one?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nspo_lightning.atomic import without_surrogates
from nspo_lightning.datamodules.sources.cells import BadRow, check_prompt, kind_of
from nspo_lightning.datamodules.sources.chats import message_text, split_chat
from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.presets import Preset, Row, TextField
from nspo_lightning.datamodules.sources.references import FINAL_ANSWER
from nspo_lightning.datamodules.sources.rows import Prompt, PromptRow, RawRow
from nspo_lightning.datamodules.sources.source import HARMFUL_TARGET, Kind, PromptSource
from nspo_lightning.policy.chats import as_turns

RESERVED_COLUMNS = ("prompt", "prompts", "completion", "completions", "prompt_ids", "completion_ids", "trainer_state")


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
        """The column whose values should differ."""
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
    if without_surrogates(parts := (result.answer, result.skill, result.columns)) != parts:
        answer, skill, columns = without_surrogates(parts)
        result = replace(result, answer=answer, skill=skill, columns=columns)
    system = plan.source.system_prompt
    if system is None:
        return result
    turns = as_turns(result.prompt)
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
    answer, final = _declared(row, plan.answer_column)
    prompt: Prompt
    if plan.messages_column is not None or isinstance(row[column], list):
        prompt, last = split_chat(row[column])
        answer = last if answer is None else answer
    else:
        prompt = check_prompt(row[column])
    named = {plan.prompt_column, plan.messages_column, plan.answer_column}
    taken = {*named, "skill", "kind", "source", FINAL_ANSWER, *RESERVED_COLUMNS}
    columns = {name: value for name, value in row.items() if name not in taken}
    if final:
        columns[FINAL_ANSWER] = final
    if plan.source.target_column:
        columns[HARMFUL_TARGET] = _text(row.get(plan.source.target_column))
    return PromptRow(
        prompt=prompt,
        answer=_text(answer),
        skill=plan.source.skill or _text(row.get("skill")) or plan.default_skill,
        kind=plan.source.kind or kind_of(row.get("kind"), "kind", plan.default_kind),
        source=plan.default_skill,
        where=raw.where,
        columns=columns,
    )


def _declared(row: Row, column: str | None) -> tuple[Any, str]:
    """Return a row's reference answer (None without any), and what a completion is compared with.

    They are columns of their own, or verl's `reward_model` with its `ground_truth`, or TRL's `completion`.
    """
    answer, final = row.get(column) if column else None, _text(row.get(FINAL_ANSWER))
    rule = row.get("reward_model")
    truth = rule.get("ground_truth") if isinstance(rule, dict) else None
    if isinstance(truth, (str, int, float)):
        final = final or _text(truth)
        answer = truth if answer is None else answer
    return message_text(row.get("completion") if answer is None else answer), final


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
    if preset.target is not None and row.get(preset.target):
        columns[HARMFUL_TARGET] = _text(row[preset.target])
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
    return _text(field(row) if callable(field) else row.get(field))


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise BadRow(f"the answer is {type(value).__name__}, not text: {clip(repr(value), 60)}")
    return "" if value is None else value if isinstance(value, str) else str(value)
