from typing import Any

import pytest
import torch
from torch import nn

from nspo_lightning.policy.log_probs import chosen_log_probs

N, HIDDEN, VOCABULARY = 11, 6, 23
TIGHT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def make(requires_grad=False):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    head.requires_grad_(requires_grad)
    hidden = torch.randn(N, HIDDEN, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (N,))
    return head, hidden, targets


def score(head, hidden, targets, **kwargs):
    frozen = not any(p.requires_grad for p in head.parameters())
    return chosen_log_probs(
        hidden, targets, head, vocab_size=VOCABULARY, head_is_frozen=frozen, with_entropy=True, **kwargs
    )


@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_equal_a_full_softmax(trainable_head, chunk, temperature):
    head, hidden, targets = make(trainable_head)
    scores = score(head, hidden, targets, chunk_tokens=chunk, temperature=temperature)
    full = (head(hidden) / temperature).log_softmax(-1)
    expected = full.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(scores.log_probs, expected, **TIGHT)
    torch.testing.assert_close(scores.entropy, -(full.exp() * full).sum(-1).detach(), **TIGHT)
    upstream = torch.randn(N)
    wanted = [hidden, *[p for p in head.parameters() if p.requires_grad]]
    ours = torch.autograd.grad((scores.log_probs * upstream).sum(), wanted)
    theirs = torch.autograd.grad((expected * upstream).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_logits_exist_for_one_chunk_at_a_time(trainable_head):
    head, hidden, targets = make(trainable_head)
    sizes = []
    head.register_forward_hook(lambda _m, _a, out: sizes.append(len(out)))
    score(head, hidden, targets, chunk_tokens=3).log_probs.sum().backward()
    assert max(sizes) == 3


def test_a_frozen_head_is_not_run_again_for_the_backward_pass():
    head, hidden, targets = make()
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    log_probs = score(head, hidden, targets, chunk_tokens=4).log_probs
    log_probs.sum().backward()
    assert len(calls) == 3


def test_no_gradient_is_prepared_without_grad_mode():
    head, hidden, targets = make()
    with torch.no_grad():
        assert not score(head, hidden, targets).log_probs.requires_grad


def test_impossible_tokens_do_not_spoil_the_entropy():
    head = nn.Linear(HIDDEN, 3)
    hidden = torch.zeros(1, HIDDEN)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
        scores = chosen_log_probs(hidden, torch.tensor([0]), head, vocab_size=3, head_is_frozen=True, with_entropy=True)
    torch.testing.assert_close(scores.entropy, torch.tensor([2.0]).log())


def test_half_precision_states_are_scored_in_float32():
    head, hidden, targets = make()
    scores = score(head.bfloat16(), hidden.bfloat16(), targets)
    assert scores.log_probs.dtype == scores.entropy.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"), [({"temperature": 0}, "must be positive"), ({"chunk_tokens": 0}, "at least 1")]
)
def test_values_out_of_range_are_refused(change, message):
    head, hidden, targets = make()
    with pytest.raises(ValueError, match=message):
        score(head, hidden, targets, **change)
