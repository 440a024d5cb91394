"""The command line as a user meets it: a run and what it leaves, and every mistake as one message and exit code 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_policies import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo_lightning.cli.app import main
from nspo_lightning.cli.run_config import policy_settings, read_config
from nspo_lightning.policy.tokenizer import load_tokenizer
from nspo_lightning.report import read_run
from nspo_lightning.report.loading import loading
from nspo_lightning.rewards import RulesJudge

CONFIGS = Path(__file__).parents[2] / "configs"


def terminated(prompts, completions, **_):
    os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)


def nan_reward(prompts, completions, **_):
    return [float("nan")] * len(completions)


def short_reward(prompts, completions, **_):
    return [0.0]


def no_reward(prompts, completions, **_):
    return [None] * len(completions)


def constant_reward(prompts, completions, **_):
    return [0.0] * len(completions)


def raising_reward(prompts, completions, **_):
    raise RuntimeError("the judge is out")


class Nay(RulesJudge):
    """Whatever begins with an N refuses."""

    def classify(self, prompts, completions, **columns):
        return ["refusal" if text.startswith("N") else "safe" for text in completions]


@pytest.fixture
def printed():
    """What each command of `run` wrote to standard output."""
    return []


@pytest.fixture
def run(tiny_llama, tmp_path, monkeypatch, capsys, printed):
    """Run a subcommand on the tiny model with a few rows; returns (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    safety, general = tmp_path / "safety.jsonl", tmp_path / "general.jsonl"
    safety.write_text("".join(json.dumps({"prompt": f"How do I burn mill {i}?"}) + "\n" for i in range(24)))
    general.write_text("".join(json.dumps({"prompt": f"Say {i}.", "answer": f"{i}"}) + "\n" for i in range(24)))
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["name"] = "tiny"
    config["model"]["policy"] = {"path": str(tiny_llama), "quantization": "nf4", "dtype": "float32", "lora": {"r": 4}}
    config["model"]["reward"] = {
        "class_path": "nspo_lightning.rewards.FunctionReward",
        "init_args": {"path": "probes.even_tokens"},
    }
    config["model"] |= {"group_size": 4, "sampling": {"max_new_tokens": 6}, "general_max_new_tokens": 4}
    config["data"] = {"safety": str(safety), "general": str(general), "batch_size": 4, "val_size": 4, "test_size": 4}
    config["nullspace"] = {"criterion": "rank", "threshold": 0.5}
    config["trainer"] |= {"limit_train_batches": 3, "val_check_interval": 1, "enable_progress_bar": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def call(subcommand, *overrides):
        code: str | int | None = 0
        try:
            main([subcommand, "-c", "config.yaml", *map(str, overrides)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        printed.append(captured.out)
        return code, captured.err

    return call


def test_a_run_leaves_what_others_rely_on(run, tiny_llama):
    code, _ = run("fit", "--trainer.limit_train_batches", 4)
    assert code == 0
    folder = Path("runs/tiny")
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        for name in ("safety/answered_rate", "safety/refusal_rate", "general/accuracy", "general/over_refusal_rate"):
            assert 0 <= summary[f"{when}/{name}"] <= 1
    assert summary["nullspace/leak_max"] <= 1e-6
    assert summary["seconds"] > 0
    assert (folder / "config.yaml").is_file()
    checkpoints = list((folder / "checkpoints").glob("*.ckpt"))
    assert checkpoints
    frozen = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    content = torch.load(checkpoints[0], weights_only=True)
    assert sum(value.numel() for value in content["state_dict"].values()) < frozen / 2
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder / "adapter")
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"reward", "reward_std"} <= scalars
    training = (
        "frac_reward_zero_std",
        "entropy",
        "completions/mean_length",
        "learning_rate",
        "grad_norm",
        "updates_skipped",
    )
    assert {f"training/{name}" for name in (*training, "updates_nonfinite", "clip_ratio/region_mean")} <= scalars
    folders = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(scalars)))  # as TensorBoard orders them
    assert folders == ["general", "nullspace", "result", "reward", "reward_std", "rewards", "safety", "training"]
    assert {"nullspace/grad_norm_before", "nullspace/grad_norm_after", "nullspace/kept_gradient_energy"} <= scalars
    assert {"nullspace/leak_max", "safety/answered_rate", "general/accuracy"} <= scalars
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert {"completions", "config", "before and after", "answers before and after"} <= texts
    assert "_hparams_/session_start_info" in events.summary_metadata
    after = summary["after/safety/answered_rate"]
    assert events.Scalars("result/safety/answered_rate")[-1].value == pytest.approx(after)
    assert events.Tags()["images"] == ["nullspace/spectrum"]
    null_space = json.loads((folder / "null_space.json").read_text())
    assert {i["free_share"] for i in null_space["inputs"]} == {0.5}
    assert max(i["leak"] for i in null_space["inputs"]) == summary["nullspace/leak_max"]
    assert (folder / "null_space.png").read_bytes().startswith(b"\x89PNG")
    said = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["kind"] for row in said) == ["general"] * 4 + ["harmful"] * 4
    assert all(isinstance(row[when], str) for row in said for when in ("before", "after"))
    page = (folder / "report.html").read_text()
    assert all(
        f">{part}</h2>" in page for part in ("Before and after", "Over training", "Null space", "How to load it")
    )
    assert said[0]["prompt"] in page
    assert (folder / "report.md").read_text().startswith("# tiny")
    code = loading(read_run(folder))["PEFT"]
    assert code in (folder / "report.md").read_text()
    made: dict[str, Any] = {}
    exec(code, made)
    weights = get_peft_model_state_dict(made["model"])
    assert all(torch.equal(value, adapter[name]) for name, value in weights.items())


