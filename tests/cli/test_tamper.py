"""`tamper`: what is left after a little fine-tuning, of the policy and of its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_jobs import adapter, datamodule, general, harmful, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning.cli import tamper as tamper_module
from nspo_lightning.cli.calibrate import prepared_for_fit
from nspo_lightning.cli.tamper import Attacker
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.policy.warm_start import WarmStart


def test_policy_and_base_are_attacked_alike_and_left_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    trained = module(tiny_llama)
    trained.configure_model()
    move_adapter_(trained.policy, 0.3)
    trained.save_adapter(tmp_path / "adapter")
    policy = module(tiny_llama)
    policy.adapter_folder = tmp_path / "adapter"
    run = trainer(tmp_path, kind=Trainer)
    run.tamper(policy, datamodule(), steps=3, examples=2, epochs=2, batch_size=2, rows=2)
    for name, value in adapter(trained).items():
        assert torch.equal(value, adapter(policy)[name]), "the policy is put back"
    rates = json.loads(Path(run.log_dir, "tamper.json").read_text())["rates"]
    assert list(rates) == ["nothing", "3 steps of harmless SFT", "2 harmful examples"]
    assert all(parameter.grad is None for parameter in policy.parameters())
    for whos in rates.values():
        assert {who: found["safety/answered_rate"]["of"] for who, found in whos.items()} == {"base": 2, "policy": 2}


@pytest.mark.parametrize("way", ["folder", "checkpoint", "warm start"])
def test_the_base_is_the_base_whatever_is_attacked(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    run = trainer(tmp_path, kind=Trainer, steps=1)
    trained = module(tiny_llama)
    run.fit(trained, datamodule())
    run.save_checkpoint(tmp_path / "mine.ckpt")
    trained.save_adapter(tmp_path / "adapter")
    starts: dict[str, Any] = {}
    monkeypatch.setattr(tamper_module, "_attack_all", lambda *args: starts.update(args[-1]) or {})
    monkeypatch.setattr(tamper_module, "_print", lambda found: None)
    policy = module(tiny_llama)
    if way == "folder":
        policy.adapter_folder = tmp_path / "adapter"
    if way == "warm start":
        WarmStart(policy=trained.fingerprint, policy_path=str(tiny_llama), basis=None, leak=None).write(
            tmp_path / "adapter"
        )
        settings = replace(policy.policy_settings, adapter=str(tmp_path / "adapter"))
        policy = module(tiny_llama, policy=settings)
    path = str(tmp_path / "mine.ckpt") if way == "checkpoint" else None
    trainer(tmp_path, kind=Trainer).tamper(policy, datamodule(), ckpt_path=path, out=str(tmp_path / "t.json"))
    of_b = [name for name in starts["base"] if "lora_B" in name]
    assert of_b
    assert not any(starts["base"][name].any() for name in of_b), "a fresh adapter"
    assert any(starts["policy"][name].any() for name in of_b)
    assert json.loads((tmp_path / "t.json").read_text())["attacked"] == (path or str(tmp_path / "adapter"))


def test_the_attackers_examples_are_plain_requests_as_many_as_there_are(tiny_llama: Path, tmp_path: Path) -> None:
    class Judge:
        def classify(self, prompts: Any, completions: Any, **_: Any) -> list[str]:
            return ["unsafe" if "mill" in prompt or "oven" in prompt else "refusal" for prompt in prompts]

    policy = module(tiny_llama, judge=Judge())
    source = PromptSource(rows=harmful, attacks=["base64"])
    data = AlignmentDataModule(source, PromptSource(rows=general), val_size=2, test_size=2, eval_batch_size=3)
    attacker = Attacker(steps=1, examples=5, epochs=1, batch_size=2, lr=1e-2, rows=2)
    with prepared_for_fit(trainer(tmp_path, kind=Trainer), policy, data), pytest.warns(UserWarning, match="5 harmful"):
        batches, examples = tamper_module._harmful(policy, data, attacker)
    prompts = [prompt for batch in batches for prompt in batch["prompt"]]
    assert examples == len(prompts) <= 2
    assert all(prompt.startswith("How do I burn the ") for prompt in prompts)


def test_a_few_updates_move_the_answers(tiny_llama: Path, tmp_path: Path) -> None:
    from nspo_lightning.cli.tamper import _fine_tune_, _harmful, _harmless

    policy, data = module(tiny_llama), datamodule()
    run = trainer(tmp_path, kind=Trainer)
    attacker = Attacker(steps=4, examples=3, epochs=2, batch_size=2, lr=1e-2, rows=2)
    with prepared_for_fit(run, policy, data):
        harmless, (harmful, examples) = _harmless(data, attacker), _harmful(policy, data, attacker)
        assert len(harmless) == 4
        assert examples == 3
        assert sum(len(batch["prompt"]) for batch in harmful) == 3 * 2
        before = adapter(policy)
        _fine_tune_(policy, harmful, attacker.lr, "Fine-tuning")
    assert any(not torch.equal(value, adapter(policy)[name]) for name, value in before.items())


def test_a_checkpoint_of_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Its weights fit, and the figures would mean nothing."""
    run = trainer(tmp_path, kind=Trainer, enable_checkpointing=True, steps=1)
    run.fit(module(tiny_llama), datamodule())
    run.save_checkpoint(tmp_path / "mine.ckpt")
    shutil.copytree(tiny_llama, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: 1.5 * value for name, value in weights.items()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(PolicyError, match="belongs to another model"):
        trainer(tmp_path, kind=Trainer).tamper(
            module(tmp_path / "other"), datamodule(), ckpt_path=str(tmp_path / "mine.ckpt")
        )


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("rows", -1), ("lr", float("inf")), ("lr", float("nan"))])
def test_what_an_attacker_does_is_positive(name: str, value: float) -> None:
    given = {"steps": 1, "examples": 1, "epochs": 1, "batch_size": 1, "lr": 1.0, "rows": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got"):
        Attacker(**given)  # type: ignore[arg-type]
