"""Perplexity and KL of a PEFT policy, against the plain way with all logits at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from tiny_policies import move_adapter_

from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy import text_scores
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.divergence import (
    RowScore,
    TextScores,
    drawn_tokens,
    predicted_positions,
    token_loss,
    token_scores,
)
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.text_scores import BaseStates, score_text, score_texts, text_loss

TOLERANCE = 2e-5  # float32 logits, taken in another order


@pytest.fixture(scope="module")
def policy(tiny_llama):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=LoraSettings(r=4))
    model = load_policy(settings, torch.device("cpu"))
    torch.manual_seed(3)
    move_adapter_(model, 0.05)
    return model


def batch(side="right"):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:], mask[2, 7:] = 0, 0
    if side == "left":
        ids, mask = ids.clone(), mask.clone()
        for row in range(3):
            length = int(mask[row].sum())
            ids[row] = ids[row].roll(9 - length)
            mask[row] = mask[row].roll(9 - length)
    return {"input_ids": ids, "attention_mask": mask}


def dense(policy, ids, keep):
    """One row without padding, all logits, float64 at the end."""
    with torch.no_grad():
        log_q = policy(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        with policy.disable_adapter():
            log_p = policy(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    nll = -log_q.gather(-1, ids[1:, None])[:, 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(nll[keep].sum()), float(kl[keep].sum()), int(keep.sum())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_sums_are_those_of_the_rows_alone(policy, side, chunk, monkeypatch):
    monkeypatch.setattr(text_scores, "token_scores", partial(token_scores, chunk_tokens=chunk))
    policy.eval()
    given = batch(side)
    expected = torch.zeros(3, dtype=torch.float64)
    for ids, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
        row = ids[mask]
        expected += torch.tensor(dense(policy, row, torch.ones(len(row) - 1, dtype=torch.bool)))
    found = score_text(policy, given)
    assert found.tokens == int(expected[2]) == 18
    assert found.nll == pytest.approx(float(expected[0]), rel=TOLERANCE)
    assert found.kl == pytest.approx(float(expected[1]), rel=1e-3)
    assert found.kl > 0.01


def test_only_labelled_tokens_count(policy):
    policy.eval()
    given = batch()
    labels = torch.zeros_like(given["attention_mask"])
    labels[0, 4:7] = 1
    found = score_text(policy, {**given, "labels_mask": labels})
    nll, kl, tokens = dense(policy, given["input_ids"][0], labels[0, 1:].bool())
    assert found.tokens == tokens == 3
    assert found.nll == pytest.approx(nll, rel=TOLERANCE)
    assert found.kl == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_tokens_of_answers_are_scored_apart_by_row_and_skill(policy, side):
    policy.eval()
    given, real = batch(side), batch(side)["attention_mask"].bool()
    lengths, prompts = real.sum(1), (4, 2, 0)  # the last row has no prompt: all of it is scored
    labels = torch.zeros_like(given["attention_mask"])
    for row, prompt in enumerate(prompts):
        labels[row, real[row].nonzero()[prompt:, 0]] = 1
    scores = score_text(policy, {**given, "labels_mask": labels, "domain": ["a", "b", "a"]})
    assert [row.skill for row in scores.rows] == ["a", "b", "a"]
    assert [row.first_tokens for row in scores.rows] == [3, 3, 0]
    for found, ids, mask, prompt, length in zip(scores.rows, given["input_ids"], real, prompts, lengths, strict=True):
        nll, kl, tokens = dense(policy, ids[mask], torch.arange(1, length) >= prompt)
        assert found.tokens == tokens == length - max(prompt, 1)
        assert (found.nll, found.kl) == (pytest.approx(nll, rel=TOLERANCE), pytest.approx(kl, rel=1e-3))
        # The position before the answer predicts its first token, and two of the answer the two that follow.
        places = torch.arange(length - 1)
        first = (places >= prompt - 1) & (places < prompt + 2) & (prompt > 0)
        assert found.first_kl == pytest.approx(dense(policy, ids[mask], first)[1], rel=1e-3)
        assert found.first_kl > 0.001 or prompt == 0


def test_the_base_is_run_once_for_a_text_and_anew_for_another(policy, monkeypatch):
    policy.eval()
    runs = []

    def counting(model):
        runs.append(model)
        return adapters_off(model)

    monkeypatch.setattr(text_scores, "adapters_off", counting)
    base, given = BaseStates(), batch()
    first, again = score_text(policy, given, base), score_text(policy, given, base)
    assert (first, len(runs)) == (again, 1)
    fewer = {**given, "labels_mask": given["attention_mask"] * torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1])}
    for other in (fewer, {**given, "input_ids": given["input_ids"] + 1}):
        assert score_text(policy, other, base) == score_text(policy, other)
    assert len(runs) == 5
    full = BaseStates(room=0)
    assert score_text(policy, given, full) == score_text(policy, given, full) == first
    with torch.autocast("cpu", torch.bfloat16):
        assert score_text(policy, given, base) == score_text(policy, given)


def test_a_fresh_adapter_is_the_base_and_the_mode_stays(policy):
    policy.train()
    saved = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_B" in n}
    try:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        found = score_texts(policy, [batch(), batch("left")])
        assert found.mean_kl == pytest.approx(0.0, abs=1e-7)
        assert found.perplexity == pytest.approx(torch.tensor(found.nll / found.tokens).exp().item())
        assert policy.training
        assert all(p.requires_grad == ("lora_" in n) for n, p in policy.named_parameters())
    finally:
        for name, parameter in policy.named_parameters():
            if name in saved:
                parameter.data.copy_(saved[name])


def test_an_adapted_head_is_off_in_the_base(tiny_llama):
    lora = LoraSettings(r=4, target_modules=["lm_head"])
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=lora)
    model = load_policy(settings, torch.device("cpu"))
    move_adapter_(model, 0.1)
    model.eval()
    given = batch()
    found = score_text(model, {key: value[:1] for key, value in given.items()})
    _, kl, _ = dense(model, given["input_ids"][0], torch.ones(8, dtype=torch.bool))
    assert kl > 0.01
    assert found.kl == pytest.approx(kl, rel=1e-3)


def test_without_an_adapter_there_is_no_kl(tiny_llama):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=None)
    plain = load_policy(settings, torch.device("cpu"))
    assert not has_adapter(plain)
    found = score_texts(plain, [batch()])
    assert found.kl != found.kl  # nan
    assert found.nll > 0
    logits = torch.randn(4, 7)
    assert token_scores(logits, torch.zeros(4, dtype=torch.long), lambda x: x, vocab_size=7).kl.isnan().all()


def test_impossible_tokens_give_no_nan():
    base = torch.tensor([[0.0, -torch.inf, 0.0]])
    policy = torch.tensor([[0.0, -torch.inf, 1.0]])
    found = token_scores(policy, torch.tensor([0]), lambda x: x, base, vocab_size=3)
    assert found.kl == pytest.approx(0.1201, abs=1e-3)
    wider = token_scores(base, torch.tensor([0]), lambda x: x, torch.zeros(1, 3), vocab_size=3)
    assert wider.kl == float("inf")  # the base says what the policy never would


def test_rows_add_and_survive_the_way_over_ranks(tmp_path):
    one = TextScores((RowScore(tokens=3, nll=1.5, base_nll=1.0, kl=0.5),))
    total = one + TextScores((RowScore(tokens=1, nll=0.5, base_nll=0.0, kl=0.25),))
    assert total.over_ranks() == total
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert total.over_ranks() == total
    finally:
        dist.destroy_process_group()
    assert (total.mean_nll, total.mean_kl, total.tokens) == (0.5, 0.1875, 4)
    assert TextScores().mean_kl != TextScores().mean_kl  # nan


def test_the_first_real_token_is_never_scored():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert predicted_positions(mask).tolist() == [[False, False, True], [True, True, False]]
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_scores(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), lambda x: x, vocab_size=2, chunk_tokens=0)


def gradients(policy, batch, kind):
    """What a plain backward pass makes, of all logits at once and in float64 at the end."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        row = ids[mask]
        log_q = policy(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        if kind == "nll":
            total = total - log_q.gather(-1, row[1:, None]).sum()
            continue
        with torch.no_grad(), adapters_off(policy):
            log_p = policy(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return float(total.detach()), torch.autograd.grad(total, parameters)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", ["kl", "nll"])
def test_the_loss_is_the_sum_that_is_measured_and_its_gradient_is_autograds(policy, kind, chunk, side, monkeypatch):
    monkeypatch.setattr(text_scores, "token_loss", partial(token_loss, chunk_tokens=chunk))
    policy.eval()
    given, parameters = batch(side), [p for p in policy.parameters() if p.requires_grad]
    loss, tokens = text_loss(policy, given, kind, BaseStates())
    measured = score_text(policy, given)
    assert tokens == measured.tokens == 18
    assert float(loss) == pytest.approx(getattr(measured, kind), rel=1e-4)
    value, expected = gradients(policy, given, kind)
    assert float(loss) == pytest.approx(value, rel=1e-3)
    for found, right in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.allclose(found, right, rtol=2e-3, atol=2e-4 * float(right.abs().max()))


def test_at_the_base_the_kl_has_no_gradient_and_dropout_none_of_its_noise(policy, tiny_llama):
    lora = LoraSettings(r=4, dropout=0.5, target_modules=["q_proj", "lm_head"])
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=lora)
    dropping = load_policy(settings, torch.device("cpu")).train()
    given, parameters = batch(), [p for p in dropping.parameters() if p.requires_grad]
    loss, _ = text_loss(dropping, given, "kl")
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5)
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, parameters)) < 1e-4
    move_adapter_(dropping, 0.1)
    losses, found = [], []
    for _ in range(2):
        loss, _ = text_loss(dropping, given, "kl")
        losses.append(float(loss.detach()))
        found.append(torch.autograd.grad(loss, parameters))
    assert losses[0] == losses[1] == pytest.approx(score_text(dropping, given).kl, rel=1e-4)
    assert losses[0] > 0.01
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert dropping.training
    assert all(p.requires_grad == ("lora_" in name) for name, p in dropping.named_parameters())


