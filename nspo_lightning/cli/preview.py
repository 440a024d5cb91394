"""`judge -c CONFIG --preview 64`: what a policy answers before training, what it is worth, and how long that takes.

A judge's server is asked before the model is loaded; nothing is trained and no run is begun.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from rich import get_console
from rich.console import Console
from rich.table import Table

from nspo_lightning.atomic import json_text, replacing
from nspo_lightning.cli.calibrate import prepared_for_fit
from nspo_lightning.cli.data import check_examples
from nspo_lightning.cli.run_folder import check_output
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.evaluation.diagnosis import RunFacts, diagnose
from nspo_lightning.evaluation.intervals import wilson_interval
from nspo_lightning.evaluation.tables import findings_text, rich_table
from nspo_lightning.grpo import loss_mask, rows_with_signal
from nspo_lightning.module.collector import Collected
from nspo_lightning.module.experience import Minibatch
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.rollout_metrics import JudgedRows
from nspo_lightning.module.scorer import step_counts
from nspo_lightning.module.signal import Signal
from nspo_lightning.module.training_state import trainer_state
from nspo_lightning.module.update_window import UpdateWindow
from nspo_lightning.rewards.messages import transcript
from nspo_lightning.rewards.protocol import prepare
from nspo_lightning.terminal import counted, duration, rows_progress

_SHOWN_CHARS = 300


class PreviewError(ValueError):
    """A preview that cannot be made of what was asked for."""


@dataclass
class Preview:
    """What was seen.

    Attributes:
        rows: Answers and their rewards.
        lines: A dict an answer, for the file and the examples.
        group_size: Answers a prompt.
        answering: Seconds of sampling, reward and judge.
        learning: Seconds that a prompt of a step takes forward and backward; None = no group had a signal.
        batches: Batches of an epoch.
        epoch_prompts: Prompts of an epoch.
    """

    rows: JudgedRows
    lines: list[dict[str, Any]]
    group_size: int
    answering: float
    learning: float | None
    batches: int
    epoch_prompts: int
    signal: Signal = field(default_factory=Signal)

    @property
    def prompts(self) -> int:
        """Prompts that were answered."""
        return len(self.rows.prompt_tokens)

    @property
    def epoch_seconds(self) -> float:
        """What an epoch takes by this, without calibration, validation and measuring."""
        return self.epoch_prompts * (self.answering / max(self.prompts, 1) + (self.learning or 0.0))


def preview(
    module: GRPOModule,
    datamodule: AlignmentDataModule,
    trainer: pl.Trainer,
    *,
    prompts: int = 64,
    output: str | None = None,
    examples: int = 3,
    console: Console | None = None,
) -> Preview:
    """Return what came of answers to training prompts and their scores, and print it.

    Args:
        module: As `fit` has it.
        datamodule: Has the prompts.
        trainer: A Trainer of one process.
        prompts: How many, in the order of training.
        output: JSON lines file for all answers; None = none is written.
        examples: Prompts that are shown with their best and worst answer.
        console: Where to print; standard output when None.

    Raises:
        PreviewError: If no prompts are asked for.
        ValueError: If `examples` is negative, or `output` can't be written.
    """
    if prompts < 1:
        raise PreviewError(f"`--preview` must be at least 1 prompt, got {prompts}.")
    check_examples(examples)
    target = None if output is None else check_output("--output", output)
    console = console or get_console()
    prepare(module.reward)  # before model and data: a server that is down is found at once
    prepare(module.judge)
    with prepared_for_fit(trainer, module, datamodule):
        module.start()
        found = _answered(module, datamodule.train_dataloader(), trainer, prompts, console)
    if target is not None:
        with replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json_text(line) + "\n" for line in found.lines)
    console.print(preview_table(found))
    for lines in _examples(found, examples):
        console.print(_example_table(lines))
    findings = diagnose(RunFacts(training=found.signal.facts(module.settings.sampling.max_new_tokens)))
    if findings:
        console.print(findings_text(findings), highlight=False)
    if target is not None:
        console.print(f"Answers: {target}")
    return found


def _answered(module: GRPOModule, loader: PromptLoader, trainer: pl.Trainer, prompts: int, console: Console) -> Preview:
    batches, in_epoch = _epoch(loader, trainer)
    loader.repeat_batches, loader.batch_size = 1, min(loader.batch_size, prompts)
    parts: list[Collected] = []
    signal, seconds, learning = Signal(), 0.0, None
    group, cut = module.settings.group_size, module.settings.objective.mask_truncated
    with rows_progress("Answering training prompts", prompts, console=console) as advance:
        for batch in itertools.islice(loader, -(-prompts // loader.batch_size)):
            batch = move_data_to_device(batch, trainer.strategy.root_device)
            start = time.perf_counter()
            with trainer.precision_plugin.train_step_context():
                state = trainer_state(trainer, module.progress, len(batch["prompt"]))
                parts.append(module.collector.collect(batch, module.progress.noise_seed, 0, state))
                seconds += time.perf_counter() - start
                learning = learning if learning is not None else _learning_seconds(module, parts[-1])
            module.progress.rollouts += 1
            signal.count(parts[-1].rows, group, mask_truncated=cut)
            advance(len(batch["prompt"]))
    return Preview(
        rows=JudgedRows.joined([part.rows for part in parts]),
        lines=[line for part in parts for line in _lines(part)],
        group_size=group,
        answering=seconds,
        learning=learning,
        batches=batches,
        epoch_prompts=in_epoch,
        signal=signal,
    )


def _epoch(loader: PromptLoader, trainer: pl.Trainer) -> tuple[int, int]:
    """Return the steps of an epoch, within `trainer.limit_train_batches`, and their prompts."""
    limit = trainer.limit_train_batches
    batches = len(loader) // loader.repeat_batches
    steps = min(batches, int(limit)) if isinstance(limit, int) else int(batches * limit)
    prompts = sum(loader.batch_sizes()) / loader.repeat_batches
    return steps, round(prompts * steps / max(batches, 1))


def _learning_seconds(module: GRPOModule, collected: Collected) -> float | None:
    """Return what learning from a rollout takes a prompt, by one forward and backward pass; None without a signal."""
    settings, parameters = module.settings, module.text_policy.trainable_parameters()
    experience = collected.buffer.next()
    mask = loss_mask(experience.rollout.completion_mask, experience.rollout.finished, settings.objective)
    with_signal = rows_with_signal(experience.advantages, mask, has_kl=settings.objective.beta > 0)
    if not bool(with_signal.any()):
        return None
    module.require_policy().train()
    start = time.perf_counter()
    normaliser = UpdateWindow().add(*step_counts(mask, settings), settings.objective.loss_type)
    loss = module.scorer.loss(Minibatch.of(experience, mask, with_signal), normaliser, 1.0).value
    torch.autograd.backward(loss)
    if loss.is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    for parameter in parameters:
        parameter.grad = None
    return taken * settings.steps_a_rollout / len(collected.rows.prompt_tokens)


def _lines(part: Collected) -> Iterator[dict[str, Any]]:
    scores = part.judged.result.per_reward
    for number, row in enumerate(part.judged.rows()):
        own = {f"rewards/{name}": values[number].item() for name, values in scores.items()} if len(scores) > 1 else {}
        yield {**row, **own, "finished": bool(part.rows.finished[number])}


# ---------------------------------------------------------------------- what is shown


def preview_table(found: Preview) -> Table:
    """Return the figures, in 80 columns."""
    rows, signal = found.rows, found.signal
    totals = rows.rewards.total
    scored = totals[totals.isfinite()]
    lines: list[tuple[str, str, str]] = [
        ("answers", f"{len(totals):,}", f"to {counted(found.prompts, 'prompt')}, {found.group_size} each"),
    ]
    if len(scored):
        different = len(set(scored.tolist()))
        values = f"{different:,} different" + (
            f", {len(totals) - len(scored):,} without one" if len(scored) < len(totals) else ""
        )
        lines.append(("reward, mean", f"{scored.mean().item():.3f}", f"{signal.low:g} to {signal.high:g}, {values}"))
        groups = totals.view(-1, found.group_size)
        centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0.0)
        spread = (centred.square().sum(1) / (~groups.isnan()).sum(1).sub(1).clamp(min=1)).sqrt().mean().item()
        lines.append(("spread in a group", f"{spread:.3f}", "standard deviation, mean over groups"))
    else:
        lines.append(("reward", "none", "no answer was scored"))
    lines.append(_share("groups with a signal", signal.groups_with_signal, found.prompts))
    for outcome, count in Counter(outcome for outcome in rows.outcomes if outcome is not None).most_common():
        lines.append(_share(f"outcome: {outcome}", count, sum(one is not None for one in rows.outcomes)))
    lines.append(_share("cut at the length limit", int((~rows.finished).sum()), len(totals)))
    lines.append((
        "tokens an answer",
        f"{rows.lengths.float().mean().item():.0f}",
        f"at most {int(rows.lengths.max()):,}",
    ))
    of_answers = found.answering / max(found.prompts, 1) * found.epoch_prompts
    learnt = "" if found.learning is None else f", learning {duration(found.learning * found.epoch_prompts)}"
    without = "" if found.learning is not None else "; no group to time learning by"
    lines.append((
        f"time, {counted(found.batches, 'step')}",
        duration(found.epoch_seconds),
        f"an epoch: answers and rewards {duration(of_answers)}{learnt}{without}",
    ))
    table = rich_table("Before training", ["", "value", ""], lines, align="lrl")
    table.caption = "Time without calibration, validation and measuring. Intervals: 95 %."
    table.caption_justify = "left"
    return table


def _share(name: str, count: int, of: int) -> tuple[str, str, str]:
    if not of:
        return name, "-", "none was judged"
    low, high = wilson_interval(count, of)
    return name, f"{100 * count / of:.1f} %", f"{count:,} of {of:,}; {100 * low:.1f} to {100 * high:.1f}"


def _examples(found: Preview, number: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of a few groups, those of the widest spread first."""
    groups = [found.lines[i : i + found.group_size] for i in range(0, len(found.lines), found.group_size)]

    def spread(lines: Sequence[dict[str, Any]]) -> float:
        rewards = [line["reward"] for line in lines if line["reward"] == line["reward"]]
        return max(rewards) - min(rewards) if rewards else 0.0

    yield from sorted(groups, key=spread, reverse=True)[:number]


def _example_table(lines: Sequence[dict[str, Any]]) -> Table:
    ordered = sorted(lines, key=lambda line: line["reward"])
    shown = [("best", ordered[-1])] + ([("worst", ordered[0])] if ordered[0]["reward"] != ordered[-1]["reward"] else [])
    rows = [
        (which, f"{line['reward']:g}", line["outcome"] or "-", _clipped(line["completion"])) for which, line in shown
    ]
    return rich_table(
        _clipped(transcript(lines[0]["prompt"])), ["answer", "reward", "outcome", "text"], rows, align="lrll"
    )


def _clipped(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARS else flat[:_SHOWN_CHARS] + " ..."
