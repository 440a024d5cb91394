"""Guided exploration: what is drawn under a safety prompt is learnt from as an answer to the plain one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_templates import family_tokenizer
from known_rollouts import Updates
from lora_server import BASE, LoraServer
from tiny_jobs import Recorder, adapter, datamodule, module, trainer

from nspo_lightning.grpo import ObjectiveConfig, objective
from nspo_lightning.module.collector import Collector
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.experience import ExperienceBuffer
from nspo_lightning.module.guided import SAFETY_PROMPT, Guidance, GuidedSampling
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.rollout.server_config import IMPORTANCE_CAP, ServerSettings

GUIDED = GuidedSampling(share=0.5, system_prompt="Refuse.")


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def moved(policy):
    """The policy with an adapter that is not zero."""
    policy.configure_model()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.text_policy.trainable_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    return policy


def fit(policy, folder, steps=1, **kwargs):
    recorder, updates = Recorder(), Updates()
    trainer(folder, steps=steps, callbacks=[recorder, updates], **kwargs).fit(policy, datamodule())
    return recorder.steps, updates.seen


@pytest.fixture
def experiences(monkeypatch):
    """What was collected."""
    seen, collect = [], Collector.collect

    def keep(self, *args, **kwargs):
        seen.append(collect(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(Collector, "collect", keep)
    return seen


def test_with_the_plain_prompt_for_both_parts_it_is_plain_grpo(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(Guidance, "_guided", lambda self, prompt: prompt)
    plain, guided = (moved(module(tiny_llama, optimizer=sgd(0.5), guided=one)) for one in (None, GUIDED))
    torch.manual_seed(3)
    expected, _ = fit(plain, tmp_path, steps=3)
    torch.manual_seed(3)
    found, _ = fit(guided, tmp_path, steps=3)
    assert plain.last_rollout.completions == guided.last_rollout.completions, "the noise is that of the places"
    for name, value in adapter(plain).items():
        torch.testing.assert_close(adapter(guided)[name], value, rtol=1e-4, atol=1e-6)
    for step in found:
        assert step["guided/importance_ratio"] == pytest.approx(1, abs=1e-4)
        assert (step["guided/ratio_capped"], step["guided/ratio_small"]) == (0, 0)
    assert [step["frac_reward_zero_std"] for step in found] == [step["frac_reward_zero_std"] for step in expected]


def log_probs_of(policy, prompt, completion):
    """Of a completion's tokens, from one plain forward pass."""
    ids = torch.cat([prompt, completion])[None]
    logits = policy.require_policy()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


