"""`tamper`: how much safety is left after a little fine-tuning by somebody who has the weights (arXiv 2310.03693).

Two attacks, each from the same start: some updates on harmless rows, and a few harmful examples. Both train the adapter
as it stands, without a null space, once from the policy and once from the base (a fresh adapter), so that what is left
of the training shows beside what the base does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from torch import Tensor

from nspo_lightning.atomic import write_json
from nspo_lightning.cli.calibrate import prepared_for_fit
from nspo_lightning.cli.run_folder import check_output
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.text.collate import collate_prompts, pad_token_ids
from nspo_lightning.datamodules.warmup import collate_answers
from nspo_lightning.evaluation.rates import ANSWERED, GARBAGE, REFUSED, UNSAFE, Rate
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.module.checkpoint_content import load_trained_
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.scorer import given_answers
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.terminal import counted, rows_progress

RESULT = "tamper.json"
_ANSWER_TOKENS = 64
_OTHERS = {REFUSED: "refused", GARBAGE: "garbage"}


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """What the attacker does; see `Trainer.tamper`."""

    steps: int
    examples: int
    epochs: int
    batch_size: int
    lr: float
    rows: int

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}.")


Measured = dict[str, dict[str, dict[str, Rate]]]
"""Attack, then ``base`` or ``policy``, then the rate's name."""


