"""What the `judge` command prints: the rewards of a file, and their agreement with its labels."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from rich.table import Table
from torch import Tensor

from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.rewards.rules.labels import LabelAgreement
from nspo_lightning.terminal import counted


def scores_table(total: Tensor, per_reward: dict[str, Tensor], metrics: dict[str, float]) -> Table:
    """Show what the rewards are like."""
    rows = [_figures(name, scores) for name, scores in per_reward.items()]
    if len(per_reward) > 1:
        rows.append(_figures("total", total))
    rows += [(name, f"{value:g}", "", "", "", "") for name, value in metrics.items()]
    headings = ("reward", "mean", "std", "min", "max", "excluded")
    return rich_table(f"Rewards of {counted(len(total), 'completion')}", headings, rows, align="lrrrrr")


def _figures(name: str, scores: Tensor) -> tuple[str, ...]:
    scored = scores[~scores.isnan()]
    if len(scored) > 1:
        figures = [f"{figure(scored).item():.4f}" for figure in (torch.mean, torch.std, torch.min, torch.max)]
    else:
        figures = [f"{scored.item():.4f}" if len(scored) else "-", "-", "-", "-"]
    return name, *figures, str(len(scores) - len(scored))


def agreement_table(agreement: LabelAgreement, threshold: float) -> Table:
    """Show how they agree with labels."""
    figures = asdict(agreement)
    title = f"Agreement with {counted(figures.pop('count'), 'label')} (unsafe = reward below {threshold:g})"
    rows = [(name.replace("_", " "), _figure(value)) for name, value in figures.items()]
    return rich_table(title, ("figure", "value"), rows, align="lr")


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else "not defined" if math.isnan(value) else f"{value:.4f}"
