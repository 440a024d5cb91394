"""Draw a group of completions for each prompt: prefill, repeat, decode.

Each prompt runs through the policy once. With sharing off, each row runs with its own copy of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.parts import PolicyParts, policy_parts
from nspo_lightning.policy.sharing import can_share_prompts
from nspo_lightning.rollout.choosing import noise
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.draft import Draft
from nspo_lightning.rollout.fixed_memory import FixedMemory
from nspo_lightning.rollout.graphs import GRAPHS_PAY_BACK, CapturedIfPossible, capturing, decoding_for
from nspo_lightning.rollout.loops import StaticLoop, decode_dynamically
from nspo_lightning.rollout.memory import RowMemory, SharedMemory
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.room import RolloutMemoryError, RolloutSize, bytes_per_token, too_large
from nspo_lightning.rollout.stopping import EndsCompletions
from nspo_lightning.rollout.waves import products_in_waves


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    group_size: int,
    config: SamplingConfig,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    stop: EndsCompletions | None = None,
    generator: torch.Generator | None = None,
    share_prefix: bool = True,
    prompt_places: Places | None = None,
    with_log_probs: bool = False,
) -> Rollout:
    """Sample ``group_size`` completions for each prompt.

    Args:
        model: The policy; runs in evaluation mode, whatever mode it is in.
        prompt_ids: Shape (P, L), left-padded.
        prompt_mask: Shape (P, L), bool, True = real token.
        group_size: G.
        config: Sampling settings.
        eos_token_ids: Every one of them ends a completion; may be empty.
        pad_token_id: Fills completions that are shorter than the longest.
        stop: Sees further ends, such as strings; None = there are none.
        generator: Source of the noise; the same state gives the same completions.
        share_prefix: Run each prompt once. False = the plain path, same results.
        prompt_places: Where these prompts stand in a larger batch, whose noise they get; None = they are all of it.
        with_log_probs: Also keep the log-probabilities of the drawn tokens, see `drawn_log_probs`.

    Returns:
        The rollout, C = length of the longest completion.

    Raises:
        ValueError: If there is no prompt, or one that ends in padding, or if it can't be decoded as asked.
        RolloutMemoryError: If the device's memory does not hold the rollout.
        NonFiniteLogitsError: If there are logits that no token can be drawn from.
    """
    prompt_mask = prompt_mask.bool()
    if prompt_ids.shape[0] == 0 or not bool(prompt_mask[:, -1].all()):
        raise ValueError(
            "Expected at least one prompt, each with its last token in the last column (left padding), got "
            f"{int((~prompt_mask[:, -1]).sum())} of {prompt_ids.shape[0]} prompts that end in padding. Tokenize with "
            "padding_side='left'."
        )
    parts = policy_parts(model)
    try:
        draft = Draft.begin(
            prompt_ids,
            prompt_mask,
            group_size=group_size,
            config=config,
            eos_token_ids=eos_token_ids,
            stop=stop,
            uniform=_noise_of(prompt_places, config.max_new_tokens, len(prompt_ids), group_size, config, generator),
            with_log_probs=with_log_probs,
        )
        with evaluation_mode(model), products_in_waves(parts.model):
            _complete(draft, parts, prompt_ids, prompt_mask, group_size, share_prefix)
        return draft.rollout(prompt_ids, prompt_mask, group_size, pad_token_id)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
    # Raised out here: the caught error holds what took the memory, and a checkpoint is to be written yet.
    size = RolloutSize(
        prompts=len(prompt_ids),
        group_size=group_size,
        prompt_tokens=prompt_ids.shape[1],
        new_tokens=config.max_new_tokens,
        shared=share_prefix,
        bytes_per_token=bytes_per_token(parts.model),
        vocab_size=parts.vocab_size,
    )
    raise RolloutMemoryError(too_large(size, reason))


def _complete(
    draft: Draft, parts: PolicyParts, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int, share_prefix: bool
) -> None:
    way = decoding_for(draft.config, parts, prompt_ids.device, share_prefix)
    if way == "dynamic":
        shared = share_prefix and can_share_prompts(parts.model)
        growing = SharedMemory(parts, group_size) if shared else RowMemory(parts, group_size)
        decode_dynamically(draft, growing, growing.prefill(prompt_ids, prompt_mask))
        return
    if not share_prefix:
        prompt_ids, prompt_mask = (x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask))
    memory = FixedMemory(parts, group_size if share_prefix else 1)
    with capturing(prompt_ids.device):
        logits = memory.prefill(prompt_ids, prompt_mask)
        if way == "graphs":
            StaticLoop(draft, memory, CapturedIfPossible, GRAPHS_PAY_BACK).run(logits)
        else:
            StaticLoop(draft, memory, lambda step: step).run(logits)


def _noise_of(
    prompt_places: Places | None,
    steps: int,
    prompts: int,
    group_size: int,
    config: SamplingConfig,
    generator: torch.Generator | None,
) -> Tensor:
    # (steps, prompts * group_size). One number a token is so little that every rank draws everybody's.
    if prompt_places is None:
        return noise(steps, prompts * group_size, config, generator)
    whole, first = prompt_places.group_size or group_size, prompt_places.first
    drawn = noise(steps, prompt_places.total * whole, config, generator)
    mine = torch.tensor(prompt_places.mine, device=drawn.device)
    return drawn.view(steps, prompt_places.total, whole)[:, mine, first : first + group_size].flatten(1)