def test_an_earlier_run_is_set_aside_and_never_lost(run):
    assert run("fit", "--trainer.limit_train_batches", 1)[0] == 0
    first = Path("runs/tiny/summary.json").read_text()
    assert run("fit", "--trainer.limit_train_batches", 1)[0] == 0
    assert Path("runs/tiny.1/summary.json").read_text() == first
    assert Path("runs/tiny/summary.json").is_file()


def test_the_callback_is_one_flag(run):
    assert run("fit", "--nullspace.enabled", "false", "--trainer.limit_train_batches", 1)[0] == 0
    assert json.loads(Path("runs/tiny/summary.json").read_text())["nullspace/leak_max"] is None


def test_a_run_without_one_score_fails_and_writes_no_result(run, caplog):
    code, said = run("fit", "--model.reward.init_args.path", "test_cli.no_reward")
    assert code == 1
    assert "not one completion of 3 rollouts was scored" in said
    assert "on_error: exclude" in said
    assert "With the same settings it would end so again" in caplog.text
    assert "Go on with" not in caplog.text
    assert not Path("runs/tiny/summary.json").exists()


def test_a_run_without_a_signal_warns_once_ends_after_the_stated_number_and_fails(run):
    alike = ("--model.reward.init_args.path", "test_cli.constant_reward", "--trainer.max_epochs", 2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code, said = run("fit", *alike, "--model.max_rollouts_without_signal", 5)
    assert code == 1
    (warning,) = [str(one.message) for one in warned if "No group had a signal" in str(one.message)]
    rates = r"first 3 rollouts.*12 groups without spread, mean reward 0, [\d.]+% of 48 \w+ (answered|unsafe)"
    assert re.search(rates, warning), warning
    assert "After 5 such rollouts in a row the run ends." in warning
    told = " ".join(said[said.index("error: ") :].split())
    assert told.startswith("error: No group had a signal in 5 rollouts in a row"), told
    for cure in ("dynamic sampling", "warmup", "`sampling.temperature`", "`group_size`", "guided"):
        assert cure in warning, cure
        assert cure in told, cure
    assert "Traceback" not in said
    assert not Path("runs/tiny/summary.json").exists()


def test_a_barebones_trainer_trains(run):
    code, said = run("fit", "--trainer.barebones", "true", "--trainer.enable_progress_bar", "true")
    assert code == 0, said
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["updates"] > 0
    assert [path.name for path in Path("runs").iterdir() if not path.name.startswith(".")] == ["tiny"]


def test_sigterm_ends_a_barebones_run_with_its_own_exit_code(run):
    code, _ = run("fit", "--trainer.barebones", "true", "--model.reward.init_args.path", "test_cli.terminated")
    assert code == 128 + signal.SIGTERM
    assert not Path("runs/tiny/summary.json").exists()


def test_runs_are_kept_where_default_root_dir_says(run, printed, caplog):
    elsewhere = ("--trainer.default_root_dir", "elsewhere", "--nullspace.enabled", "false")
    code, said = run("fit", *elsewhere, "--trainer.limit_train_batches", 1)
    assert code == 0
    assert re.search(r"Training [\d,]+ parameters in \d+ matrices", caplog.text)
    assert "FLOPs" not in said + printed[-1]
    assert Path("elsewhere/tiny/summary.json").is_file()
    assert not Path("runs").exists()
    assert run("test", *elsewhere, "--ckpt_path", "last")[0] == 0
    assert Path("elsewhere/tiny/test.json").is_file()
    page = Path("elsewhere/tiny/report.html").read_text()
    assert "measured by <code>test</code>" in page, "written anew"
    assert "What <code>fit</code> measured" in page
    assert "Test metric" not in printed[-1], "Lightning's table after ours"


def test_printed_config_runs(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "config.yaml", "--print_config"])
    assert stop.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", "-c", "printed.yaml", "--trainer.limit_train_batches", "1"])
    assert Path("runs/tiny/summary.json").is_file()


