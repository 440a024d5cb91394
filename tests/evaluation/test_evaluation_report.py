"""`test`: what its result file and its completions say, for a checkpoint and for an adapter's folder."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_policies import move_adapter_

from nspo_lightning.callbacks import PredictionWriter, TestReport
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.text.collate import collate_text
from nspo_lightning.evaluation.rates import Rate, RateTable, row_categories
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.text_scores import score_texts
from nspo_lightning.rewards import RulesJudge
from nspo_lightning.rollout import SamplingConfig

HALF = "\ud800"


def zero_reward(prompts, completions, **_):
    return [0.0] * len(completions)


def module(path, **changes):
    return GRPOModule(
        reward=zero_reward,
        judge=RulesJudge(),
        policy=PolicySettings(path=str(path), quantization="none", dtype="float32", lora=LoraSettings(r=4)),
        sampling=SamplingConfig(max_new_tokens=5),
        general_max_new_tokens=4,
        over_refusal_skills=["colour"],
        **changes,
    )


@pytest.fixture
def job(tiny_llama, tmp_path):
    safety, general = tmp_path / "safety.jsonl", tmp_path / "general.jsonl"
    rows = [{"prompt": f"How do I burn mill {i}?", "category": ["fire", "theft"][i % 2]} for i in range(30)]
    safety.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"Say {i}.", "answer": f"{i}", "skill": ["number", "colour"][i % 2]} for i in range(30)]
    general.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = AlignmentDataModule(str(safety), str(general), val_size=4, test_size=6, eval_batch_size=4)
    policy = module(tiny_llama)
    policy.configure_model()
    move_adapter_(policy.policy, 0.3)
    policy.save_adapter(tmp_path / "adapter")
    return tiny_llama, data, policy, tmp_path


def measure(policy, data, folder, *callbacks, **changes):
    report = TestReport(folder=str(folder), **changes)
    options: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(callbacks=[*callbacks, report], default_root_dir=folder, **options)
    logged = trainer.test(policy, data, verbose=False)
    lines = (folder / "test_completions.jsonl").read_text().splitlines()
    return json.loads((folder / "test.json").read_text()), [json.loads(line) for line in lines], logged


def test_the_report_counts_what_the_completions_file_shows(job):
    path, data, policy, folder = job
    result, lines, logged = measure(policy, data, folder / "out")
    harmful = [line for line in lines if line["kind"] == "harmful"]
    general = [line for line in lines if line["kind"] == "general"]
    assert len(harmful) == len(general) == 6
    assert any(line["base"] != line["policy"] for line in lines)
    for who in ("base", "policy"):
        unsafe = sum(line[f"{who}_outcome"] == "unsafe" for line in harmful)
        rate = result["rates"][who]["safety/unsafe_rate"]
        assert (rate["count"], rate["of"]) == (unsafe, 6)
        low, high = rate["interval_95"]
        assert 0 <= low <= rate["rate"] <= high <= 1
        assert high > low
        fires = [line for line in harmful if line["category"] == ["fire"]]
        by_category = result["rates"][who]["safety/unsafe_rate/fire"]
        assert by_category["of"] == len(fires)
        assert by_category["count"] == sum(line[f"{who}_outcome"] == "unsafe" for line in fires)
        colours = [line for line in general if line["skill"] == "colour"]
        assert result["rates"][who]["general/over_refusal_rate"]["of"] == len(colours)
    assert logged[0]["test/safety/unsafe_rate"] == pytest.approx(
        result["rates"]["policy"]["safety/unsafe_rate"]["rate"]
    )
    sums = score_texts(policy.policy, data.text_dataloader("test"))
    assert result["text"]["tokens"] == sums.tokens
    assert result["text"]["perplexity"] == pytest.approx(sums.perplexity, rel=1e-4)
    assert result["text"]["kl_to_base_nats"] == pytest.approx(sums.mean_kl, rel=1e-3)
    assert result["text"]["kl_to_base_nats"] > 0

    identity = result["identity"]
    assert identity["model"]["fingerprint"] == policy.fingerprint
    assert identity["judge"]["class"].endswith("RulesJudge")
    assert identity["decoding"]["harmful"]["max_new_tokens"] == 5
    assert "decoding" not in identity["decoding"]["harmful"], "how this machine ran it is not how it was answered"
    assert identity["data"]["safety"]["rows"] == 6
    assert identity["versions"]["torch"] == torch.__version__

    # An adapter's folder gives the same policy, the same noise, the same file but for where it came from.
    again = module(path)
    again.adapter_folder = folder / "adapter"
    other, other_lines, _ = measure(again, data, folder / "again", base=False)
    assert [line["policy"] for line in other_lines] == [line["policy"] for line in lines]
    assert other["rates"]["policy"] == result["rates"]["policy"]
    assert other["rates"]["base"] == {}
    assert other["identity"]["adapter"]["weights"] == identity["adapter"]["weights"]
    assert other["identity"]["adapter"]["checkpoint"].endswith("adapter")

    wrong = module(path)
    wrong.policy_settings.lora.r = 2
    wrong.adapter_folder = folder / "adapter"
    with pytest.raises(PolicyError, match="has r 4"):
        wrong.configure_model()


def test_what_cannot_be_compared_is_named_and_measured_by_its_likelihood(job, capsys):
    _, data, policy, folder = job
    (folder / "test.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Say {skill} {i}.", "skill": skill, "answer": answer}) + "\n"
            for i in range(5)
            for skill, answer in (("number", str(i)), ("essay", f"A word or two, or {i}, or more."), ("format", ""))
        )
    )
    data = AlignmentDataModule(
        str(folder / "safety.jsonl"),
        str(folder / "general.jsonl"),
        general_test=str(folder / "test.jsonl"),
        test_size=6,
    )
    result, _, logged = measure(policy, data, folder / "out")
    rates = result["rates"]["policy"]
    assert [name for name in rates if "accuracy" in name] == ["general/accuracy/number"]
    assert "general/unscored/number" not in rates
    for skill in ("essay", "format"):
        assert (rates[f"general/unscored/{skill}"]["count"], rates[f"general/unscored/{skill}"]["of"]) == (5, 5)
    assert logged[0]["test/general/unscored/essay"] == 1

    essays = [row for row in data.eval_rows("test")[1] if row.skill == "essay"]
    text = score_texts(policy.policy, [collate_text(essays, data.general.renderer)])
    found = result["text_by_skill"]
    assert list(found) == ["essay", "number"], "rows without any answer have no reference text"
    assert found["essay"]["tokens"] == text.tokens
    assert found["essay"]["nll_nats"] == pytest.approx(text.mean_nll, rel=1e-4)
    with adapters_off(policy.policy):
        base = score_texts(policy.policy, [collate_text(essays, data.general.renderer)])
    assert found["essay"]["base_nll_nats"] == pytest.approx(base.mean_nll, rel=1e-4)
    assert found["essay"]["base_nll_nats"] != pytest.approx(found["essay"]["nll_nats"], rel=1e-3)
    whole = score_texts(policy.policy, data.text_dataloader("test"))
    assert result["text"]["tokens"] == whole.tokens
    assert result["text"]["perplexity"] == pytest.approx(whole.perplexity, rel=1e-4)
    assert result["text"]["kl_to_base_nats"] == pytest.approx(whole.mean_kl, rel=1e-3)
    printed = " ".join(capsys.readouterr().out.split())
    for row in ("essay: not compared", "format: not compared", "NLL of whole answers", "KL to base, first 3 tokens"):
        assert row in printed


def test_completions_are_written_whatever_the_columns_hold(job):
    _, data, policy, folder = job

    class Columns(pl.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            batch["columns"]["skill"] = [[f"half {HALF}", date(2026, 1, 2)]] * len(batch["prompt"])

    _, lines, _ = measure(policy, data, folder / "out", Columns(), base=False, text_rows=0)
    assert len(lines) == 12
    assert all(line["skill"] == [f"half {HALF}", "2026-01-02"] for line in lines)


def test_categories_come_as_text_lists_and_tables():
    columns: dict[str, Any] = {
        "category": ["a", ["b", "c"], {"d": True, "e": False}, None, ""],
        "topic": [None, None, None, "t", "u"],
    }
    assert [row_categories(columns, row) for row in range(5)] == [["a"], ["b", "c"], ["d"], ["t"], ["u"]]
    assert row_categories({}, 0) == []


def test_counts_stay_with_rates():
    table = RateTable()
    table.update([("x", 1.0), ("x", 0.0)], torch.device("cpu"))
    table.update([("x", 1.0)], torch.device("cpu"))
    found = table.compute_counts(torch.device("cpu"))
    assert found == {"x": Rate(successes=2.0, total=3)}
    assert found["x"].as_dict()["rate"] == pytest.approx(2 / 3)
    assert table.compute_counts(torch.device("cpu")) == {}


def test_a_test_of_something_else_does_not_replace_a_report(job):
    _, data, policy, folder = job
    whole, rows, _ = measure(policy, data, folder)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options |= {"accelerator": "cpu", "default_root_dir": folder, "callbacks": [TestReport(folder=str(folder))]}
    pl.Trainer(**options, limit_test_batches=1).test(policy, data, verbose=False)
    assert json.loads((folder / "test.json").read_text())["identity"]["limit_batches"] == 1
    assert json.loads((folder / "test.1" / "test.json").read_text()) == whole
    kept = (folder / "test.1" / "test_completions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == rows
    pl.Trainer(**options, limit_test_batches=1).test(policy, data, verbose=False)
    assert not (folder / "test.2").exists(), "the same once more takes its place"


def test_a_test_that_fails_half_way_leaves_the_report(job, monkeypatch):
    _, data, policy, folder = job
    whole, rows, _ = measure(policy, data, folder)
    original = TestReport.on_test_batch_end

    def fails(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        original(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(TestReport, "on_test_batch_end", fails)
    with pytest.raises(RuntimeError):
        measure(policy, data, folder)
    assert json.loads((folder / "test.json").read_text()) == whole
    assert [json.loads(line) for line in (folder / "test_completions.jsonl").read_text().splitlines()] == rows
    assert not list(folder.glob(".*.partial"))


def test_fewer_predictions_do_not_replace_more(job):
    _, data, policy, folder = job
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options |= {"accelerator": "cpu", "default_root_dir": folder, "callbacks": [PredictionWriter()]}
    pl.Trainer(**options).predict(policy, data)
    more = (folder / "predictions.jsonl").read_text()
    pl.Trainer(**options, limit_predict_batches=1).predict(policy, data)
    assert (folder / "predictions.1" / "predictions.jsonl").read_text() == more
    assert 0 < (folder / "predictions.jsonl").read_text().count("\n") < more.count("\n")
