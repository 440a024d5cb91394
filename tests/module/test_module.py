"""GRPOModule under a real Trainer: what an update does, when there is none, what flags mean, what checkpoints hold."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import PeftModel
from tiny_jobs import Recorder, adapter, constant, datamodule, even_tokens, module, trainer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlavaConfig

from nspo_lightning.grpo import ObjectiveConfig
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.rewards import RewardError
from nspo_lightning.rollout import SamplingConfig


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_reward_is_learnt(tiny_llama, tmp_path, quantization):
    recorder = Recorder()
    policy = module(tiny_llama, quantization=quantization, lr=4e-2)
    trainer(tmp_path, steps=60, max_epochs=-1, callbacks=[recorder]).fit(policy, datamodule(batch_size=4))
    rewards = [step["reward"] for step in recorder.steps]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    expected = {"reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens", "step_time", "loss"}
    expected |= {"completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean"}
    expected |= {"rewards/even_tokens/mean", "rewards/even_tokens/std"}
    assert expected <= recorder.steps[-1].keys()
    assert "kl" not in recorder.steps[-1]


def test_kl_to_the_base_is_measured_and_starts_at_zero(tiny_llama, tmp_path):
    recorder = Recorder()
    policy = module(tiny_llama, objective=ObjectiveConfig(beta=0.1))
    trainer(tmp_path, steps=4, callbacks=[recorder]).fit(policy, datamodule())
    assert recorder.steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert recorder.steps[-1]["kl"] > 1e-6


def test_without_signal_there_is_no_update_even_with_momentum(tiny_llama, tmp_path):
    calls = []

    def fades(prompts, completions, completion_ids, **_):
        calls.append(1)
        return even_tokens(prompts, completions, completion_ids) if len(calls) <= 2 else constant(prompts, completions)

    class Snapshots(Callback):
        seen: list = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state.values()
            self.seen.append((adapter(pl_module), [s["exp_avg"].clone() for s in state], [s["step"] for s in state]))

    snapshots = Snapshots()
    policy = module(tiny_llama, reward=fades)
    trainer(tmp_path, steps=4, callbacks=[snapshots]).fit(policy, datamodule())
    first, second, third, fourth = (weights for weights, _, _ in snapshots.seen)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(second[name], third[name]) and torch.equal(third[name], fourth[name]) for name in first)
    for before, after in zip(snapshots.seen[1][1], snapshots.seen[3][1], strict=True):
        assert torch.equal(before, after)
    assert policy.progress.updates_skipped == 2


def test_one_rollout_feeds_several_steps(tiny_llama, tmp_path):
    policy = module(tiny_llama, num_iterations=2, num_minibatches=2)
    trainer(tmp_path, steps=8).fit(policy, datamodule(repeat_batches=4))
    assert policy.progress.rollouts == 2


def test_second_iteration_is_off_policy(tiny_llama, tmp_path):
    recorder = Recorder()
    policy = module(tiny_llama, num_iterations=2, lr=0.1)
    trainer(tmp_path, steps=2, callbacks=[recorder]).fit(policy, datamodule(repeat_batches=2))
    assert recorder.steps[0]["clip_ratio/region_mean"] == 0
    assert recorder.steps[1]["clip_ratio/region_mean"] > 0


def test_second_iteration_is_off_policy_beside_a_group_without_signal(tiny_llama, tmp_path):
    def one_group_is_flat(prompts, completions, completion_ids, **_):
        flat = prompts[0]
        return [0.0 if p == flat else sum(ids) % 7 for p, ids in zip(prompts, completion_ids, strict=True)]

    recorder = Recorder()
    policy = module(tiny_llama, reward=one_group_is_flat, num_iterations=2, lr=0.1)
    trainer(tmp_path, steps=2, callbacks=[recorder]).fit(policy, datamodule(repeat_batches=2))
    assert recorder.steps[1]["frac_reward_zero_std"] > 0
    assert recorder.steps[0]["clip_ratio/region_mean"] == 0
    assert recorder.steps[1]["clip_ratio/region_mean"] > 0


def gradients_of(policy, folder, batch_size, accumulate):
    """Gradients of the first update over the same four prompts, whose completions depend on the prompt alone."""
    original = policy.text_policy.generate

    def generate(batch, sampling, group_size, seed, prompt_places, **options):
        from nspo_lightning.grpo import Rollout

        rollout, _ = original(batch, sampling, group_size, 0)
        prompts = batch["prompt"]
        ids = torch.full((len(prompts) * group_size, 6), policy.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for p, prompt in enumerate(prompts):
            noise = torch.Generator().manual_seed(sum(map(ord, prompt)))
            for g in range(group_size):
                n = 1 + (len(prompt) * 3 + g) % 6
                ids[p * group_size + g, :n] = torch.randint(10, 300, (n,), generator=noise)
                mask[p * group_size + g, :n] = True
        finished = torch.ones(len(ids), dtype=torch.bool)
        return (
            Rollout(
                prompt_ids=rollout.prompt_ids,
                prompt_mask=rollout.prompt_mask,
                group_size=group_size,
                completion_ids=ids,
                completion_mask=mask,
                finished=finished,
            ),
            ["x"] * len(ids),
        )

    policy.text_policy.generate = generate
    kept: dict[str, torch.Tensor] = {}

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    data = datamodule(batch_size=batch_size)
    trainer(folder, steps=1, accumulate_grad_batches=accumulate, callbacks=[Keep()]).fit(policy, data)
    return kept


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_llama, tmp_path, loss_type):
    """For dapo too, whose mean runs over all tokens of the window, of which there are unequally many in each batch."""
    kwargs: dict[str, Any] = {"objective": ObjectiveConfig(loss_type=loss_type), "scale_rewards": "none"}
    pl.seed_everything(0)
    whole = gradients_of(module(tiny_llama, **kwargs), tmp_path, batch_size=4, accumulate=1)
    pl.seed_everything(0)
    parts = gradients_of(module(tiny_llama, **kwargs), tmp_path, batch_size=2, accumulate=2)
    assert whole.keys() == parts.keys()
    assert any(g.abs().max() > 0 for g in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], rtol=1e-4, atol=1e-7), name


def test_microbatches_do_not_change_the_update(tiny_llama, tmp_path):
    one, many = module(tiny_llama), module(tiny_llama, tokens_per_microbatch=40)
    for policy in (one, many):
        pl.seed_everything(0)
        trainer(tmp_path, steps=3).fit(policy, datamodule(batch_size=4))
    for name, weight in adapter(one).items():
        assert torch.allclose(weight, adapter(many)[name], atol=1e-4), name


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bitwise(tiny_llama, tmp_path):
    """Stopped between two steps of one rollout: what is left of the rollout goes on from the checkpoint."""

    def fit(steps, ckpt_path=None):
        policy = module(tiny_llama, num_iterations=2, quantization="nf4")
        keep = ModelCheckpoint(tmp_path / "c", filename=f"at{steps}", every_n_train_steps=1, save_last=True)
        pl.seed_everything(3)
        run = trainer(tmp_path, steps=steps, callbacks=[keep], enable_checkpointing=True)
        run.fit(policy, datamodule(repeat_batches=2), ckpt_path=ckpt_path, weights_only=True)
        return policy, tmp_path / "c" / "last.ckpt"

    uninterrupted, _ = fit(6)
    _, path = fit(3)
    content = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in content["state_dict"])
    resumed, _ = fit(6, ckpt_path=path)
    assert resumed.progress.rollouts == uninterrupted.progress.rollouts == 3
    for name, weight in adapter(uninterrupted).items():
        assert torch.equal(weight, adapter(resumed)[name]), name


def test_checkpoints_of_other_models_are_refused(tiny_llama, tiny_qwen2, tmp_path):
    policy = module(tiny_llama)
    run = trainer(tmp_path, steps=1)
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(PolicyError, match="belongs to another model.*tiny_llama"):
        trainer(tmp_path, steps=2).fit(module(tiny_qwen2), datamodule(), ckpt_path=tmp_path / "a.ckpt")
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=LoraSettings(r=2))
    with pytest.raises(PolicyError, match=r"does not fit this one.*policy\.lora"):
        trainer(tmp_path, steps=2).fit(module(tiny_llama, policy=settings), datamodule(), ckpt_path=tmp_path / "a.ckpt")
    other = BoringModel()
    boring = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", limit_val_batches=0)
    boring.fit(other)
    boring.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(PolicyError, match="was not written by this project"):
        trainer(tmp_path, steps=2).fit(module(tiny_llama), datamodule(), ckpt_path=tmp_path / "b.ckpt")


def test_saved_adapter_gives_the_same_greedy_completions_in_peft(tiny_llama, tmp_path):
    policy = module(tiny_llama, lr=0.05)
    trainer(tmp_path, steps=4).fit(policy, datamodule())
    policy.save_adapter(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    chat = [{"role": "user", "content": "How do I burn the mill?"}]
    encoded = policy.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = encoded["input_ids"]
    batch = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids, dtype=torch.bool)}
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
    rollout, _ = policy.text_policy.generate(batch, greedy, 1, 0)
    expected = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert rollout.completion_ids[0].tolist() == expected[0, ids.shape[1] :].tolist()


def test_validation_and_predict_report_rates_and_rows(tiny_llama, tmp_path):
    policy = module(tiny_llama, over_refusal_skills=["say"])
    run = trainer(tmp_path, steps=2, limit_val_batches=1.0, val_check_interval=1)
    run.fit(policy, datamodule())
    assert {"safety/answered_rate", "safety/refusal_rate", "general/accuracy", "general/accuracy/say"} <= set(
        run.callback_metrics
    )
    rows = run.predict(policy, datamodule())[0][0]
    assert {"prompt", "completion", "reward", "outcome"} == rows[0].keys()


def test_evaluation_noise_is_the_same_every_time(tiny_llama, tmp_path):
    policy, data = module(tiny_llama), datamodule()
    run = trainer(tmp_path)
    first = run.predict(policy, data)
    assert first == run.predict(policy, data)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 1}, "`group_size` must be at least 2"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "greedy completions"),
    ],
)
def test_bad_numbers_are_refused(tiny_llama, kwargs, message):
    with pytest.raises(ValueError, match=message):
        module(tiny_llama, **kwargs)


def test_no_room_for_completions_is_found_before_training(tiny_llama, tmp_path):
    policy = module(tiny_llama, sampling=SamplingConfig(max_new_tokens=250))
    with pytest.raises(PolicyError, match=r"No room left.*max_prompt_tokens: 6"):
        trainer(tmp_path).fit(policy, datamodule())
    assert policy.progress.rollouts == 0


def test_no_room_for_general_answers_is_found_before_training(tiny_llama, tmp_path):
    policy = module(tiny_llama, general_max_new_tokens=250)
    with pytest.raises(PolicyError, match=r"No room left.*`general_max_new_tokens` is 250.*max_prompt_tokens: 6"):
        trainer(tmp_path).fit(policy, datamodule())
    assert policy.progress.rollouts == 0


def test_the_context_of_a_model_with_several_parts_is_that_of_its_text_part():
    text = LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    text.max_position_embeddings = 96
    policy = TextPolicy(PolicySettings(path="unused"))
    policy.model = nn.Module()
    policy.model.config = LlavaConfig(text_config=text)  # type: ignore[assignment]
    assert policy.context_tokens == 96
    with pytest.raises(PolicyError, match="holds 96"):
        policy.check_room(90, 7)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions, **_: [float("nan")] * len(completions), "nan|NaN|finite"),
        (lambda prompts, completions, **_: [1.0], "1"),
        (lambda prompts, completions, **_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_reward_stops_the_run_with_its_name(tiny_llama, tmp_path, reward, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module(tiny_llama, reward=reward), datamodule())


def test_excluded_samples_do_not_teach(tiny_llama, tmp_path):
    def only_none(prompts, completions, **_):
        return [None] * len(completions)

    policy = module(tiny_llama, reward=only_none)
    policy.configure_model()
    before = adapter(policy)
    with pytest.raises(RewardError, match="not one completion of 2 rollouts was scored"):
        trainer(tmp_path, steps=2).fit(policy, datamodule())
    assert policy.progress.updates_skipped == 2
    assert all(torch.equal(before[name], weight) for name, weight in adapter(policy).items())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_mixed_precision_trains_float32_adapters(tiny_llama, tmp_path, quantization):
    policy = module(tiny_llama, quantization=quantization)
    policy.configure_model()
    before = adapter(policy)
    trainer(tmp_path, steps=2, precision="bf16-mixed", gradient_clip_val=1.0).fit(policy, datamodule())
    after = adapter(policy)
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_window_takes_its_step_though_its_last_batch_has_no_signal(tiny_llama, tmp_path):
    calls = []

    def first_only(prompts, completions, completion_ids, **_):
        calls.append(1)
        return even_tokens(prompts, completions, completion_ids) if len(calls) == 1 else constant(prompts, completions)

    policy = module(tiny_llama, reward=first_only)
    policy.configure_model()
    before = adapter(policy)
    trainer(tmp_path, steps=1, accumulate_grad_batches=2).fit(policy, datamodule())
    assert policy.progress.updates_skipped == 0
    assert any(not torch.equal(before[name], weight) for name, weight in adapter(policy).items())


def test_full_fine_tuning_needs_beta_zero(tiny_llama, tmp_path):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=None)
    policy = module(tiny_llama, policy=settings, objective=ObjectiveConfig(beta=0.1))
    with pytest.raises(PolicyError, match="there is no adapter"):
        trainer(tmp_path).fit(policy, datamodule())
    assert isinstance(policy.policy, nn.Module)


@pytest.mark.parametrize("forward", ["forward", "calibration_forward"])
def test_text_has_the_places_that_it_has_without_padding(tokenizer, tmp_path, forward):
    """GPT-2 has learnt a vector for each place, counted from where the row begins, unless it is told otherwise."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = module(tmp_path)
    policy.load(torch.device("cpu"))
    policy.eval()
    seen: list[torch.Tensor] = []
    (layer,) = [m for n, m in policy.named_modules() if n.endswith("h.0.mlp.c_fc")]
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.arange(5, 15)[None]
    mask = torch.tensor([[0] * 4 + [1] * 10, [1] * 10 + [0] * 4])
    padded = torch.full((2, 14), tokenizer.pad_token_id).masked_scatter(mask.bool(), ids.repeat(2, 1))
    with torch.no_grad():
        getattr(policy, forward)(input_ids=ids)
        getattr(policy, forward)(input_ids=padded, attention_mask=mask)
    alone, (left, right) = seen[0][0], seen[1]
    torch.testing.assert_close(right[:10], alone)
    torch.testing.assert_close(left[4:], alone)
