"""General text as a measure: NLL of reference answers, and KL(base || policy) on them, by domain."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any, Literal, Protocol

from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.text.collate import collate_text
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.text_scores import score_texts

_ROWS_A_BATCH = 16


class HasPolicy(Protocol):
    """A module with a loaded policy."""

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the policy's context holds."""

    def require_policy(self) -> Any:
        """Return the policy."""


def text_metrics(
    module: HasPolicy, datamodule: AlignmentDataModule, split: Literal["validation", "test"], rows: int
) -> dict[str, float]:
    """Return measures of the policy on the first `rows` held-out general rows of each domain that have an answer.

    They are `text/nll` (nats an answer token, the mean over domains), `text/nll/<domain>` and `text/kl` (nats an answer
    token, KL(base || policy), the mean over domains; 0 without an adapter). Empty without rows.
    """
    policy, renderer = module.require_policy(), datamodule.general.renderer
    chosen: dict[str, list[PromptRow]] = defaultdict(list)
    for row in datamodule.eval_rows(split)[1]:
        if row.answer and len(chosen[row.skill]) < rows:
            chosen[row.skill].append(row)
    sums = {}
    for domain, members in chosen.items():
        parts = [members[start : start + _ROWS_A_BATCH] for start in range(0, len(members), _ROWS_A_BATCH)]
        sums[domain] = score_texts(policy, [collate_text(part, renderer, module.context_tokens) for part in parts])
    if not sums:
        return {}
    by_domain = {f"text/nll/{domain}": total.mean_nll for domain, total in sums.items()}
    kl = fmean(total.mean_kl for total in sums.values()) if has_adapter(policy) else 0.0
    return {**by_domain, "text/nll": fmean(by_domain.values()), "text/kl": kl}
