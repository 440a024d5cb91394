"""Scoring with shared prompts against full sequences through the model, architecture by architecture."""

import warnings
from functools import partial

import pytest
import torch
from tiny_policies import CONFIGS, SHARING, VOCABULARY, ragged_prompts, tiny_base, tiny_policy, with_adapter

from nspo_lightning.grpo import (
    Normaliser,
    ObjectiveConfig,
    Rollout,
    accumulated_loss,
    objective,
    split_microbatches,
    token_weights,
)
from nspo_lightning.policy import scoring
from nspo_lightning.policy.log_probs import chosen_log_probs
from nspo_lightning.policy.scoring import score_completions

LOG_PROB = 1e-5  # absolute, float32
GRADIENT = 1e-5  # relative to the largest entry of each parameter's gradient
GROUP = 3


def make_rollout(lengths=(1, 8, 3, 5, 2, 8, 1, 1, 6)):
    ids, mask = ragged_prompts()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor(lengths)
    completion_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    completion_ids = torch.randint(3, VOCABULARY, completion_mask.shape, generator=generator)
    return Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        group_size=GROUP,
        completion_ids=completion_ids.masked_fill(~completion_mask, 0),
        completion_mask=completion_mask,
        finished=lengths < 8,
    )


def trainable(policy):
    return [p for p in policy.parameters() if p.requires_grad]