def test_the_gradient_is_that_of_tokens_weighted_by_the_truncated_ratio(tiny_llama, tmp_path, experiences):
    policy = moved(module(tiny_llama, optimizer=sgd(0.0), guided=GUIDED))
    steps, found = fit(policy, tmp_path)
    experience = experiences[0].buffer.experience
    rollout = experience.rollout
    assert rollout.guided.view(-1, 4).tolist() == [[False, False, True, True]] * 2
    policy.zero_grad()
    loss, ratios = torch.zeros(()), list[float]()
    for row in range(8):
        place = row // 4
        plain = rollout.prompt_ids[place][rollout.prompt_mask[place]]
        chat = [
            {"role": "system", "content": "Refuse."},
            {"role": "user", "content": experiences[0].judged.prompts[row]},
        ]
        seen = policy.text_policy.render([chat])["prompt_ids"][0] if row % 4 >= 2 else plain
        tokens = rollout.completion_ids[row][rollout.completion_mask[row]]
        own = log_probs_of(policy, plain, tokens)
        ratio = (own - log_probs_of(policy, seen, tokens)).exp().detach()
        ratios += ratio.tolist() if row % 4 >= 2 else []
        loss = loss - (experience.advantages[row] * ratio.clamp(max=IMPORTANCE_CAP) * own).mean() / 8
    loss.backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[0][name], parameter.grad, rtol=1e-3, atol=1e-6)
    capped = [min(ratio, IMPORTANCE_CAP) for ratio in ratios]
    assert any(abs(ratio - 1) > 0.05 for ratio in ratios), "another prompt is another distribution"
    assert steps[0]["guided/importance_ratio"] == pytest.approx(sum(capped) / len(capped), rel=1e-3)
    assert steps[0]["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4), "the plain part's"


def test_what_is_measured_is_the_plain_part(tiny_llama, tmp_path):
    class Guides:
        """Rewards the second half of each group."""

        name = "guides"

        def __call__(self, prompts, completions, **_):
            return [float(i % 4 >= 2) for i in range(len(completions))]

    policy = module(tiny_llama, reward=Guides(), guided=GUIDED, dynamic_sampling=DynamicSampling())
    steps, _ = fit(policy, tmp_path)
    assert (steps[0]["reward"], steps[0]["guided/reward"], steps[0]["frac_reward_zero_std"]) == (0, 1, 0)
    assert policy.progress.signal.with_signal == 1
    assert [row["guided"] for row in policy.last_rollout.rows()] == [False, False, True, True] * 2


def test_a_rollout_in_a_checkpoint_knows_its_guided_rows(tiny_llama, tmp_path, experiences):
    fit(module(tiny_llama, guided=GUIDED, num_iterations=2), tmp_path)
    saved = experiences[0].buffer.state_dict()
    again = ExperienceBuffer.from_state_dict(saved, torch.device("cpu")).next().rollout
    assert again.guided is not None
    assert again.log_probs is not None
    assert again.guided.tolist() == [False, False, True, True] * 2
    assert torch.equal(again.log_probs, saved["rollout"]["log_probs"])


def test_a_server_draws_both_parts(tiny_llama, tmp_path):
    with LoraServer(tiny_llama) as server:
        settings = ServerSettings(
            base_url=server.url, model=BASE, adapter_folder=str(tmp_path / "shelf"), retries=3, backoff_s=0.01
        )
        policy = moved(module(tiny_llama, optimizer=sgd(0.1), guided=GUIDED, rollout_server=settings))
        steps, _ = fit(policy, tmp_path, steps=2)
        asked = [(request["n"], len(request["prompt"]), request["seed"]) for request in server.requests[:4]]
    assert {n for n, _, _ in asked} == {2}
    assert len({seed for _, _, seed in asked}) == 4
    assert max(length for _, length, _ in asked) > min(length for _, length, _ in asked) + 5, "with the system prompt"
    assert steps[-1]["sampling/sampling_logp_difference/mean"] < 1e-3
    assert abs(steps[-1]["guided/importance_ratio"] - 1) > 1e-3


def renders(family: str, template: str | None = None) -> Any:
    """The part of a policy that renders."""
    return SimpleNamespace(tokenizer=family_tokenizer(family, template))


@pytest.mark.parametrize(
    ("family", "prompt", "expected"),
    [
        ("qwen2.5", "Hi", [("system", "S"), ("user", "Hi")]),
        (
            "qwen2.5",
            [{"role": "system", "content": "Own"}, {"role": "user", "content": "Hi"}],
            [("system", "S\n\nOwn"), ("user", "Hi")],
        ),
        ("gemma2", "Hi", [("user", "S\n\nHi")]),
    ],
)
def test_the_safety_prompt_goes_where_the_template_has_room(family, prompt, expected):
    guidance = Guidance(renders(family), GuidedSampling(system_prompt="S"))
    assert [(turn["role"], turn["content"]) for turn in guidance._guided(prompt)] == expected


def test_room_is_kept_for_prompts_with_a_system_message_of_their_own():
    policy = renders("qwen2.5")  # whose template has one for prompts without

    def render(prompts):
        chat = [{"role": "user", "content": prompts[0]}] if isinstance(prompts[0], str) else prompts[0]
        ids = policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"prompt_ids": torch.tensor([ids])}

    policy.render = render
    guidance = Guidance(policy, GuidedSampling(system_prompt="Refuse what is harmful."))
    own = [{"role": "system", "content": "Own"}, {"role": "user", "content": "Hi"}]
    room = guidance.extra_tokens()
    longer = {
        str(prompt): render([guidance._guided(prompt)])["prompt_ids"].shape[1] - render([prompt])["prompt_ids"].shape[1]
        for prompt in ("Hi", own)
    }
    assert longer["Hi"] < longer[str(own)] <= room


def test_a_template_that_leaves_it_out_is_refused():
    nothing = Guidance(renders("qwen2.5", "{{ 'Hello' }}"), GuidedSampling())
    with pytest.raises(PolicyError, match=r"leaves `guided.system_prompt` out"):
        nothing.extra_tokens()


def test_ratios_that_are_capped_or_small_are_counted():
    sampled = torch.tensor([[0.0, 0.0], [math.log(0.9), math.log(0.1)]])
    own = torch.tensor([[0.0, 0.0], [math.log(0.01), math.log(0.9)]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    found = objective(
        own,
        mask=mask,
        weights=mask.float(),
        advantages=torch.tensor([-1.0, 1.0]),
        config=ObjectiveConfig(),
        sampling_log_probs=sampled,
        importance_cap=2.0,
        guided=torch.tensor([False, True]),
    ).metrics.means()
    assert float(found["guided/importance_ratio"]) == pytest.approx((0.01 / 0.9 + 2) / 2)
    assert (float(found["guided/ratio_capped"]), float(found["guided/ratio_small"])) == (0.5, 0.5)
    assert float(found["sampling/importance_sampling_ratio/mean"]) == 1
    assert float(found["sampling/sampling_logp_difference/mean"]) == 0


def test_shares_are_whole_completions_and_values_are_checked():
    assert [GuidedSampling(share=share).completions(8) for share in (0.01, 0.25, 0.99)] == [1, 2, 7]
    assert GuidedSampling().system_prompt == SAFETY_PROMPT
    values: list[dict[str, Any]] = [{"share": 0.0}, {"share": 1.0}, {"system_prompt": " "}]
    for value in values:
        with pytest.raises(ValueError, match=f"`guided.{next(iter(value))}`"):
            replace(GuidedSampling(), **value)
