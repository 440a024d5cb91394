"""`python -m nspo_lightning judge`: score a file of prompts and completions, and compare with labels if it has some.

The config names a reward as a training config does: `reward:` at the top, or a whole training config, whose
`model.reward` is taken. Scores go to a JSON lines file beside a table on the screen.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ActionConfigFile
from rich import get_console
from rich.console import Console

from nspo_lightning.atomic import json_text, replacing
from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.judge_tables import agreement_table, scores_table
from nspo_lightning.cli.parser import KeylessParser
from nspo_lightning.cli.run_folder import check_output
from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.readers import read_file
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.keys import check_no_key
from nspo_lightning.rewards import Reward, RewardFunction, RewardResult, RewardSet
from nspo_lightning.rewards.rules.labels import LabelAgreement, label_agreement, truth_value
from nspo_lightning.terminal import rows_progress

_COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
_LABEL_COLUMNS: dict[str, Literal["safe", "unsafe"]] = {"is_safe": "safe", "is_unsafe": "unsafe", "unsafe": "unsafe"}


def main(arguments: list[str], console: Console | None = None) -> None:
    """Run the `judge` command; errors are raised."""
    judge_file(**_parse(arguments), console=console)


def judge_file(
    reward: RewardSet | Reward | RewardFunction,
    *,
    input: str,
    output: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str | None = None,
    label_column: str | None = None,
    label_true_means: Literal["safe", "unsafe"] | None = None,
    threshold: float = 0.0,
    batch_size: int = 64,
    limit: int | None = None,
    console: Console | None = None,
) -> LabelAgreement | None:
    """Score a file with a reward, write the scores, print what they are like and how they agree with labels.

    Args:
        reward: What to score with.
        input: A jsonl, json, csv or parquet file of prompts and completions.
        output: JSON lines file for the scores; `NAME.scores.jsonl` in the working folder by default.
        prompt_column: Column of the prompts.
        completion_column: Column of the completions; by default the first there is of completion, response, output
            and answer.
        label_column: Column that says which completions are unsafe; by default is_safe, is_unsafe or unsafe, if there.
        label_true_means: What true (or 1) says in that column; known for the three above. Words such as "unsafe" say
            it themselves.
        threshold: A total reward below it counts as judged unsafe.
        batch_size: Rows in one call of the reward.
        limit: Rows to read at most.
        console: Where the tables go.

    Returns:
        The agreement, or None without labels.

    Raises:
        DataError: If the file can't be read or lacks a column.
        ValueError: If an option is out of range.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"`batch_size` and `limit` must be at least 1, got {batch_size} and {limit}.")
    default = f"{Path(input).name.split('.')[0]}.scores.jsonl"
    target = check_output("--output", default if output is None else output, inputs=[Path(input)])
    console = console or get_console()
    rewards = reward if isinstance(reward, RewardSet) else RewardSet([reward])
    rows = list(itertools.islice(read_file(Path(input)), limit))
    if not rows:
        raise DataError(input, "it holds no rows", "Name a file with prompts and completions.")
    completion_column = completion_column or _present(rows[0], _COMPLETION_COLUMNS, "completion_column")
    for row in rows:
        _check_text(row, prompt_column, "prompt_column")
        _check_text(row, completion_column, "completion_column")
    labels = _labels(rows, label_column, label_true_means)
    rewards.prepare()
    results = _score(rewards, rows, (prompt_column, completion_column), batch_size, target, console)
    total = torch.cat([result.total for result in results])
    per_reward = {name: torch.cat([result.per_reward[name] for result in results]) for name in rewards.names}
    console.print(scores_table(total, per_reward, results[-1].metrics))
    both = [i for i, label in enumerate(labels) if label is not None and not math.isnan(total[i].item())]
    agreement = None
    if both:
        agreement = label_agreement(total[both], torch.tensor([bool(labels[i]) for i in both]), threshold)
        console.print(agreement_table(agreement, threshold))
    console.print(f"Scores: {target}")
    return agreement


def _parse(arguments: list[str]) -> dict[str, Any]:
    parser = KeylessParser(prog=f"{PROG} judge", description="Score a file of prompts and completions.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML with `reward`, or a training config.")
    parser.add_argument("--reward", type=RewardSet | Reward | RewardFunction, required=True, help="What to score with.")
    told = "Instead of a file: answer so many training prompts and show what the reward makes of it, without training."
    parser.add_argument("--preview", type=int, help=told)  # taken out before, see `preview_arguments`
    parser.add_function_arguments(judge_file, skip={"reward", "console"})
    parsed = parser.parse_args(_with_reward_alone(arguments))
    check_no_key("", parsed.as_dict())
    options = parser.instantiate(parsed)
    return {key: value for key, value in vars(options).items() if key not in ("config", "preview")}


