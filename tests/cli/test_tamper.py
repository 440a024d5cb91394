"""`tamper`: what is left after a little fine-tuning, of the policy and of its base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_jobs import adapter, datamodule, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning.cli.trainer import Trainer


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
    from nspo_lightning.cli.tamper import Attacker, _fine_tune_, _harmful, _harmless

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
