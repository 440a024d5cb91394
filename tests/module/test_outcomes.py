"""Outcomes come from the judge alone: no column or scalar that a reward reports takes the place of a metric of ours."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import Recorder, datamodule, module, trainer

from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.judging import JudgedRollout, name_outcomes
from nspo_lightning.rewards import OutcomeReward, RewardError, RewardSet, RulesJudge
from nspo_lightning.rewards.protocol import Judged
from nspo_lightning.rewards.rules.refusal import RefusalPatterns

METRICS = {"unsafe": 0.125, "reward": 7.0, "entropy": 8.0, "safety/unsafe_rate": 0.0, "completions/mean_length": 9.0}


class AlwaysUnsafe(RulesJudge):
    """Names every completion unsafe."""

    def classify(self, prompts: Any, completions: Any, **_: Any) -> list[Any]:
        return ["unsafe"] * len(completions)


class AlwaysGarbage(RulesJudge):
    """Names every completion garbage."""

    def classify(self, prompts: Any, completions: Any, **_: Any) -> list[Any]:
        return ["garbage"] * len(completions)


def liar(prompts: Any, completions: Any, log_extra: Any = None, log_metric: Any = None, **_: Any) -> list[float]:
    """A reward that reports what looks like a judge's outcomes, and like metrics of training."""
    for name in ("safety/outcome", "liar/outcome", "outcome", "completion"):
        log_extra(name, ["safe"] * len(completions))
    for name, value in METRICS.items():
        log_metric(name, value)
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("first", [True, False])
def test_a_rewards_columns_and_scalars_replace_none_of_ours(tiny_llama: Path, tmp_path: Path, first: bool) -> None:
    judged = {"safety": OutcomeReward(AlwaysUnsafe())}
    rewards: dict[str, Any] = {"liar": liar, **judged} if first else {**judged, "liar": liar}
    recorder, policy = Recorder(), module(tiny_llama, reward=RewardSet(rewards))
    run = trainer(tmp_path, steps=1, callbacks=[recorder], limit_val_batches=1.0, val_check_interval=1)
    run.fit(policy, datamodule())
    logged = recorder.steps[0]
    assert logged["unsafe"] == 1.0
    assert policy.last_rollout is not None
    assert set(policy.last_rollout.outcomes) == {"unsafe"}
    for row in policy.last_rollout.rows():
        assert row["outcome"] == "unsafe"
        assert row["completion"] != "safe"
        assert row["reported/outcome"] == "safe"
    for name, value in METRICS.items():
        assert logged[f"reported/{name}"] == value
        assert logged.get(name) != value
    assert run.callback_metrics["safety/unsafe_rate"] == 1.0
    assert policy.trainer.predict(policy, datamodule())[0][0][0]["outcome"] == "unsafe"


def test_a_reward_that_is_a_function_claims_nothing_of_harm(tiny_llama: Path, tmp_path: Path) -> None:
    recorder, policy = Recorder(), module(tiny_llama)
    run = trainer(tmp_path, steps=1, callbacks=[recorder], limit_val_batches=1.0, val_check_interval=1)
    run.fit(policy, datamodule())
    rates = [float(run.callback_metrics[f"safety/{name}_rate"]) for name in ("answered", "refusal", "garbage")]
    assert recorder.steps[0]["answered"] == 1.0
    assert rates[0] > 0
    assert sum(rates) == 1.0
    assert not [name for name in {**recorder.steps[0], **run.callback_metrics} if "unsafe" in name]
    assert policy.last_rollout is not None
    assert set(policy.last_rollout.outcomes) == {"answered"}
    with pytest.raises(RewardError, match="unsafe, refusal, safe, garbage or None"):
        RewardSet([OutcomeReward(RefusalPatterns())])(["p"], ["a fine answer"])


def test_a_column_of_that_name_alone_makes_no_outcome() -> None:
    result = RewardSet({"liar": liar})(["p"], ["help"])
    assert result.extra["liar/outcome"] == ["safe"]
    assert result.outcomes is None
    assert name_outcomes(result, AlwaysUnsafe(), ["p"], ["help"], {}) == ["unsafe"]