def full_log_probs(policy, rollout, temperature=1.0):
    """Each row on its own, without padding, straight through the model."""
    rows = []
    for r in range(len(rollout.completion_ids)):
        p = r // rollout.group_size
        prompt = rollout.prompt_ids[p][rollout.prompt_mask[p]]
        tail = rollout.completion_ids[r][rollout.completion_mask[r]]
        logits = policy(input_ids=torch.cat([prompt, tail])[None], use_cache=False).logits[0].float() / temperature
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        row = steps.gather(1, tail[:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(row, (0, rollout.completion_ids.shape[1] - len(tail))))
    return torch.stack(rows)


def gradients(policy, log_probs):
    generator = torch.Generator().manual_seed(4)
    upstream = torch.randn(log_probs.shape, generator=generator)
    grads = torch.autograd.grad((log_probs * upstream).sum(), trainable(policy), allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in grads]


def assert_gradients_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= GRADIENT * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_shared_and_plain_paths_equal_rows_run_one_by_one(name):
    policy, rollout = tiny_policy(name), make_rollout()
    expected = full_log_probs(policy, rollout, temperature=0.8)
    wanted = gradients(policy, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if name in SHARING:  # none of these may fall back
            warnings.filterwarnings("error", message=".*cannot share a prompt")
        for share in (True, False):
            scores = score_completions(policy, rollout, temperature=0.8, share_prefix=share, with_entropy=True)
            assert (scores.log_probs - expected).abs().max() <= LOG_PROB
            assert scores.log_probs[~rollout.completion_mask].eq(0).all()
            assert scores.entropy is not None
            assert scores.entropy[rollout.completion_mask].gt(0).all()
            assert_gradients_equal(gradients(policy, scores.log_probs), wanted)


@pytest.mark.parametrize("name", SHARING)
def test_gradient_checkpointing_changes_nothing_and_is_used(name):
    base = tiny_base(name)
    policy, rollout = with_adapter(base), make_rollout()
    plain = score_completions(policy, rollout).log_probs
    wanted = gradients(policy, plain)
    policy.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    runs = []
    layers = base.model.layers if hasattr(base, "model") else base.transformer.h
    layers[0].register_forward_pre_hook(lambda *_: runs.append("outer"))
    inner = next(m for m in layers[0].modules() if type(m).__name__.endswith("MLP") or "Moe" in type(m).__name__)
    inner.register_forward_pre_hook(lambda *_: runs.append("inner"))
    scores = score_completions(policy, rollout).log_probs
    grads = gradients(policy, scores)
    assert runs.count("outer") == 1
    assert runs.count("inner") == 2, "the layer was not run again in the backward pass"
    assert (scores - plain).abs().max() <= LOG_PROB
    assert_gradients_equal(grads, wanted)
    assert base.config._attn_implementation != "nspo_group"


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_every_loss_in_micro_batches_equals_one_plain_batch(loss_type, beta):
    policy, rollout = tiny_policy(), make_rollout()
    config = ObjectiveConfig(loss_type=loss_type, beta=beta)
    mask, advantages = rollout.completion_mask, torch.linspace(-1, 1, len(rollout.completion_ids))
    weights = token_weights(mask, loss_type, Normaliser.of(mask, 10))
    with torch.no_grad():
        old = score_completions(policy, rollout, share_prefix=False).log_probs + 0.1 * mask
        with policy.disable_adapter():
            reference = score_completions(policy, rollout).log_probs

    def run(budget, share):
        def one(micro):
            scores = score_completions(policy, micro.rollout, share_prefix=share)
            return objective(
                scores.log_probs,
                mask=micro.take(mask),
                weights=micro.take(weights),
                advantages=micro.take(advantages),
                config=config,
                old_log_probs=micro.take(old),
                reference_log_probs=micro.take(reference),
            ).loss

        micros = split_microbatches(rollout, budget, share_prefix=share)
        loss = accumulated_loss(trainable(policy), micros, one)
        return loss, torch.autograd.grad(loss, trainable(policy)), len(micros)

    loss, grads, _ = run(None, share=False)
    for budget in (None, 30, 12):
        shared_loss, shared_grads, pieces = run(budget, share=True)
        assert pieces == {None: 1, 30: 3, 12: 7}[budget]
        torch.testing.assert_close(shared_loss, loss, rtol=1e-5, atol=1e-6)
        assert_gradients_equal(shared_grads, grads)


def test_reference_is_the_base_while_the_adapter_is_off():
    policy, rollout = tiny_policy(), make_rollout()
    with torch.no_grad(), policy.disable_adapter():
        reference = score_completions(policy, rollout).log_probs
    with torch.no_grad():
        expected = full_log_probs(tiny_base("llama"), rollout)
        adapted = score_completions(policy, rollout).log_probs
    assert (reference - expected).abs().max() <= LOG_PROB
    assert (adapted - expected).abs().max() > 100 * LOG_PROB


def test_one_token_completions_and_single_prompts():
    policy = tiny_policy()
    rollout = make_rollout(lengths=(1,) * 9)
    for part in (rollout, rollout.select([0]), rollout.select_rows(1, torch.tensor([4]))):
        with torch.no_grad():
            scores = score_completions(policy, part)
        assert (scores.log_probs - full_log_probs(policy, part)).abs().max() <= LOG_PROB


def test_each_prompt_token_goes_through_the_layers_once():
    policy, rollout = tiny_policy(), make_rollout()
    score_completions(policy, rollout)  # the trial of the model is behind us
    tokens = []
    layer = policy.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        score_completions(policy, rollout)
    # All real prompt tokens, and all real completion tokens but each row's last.
    assert tokens == [int(rollout.prompt_mask.sum() + rollout.completion_mask.sum()) - len(rollout.completion_ids)]


def test_the_largest_logits_are_one_chunk(monkeypatch):
    policy, rollout = tiny_policy(), make_rollout()
    score_completions(policy, rollout)
    sizes = []
    policy.get_output_embeddings().register_forward_hook(lambda _m, _a, out: sizes.append(out.shape[:-1].numel()))
    monkeypatch.setattr(scoring, "chosen_log_probs", partial(chosen_log_probs, chunk_tokens=4))
    score_completions(policy, rollout).log_probs.sum().backward()
    assert max(sizes) == 4


def test_empty_completions_are_refused():
    rollout = make_rollout()
    mask = rollout.completion_mask.clone()
    mask[2] = False
    with pytest.raises(ValueError, match="1 of 9 completions have no token"):
        score_completions(tiny_policy(), Rollout(**rollout.state_dict() | {"completion_mask": mask}))


def test_bfloat16_policies_are_scored():
    policy, rollout = with_adapter(tiny_base("llama").bfloat16()), make_rollout()
    with torch.no_grad():
        shared = score_completions(policy, rollout).log_probs
        plain = score_completions(policy, rollout, share_prefix=False).log_probs
    assert (shared - plain).abs().max() < 0.3  # eight bits of mantissa
