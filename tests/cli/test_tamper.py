"""`tamper`: what is left after a little fine-tuning, of the policy and of its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_jobs import adapter, datamodule, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning.cli.tamper import Attacker
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.policy.settings import PolicyError


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
    for whos in rates.values():
        assert {who: found["safety/answered_rate"]["of"] for who, found in whos.items()} == {"base": 2, "policy": 2}


def test_a_few_updates_move_the_answers(tiny_llama: Path, tmp_path: Path) -> None:
    from nspo_lightning.cli.calibrate import prepared_for_fit
    from nspo_lightning.cli.tamper import _fine_tune_, _harmful, _harmless

    policy, data = module(tiny_llama), datamodule()
    run = trainer(tmp_path, kind=Trainer)
    attacker = Attacker(steps=4, examples=3, epochs=2, batch_size=2, lr=1e-2, rows=2)
    with prepared_for_fit(run, policy, data):
        harmless, harmful = _harmless(data, attacker), _harmful(policy, data, attacker)
        assert len(harmless) == 4
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