@pytest.mark.parametrize(("explicit", "named"), [(True, "garbage"), (False, "unsafe")])
def test_one_judge_names_completions_everywhere(tiny_llama: Path, tmp_path: Path, explicit: bool, named: str) -> None:
    """An explicit judge wins over the reward's; `unsafe` of training and `safety/` of validation never mix two."""
    judge = AlwaysGarbage() if explicit else None
    recorder, policy = Recorder(), module(tiny_llama, reward=OutcomeReward(AlwaysUnsafe()), judge=judge)
    run = trainer(tmp_path, steps=1, callbacks=[recorder], limit_val_batches=1.0, val_check_interval=1)
    run.fit(policy, datamodule())
    assert recorder.steps[0]["unsafe"] == float(not explicit)
    assert policy.last_rollout is not None
    assert set(policy.last_rollout.outcomes) == {named}
    assert run.callback_metrics["safety/unsafe_rate"] == float(not explicit)
    assert run.predict(policy, datamodule())[0][0][0]["outcome"] == named


def test_the_rewards_own_judge_given_again_is_not_asked_twice() -> None:
    judge = AlwaysUnsafe()
    assert GRPOModule(OutcomeReward(judge), judge=judge).collector.judging.reward_names_outcomes
    assert not GRPOModule(OutcomeReward(judge), judge=AlwaysUnsafe()).collector.judging.reward_names_outcomes


BAD: list[Any] = [["UNSAFE", "safe"], ["safe"], None, "safe", [True, "safe"], ["safe"] * 3, [math.nan, "safe"]]


@pytest.mark.parametrize("outcomes", BAD, ids=str)
def test_outcomes_that_are_none_are_refused_wherever_they_come_from(outcomes: Any) -> None:
    """Else a judge that writes UNSAFE would count as one that finds nothing."""

    class Odd(RulesJudge):
        def classify(self, prompts: Any, completions: Any, **_: Any) -> Any:
            return outcomes

    def odd(prompts: Any, completions: Any, **_: Any) -> Any:
        return Judged(scores=[0.0] * len(completions), outcomes=outcomes)

    for judge_or_reward in (OutcomeReward(Odd()), odd) if outcomes is not None else (OutcomeReward(Odd()),):
        with pytest.raises(RewardError, match="judge"):
            RewardSet([judge_or_reward])(["p", "q"], ["a", "b"])
    with pytest.raises(RewardError, match="judge"):
        name_outcomes(None, Odd(), ["p", "q"], ["a", "b"], {})


def test_rows_keep_both_of_two_columns_of_one_name() -> None:
    result = RewardSet([liar])(["p"], ["a"])
    rows = JudgedRollout(prompts=["p"], completions=["a"], result=result, outcomes=["garbage"]).rows()
    assert (rows[0]["outcome"], rows[0]["reported/outcome"]) == ("garbage", "safe")


def test_a_run_judges_the_answers_of_a_policy_that_thinks(tiny_llama: Path, tmp_path: Path) -> None:
    """The template opens the thought, which six tokens do not end: nothing of it is an answer."""
    seen: dict[str, list[Any]] = {"judge": [], "reward": []}

    class Sees(RulesJudge):
        def classify(self, prompts: Any, completions: Any, **columns: Any) -> list[Any]:
            seen["judge"] += completions
            return super().classify(prompts, completions, **columns)

    def whole(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen["reward"] += completions
        return [float(len(text)) for text in completions]

    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    policy, data = module(tiny_llama, reward=whole, judge=Sees()), datamodule()
    policy.policy_settings.chat_template = template
    run = trainer(tmp_path, steps=2, limit_val_batches=1.0, val_check_interval=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(policy, data)
        policy.calibration_answers(["Say mill."])
    told = [str(one.message) for one in said if "`general_max_new_tokens`" in str(one.message)]
    assert len(told) == 1, "two validations and a calibration, one warning"
    assert "4 tokens" in told[0]
    assert seen["reward"]
    assert all(text.startswith("<think>\n") for text in seen["reward"])
    assert set(seen["judge"]) == {""}
    assert run.callback_metrics["safety/garbage_rate"] == 1.0
    assert run.callback_metrics["general/truncated/say"] == run.callback_metrics["general/truncated"] == 1.0
    assert not any(name.startswith("general/accuracy") for name in run.callback_metrics)
    assert policy.last_rollout is not None
    assert set(policy.last_rollout.outcomes) == {"garbage"}