def test_drawn_tokens_are_the_policys_the_same_for_the_same_text_and_draw_nothing_elsewhere(policy):
    policy.eval()
    generator = torch.Generator().manual_seed(4)
    likelihood = entropy = spread = 0.0
    state = torch.get_rng_state()
    for _ in range(40):
        ids = torch.randint(5, 200, (2, 9), generator=generator)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        loss, tokens = text_loss(policy, given, "drawn")
        assert tokens == 16
        assert float(loss) == float(text_loss(policy, given, "drawn")[0])
        log_q = policy(input_ids=ids).logits[:, :-1].double().log_softmax(-1).detach()
        own = -(log_q.exp() * log_q).sum(-1)
        likelihood, entropy = likelihood + float(loss), entropy + float(own.sum())
        spread += float(((log_q.exp() * log_q.square()).sum(-1) - own.square()).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(likelihood - entropy) < 4 * spread**0.5


def test_no_token_is_drawn_from_what_is_not_finite():
    states, generator = torch.tensor([[0.0, float("nan")]]), torch.Generator()
    with pytest.raises(ValueError, match="logits on general text are not finite"):
        drawn_tokens(states, lambda x: x, generator, vocab_size=2)
    assert drawn_tokens(torch.zeros(0, 2), lambda x: x, generator, vocab_size=2).shape == (0,)


def test_a_kl_without_an_adapter_is_refused(tiny_llama):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=None)
    plain = load_policy(settings, torch.device("cpu"))
    with pytest.raises(PolicyError, match="no adapter"):
        text_loss(plain, batch(), "kl")
