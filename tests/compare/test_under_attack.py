"""`compare --attacks`: the selected checkpoint under attack, in each run's result and in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_jobs import datamodule, module, trainer

from nspo_lightning.compare.plan import Budget, RunSpec
from nspo_lightning.compare.results import Findings, RunResult
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compare.summary import summary
from nspo_lightning.compare.trajectory import Trajectory

RULE = {"metric": "general/refusal_rate", "higher_is_better": False}


class Unsafe:
    """Names every other answer unsafe: `compare` chooses by what tells harm from an answer."""

    def classify(self, prompts: Any, completions: Any, **_: Any) -> list[str]:
        return ["unsafe" if len(text) % 2 else "refusal" for text in completions]


def result(tiny_llama: Path, folder: Path, attacks: list[str] | None) -> RunResult:
    folder.mkdir()
    torch.manual_seed(0)
    callback = Trajectory(str(folder / "result.json"), steps=1, attacks=attacks, **RULE)  # type: ignore[arg-type]
    trainer(folder, steps=1, callbacks=[callback], limit_val_batches=1.0).fit(
        module(tiny_llama, judge=Unsafe()), datamodule()
    )
    return RunResult.read(RunSpec(method="grpo", seed=0, learning_rate=1e-2), folder / "result.json")


def test_a_run_is_measured_under_attack_and_the_summary_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    plain, attacked = (
        result(tiny_llama, tmp_path / name, a) for name, a in (("p", None), ("a", ["prefill_3", "base64"]))
    )
    under = {name: value for name, value in attacked.test.items() if name.startswith("attack/")}
    assert {"attack/prefill_3/unsafe_rate", "attack/base64/unsafe_rate"} <= set(under)
    assert {name: v for name, v in attacked.test.items() if name not in under} == plain.test

    def text(one: RunResult) -> str:
        budget = Budget(steps=1, eval_every=1, stop_unsafe=0.0)
        rule = SelectionRule(**RULE)  # type: ignore[arg-type]
        return summary(Findings(results=[one], rule=rule, budget=budget, sweep=None, planned=1))

    assert "## Under attack" not in text(plain)
    shown = text(attacked)
    assert f"| prefill_3 | {100 * under['attack/prefill_3/unsafe_rate']:.1f} % |" in shown
    assert "| attack | GRPO |" in shown
