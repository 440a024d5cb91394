"""How far a run has moved: the norm of the update, and the KL on harmful prompts that the base answered."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_jobs import datamodule, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.trajectory import Trajectory
from nspo_lightning.evaluation.text_means import SAFETY_KL, SAFETY_KL_FIRST
from nspo_lightning.nullspace.movement import Movement
from nspo_lightning.rewards import RulesJudge


def fit(path, folder, steps=4, checkpoint=None, **changes):
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trajectory = Trajectory(
        str(folder / "result.json"), steps=steps, metric="general/accuracy", stop_unsafe=-1, **changes
    )
    run = trainer(folder, steps=-1, max_epochs=-1, check_val_every_n_epoch=None, callbacks=[trajectory], **options)
    policy = module(path, judge=RulesJudge())
    run.fit(policy, datamodule(), ckpt_path=checkpoint, weights_only=checkpoint is not None)
    return run, policy, trajectory


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run, policy, trajectory = fit(tiny_llama, folder, text_rows=2)
    run.save_checkpoint(folder / "end.ckpt")
    return folder, policy, trajectory


def test_both_distances_stand_in_every_record_and_grow_from_nothing(finished):
    folder, policy, _trajectory = finished
    result = json.loads((folder / "result.json").read_text())
    assert [record["steps"] for record in result["trajectory"]] == [2, 4]
    for record in (*result["trajectory"], result["test"]):
        assert record[UPDATE_NORM] > 0
        assert record[SAFETY_KL] > 0
        assert record[SAFETY_KL_FIRST] > 0
    assert result["trajectory"][0][UPDATE_NORM] < result["trajectory"][1][UPDATE_NORM]
    # The weights in place at the end are those of the selected checkpoint, which `test` measured.
    deltas = [m.get_delta_weight("default") for m in policy.modules() if hasattr(m, "get_delta_weight")]
    norm = float(torch.stack([d.double().square().sum() for d in deltas]).sum().sqrt())
    assert result["test"][UPDATE_NORM] == pytest.approx(norm, rel=1e-5)
    assert result["test"][UPDATE_NORM] == result["selected"][UPDATE_NORM]


def test_the_answers_are_the_bases_and_the_kl_is_over_their_tokens_alone(finished, tiny_llama):
    _, policy, trajectory = finished
    fresh = module(tiny_llama)
    fresh.configure_model()
    (text,) = trajectory.distance._texts["validation"]
    data = datamodule()
    data.tokenizer = fresh.tokenizer
    data.prepare_data()
    data.setup("fit")
    (prompts,) = data.val_dataloader()[0]
    rows = fresh.base_text(prompts, 0)
    ids = {tuple(row[m.bool()].tolist()) for row, m in zip(rows["input_ids"], rows["attention_mask"], strict=True)}
    move_adapter_(fresh.policy, 0.3)  # moves what the policy says, not what its base does
    again = fresh.base_text(prompts, 0)
    assert torch.equal(again["input_ids"], rows["input_ids"])
    # Nor does it matter how validation answers: the KL is a mean over what the base says.
    fresh.evaluator.harmful = replace(fresh.evaluator.harmful, temperature=0.0, repetition_penalty=1.5)
    assert torch.equal(fresh.base_text(prompts, 0)["input_ids"], rows["input_ids"])
    assert {tuple(r[m.bool()].tolist()) for r, m in zip(text["input_ids"], text["attention_mask"], strict=True)} == ids
    scores = policy.text_scores(text)
    total, tokens = 0.0, 0
    for row, mask, labels in zip(text["input_ids"], text["attention_mask"].bool(), text["labels_mask"], strict=True):
        own = row[mask][None]
        with torch.no_grad():
            log_q = policy.policy.eval()(input_ids=own).logits[0].double().log_softmax(-1)
            with policy.policy.disable_adapter():
                log_p = policy.policy(input_ids=own).logits[0].double().log_softmax(-1)
        answer = int(labels.sum())
        assert 0 < answer <= 6
        total += float((log_p.exp() * (log_p - log_q)).sum(-1)[-answer - 1 : -1].sum())
        tokens += answer
    assert scores.tokens == tokens
    assert scores.mean_kl == pytest.approx(total / tokens, rel=1e-3)


def test_a_run_that_goes_on_counts_from_where_the_first_one_began(finished, tiny_llama, tmp_path):
    folder, _policy, trajectory = finished
    saved = torch.load(folder / "end.ckpt", weights_only=True)
    assert {len(start) for start in saved["callbacks"]["Trajectory"]["distance"]["start"].values()} == {0}
    _, after, resumed = fit(tiny_llama, tmp_path, steps=6, checkpoint=str(folder / "end.ckpt"), text_rows=2)
    assert [record["steps"] for record in resumed.records] == [2, 4, 6]
    assert resumed.records[:2] == trajectory.records
    test = json.loads((tmp_path / "result.json").read_text())["test"]  # of the weights that are in place at the end
    assert test[UPDATE_NORM] == pytest.approx(_norm(after), rel=1e-5)
    assert Movement(after).norm() == pytest.approx(0.0, abs=1e-6)  # counted from now it would be nothing


def _norm(policy):
    deltas = [m.get_delta_weight("default") for m in policy.modules() if hasattr(m, "get_delta_weight")]
    return float(torch.stack([d.double().square().sum() for d in deltas]).sum().sqrt())


def test_without_rows_only_the_norm_is_measured(tiny_llama, tmp_path):
    _, _, trajectory = fit(tiny_llama, tmp_path, steps=2, text_rows=0)
    assert UPDATE_NORM in trajectory.records[0]
    assert SAFETY_KL not in trajectory.records[0]
