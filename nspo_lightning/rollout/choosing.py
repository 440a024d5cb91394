"""From the last logits to the next token: transformers' own processors, then one number of noise a row.

A token is drawn by inverting the cumulative distribution at a uniform number u[t, row]. All of u is drawn before the
first step, so a row's tokens depend neither on which other rows are still running nor on how the prompt was computed,
and a step costs one random number a row instead of one a row and vocabulary entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nspo_lightning.rollout.config import SamplingConfig

# (all sequences (R, L + C), their rows of interest (r,), tokens drawn so far, logits (r, V)) -> logits. The number of
# tokens is an int, or a tensor of shape (1,) where no shape may depend on it.
Process = Callable[[Tensor, Tensor, int | Tensor, Tensor], Tensor]


class NonFiniteLogitsError(ValueError):
    """Logits that no token can be drawn from."""


def build_processors(
    config: SamplingConfig, *, eos_token_ids: Sequence[int], prompt_length: int, device: torch.device
) -> Process:
    """Make the chain that ``generate`` would make, in its order.

    Nothing in it waits for the device, so that it can be part of a captured step. The one processor of transformers
    that decides by a number on the host, the minimum of new tokens, is written out here.

    Args:
        config: The sampling settings.
        eos_token_ids: Tokens that end a completion.
        prompt_length: L, columns before the first generated token.
        device: Device of the logits.

    Returns:
        A function of (all sequences, rows, tokens drawn so far, these rows' logits) that returns logits. Given the
        number of tokens as a tensor it reads all columns: those not drawn yet must repeat a token of their row.
    """
    from transformers.generation import logits_process as hf  # heavy: imported where it is used

    penalty = config.repetition_penalty
    repeat = hf.RepetitionPenaltyLogitsProcessor(float(penalty)) if penalty != 1.0 else None
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    chain: list[Callable[..., Tensor]] = []
    if config.temperature not in {0, 1}:
        chain.append(hf.TemperatureLogitsWarper(float(config.temperature)))
    if config.temperature > 0 and config.top_k > 0:
        chain.append(hf.TopKLogitsWarper(top_k=config.top_k))
    if config.temperature > 0 and config.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(top_p=float(config.top_p)))
    if config.temperature > 0 and config.min_p is not None:
        chain.append(hf.MinPLogitsWarper(min_p=float(config.min_p)))

    def process(sequences: Tensor, rows: Tensor, drawn: int | Tensor, logits: Tensor) -> Tensor:
        if repeat is not None:
            ids = sequences[rows] if isinstance(drawn, Tensor) else sequences[rows, : prompt_length + drawn]
            logits = repeat(ids, logits)
        if config.min_new_tokens > 0 and len(eos):
            is_eos = is_any_of(torch.arange(logits.shape[-1], device=logits.device), eos)
            logits = logits.masked_fill(is_eos & (drawn < config.min_new_tokens), -torch.inf)
        for processor in chain:
            logits = processor(None, logits)
        return logits

    return process


def is_any_of(tokens: Tensor, some: Tensor) -> Tensor:
    """Return where tokens, shape (...), are among a few, shape (E,); unlike `torch.isin` it never waits for a count."""
    return (tokens[..., None] == some).any(-1)


def noise(steps: int, rows: int, config: SamplingConfig, generator: torch.Generator | None) -> Tensor:
    """Draw all the noise of a rollout.

    Args:
        steps: Most tokens a completion can have.
        rows: Number of completions.
        config: Greedy settings (temperature 0) use no noise and draw none.
        generator: Its source; None = torch's global one.

    Returns:
        Shape (steps, rows), float64 in [0, 1), on the generator's device.
    """
    device = "cpu" if generator is None else generator.device
    if config.temperature == 0:
        return torch.zeros(steps, rows, dtype=torch.float64, device=device)
    return torch.rand(steps, rows, dtype=torch.float64, generator=generator, device=device)


def without_padding(ids: Tensor, mask: Tensor) -> Tensor:
    """Fill left padding with each row's first real token, (R, L): to a repetition penalty it then says nothing new."""
    return torch.where(mask, ids, ids.gather(1, mask.int().argmax(1, keepdim=True)))


def without_distribution(logits: Tensor) -> Tensor:
    """Return which rows of logits, (r, V), say nothing: shape (r,), bool, True = NaN or +inf in it, or -inf alone.

    Some tokens at -inf are no fault: they are impossible.
    """
    return ~torch.isfinite(logits.amax(dim=-1))  # the largest is NaN where any is


def nonfinite_logits(step: int, rows: int, running: int) -> str:
    """Say at which token completions can't go on, and why that may be."""
    return (
        f"No token can be drawn: the policy's logits for token {step + 1} of {rows} of the {running} running "
        "completions are NaN or infinite. Likely causes, the likeliest first: weights that a learning rate too high "
        "has spoilt (look at `loss` and `entropy` before); overflow in 16-bit floating point (`policy.dtype: bfloat16` "
        "instead of float16); a damaged base model or adapter; an attention implementation that fails at padding "
        "(`policy.attn_implementation: eager`)."
    )


def draw_tokens(logits: Tensor, uniform: Tensor, *, greedy: bool) -> Tensor:
    """Draw one token a row.

    Args:
        logits: Shape (r, V), processed.
        uniform: Shape (r,), float64 in [0, 1).
        greedy: Take the likeliest token instead.

    Returns:
        Shape (r,), int64.
    """
    if greedy:
        return logits.argmax(-1)
    # float64 sums: in float32 the tail of a large vocabulary would fall below the resolution of the sum before it.
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    # right=True: the first entry *above* the target, which a token of probability zero never is.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def drawn_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of each row's token, (r, V) and (r,) to (r,), as the policy is scored.

    The logits are the model's own, before processors: training knows the temperature alone.
    """
    scaled = logits if temperature in {0, 1} else logits / temperature
    return scaled.gather(-1, tokens[:, None]).squeeze(-1) - scaled.logsumexp(-1)
