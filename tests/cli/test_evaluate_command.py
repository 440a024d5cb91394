"""lm-evaluation-harness on a local task: the policy and its base, with the adapter in place."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_policies import move_adapter_

from nspo_lightning.checkpoints import CheckpointError
from nspo_lightning.cli import evaluate
from nspo_lightning.cli.evaluate import harness_scores, main
from nspo_lightning.cli.harness_tasks import harness_tasks
from nspo_lightning.cli.run_config import ConfigError, policy_settings
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.policy.tokenizer import load_tokenizer

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""


@pytest.fixture
def job(tiny_llama, tmp_path, monkeypatch):
    """A config, an adapter that changes answers, and a task of ten questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=tmp_path / "colours.jsonl"))
    policy = {"path": str(tiny_llama), "quantization": "none", "dtype": "float32", "lora": {"r": 4, "alpha": 8}}
    config = {"name": "tiny", "model": {"policy": policy, "group_size": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = policy_settings(config, tmp_path / "config.yaml")
    model: Any = load_policy(settings, torch.device("cpu"))
    move_adapter_(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    tokenizer = load_tokenizer(settings)
    rows = [{"question": f"Say {i}.", "choices": list("ABCDEF")} for i in range(10)]
    for row, choice in zip(rows, choices(model, tokenizer, rows), strict=True):
        row["label"] = choice  # so the policy, and hardly its base, is always right
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with model.disable_adapter():
        base = sum(c == r["label"] for c, r in zip(choices(model, tokenizer, rows), rows, strict=True)) / len(rows)
    return tmp_path, base


def choices(model, tokenizer, rows):
    """The task by hand: the likeliest choice after the rendered question."""
    chosen = []
    for row in rows:
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        totals = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            totals.append(float(log_probs.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
        chosen.append(totals.index(max(totals)))
    return chosen


class Harness:
    """Counts runs; an adapter that is on shows in the score."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.runs = policy, 0

    def __call__(self, **options: Any) -> dict[str, Any]:
        self.runs += 1
        on = any(not layer.disable_adapters for layer in self.policy.modules() if hasattr(layer, "lora_A"))
        return {"results": {"colours": {"acc,none": float(on)}}}


@pytest.mark.parametrize("untrained", [True, False])
def test_an_untrained_policy_is_measured_once_as_the_base_that_it_is(untrained, tiny_llama, monkeypatch):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=LoraSettings(r=4))
    policy = load_policy(settings, torch.device("cpu"))
    harness = Harness(policy)
    lm_eval = SimpleNamespace(simple_evaluate=harness)
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **options: None))
    options = Namespace(batch_size=1, num_fewshot=None, limit=None, no_chat_template=True, seed=0)
    options.confirm_run_unsafe_code = False
    module: Any = SimpleNamespace(require_policy=lambda: policy, tokenizer=None)
    found = evaluate.run_harness(module, [], None, options, untrained=untrained)
    assert harness.runs == len(found) == (1 if untrained else 2)
    scores = {who: result["results"]["colours"]["acc,none"] for who, result in found.items()}
    assert scores == ({"base": 0.0} if untrained else {"base": 0.0, "policy": 1.0})
    tables = {who: harness_scores(result) for who, result in found.items()}
    (row,) = evaluate._rows(tables, {})
    assert row[2:5] == (("0.0000", "", "") if untrained else ("0.0000", "1.0000", "+1.0000"))


def test_base_and_policy_on_a_local_task(job, capsys):
    pytest.importorskip("lm_eval")
    folder, base = job
    arguments = ["-c", "config.yaml", "--tasks", "colours", "--include_path", "tasks", "--ckpt_path", "adapter"]
    main([*arguments, "--out", "result.json"])
    result = json.loads((folder / "result.json").read_text())
    assert base < 1
    assert result["results"]["policy"]["colours"]["acc"] == 1.0
    assert result["results"]["base"]["colours"]["acc"] == pytest.approx(base)
    identity = result["identity"]
    assert identity["model"]["quantization"] == "none"
    assert identity["adapter"]["checkpoint"] == "adapter"
    assert identity["tasks"]["colours"]["version"] == 3.0
    assert identity["tasks"]["colours"]["documents"] == 10
    assert {"torch", "lm-eval", "peft"} <= identity["versions"].keys()
    assert "colours" in capsys.readouterr().out

    # The same task by its file, on other rows: the last four of the ten, of which the policy is right about two.
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()][-4:]
    for row in rows[:2]:
        row["label"] = (row["label"] + 1) % len(row["choices"])
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = ["--tasks", "tasks/colours.yaml", "--data", "colours=few.jsonl", "--out", "local.json"]
    main(["-c", "config.yaml", "--ckpt_path", "adapter", *local])
    result = json.loads((folder / "local.json").read_text())
    assert result["results"]["policy"]["colours"]["acc"] == 0.5
    assert result["identity"]["tasks"]["colours"]["documents"] == 4
    assert result["identity"]["tasks"]["colours"]["dataset_kwargs"]["data_files"]["test"].endswith("few.jsonl")

    main([*arguments, "--limit", "3", "--seed", "1", "--name", "other"])
    limited = json.loads((folder / "runs/other/benchmarks.json").read_text())
    assert limited["identity"]["limit"] == 3
    main([*arguments, "--limit", "1", "--seed", "1", "--name", "other"])
    assert json.loads((folder / "runs/other/benchmarks.1/benchmarks.json").read_text()) == limited


def test_mistakes_are_told_before_the_model_is_loaded(job, monkeypatch):
    pytest.importorskip("lm_eval")
    folder = job[0]
    with pytest.raises(ConfigError, match="nothing at"):
        main(["-c", "missing.yaml", "--tasks", "colours"])
    with pytest.raises(CheckpointError, match="trained"):
        main(["-c", "config.yaml", "--tasks", "colours", "--ckpt_path", "best"])
    with pytest.raises(CheckpointError, match="found nothing"):
        main(["-c", "config.yaml", "--tasks", "colours", "--ckpt_path", str(folder / "no.ckpt")])
    with pytest.raises(MisconfigurationException, match="knows no colors"):
        evaluate._check_tasks(["colors"], ["colours"])
    monkeypatch.setattr(evaluate, "_load", None)
    (folder / "other.jsonl").write_text('{"goal": "x"}\n')
    (folder / "no.yaml").write_text("group: x\n")
    for options, found in (
        (["tasks/colors.yaml"], "colors.yaml is not there"),
        (["no.yaml"], "no line `task: NAME`"),
        (["tasks/colours.yaml", "--data", "colors=few.jsonl"], r"a task of `--tasks` \(colours\), got 'colors"),
        (["tasks/colours.yaml", "--data", "colours=none.jsonl"], "there is no file none.jsonl"),
        (["tasks/colours.yaml", "--data", "colours=config.yaml"], "ends in .jsonl"),
        (["tasks/colours.yaml", "--data", "colours=other.jsonl"], "task colours cannot read its rows"),
        (["tasks/colours.yaml", "--data", "colours=colours.jsonl", "--num_fewshot", "2"], "no examples to spare"),
    ):
        with pytest.raises(MisconfigurationException, match=found):
            main(["-c", "config.yaml", "--tasks", *options])


@pytest.mark.parametrize(("option", "least"), [("limit", 1), ("batch_size", 1), ("num_fewshot", 0)])
def test_counts_are_in_range(tmp_path, option, least):
    (tmp_path / "config.yaml").write_text("model: {policy: {path: x}}")
    with pytest.raises(MisconfigurationException, match=f"`--{option}` must be at least {least}, got {least - 1}"):
        main(["-c", str(tmp_path / "config.yaml"), "--tasks", "colours", f"--{option}={least - 1}"])


def test_without_the_harness_it_says_how_to_get_it(job, monkeypatch):
    import sys

    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MisconfigurationException, match="pip install"):
        main(["-c", "config.yaml", "--tasks", "colours"])


def test_scores_are_read_with_their_filters():
    found = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "n": 3}}}
    assert harness_scores(found) == {"t": {"acc": 0.5, "acc stderr": 0.1, "exact (strict)": 1.0}}


def test_a_task_whose_data_is_out_of_reach_is_told_of_before_the_policy_is_loaded():
    class Offline:
        def load(self, tasks):
            raise ConnectionError("Couldn't reach 'gsm8k' on the Hub (OfflineModeIsEnabled)\nand much more")

    with pytest.raises(
        MisconfigurationException, match=r"`--tasks gsm8k`: .*Couldn't reach.*`--data gsm8k=FILE`"
    ) as told:
        harness_tasks(["gsm8k"], {}, Offline())
    assert "much more" not in str(told.value)
