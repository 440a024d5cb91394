"""`python -m nspo_lightning judge`: score a file of prompts and completions, and compare with labels if it has some.

The config names a reward as a training config does: `reward:` at the top, or a whole training config, whose
`model.reward` is taken. Scores go to a JSON lines file beside a table on the screen.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from nspo_lightning.atomic import replacing
from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.readers import read_file
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.rewards import Reward, RewardFunction, RewardResult, RewardSet
from nspo_lightning.rewards.rules.harm_column import truth_value
from nspo_lightning.rewards.rules.label_agreement import LabelAgreement, label_agreement

__all__ = ["judge_file", "main"]

_COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
_LABEL_COLUMNS: dict[str, Literal["safe", "unsafe"]] = {"is_safe": "safe", "is_unsafe": "unsafe", "unsafe": "unsafe"}


def main(args: list[str] | None = None, console: Console | None = None) -> int:
    """Run the `judge` command.

    Args:
        args: the command line after `judge`; the process's own by default.
        console: where the tables go.

    Returns:
        0; errors are raised.
    """
    options = _parse(args)
    reward = options.pop("reward")
    judge_file(reward, console=console or Console(), **options)
    return 0


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
        reward: what to score with.
        input: jsonl, json, csv or parquet file of prompts and completions.
        output: JSON lines file for the scores; `NAME.scores.jsonl` in the working folder by default.
        prompt_column: column of the prompts.
        completion_column: column of the completions; by default the first there is of completion, response, output
            and answer.
        label_column: column that says which completions are unsafe; by default is_safe, is_unsafe or unsafe, if there.
        label_true_means: what true (or 1) says in that column; known for the three above. Words such as "unsafe" say
            it themselves.
        threshold: a total reward below it counts as judged unsafe.
        batch_size: rows in one call of the reward.
        limit: rows to read at most.
        console: where the tables go.

    Returns:
        The agreement, or None without labels.

    Raises:
        DataError: if the file can't be read or lacks a column.
        ValueError: if an option is out of range.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"`batch_size` and `limit` must be at least 1, got {batch_size} and {limit}.")
    console = console or Console()
    rewards = reward if isinstance(reward, RewardSet) else RewardSet([reward])
    rows = list(_first(read_file(Path(input)), limit))
    if not rows:
        raise DataError(input, "it holds no rows", "Name a file with prompts and completions.")
    completion_column = completion_column or _present(rows[0], _COMPLETION_COLUMNS, "completion_column")
    for row in rows:
        _check_text(row, prompt_column, "prompt_column")
        _check_text(row, completion_column, "completion_column")
    labels = _labels(rows, label_column, label_true_means)
    target = Path(output or f"{Path(input).name.split('.')[0]}.scores.jsonl")
    total, per_reward, metrics = _score(rewards, rows, (prompt_column, completion_column), batch_size, target, console)
    console.print(_scores_table(total, per_reward, metrics))
    agreement = _agreement(total, labels, threshold)
    if agreement is not None:
        console.print(_agreement_table(agreement, threshold))
    console.print(f"Scores: {target}")
    return agreement


def _parse(args: list[str] | None) -> dict[str, Any]:
    parser = ArgumentParser(prog="nspo_lightning judge", description="Score a file of prompts and completions.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML with `reward`, or a training config.")
    parser.add_argument("--reward", type=RewardSet | Reward | RewardFunction, required=True, help="What to score with.")
    parser.add_function_arguments(judge_file, skip={"reward", "console"})
    options = parser.instantiate(parser.parse_args(_with_reward_alone(sys.argv[2:] if args is None else args)))
    return {key: value for key, value in vars(options).items() if key != "config"}


def _with_reward_alone(args: Sequence[str]) -> list[str]:
    """Replace a training config among the arguments by the reward in it; the rest of it is not for this command.

    Returns:
        The arguments to parse.
    """
    replaced: list[str] = []
    for word in args:
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
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Score batch by batch into a partial file that takes its name when it is complete.

    Returns:
        The total, each reward's scores, and the last counters.
    """
    prompt_column, completion_column = columns
    totals: list[Tensor] = []
    per_reward: dict[str, list[Tensor]] = {name: [] for name in rewards.names}
    metrics: dict[str, float] = {}
    with replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
        for start in track(range(0, len(rows), batch_size), description="Scoring", console=console, transient=True):
            batch = rows[start : start + batch_size]
            names = {name for row in batch for name in row.data} - {prompt_column, completion_column}
            result = rewards(
                [row.data[prompt_column] for row in batch],
                [row.data[completion_column] for row in batch],
                {name: [row.data.get(name) for row in batch] for name in names},
            )
            totals.append(result.total)
            metrics = result.metrics
            for name, scores in result.per_reward.items():
                per_reward[name].append(scores)
            file.writelines(line + "\n" for line in _lines(result, start))
    return torch.cat(totals), {name: torch.cat(scores) for name, scores in per_reward.items()}, metrics


