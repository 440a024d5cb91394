import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nspo_lightning.policy.attention import GroupPass, attend, causal_bias
from nspo_lightning.policy.ragged import Ragged

HEADS, KV_HEADS, SIZE = 4, 2, 8
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # everything here runs in float64


def naive(q, k, v, allowed, scale=None, softcap=None):
    """One query, one head at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for h in range(q.shape[1]):
        source = h // (q.shape[1] // k.shape[1])
        for t in range(len(q)):
            scores = k[:, source] @ q[t, h] * (SIZE**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = (scores / softcap).tanh() * softcap
            out[t, h] = scores.masked_fill(~allowed[t], -torch.inf).softmax(0) @ v[:, source]
    return out


def random_qkv(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("mask_kind", ["ragged", "full"])
def test_ragged_round_trip_and_gradients(mask_kind):
    mask = torch.tensor([[False, True, True], [True, True, True]]) | (mask_kind == "full")
    ragged = Ragged(mask)
    grid = torch.randn(2, 3, 2, requires_grad=True)
    flat = ragged.pack(grid)
    assert flat.equal(grid[mask])
    padded = ragged.pad(flat)
    assert padded.equal(grid * mask[..., None])
    weight = torch.randn(2, 3, 2)
    (padded * weight).sum().backward()
    assert grid.grad is not None
    assert grid.grad.equal(weight * mask[..., None])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("biased", [True, False])
def test_grouped_heads_attend_as_separate_ones_do(softcap, scale, biased):
    q, k, v = (x[None] for x in random_qkv(6))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = causal_bias(torch.ones(1, 6, dtype=torch.bool), 6, None, q.dtype) if biased else None
    out = attend(q, k, v, bias=bias, scale=scale, softcap=softcap)
    torch.testing.assert_close(out[0], naive(q[0], k[0], v[0], allowed, scale, softcap), **EXACT)


def test_causal_bias_by_hand():
    mask = torch.tensor([[False, True, True, True]])
    o, x = 0.0, -torch.inf
    # The last two columns look back: padding is hidden, the future too, and a window of two hides column 1 from 3.
    assert causal_bias(mask, 2, None, torch.float32).tolist() == [[[x, o, o, x], [x, o, o, o]]]
    assert causal_bias(mask, 2, 2, torch.float32).tolist() == [[[x, o, o, x], [x, x, o, o]]]
    # Padding may look at itself, so that nothing becomes NaN.
    assert causal_bias(mask, 4, None, torch.float32)[0, 0].tolist() == [o, x, x, x]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_a_group_pass_equals_separate_sequences(window, padded):
    prompt_lengths, tail_lengths, group = ([2, 4], [3, 1, 2, 3], 2) if padded else ([4, 4], [3, 3, 3, 3], 2)
    prompt_mask = torch.arange(4) >= 4 - torch.tensor(prompt_lengths)[:, None]
    tail_mask = torch.arange(3) < torch.tensor(tail_lengths)[:, None]
    tokens = sum(prompt_lengths) + sum(tail_lengths)
    q, k, v = random_qkv(tokens)
    out = GroupPass(prompt_mask, tail_mask).attend(0, q, k, v, window=window, scale=None, softcap=None)

    starts = [0, *itertools.accumulate([*prompt_lengths, *tail_lengths])]
    pieces: dict[int, Tensor] = {}
    for row in range(len(tail_lengths)):
        p, c = row // group, len(prompt_lengths) + row
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in (p, c)])
        n = len(where)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        allowed = (distance >= 0) & (distance < (window or n))
        full = naive(q[where], k[where], v[where], allowed)
        pieces[p], pieces[c] = full[: prompt_lengths[p]], full[prompt_lengths[p] :]
    expected = torch.cat([pieces[i] for i in sorted(pieces)])
    torch.testing.assert_close(out, expected, **EXACT)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_pass_over_prompts_alone_leaves_their_keys_and_values():
    mask = torch.tensor([[False, True], [True, True]])
    q, k, v = random_qkv(3)
    memory: dict[int, tuple[Tensor, Tensor]] = {}
    GroupPass(mask, memory=memory).attend(5, q, k, v, window=None, scale=None, softcap=None)
    keys, values = memory[5]
    assert keys[mask].equal(k)
    assert values[mask].equal(v)
