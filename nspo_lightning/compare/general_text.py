"""General text as a measure: NLL of reference answers, and KL(base || policy) on them, by domain."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from nspo_lightning.datamodules.text.collate import collate_text
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.text_scores import score_texts

_ROWS_A_BATCH = 16


def text_metrics(module: Any, datamodule: Any, split: str, rows: int) -> dict[str, float]:
    """Measure the policy on held-out general rows that have an answer.

    Args:
        module: has `require_policy()`, a PEFT model or a plain one.
        datamodule: has `eval_rows(split)` and a renderer.
        split: ``validation`` or ``test``.
        rows: at most so many rows of each domain, the first ones.

    Returns:
        `text/nll` (nats an answer token, the mean over domains), `text/nll/<domain>`, `text/kl` (nats an answer token,
        KL(base || policy), the mean over domains; 0 without an adapter); empty without rows.
    """
    policy, renderer = module.require_policy(), datamodule.general.renderer
    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in datamodule.eval_rows(split)[1]:
        if row.answer and len(chosen[row.skill]) < rows:
            chosen[row.skill].append(row)
    sums = {
        domain: score_texts(
            policy,
            [
                collate_text(members[start : start + _ROWS_A_BATCH], renderer, module.context_tokens)
                for start in range(0, len(members), _ROWS_A_BATCH)
            ],
        )
        for domain, members in chosen.items()
        if members
    }
    if not sums:
        return {}
    metrics = {f"text/nll/{domain}": total.mean_nll for domain, total in sums.items()}
    metrics["text/nll"] = sum(metrics.values()) / len(metrics)
    metrics["text/kl"] = sum(s.mean_kl for s in sums.values()) / len(sums) if has_adapter(policy) else 0.0
    return metrics
