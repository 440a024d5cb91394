"""The diagnosis of a run: a file and a block at its end, warnings on the way, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import warnings
from typing import Any

import null_space_problems
import pytest
import torch
from tiny_jobs import constant, datamodule, even_tokens, module, trainer

from nspo_lightning.callbacks import Diagnosis, NullSpaceProjection, RunReport
from nspo_lightning.callbacks.null_space.facts import KeptEnergy
from nspo_lightning.module.signal import NoSignalError
from nspo_lightning.nullspace.keeper import GradientEnergy


def fit(tiny_llama, folder, reward=even_tokens, steps=9, *callbacks, **changes):
    policy = module(tiny_llama, reward=reward, **changes)
    report = RunReport(str(folder), evaluate=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = trainer(folder, steps=steps, max_epochs=-1, callbacks=[*callbacks, report, Diagnosis(str(folder))])
        run.fit(policy, datamodule())
    return json.loads((folder / "diagnosis.json").read_text()), [str(one.message) for one in said]


def test_what_is_wrong_is_warned_of_once_on_the_way_and_said_in_a_block_at_the_end(tiny_llama, tmp_path, capsys):
    tight = NullSpaceProjection(criterion="rank", threshold=63)  # of 64 directions, one is free
    found, said = fit(tiny_llama, tmp_path, even_tokens, 9, tight)
    titles = [one["title"] for one in found]
    assert "Hardly a direction is free" in titles
    assert "Answers are cut" in titles
    assert [one["severity"] for one in found] == ["warning"] * len(found)
    for title in titles:
        assert sum(message.startswith(title) for message in said) == 1, title
    out = capsys.readouterr().out
    block = out[out.index("What to look at") :]
    assert out.index("largest leak") < out.index("What to look at"), "behind the report"
    for one in found:
        assert f"{one['severity']}: {one['title']}." in block
        assert " ".join(one["cure"].split())[:20] in " ".join(block.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["nullspace/kept_gradient_energy"] < 1
    assert summary["nullspace/output_change"] == tight.output_change
    assert summary["nullspace/output_change_bound"] == max(c.output_change for c in tight.certificates()) > 0


def script(folder, *callbacks, **options):
    """Train in a script of one's own; return what the warnings say of findings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        null_space_problems.trainer(folder, *callbacks, **options).fit(null_space_problems.Net())
    titles = ("Hardly a direction", "The projection leaves", "Calibration text", "An update left")
    return [str(one.message) for one in said if str(one.message).startswith(titles)]


def test_the_callback_alone_in_a_script_warns_of_what_it_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr("nspo_lightning.evaluation.diagnosis.KEPT_LITTLE", 0.9)
    monkeypatch.setattr("nspo_lightning.evaluation.diagnosis.TIGHT", 0.2)
    tight = {"threshold": null_space_problems.HIDDEN - 1}
    found = script(tmp_path, null_space_problems.projection(**tight))
    assert [message.partition(".")[0] for message in found] == [
        "Hardly a direction is free",
        "The projection leaves next to nothing of the gradient",
    ], "each once, the first before hours have gone by"
    assert found == script(tmp_path, null_space_problems.projection(**tight), max_epochs=2), "not once an epoch"
    alone = script(tmp_path, null_space_problems.projection(**tight), Diagnosis(str(tmp_path)))
    assert len(alone) == 2, "said by one of the two"


def test_the_callback_alone_says_nothing_where_nothing_is_wrong(tmp_path):
    assert script(tmp_path, null_space_problems.projection()) == []


def test_a_run_with_nothing_wrong_says_nothing(tiny_llama, tmp_path, capsys):
    from nspo_lightning.rollout import SamplingConfig

    ends = SamplingConfig(max_new_tokens=6, stop_strings=("e", "a", "o", "i", " ", "t"))
    found, said = fit(tiny_llama, tmp_path, even_tokens, 9, sampling=ends)
    assert found == []
    assert "What to look at" not in capsys.readouterr().out
    assert not [message for message in said if "mend" in message or "Hardly" in message]


def test_a_run_that_ends_since_nothing_can_be_learnt_leaves_its_diagnosis_too(tiny_llama, tmp_path):
    with pytest.raises(NoSignalError):
        fit(tiny_llama, tmp_path, constant, 4)
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found[0]["title"] == "All rewards are the same"
    assert "reward 1," in found[0]["text"]


def test_counts_go_on_after_a_resume(tiny_llama, tmp_path):
    first: Any = module(tiny_llama)
    run = trainer(tmp_path, steps=2)
    run.fit(first, datamodule())
    run.save_checkpoint(tmp_path / "part.ckpt")
    again: Any = module(tiny_llama)
    trainer(tmp_path, steps=3).fit(again, datamodule(), ckpt_path=tmp_path / "part.ckpt")
    facts = again.training_facts()
    assert (facts.groups, facts.completions, facts.updates) == (6, 24, 3)
    assert facts.cut <= 24
    assert facts.low is not None
    assert facts.low < facts.high


def test_kept_energy_is_the_mean_over_updates_with_a_gradient():
    kept = KeptEnergy()
    assert kept.mean() == (None, 0)
    for before, after in ((0.0, 0.0), (4.0, 1.0), (2.0, 1.5)):
        kept.add(GradientEnergy(before=torch.tensor(before), after=torch.tensor(after)))
    assert kept.mean() == (0.5, 2)
