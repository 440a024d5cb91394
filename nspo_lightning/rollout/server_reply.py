"""What is asked of a completions server, and its answer as token ids and log-probabilities, checked.

Field names are vLLM's. Every sampling parameter is sent, also where it has its default: vLLM fills what a request
leaves out from the model's own generation settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.terminal import counted


@dataclass(frozen=True)
class ServedCompletion:
    """One completion as the server drew it: tokens with the closing EOS, and the log-probability of each."""

    ids: list[int]
    log_probs: list[float]
    stopped: bool = False
    """By one of `stop_strings`."""


def completion_request(
    model: str, prompt: Sequence[int], group_size: int, config: SamplingConfig, stop_ids: Sequence[int], seed: int
) -> dict[str, Any]:
    """Ask a model for one prompt's group; completion g uses the noise of seed + g."""
    return {
        "model": model,
        "prompt": list(prompt),
        "n": group_size,
        "seed": seed,
        "max_tokens": config.max_new_tokens,
        "min_tokens": config.min_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p or 0.0,
        "repetition_penalty": config.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(stop_ids),
        "stop": list(config.stop_strings),
        "logprobs": 0,  # of the drawn token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def read_completions(
    reply: Any, request: dict[str, Any], stop_ids: Sequence[int], vocab_size: int
) -> list[ServedCompletion]:
    """Return the group of completions that a reply (JSON) to a request holds, in order, after checking it.

    `stop_ids` are the tokens that end a completion, `vocab_size` is that of the trainer's policy.

    Raises:
        RolloutServerError: If another model answered, or something is missing or impossible.
    """
    if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
        raise RolloutServerError(f"The rollout server answered no completion but {str(reply)[:120]!r}.")
    if reply.get("model") != request["model"]:
        raise RolloutServerError(
            f"Stale adapter: completions were asked of '{request['model']}', and the rollout server says that "
            f"'{reply.get('model')}' answered. Nothing of it is trained on. Is there a proxy between?"
        )
    choices = reply["choices"]
    if not all(isinstance(choice, dict) and _is_id(choice.get("index", 0)) for choice in choices):
        raise RolloutServerError(f"The rollout server's choices are none of a completions API: {str(choices)[:120]}.")
    choices = sorted(choices, key=lambda choice: int(choice.get("index", 0)))
    if len(choices) != request["n"]:
        raise RolloutServerError(
            f"{counted(request['n'], 'completion was', 'completions were')} asked for, and {len(choices)} came "
            "back. The server must honour `n`."
        )
    return [_read(choice, request, frozenset(stop_ids), vocab_size) for choice in choices]


def _read(choice: dict[str, Any], request: dict[str, Any], stop: frozenset[int], vocab_size: int) -> ServedCompletion:
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and prompt != request["prompt"]:
        raise RolloutServerError(
            f"The rollout server completed another prompt ({counted(len(_list(prompt)), 'token')}) than the one it "
            f"was sent ({counted(len(request['prompt']), 'token')}): it must take token ids as they are."
        )
    scored = choice.get("logprobs")
    scored = scored if isinstance(scored, dict) else {}
    ids = _list(choice.get("token_ids")) or _ids_of(_list(scored.get("tokens")))
    log_probs = _list(scored.get("token_logprobs"))
    if not ids or len(ids) != len(log_probs):
        raise RolloutServerError(
            f"A completion came back with {len(ids)} token ids and {len(log_probs)} log-probabilities. The "
            "server must return both (vLLM 0.10.2 or newer: `return_token_ids` and `logprobs`)."
        )
    if not all(_is_number(value) and math.isfinite(value) and value <= 1e-3 for value in log_probs):
        raise RolloutServerError(
            "The rollout server returned a log-probability that is none (missing, NaN or positive)."
        )
    if odd := [token for token in ids if not _is_id(token) or token >= vocab_size]:
        raise RolloutServerError(
            f"The rollout server drew token {str(odd[0])[:40]}, and the policy's vocabulary has {vocab_size}. It "
            "serves another model: mend `rollout_server.model`."
        )
    if any(token in stop for token in ids[:-1]) or len(ids) > request["max_tokens"]:
        raise RolloutServerError(
            f"The rollout server went on behind a token that ends a completion ({sorted(stop)}) or behind "
            "`max_tokens`. It must honour `stop_token_ids` and `max_tokens`."
        )
    stopped = choice.get("finish_reason") == "stop" and choice.get("stop_reason") in request["stop"]
    if ids[-1] not in stop and not stopped and len(ids) < request["max_tokens"]:
        raise RolloutServerError(
            f"A completion ended after {len(ids)} of {request['max_tokens']} tokens without one that ends it "
            f"(finish_reason '{choice.get('finish_reason')}', stop_reason {choice.get('stop_reason')!r}). Give the "
            "server more context (`--max-model-len`), or remove its own stop words (`--generation-config vllm`)."
        )
    return ServedCompletion(ids, [min(float(value), 0.0) for value in log_probs], stopped)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids_of(tokens: list[Any]) -> list[int]:
    # Servers without `token_ids` may write tokens as "token_id:17".
    marked = [str(token).partition("token_id:")[2] for token in tokens]
    return [int(token) for token in marked] if all(token.isdigit() for token in marked) else []


def as_rollout(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    groups: Sequence[Sequence[ServedCompletion]],
    stop_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Pad P groups of completions, with the log-probabilities that the server gives their tokens."""
    rows = [completion for group in groups for completion in group]
    lengths = torch.tensor([len(row.ids) for row in rows])
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True, padding_value=pad_id)
    log_probs = pad_sequence([torch.tensor(row.log_probs) for row in rows], batch_first=True)
    device = prompt_ids.device
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask.bool(),
        group_size=len(groups[0]),
        completion_ids=ids.to(device),
        completion_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).to(device),
        finished=torch.tensor([row.stopped or row.ids[-1] in set(stop_ids) for row in rows], device=device),
        log_probs=log_probs.to(device),
    )
