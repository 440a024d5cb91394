"""Every YAML in docs/judges.md and the judge's own configs is built as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from nspo_lightning.rewards import Reward, RewardFunction, RewardResult, RewardSet

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


def build(text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardSet | Reward | RewardFunction)
    return parser.instantiate(parser.parse_object(yaml.safe_load(text))).reward


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("snippet", [*SNIPPETS, (ROOT / "configs" / "judge-rules.yaml").read_text(encoding="utf-8")])
def test_snippets_build(snippet):
    reward = build(snippet)
    assert callable(reward)


def test_python_example_is_a_reward():
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0], scope)
    result = RewardSet([scope["brief"]])(["p"] * 2, ["short", "long " * 200])
    assert isinstance(result, RewardResult)
    assert result.total.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("number", [0, 1])
def test_python_examples_hold_where_a_system_prompt_makes_chats(number):
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[number], scope)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "p"}]
    function = next(value for name, value in scope.items() if name.startswith("brief"))
    assert RewardSet([function])([chat] * 2, ["short", "long " * 200]).total.tolist() == [1.0, 0.0]


def test_the_stated_bound_is_the_codes():
    from nspo_lightning.rewards import ServerJudge

    assert f"so {ServerJudge('m').longest_s:g} s" in DOCS
