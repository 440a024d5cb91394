"""`judge -c CONFIG --preview N`: what a training would start from, before hours are spent, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs
import yaml
from rich.console import Console

from nspo_lightning.cli.app import main
from nspo_lightning.cli.preview import preview
from nspo_lightning.cli.shipped import WrongOptionsError, preview_arguments
from nspo_lightning.rewards import OutcomeReward, ServerJudge


def seen(tiny_llama, folder, reward=tiny_jobs.even_tokens, prompts=4, **options: Any):
    policy, console = tiny_jobs.module(tiny_llama, reward=reward), Console(file=io.StringIO(), width=80)
    run = tiny_jobs.trainer(folder, limit_train_batches=options.pop("limit", 1.0))
    found = preview(policy, tiny_jobs.datamodule(), run, prompts=prompts, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    return found, console.file.getvalue(), policy


def test_answers_rewards_spread_signal_and_time_are_shown(tiny_llama, tmp_path):
    found, text, policy = seen(tiny_llama, tmp_path, prompts=3, output=str(tmp_path / "answers.jsonl"))
    assert (found.prompts, len(found.lines)) == (4, 16), "batches of 2 prompts, 4 answers each"
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == pytest.approx(found.rows.rewards.total.tolist())
    assert {"prompt", "completion", "reward", "outcome", "finished"} <= set(lines[0])
    groups = found.rows.rewards.total.view(4, 4)
    with_signal = int((groups.max(1).values > groups.min(1).values).sum())
    plain = " ".join(text.split())
    assert f"{with_signal} of 4" in plain
    assert f"spread in a group │ {groups.std(1).mean():.3f}" in plain
    assert "outcome: answered" in plain
    assert "time, 4 steps" in plain, "8 prompts in batches of 2"
    assert found.learning is not None
    assert found.epoch_seconds == pytest.approx(8 * (found.answering / 4 + found.learning))
    assert plain.count("best") == 3
    assert max(map(len, text.splitlines())) <= 80
    # Nothing was trained, and no run begun.
    assert all(not p.any() for name, p in policy.named_parameters() if "lora_B" in name)
    assert all(p.grad is None for p in policy.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_an_epoch_is_what_the_trainer_allows_and_rewards_all_alike_are_told(tiny_llama, tmp_path):
    found, text, _ = seen(tiny_llama, tmp_path, tiny_jobs.constant, prompts=2, limit=3)
    assert (found.batches, found.epoch_prompts) == (3, 6)
    assert found.learning is None
    plain = " ".join(text.split())
    assert "0 of 2" in plain
    assert "error: All rewards are the same. All 8 answers got the reward 1" in plain


def test_a_dead_server_is_found_before_the_model_is_loaded(tiny_llama, tmp_path):
    judge = ServerJudge("m", "http://127.0.0.1:9/v1", max_retries=0)
    policy = tiny_jobs.module(tiny_llama, reward=OutcomeReward(judge))
    with pytest.raises(ValueError, match="before anything else.*127|127.*before anything else"):
        preview(policy, tiny_jobs.datamodule(), tiny_jobs.trainer(tmp_path))
    assert policy.policy is None
    with pytest.raises(ValueError, match="before anything else"):
        tiny_jobs.trainer(tmp_path, steps=1).fit(policy, tiny_jobs.datamodule())
    assert policy.policy is None


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"prompts": 0}, "`--preview` must be at least 1 prompt, got 0"),
        ({"examples": -1}, "`--examples` must not be negative, got -1"),
        ({"output": "taken/answers.jsonl"}, "nothing can be written in .*taken"),
        ({"output": "pipe"}, "no ordinary file"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tiny_llama, tmp_path, monkeypatch, options, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    os.mkfifo(tmp_path / "pipe")
    policy = tiny_jobs.module(tiny_llama)
    with pytest.raises(ValueError, match=found):
        preview(policy, tiny_jobs.datamodule(), tiny_jobs.trainer(tmp_path), **options)
    assert policy.policy is None


def test_the_command_takes_a_training_config_and_its_overrides(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("safety", "general"):
        rows = [{"prompt": f"Say {name} {i}.", "answer": f"{i}"} for i in range(16)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = {"path": str(tiny_llama), "quantization": "none", "dtype": "float32", "lora": {"r": 2}}
    reward = "nspo_lightning.rewards.RefusalReward"
    config = {
        "model": {"reward": reward, "policy": policy, "group_size": 4, "sampling": {"max_new_tokens": 4}},
        "data": {"safety": "safety.jsonl", "general": "general.jsonl", "batch_size": 4, "val_size": 4, "test_size": 4},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("my.yaml").write_text(yaml.safe_dump(config))
    main(["judge", "-c", "my.yaml", "--preview", "3", "--model.group_size", "2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "to 3 prompts, 2 each" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize("given", [["--preview", "-3"], ["--preview=0"], ["--preview", "few"]])
def test_what_is_no_number_of_prompts_is_told_by_the_name_of_the_option(given):
    with pytest.raises(WrongOptionsError, match=r"`--preview` must be a whole number of prompts, 1 or more, got '"):
        preview_arguments(["judge", "-c", "a", *given])


def test_the_option_becomes_the_job():
    assert preview_arguments(["judge", "-c", "a", "--preview"]) == ["preview", "-c", "a", "--prompts", "64"]
    assert preview_arguments(["judge", "--preview=5", "-c", "a"]) == ["preview", "--prompts", "5", "-c", "a"]
    assert preview_arguments(["judge", "-c", "a", "--input", "f"]) == ["judge", "-c", "a", "--input", "f"]
    assert preview_arguments(["fit", "--preview", "5"]) == ["fit", "--preview", "5"]
    with pytest.raises(WrongOptionsError, match="one of the two"):
        preview_arguments(["judge", "--preview", "--input", "f"])
