"""General text as a measure: NLL of reference answers, and KL(base || policy) on them, by domain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 16


@torch.no_grad()
def text_metrics(module: Any, datamodule: Any, split: str, rows: int) -> dict[str, float]:
    """Measure the policy on held-out general rows that have an answer.

    Args:
        module: has `require_policy()`, a PEFT model or a plain one.
        datamodule: has `eval_rows(split)` and a renderer.
        split: ``validation`` or ``test``.
        rows: at most so many rows of each domain.

    Returns:
        `text/nll` (nats an answer token, the mean over domains), `text/nll/<domain>`, `text/kl` (nats an answer token,
        KL(base || policy); 0 without an adapter); empty without rows.
    """
    policy = module.require_policy()
    renderer = datamodule.general.renderer
    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in datamodule.eval_rows(split)[1]:
        if row.answer and len(chosen[row.skill]) < rows:
            chosen[row.skill].append(row)
    was_training = policy.training
    policy.eval()
    metrics: dict[str, float] = {}
    divergences: list[float] = []
    for domain, members in chosen.items():
        if not members:
            continue
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(members), _ROWS):
            sums += _sums(policy, renderer, members[start : start + _ROWS], module.device)
        nll, divergence, tokens = sums.tolist()
        metrics[f"text/nll/{domain}"] = nll / max(tokens, 1.0)
        divergences.append(divergence / max(tokens, 1.0))
    policy.train(was_training)
    if divergences:
        nlls = list(metrics.values())
        metrics |= {"text/nll": sum(nlls) / len(nlls), "text/kl": sum(divergences) / len(divergences)}
    return metrics


def _sums(policy: Any, renderer: Any, rows: Sequence[Any], device: torch.device) -> Tensor:
    """Return the summed NLL, the summed KL and the number of answer tokens of a batch, shape (3,)."""
    prompts = renderer.encode([renderer.text(row.prompt, None) for row in rows])
    texts = renderer.encode([renderer.text(row.prompt, row.answer) for row in rows])
    limit = int(getattr(getattr(policy, "config", None), "max_position_embeddings", 0) or max(map(len, texts)))
    texts = [ids[:limit] for ids in texts]
    width = max(len(ids) for ids in texts)
    ids = torch.tensor([t + [renderer.pad_token_id] * (width - len(t)) for t in texts], device=device)
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=device)
    answer = torch.tensor(
        [[len(p) <= i < len(t) for i in range(1, width)] for p, t in zip(prompts, texts, strict=True)], device=device
    )  # True = the token that is predicted belongs to the answer; shape (rows, width - 1)
    log_probs = _log_probs(policy, ids, mask, answer)
    target = ids[:, 1:][answer]
    nll = -log_probs.gather(1, target[:, None]).sum()
    disable = getattr(policy, "disable_adapter", None)
    divergence = torch.zeros((), device=device)
    if disable is not None:
        with disable():
            base = _log_probs(policy, ids, mask, answer)
        divergence = (base.exp() * (base - log_probs)).sum()
    return torch.stack([nll.double(), divergence.double(), answer.sum().double()]).cpu()


def _log_probs(policy: Any, ids: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
    """Return float32 log-probabilities at the answer positions, shape (answer tokens, vocabulary)."""
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][answer]
    return torch.log_softmax(logits.float(), dim=-1)