def test_validate_test_and_predict(run):
    assert run("fit", "--trainer.limit_train_batches", 2)[0] == 0
    trained_with = Path("runs/tiny/config.yaml").read_bytes()
    for subcommand in ("validate", "test", "predict"):
        options = ("--data.batch_size", 2, "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")
        assert run(subcommand, *options)[0] == 0
        assert Path("runs/tiny/config.yaml").read_bytes() == trained_with, "the record of the run is not rewritten"
        assert yaml.safe_load(Path(f"runs/tiny/config.{subcommand}.yaml").read_text())["data"]["batch_size"] == 2
    rows = [json.loads(line) for line in Path("runs/tiny/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {"prompt", "completion", "reward"} <= rows[0].keys()


def test_an_interrupted_run_resumes(run, monkeypatch):
    from nspo_lightning.module.grpo_module import GRPOModule

    original = GRPOModule.training_step

    def interrupt(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    assert run("fit", "--trainer.limit_train_batches", 4, "--name", "whole")[0] == 0
    monkeypatch.setattr(GRPOModule, "training_step", interrupt)
    code, _ = run("fit", "--trainer.limit_train_batches", 4, "--name", "cut")
    assert code == 1
    assert Path("runs/cut/checkpoints/last.ckpt").is_file()
    monkeypatch.setattr(GRPOModule, "training_step", original)
    assert run("fit", "--trainer.limit_train_batches", 4, "--name", "cut", "--ckpt_path", "last")[0] == 0
    whole, cut = (load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    before = [
        json.loads(Path(f"runs/{name}/summary.json").read_text())["before/safety/answered_rate"]
        for name in ("whole", "cut")
    ]
    assert before[0] == before[1]


def test_out_of_memory_while_sampling_is_one_message_and_loses_nothing(run, monkeypatch):
    from nspo_lightning.rollout.memory import SharedMemory

    original, steps = SharedMemory.step, []

    def full(self, token):
        steps.append(1)
        if steps.count(1) > 60:  # in the middle of a later rollout
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, token)

    assert run("fit", "--trainer.limit_train_batches", 6, "--name", "whole")[0] == 0
    monkeypatch.setattr(SharedMemory, "step", full)
    shown = run("fit", "--trainer.limit_train_batches", 6, "--name", "cut")
    check(shown, r"ran out of memory while completions were sampled: CUDA out of memory.*`data.batch_size` \d+ -> \d+:")
    assert len(shown[1].split("error: ")[1].splitlines()) < 12
    assert Path("runs/cut/checkpoints/last.ckpt").is_file()
    monkeypatch.setattr(SharedMemory, "step", original)
    again = ("--name", "cut", "--ckpt_path", "last", "--model.sampling.decoding", "static")
    assert run("fit", "--trainer.limit_train_batches", 6, *again)[0] == 0, "how tokens are drawn may change on the way"
    whole, cut = (load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(value, cut[name], rtol=0, atol=1e-5) for name, value in whole.items())


def test_a_refused_resume_leaves_the_runs_files(run, monkeypatch):
    assert run("fit", "--trainer.limit_train_batches", 1)[0] == 0
    before = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    code, said = run("fit", "--trainer.limit_train_batches", 2, "--ckpt_path", "last", "--model.group_size", 6)
    assert code == 1
    assert "`model.group_size` 4 -> 6" in said
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()} == before
    assert run("fit", "--trainer.limit_train_batches", 1, "--trainer.max_epochs", 2, "--ckpt_path", "last")[0] == 0
    assert "max_epochs: 2" in Path("runs/tiny/config.resumed.1.yaml").read_text()
    assert Path("runs/tiny/config.yaml").read_bytes() == before[Path("runs/tiny/config.yaml")]


def no_template(tokenizer, folder):
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(folder)
    return folder


MISTAKES = {
    "unknown model": (["--model.policy.path", "/nowhere"], r"policy.path.*found nothing at '/nowhere'"),
    "missing data": (["--data.safety", "nothing.csv"], r"nothing\.csv"),
    "group of one": (["--model.group_size", "1"], r"`group_size` must be at least 2, got 1"),
    "no room": (["--model.sampling.max_new_tokens", "250"], r"No room left for completions.*max_prompt_tokens"),
    "no room at all": (["--model.sampling.max_new_tokens", "256"], r"No room left for completions"),
    "greedy training": (["--model.sampling.temperature", "0"], r"greedy completions"),
    "reward with NaN": (["--model.reward.init_args.path", "test_cli.nan_reward"], r"nan_reward.*(?i:nan|finite)"),
    "reward of wrong length": (["--model.reward.init_args.path", "test_cli.short_reward"], r"short_reward.*16"),
    "reward that raises": (
        ["--model.reward.init_args.path", "test_cli.raising_reward"],
        r"raising_reward.*the judge is out",
    ),
    "nothing left": (["--nullspace.criterion", "absolute", "--nullspace.threshold", "1e-30"], r"(?i)no null direction"),
    "unknown criterion": (["--nullspace.criterion", "guess"], r"(?s)criterion"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(run, mistake):
    overrides, message = MISTAKES[mistake]
    check(run("fit", *overrides), message)
    assert not list(Path("runs").glob("tiny/checkpoints/*.ckpt"))


def check(shown, message):
    code, err = shown
    assert code in (1, 2)
    assert "Traceback" not in err
    assert re.search(message, err, re.DOTALL), err
    shown = [line for line in err.splitlines() if line.startswith("error")]
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.csv"),
        ("text\nhello\n", r"bad\.csv.*prompt"),
        ('prompt\n""\n', r"bad\.csv.*empty"),
    ],
)
def test_bad_data_files_are_named(run, content, message):
    Path("bad.csv").write_text(content)
    check(run("fit", "--data.safety", "bad.csv"), message)


def test_a_model_without_chat_template(run, tokenizer, tmp_path):
    check(run("fit", "--model.policy.tokenizer", no_template(tokenizer, tmp_path / "bare")), r"no chat template")


def test_one_chat_template_for_everything(run, tokenizer, tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ 'Loud: ' if loud else '' }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    Path("mine.jinja").write_text(template)
    bare = no_template(tokenizer, tmp_path / "bare")
    given = ["--model.policy.tokenizer", bare, "--data.chat_template", "mine.jinja"]
    given += ["--model.policy.chat_template_kwargs", '{"loud": true}']
    check(run("fit", *given, "--model.policy.chat_template", "{{ messages }}"), r"two names of one setting")
    assert run("data", *given)[0] == 0
    assert run("fit", *given, "--data.calibration_text", "prompt_and_model_answer", "--trainer.max_steps", 2)[0] == 0
    folder = Path("runs/tiny")
    read = policy_settings(read_config(folder / "config.yaml"), folder / "config.yaml")
    main(["export", "--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--out", "exported"])
    chat = [{"role": "user", "content": "Hi"}]
    for made in (*map(AutoTokenizer.from_pretrained, (folder / "adapter", "exported")), load_tokenizer(read)):
        assert made.apply_chat_template(chat, tokenize=False) == "<|user|>Loud: Hi<|end|>"
    assert "loud: true" in Path("exported/README.md").read_text()


def test_a_width_that_4bit_cannot_take(run, tokenizer, tmp_path):
    save_llama(tmp_path / "odd", tokenizer, intermediate_size=100)
    check(run("fit", "--model.policy.path", tmp_path / "odd"), r"100 out-features.*quantization: none")


def test_a_basis_and_a_checkpoint_of_another_model(run, tiny_qwen2, tmp_path):
    assert run("fit", "--trainer.limit_train_batches", 1)[0] == 0
    basis = next((tmp_path / "runs" / "nullspace").glob("*.safetensors"))
    code, err = run("fit", "--model.policy.path", tiny_qwen2, "--nullspace.calibration", basis, "--name", "other")
    check((code, err), r"(?s)model")
    code, err = run("fit", "--model.policy.path", tiny_qwen2, "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")
    check((code, err), r"belongs to another model")


def test_a_warm_start_and_a_run_that_goes_on_from_it(run, tmp_path, caplog):
    teach = ("--warmup.refusals", "[No.]", "--model.judge", "test_cli.Nay", "--warmup.check_prompts", 2)
    one = ("--warmup.max_updates", 1, "--warmup.check_every", 1, "--warmup.lr", 1e-6, "--trainer.limit_test_batches", 1)
    code, err = run("warmup", *teach, *one)
    check((code, err), r"warm start is not done: after 1 update,.*max_updates")
    limits = r"leaves out .*limit_train_batches, limit_test_batches of the configuration.*`warmup.check_prompts`"
    assert re.search(limits, caplog.text), caplog.text
    enough = ("--warmup.max_updates", 2, "--warmup.refusal_share", 1e-9, "--warmup.check_every", 2)
    assert run("warmup", *teach, *enough, "--ckpt_path", "last")[0] in (0, 1)
    shutil.move("runs/tiny-warmup/adapter", "warm")
    going_on = ("--model.policy.adapter", "warm", "--trainer.limit_train_batches")
    assert run("fit", *going_on, 1)[0] == 0
    assert json.loads(Path("runs/tiny/summary.json").read_text())["nullspace/leak_max"] <= 1e-6
    check(run("fit", *going_on, 2, "--ckpt_path", "runs/tiny-warmup/checkpoints/last.ckpt"), r"written by `warmup`")
    other = run("fit", *going_on, 1, "--name", "next", "--nullspace.threshold", 0.25)
    check(other, r"nullspace.threshold: the adapter's was 0.5, this run wants 0.25.*Warm up again")
    assert len(other[1][other[1].index("error") :].splitlines()) < 24
    assert not Path("runs/next").exists(), "what is refused leaves nothing"
    shutil.rmtree("warm")
    assert run("fit", *going_on, 2, "--ckpt_path", "last")[0] == 0
    check(run("fit", *going_on, 1, "--name", "next"), r"found nothing at 'warm'")
    (Path("runs/tiny/adapter") / "null_space.json").unlink()
    foreign = ("--model.policy.adapter", "runs/tiny/adapter", "--name", "next")
    check(run("fit", *foreign), r"its B is not zero.*merge_adapter")


def test_calibrate_writes_a_basis_that_fit_takes(run):
    assert run("calibrate", "--out", "basis.safetensors")[0] == 0
    assert Path("basis.png").is_file()
    assert run("fit", "--nullspace.calibration", "basis.safetensors", "--trainer.limit_train_batches", 1)[0] == 0
    assert json.loads(Path("runs/tiny/summary.json").read_text())["nullspace/leak_max"] <= 1e-6


def test_calibration_on_the_models_own_answers(run):
    assert run("calibrate", "--out", "own.safetensors", "--data.calibration_text", "prompt_and_model_answer")[0] == 0
    assert run("calibrate", "--out", "reference.safetensors")[0] == 0
    own, reference = load_file("own.safetensors"), load_file("reference.safetensors")
    assert any(own[name].shape != reference[name].shape or not torch.equal(own[name], reference[name]) for name in own)


def test_data_shows_what_is_trained_on(run, capsys):
    main(["data", "-c", "config.yaml"])
    assert "<|user|>How do I burn mill" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_parsed_and_instantiated(config, monkeypatch, tmp_path):
    from nspo_lightning.cli.jobs import CLI, cli_arguments

    monkeypatch.chdir(tmp_path)
    if "judge" in config.stem:
        pytest.skip("read by the judge subcommand, see tests/rewards")
    arguments = ["-c", str(config), "--trainer.accelerator", "cpu"]
    cli = CLI(**cli_arguments(), run=False, args=arguments)
    assert cli.model is not None
    assert cli.datamodule is not None


def test_going_on_with_a_run_that_is_over_changes_nothing(run, caplog):
    assert run("fit", "--trainer.limit_train_batches", 2)[0] == 0
    results = ["summary.json", "config.yaml", "adapter/adapter_model.safetensors", "checkpoints/last.ckpt"]
    before = {name: (Path("runs/tiny") / name).read_bytes() for name in results}
    caplog.clear()
    assert run("fit", "--trainer.limit_train_batches", 2, "--ckpt_path", "last")[0] == 0
    assert "This run is over" in caplog.text
    assert "certificate" not in caplog.text
    assert {name: (Path("runs/tiny") / name).read_bytes() for name in results} == before
    # Killed after training and before the report: it is made then, with all that belongs to it.
    Path("runs/tiny/summary.json").unlink()
    assert run("fit", "--trainer.limit_train_batches", 2, "--ckpt_path", "last")[0] == 0
    first, again = json.loads(before["summary.json"]), json.loads(Path("runs/tiny/summary.json").read_text())
    assert again.keys() == first.keys()
    assert again["nullspace/leak_max"] == pytest.approx(first["nullspace/leak_max"], rel=0.5)
    same = [name for name in first if name.startswith(("before/", "after/", "updates"))]
    assert {name: again[name] for name in same} == {name: first[name] for name in same}