def _with_reward_alone(arguments: Sequence[str]) -> list[str]:
    """Replace a training config among the arguments by the reward in it; the rest of it is not for this command."""
    replaced: list[str] = []
    for word in arguments:
        name, _, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        is_config = bool(name) or (replaced and replaced[-1] in ("-c", "--config"))
        if is_config and (reward := _training_reward(Path(value))) is not None:
            if not name:
                replaced.pop()
            replaced += ["--reward", json.dumps(reward)]
        else:
            replaced.append(word)
    return replaced


def _training_reward(path: Path) -> Any:
    if not path.is_file():
        return None  # the parser says so
    with contextlib.suppress(yaml.YAMLError):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = config.get("model") if isinstance(config, dict) else None
        if isinstance(model, dict):
            return model.get("reward") or (model.get("init_args") or {}).get("reward")
    return None


def _score(
    rewards: RewardSet, rows: list[RawRow], columns: tuple[str, str], batch_size: int, target: Path, console: Console
) -> list[RewardResult]:
    """Score batch by batch into a partial file that takes its name when it is complete."""
    results: list[RewardResult] = []
    scoring = rows_progress("Scoring", len(rows), console=console)
    with replacing(target) as partial, partial.open("w", encoding="utf-8") as file, scoring as advance:
        for start in range(0, len(rows), batch_size):
            batch = [row.data for row in rows[start : start + batch_size]]
            prompts, completions = ([data[column] for data in batch] for column in columns)
            others = {name for data in batch for name in data} - set(columns)
            results.append(rewards(prompts, completions, {name: [data.get(name) for data in batch] for name in others}))
            file.writelines(line + "\n" for line in _lines(results[-1], start))
            advance(len(batch))
    return results


def _lines(result: RewardResult, start: int) -> Iterator[str]:
    # A reward that scores some rows alone may have reported a column of those alone: there is no telling which.
    whole = {name: values for name, values in result.extra.items() if len(values) == len(result.total)}
    for i, total in enumerate(result.total.tolist()):
        line: dict[str, Any] = {"row": start + i, "reward": _or_null(total)}
        line |= {f"rewards/{name}": _or_null(scores[i].item()) for name, scores in result.per_reward.items()}
        line |= {name: values[i] for name, values in whole.items()}
        yield json_text(line)


def _or_null(number: float) -> float | None:
    return None if math.isnan(number) else number


def _present(row: RawRow, names: Sequence[str], option: str) -> str:
    for name in names:
        if name in row.data:
            return name
    raise DataError(
        row.where,
        f"none of the columns {', '.join(names)}; the columns are {listing(list(row.data))}",
        f"Set `{option}`.",
    )


def _check_text(row: RawRow, column: str, option: str) -> None:
    if column not in row.data:
        raise DataError(
            row.where, f"there is no column {column!r}; the columns are {listing(list(row.data))}", f"Set `{option}`."
        )
    value = row.data[column]
    if not isinstance(value, str) and not (isinstance(value, list) and value and isinstance(value[0], dict)):
        raise DataError(
            row.where,
            f"column {column!r} must hold text or chat messages, but holds {type(value).__name__}",
            f"Mend the row, or set `{option}` to another column.",
        )


def _labels(rows: list[RawRow], column: str | None, true_means: str | None) -> list[bool | None]:
    """Read who is labelled unsafe; None where there is no label."""
    column = column or next((name for name in _LABEL_COLUMNS if name in rows[0].data), None)
    if column is None:
        return [None] * len(rows)
    true_means = true_means or _LABEL_COLUMNS.get(column)
    return [_is_unsafe(row, column, true_means) for row in rows]


def _is_unsafe(row: RawRow, column: str, true_means: str | None) -> bool | None:
    value = row.data.get(column)
    if value is None or value == "":
        return None
    truth = truth_value(value)
    if truth is None:
        raise DataError(
            row.where,
            f"the label in {column!r} must be true or false, 1 or 0, or a word such as 'unsafe', but is {value!r}",
            "Mend the row, or set `label_column` to another column.",
        )
    if isinstance(value, str) and value.strip().lower() not in ("true", "false", "1", "0", "yes", "no"):
        return truth
    if true_means is None:
        raise DataError(
            row.where, f"{column!r} = {value!r} can mean safe or unsafe", "Set `label_true_means` to safe or unsafe."
        )
    return truth if true_means == "unsafe" else not truth
