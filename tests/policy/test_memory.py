"""No logits of a whole batch, nothing left behind between steps, and 4-bit bases with the same numbers."""

import gc
from functools import partial

import pytest
import torch
import transformers
from tiny_policies import VOCABULARY, ragged_prompts, tiny_policy, with_adapter

from nspo_lightning.compat.bitsandbytes import keep_4bit_exact
from nspo_lightning.grpo import (
    Normaliser,
    ObjectiveConfig,
    Rollout,
    accumulated_loss,
    group_advantages,
    objective,
    split_microbatches,
    token_weights,
)
from nspo_lightning.policy import scoring
from nspo_lightning.policy.log_probs import chosen_log_probs
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig, sample

GROUP, LIMIT = 4, 6
RELATIVE = 1e-5  # float32


def rollout_of(policy, share=True, seed=0, **settings):
    ids, mask = ragged_prompts()
    return sample(
        policy,
        ids,
        mask,
        group_size=GROUP,
        config=SamplingConfig(max_new_tokens=LIMIT, **settings),
        eos_token_ids=range(5, 15),
        pad_token_id=0,
        generator=torch.Generator().manual_seed(seed),
        share_prefix=share,
    )


def train_step(policy, optimizer, seed):
    rollout = rollout_of(policy, seed=seed)
    mask = rollout.completion_mask
    weights = token_weights(mask, "grpo", Normaliser.of(mask, LIMIT))
    advantages = group_advantages(torch.arange(float(len(rollout.completion_ids))) % 3, GROUP)

    def one(micro):
        scores = score_completions(policy, micro.rollout, with_entropy=True)
        return objective(
            scores.log_probs,
            mask=micro.take(mask),
            weights=micro.take(weights),
            advantages=micro.take(advantages),
            config=ObjectiveConfig(),
            entropy=scores.entropy,
        ).loss

    accumulated_loss(optimizer.param_groups[0]["params"], split_microbatches(rollout, 30), one).backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors_alive():
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_is_left_behind_between_steps(steps):
    policy = tiny_policy()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for seed in range(3):
        train_step(policy, optimizer, seed)
    before = tensors_alive()  # holds them, so that what other tests left is neither freed meanwhile nor counted
    for seed in range(steps):
        train_step(policy, optimizer, seed)
    assert not tensors_alive().keys() - before.keys()


def test_no_tensor_is_as_large_as_all_logits(monkeypatch):
    policy = tiny_policy()
    rollout = rollout_of(policy, min_new_tokens=LIMIT)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor) and value.shape and value.shape[-1] == VOCABULARY:
                    largest = max(largest, value.numel())
            return out

    score_completions(policy, rollout)  # the trial of the model is behind us
    monkeypatch.setattr(scoring, "chosen_log_probs", partial(chosen_log_probs, chunk_tokens=5))
    with Watch():
        score_completions(policy, rollout, with_entropy=True).log_probs.sum().backward()
    weight = policy.get_output_embeddings().weight.numel()
    assert largest <= max(5 * VOCABULARY, weight) < rollout.completion_mask.numel() * VOCABULARY


@pytest.fixture(scope="module")
def nf4_policy(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    path = tmp_path_factory.mktemp("nf4")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    keep_4bit_exact(base)  # a layer would leave float32, for good, when first sampling
    return with_adapter(base.requires_grad_(False))


def test_four_bit_bases_give_the_same_numbers_on_both_paths(nf4_policy):
    shared, plain = rollout_of(nf4_policy), rollout_of(nf4_policy, share=False)
    assert shared.completion_ids.equal(plain.completion_ids)
    parameters = [p for p in nf4_policy.parameters() if p.requires_grad]
    results = []
    for share in (True, False):
        log_probs = score_completions(nf4_policy, Rollout(**shared.state_dict()), share_prefix=share)
        loss = log_probs.log_probs.square().sum()
        results.append((log_probs.log_probs.detach(), torch.autograd.grad(loss, parameters)))
    assert (results[0][0] - results[1][0]).abs().max() <= RELATIVE
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= RELATIVE * theirs.abs().max()
