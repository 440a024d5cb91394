"""Rewards are named in YAML by class path, short class name or dotted function path."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from nspo_lightning.rewards import Judge, Reward, RewardSet


class Holder:
    def __init__(self, rewards: RewardSet, judge: Judge | None = None) -> None:
        self.rewards, self.judge = rewards, judge


class DuckJudge:
    def __init__(self, answer: str = "safe") -> None:
        self.answer = answer

    def classify(self, prompts, completions, **columns):
        return [self.answer] * len(completions)


class OwnReward:
    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def __call__(self, prompts, completions, **columns):
        return [self.value] * len(completions)


def plain_function(completions, **columns):
    return [2.0] * len(completions)


def build(text: str) -> Holder:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    config = parser.parse_object({"holder": yaml.safe_load(text)})
    again = parser.parse_object(yaml.safe_load(parser.dump(config)))  # what --print_config prints is read back
    return parser.instantiate(again).holder


def test_functions_and_classes_side_by_side():
    holder = build(f"""
rewards:
  class_path: nspo_lightning.rewards.RewardSet
  init_args:
    rewards:
      - {__name__}.plain_function
      - class_path: {__name__}.OwnReward
        init_args: {{value: 3}}
      - class_path: FunctionReward
        init_args: {{path: {__name__}.plain_function, name: third}}
    weights: [1, 0.5, 2]
""")
    result = holder.rewards(["p"], ["c"])
    assert result.total.tolist() == [2 + 0.5 * 3 + 2 * 2]
    assert list(result.per_reward) == ["plain_function", "own_reward", "third"]


def test_names_from_a_mapping():
    holder = build(f"""
rewards:
  class_path: RewardSet
  init_args:
    rewards:
      first: {__name__}.plain_function
      second: {{class_path: {__name__}.OwnReward}}
""")
    assert holder.rewards.names == ["first", "second"]


def test_a_judge_needs_only_classify():
    holder = build(f"""
rewards: {{class_path: RewardSet, init_args: {{rewards: [{__name__}.plain_function]}}}}
judge: {{class_path: {__name__}.DuckJudge, init_args: {{answer: refusal}}}}
""")
    assert holder.judge is not None
    assert holder.judge.classify(["p"], ["c"]) == ["refusal"]
    assert issubclass(DuckJudge, Judge)
    assert not issubclass(OwnReward, Judge)
    assert not issubclass(OwnReward, Reward)


def test_a_class_that_is_no_judge_is_refused():
    with pytest.raises(ArgumentError, match="Judge"):
        build(f"""
rewards: {{class_path: RewardSet, init_args: {{rewards: [{__name__}.plain_function]}}}}
judge: {{class_path: {__name__}.OwnReward}}
""")