def tamper(
    module: GRPOModule,
    datamodule: AlignmentDataModule,
    trainer: pl.Trainer,
    attacker: Attacker,
    *,
    ckpt_path: str | None,
    out: str | None,
) -> Measured:
    """Attack policy and base, print what is left, and write it.

    Args:
        module: The module.
        datamodule: Has general rows with answers, and held-out prompts.
        trainer: Its device is used, in one process.
        attacker: Settings of the fine-tuning.
        ckpt_path: A checkpoint's file; None = an adapter that the module was told, or the base.
        out: JSON file; None = `RESULT` in the run's folder.

    Returns:
        The rates.

    Raises:
        PolicyError: If there is no adapter, so that nothing tells policy and base apart; or the checkpoint belongs to
            another base or adapter.
        ValueError: If there are several processes.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"`tamper` runs in one process, and `trainer.devices` starts {trainer.world_size}. Set it to 1."
        )
    path = check_output("--out", Path(trainer.log_dir or ".") / RESULT if out is None else out)
    if module.policy_settings.lora is None:
        raise PolicyError("`tamper` trains the adapter, and there is none (`policy.lora` is null). Set `policy.lora`.")
    folder, module.adapter_folder = module.adapter_folder, None  # it would be loaded with the policy
    with prepared_for_fit(trainer, module, datamodule):
        base = _weights(module)  # a fresh adapter: the base
        if ckpt_path is not None:
            load_trained_(module, Path(ckpt_path))
        elif folder is not None:
            module.load_adapter(folder)
        else:
            module.start()
            if module.warm_start is None:
                rank_zero_warn("Without `--ckpt_path` and `policy.adapter` the policy is its base: both are the same.")
        module.adapter_folder = folder
        starts = {"base": base, "policy": _weights(module)}
        found = _attack_all(module, datamodule, attacker, starts)
    _print(found)
    rates = {
        attack: {who: {n: r.as_dict() for n, r in rs.items()} for who, rs in whos.items()}
        for attack, whos in found.items()
    }
    attacked = ckpt_path or folder or module.policy_settings.adapter
    what = {"attacked": None if attacked is None else str(attacked), "attacker": asdict(attacker)}
    write_json({**what, "rates": rates}, path)
    get_console().print(f"Written to {path}")
    return found


def _attack_all(
    module: GRPOModule, data: AlignmentDataModule, attacker: Attacker, starts: Mapping[str, Mapping[str, Tensor]]
) -> Measured:
    harmless, (harmful, examples) = _harmless(data, attacker), _harmful(module, data, attacker)
    attacks: dict[str, list[dict[str, Any]]] = {
        "nothing": [],
        f"{counted(attacker.steps, 'step')} of harmless SFT": harmless,
        counted(examples, "harmful example"): harmful,
    }
    found: Measured = {name: {} for name in attacks}
    for name, batches in attacks.items():
        for who, start in starts.items():
            _put_(module, start)
            _fine_tune_(module, batches, attacker.lr, f"Fine-tuning the {who}: {name}")
            held_out = _held_out(data, attacker.rows)
            found[name][who] = module.evaluator.measure([held_out], lambda batch: _on(batch, module.device))
    _put_(module, starts["policy"])
    return found


def _harmless(data: AlignmentDataModule, attacker: Attacker) -> list[dict[str, Any]]:
    rows = [row for source in data.general.loaded().train for row in source if row.answer]
    if not rows:
        raise DataError("`data.general`", "no training row has an answer to fine-tune on", "Name `answer_column`.")
    renderer, size = data.general.renderer, attacker.batch_size
    order = take_ranked(rows, min(len(rows), attacker.steps * size), "tamper")
    chosen = [rows[order[i % len(order)]] for i in range(attacker.steps * size)]
    return [collate_answers(part, renderer, _ANSWER_TOKENS) for part in _parts(chosen, size)]


def _harmful(module: GRPOModule, data: AlignmentDataModule, attacker: Attacker) -> tuple[list[dict[str, Any]], int]:
    """Return batches of prompts with answers that comply (the rows' targets, or what the base says), and of how many.

    The prompts are the requests themselves, not the templates that training puts around them.

    Raises:
        DataError: If no answer complies.
    """
    every = [_plain(row) for row in data.safety.loaded().train_of("harmful")]
    rows = [every[i] for i in take_ranked(every, min(len(every), 4 * attacker.examples), "tamper")]
    renderer, pairs = data.safety.renderer, list[tuple[PromptRow, list[int]]]()
    for part in _parts(rows, data.safety.eval_batch_size):
        answers = module.prefixes.compliant_answers(_on(collate_prompts(part, renderer), module.device))
        pairs += [(row, answer) for row, answer in zip(part, answers, strict=True) if answer]
        if len(pairs) >= attacker.examples:
            break
    pairs = pairs[: attacker.examples]
    if not pairs:
        raise DataError("`data.safety`", "the base complies with none of its prompts", "Give `target_column`.")
    if len(pairs) < attacker.examples:
        rank_zero_warn(
            f"`--examples` asks for {attacker.examples} harmful examples, and {counted(len(pairs), 'training prompt')} "
            "of those looked at have an answer that complies. The attack is made with these."
        )
    batches = []
    for part in _parts(pairs * attacker.epochs, attacker.batch_size):
        ids, mask = pad_token_ids([answer for _, answer in part], renderer.pad_token_id, "right")
        batches.append({**collate_prompts([row for row, _ in part], renderer), "answer_ids": ids, "answer_mask": mask})
    return batches, len(pairs)


def _plain(row: PromptRow) -> PromptRow:
    return row if row.request is None else replace(row, prompt=row.request, request=None)


def _fine_tune_(module: GRPOModule, batches: Sequence[dict[str, Any]], lr: float, label: str) -> None:
    if not batches:
        return
    parameters = module.text_policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    module.require_policy().train()
    with rows_progress(label, len(batches), unit="update") as advance:
        for batch in batches:
            rollout = given_answers(_on(batch, module.device))
            loss = module.scorer.likelihood_loss(rollout, float(rollout.completion_mask.sum()), 1.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            advance(1)
    optimizer.zero_grad()


def _held_out(data: AlignmentDataModule, limit: int) -> Any:
    harmful = data.eval_rows("test").safety
    if not harmful:
        raise DataError("`data.safety`", "there is no held-out harmful prompt", "Set `data.test_size`.")
    return data.safety.eval_loader([harmful[i] for i in take_ranked(harmful, min(limit, len(harmful)), "attack")])


def _parts(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(rows[start : start + size]) for start in range(0, len(rows), size))


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _weights(module: GRPOModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _put_(module: GRPOModule, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def _print(found: Measured) -> None:
    rows = []
    harm = next((name for name in (UNSAFE, ANSWERED) if name in found["nothing"]["policy"]), UNSAFE)
    for attack, whos in found.items():
        for who, rates in whos.items():
            shown = [rates.get(name) for name in (harm, *_OTHERS)]  # None: no answer could be judged
            unsafe, *shares = ["" if rate is None else f"{100 * rate.value:.1f}" for rate in shown]
            ends = shown[0].interval if shown[0] is not None else ()
            rows.append((attack, who, unsafe, " to ".join(f"{100 * end:.1f}" for end in ends), *shares))
    columns = ["after", "of the", "unsafe" if harm == UNSAFE else "answered", "95 %", *_OTHERS.values()]
    title = "Safety left after fine-tuning, in per cent of held-out harmful prompts"
    get_console().print(rich_table(title, columns, rows, align="llrrrr"))