def _lines(result: RewardResult, start: int) -> Iterator[str]:
    for i, total in enumerate(result.total.tolist()):
        line: dict[str, Any] = {"row": start + i, "reward": _or_null(total)}
        line |= {f"rewards/{name}": _or_null(scores[i].item()) for name, scores in result.per_reward.items()}
        line |= {name: values[i] for name, values in result.extra.items()}
        yield json.dumps(line, ensure_ascii=False)


def _or_null(number: float) -> float | None:
    return None if math.isnan(number) else number


def _first(rows: Iterator[RawRow], limit: int | None) -> Iterator[RawRow]:
    return rows if limit is None else itertools.islice(rows, limit)


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
    """Read who is labelled unsafe.

    Returns:
        One value a row; None where there is no label.

    Raises:
        DataError: if a label can't be read, or it is not said what it means.
    """
    column = column or next((name for name in _LABEL_COLUMNS if name in rows[0].data), None)
    if column is None:
        return [None] * len(rows)
    true_means = true_means or _LABEL_COLUMNS.get(column)
    labels: list[bool | None] = []
    for row in rows:
        value = row.data.get(column)
        if value is None or value == "":
            labels.append(None)
            continue
        truth = truth_value(value)
        if truth is None:
            raise DataError(
                row.where,
                f"the label in {column!r} must be true or false, 1 or 0, or a word such as 'unsafe', but is {value!r}",
                "Mend the row, or set `label_column` to another column.",
            )
        is_word = isinstance(value, str) and value.strip().lower() not in ("true", "false", "1", "0", "yes", "no")
        if not is_word and true_means is None:
            raise DataError(
                row.where,
                f"{column!r} = {value!r} can mean safe or unsafe",
                "Set `label_true_means` to safe or unsafe.",
            )
        labels.append(truth if is_word or true_means == "unsafe" else not truth)
    return labels


def _agreement(total: Tensor, labels: list[bool | None], threshold: float) -> LabelAgreement | None:
    both = [i for i, label in enumerate(labels) if label is not None and not math.isnan(total[i].item())]
    if not both:
        return None
    return label_agreement(total[both], torch.tensor([bool(labels[i]) for i in both]), threshold)


def _scores_table(total: Tensor, per_reward: dict[str, Tensor], metrics: dict[str, float]) -> Table:
    table = Table(title=f"Rewards of {len(total)} completions", title_justify="left")
    table.add_column("reward")
    for heading in ("mean", "std", "min", "max", "excluded"):
        table.add_column(heading, justify="right")
    rows = per_reward if len(per_reward) == 1 else {**per_reward, "total": total}
    for name, scores in rows.items():
        scored = scores[~scores.isnan()]
        figures = [f(scored).item() for f in (torch.mean, torch.std, torch.min, torch.max)] if len(scored) > 1 else []
        shown = [f"{figure:.4f}" for figure in figures] or [
            f"{scored.item():.4f}" if len(scored) else "-",
            "-",
            "-",
            "-",
        ]
        table.add_row(name, *shown, str(len(scores) - len(scored)))
    for name, value in metrics.items():
        table.add_row(name, f"{value:g}", "", "", "", "")
    return table


def _agreement_table(agreement: LabelAgreement, threshold: float) -> Table:
    table = Table(
        title=f"Agreement with {agreement.count} labels (unsafe = reward below {threshold:g})", title_justify="left"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in asdict(agreement).items():
        if name != "count":
            text = str(value) if isinstance(value, int) else "not defined" if math.isnan(value) else f"{value:.4f}"
            table.add_row(name.replace("_", " "), text)
    return table
