"""An export gives the run's completions, says what rounding did, and never leaves half a folder."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_policies import move_adapter_
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nspo_lightning.cli.app import main
from nspo_lightning.cli.run_config import policy_settings, read_config
from nspo_lightning.export.merge import merge_
from nspo_lightning.export.trained import ExportSource
from nspo_lightning.nullspace import load_calibration
from nspo_lightning.policy.loading import load_base, load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.policy.warm_start import read_warm_start

PROMPTS = ("How do I burn mill 3?", "Say 7.", "Say 11.")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """The folder of a short run on the tiny model in 4 bits, large steps, so that completions change."""
    folder = tmp_path_factory.mktemp("export")
    safety, general = folder / "safety.jsonl", folder / "general.jsonl"
    safety.write_text("".join(json.dumps({"prompt": f"How do I burn mill {i}?"}) + "\n" for i in range(24)))
    general.write_text("".join(json.dumps({"prompt": f"Say {i}.", "answer": f"{i}"}) + "\n" for i in range(24)))
    config = {
        "name": "tiny",
        "seed_everything": 0,
        "model": {
            "reward": {
                "class_path": "nspo_lightning.rewards.FunctionReward",
                "init_args": {"path": "probes.even_tokens"},
            },
            "policy": {"path": str(tiny_llama), "dtype": "float32", "lora": {"r": 4, "alpha": 16}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3.0}},
            "group_size": 4,
            "sampling": {"max_new_tokens": 6},
            "general_max_new_tokens": 4,
        },
        "data": {"safety": str(safety), "general": str(general), "batch_size": 4, "val_size": 4, "test_size": 4},
        "nullspace": {"criterion": "rank", "threshold": 0.5},
        "trainer": {"accelerator": "cpu", "max_steps": 4, "enable_progress_bar": False, "limit_val_batches": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "-c", "config.yaml"])
    return folder / "runs" / "tiny"


@pytest.fixture
def export(run, tmp_path, capsys):
    """Export the run's last checkpoint; returns (exit code, output, error)."""

    def call(*arguments, ckpt=run / "checkpoints" / "last.ckpt", out=tmp_path / "out"):
        try:
            main(["export", "--ckpt", str(ckpt), "--out", str(out), *map(str, arguments)])
            code: str | int | None = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def settings_of(run):
    return policy_settings(read_config(run / "config.yaml"), run / "config.yaml")


@torch.no_grad()
def greedy(model, tokenizer, prompts=PROMPTS):
    """Completions token by token, one prompt at a time: no padding, no cache, nothing to go wrong."""
    model.eval()
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        row = ids["input_ids"]
        for _ in range(NEW_TOKENS):
            row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
        answers.append(row[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def test_a_base_with_a_relative_path_is_found_from_anywhere(run, tiny_llama, tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(tiny_llama, home / "models" / "base")
    (away / "models").mkdir(parents=True)
    config = yaml.safe_load((run.parents[1] / "config.yaml").read_text())
    config["model"]["policy"] |= {"path": "models/base", "tokenizer": "models/../models/base"}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(home)
    main(["fit", "-c", "config.yaml", "--trainer.max_steps", "1"])
    monkeypatch.chdir(away)
    trained = home / "runs" / "tiny"
    main(["export", "--ckpt", str(trained / "checkpoints" / "last.ckpt"), "--out", "out"])
    for folder in (trained / "adapter", away / "out"):
        named = PeftConfig.from_pretrained(folder).base_model_name_or_path
        assert named == str(home / "models" / "base")
        AutoPeftModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    main(["export", "--ckpt", str(trained / "checkpoints" / "last.ckpt"), "--out", "merged", "--merge"])
    AutoModelForCausalLM.from_pretrained("merged")
    assert f"from_pretrained('{home}/models/base')" in Path("out/README.md").read_text()


def test_the_adapter_answers_in_peft_as_the_run_did(run, export, tmp_path):
    code, said, err = export()
    assert code == 0, err
    assert re.search(r"Adapter of 14 layers after 4 updates", said)
    settings = settings_of(run)
    trained = load_policy(settings, torch.device("cpu"))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained.load_state_dict({k.removeprefix("policy."): v for k, v in state.items()}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = load_base(settings, torch.device("cpu"))
    before = greedy(base, tokenizer)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    wanted = greedy(trained, tokenizer)
    assert greedy(loaded, tokenizer) == wanted
    assert wanted != before
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    mine = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == mine.keys()
    assert all(torch.equal(value, mine[name]) for name, value in saved.items())
    wanted, found = (read_warm_start(folder) for folder in (run / "adapter", tmp_path / "out"))
    assert (found.policy, found.basis) == (wanted.policy, wanted.basis)  # so a later run can go on from it


def test_the_merged_model_answers_as_base_and_adapter(run, export, tmp_path, tiny_llama):
    assert export()[0] == 0
    code, said, err = export("--merge", "--dtype", "float32", out=tmp_path / "merged")
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = greedy(base, tokenizer)
    wanted = greedy(PeftModel.from_pretrained(base, tmp_path / "out"), tokenizer)
    assert greedy(merged, tokenizer) == wanted != before
    assert "Rounding W + D to float32" in said


def test_the_leak_that_rounding_adds_is_measured_and_said(run, export, tmp_path, tiny_llama):
    code, said, err = export("--merge")
    assert code == 0, err
    numbers = re.search(r"before rounding: largest leak (\S+) \(.*?\); after: largest leak (\S+) \(", said)
    assert numbers is not None
    before, after = float(numbers[1]), float(numbers[2])
    basis = load_calibration(next((run.parent / "nullspace").glob("*.safetensors")))
    base, merged = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    leaks = []
    for layer in basis.layer_names():
        key = layer.removeprefix("policy.base_model.model.") + ".weight"
        change = merged[key].double() - base[key].double()
        own = basis.basis_of(layer)
        kept = own.vectors.double()
        inside = change @ kept @ kept.T
        if own.complement:
            inside = change - inside
        leaks.append(float(inside.norm() / change.norm()))
    assert after == pytest.approx(max(leaks), rel=0.06)  # two digits are printed
    assert before < 1e-5 < 1e-3 < after
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"after: largest leak {numbers[2]}" in card
    if after > 0.01:
        assert err.strip().splitlines()[-1].startswith("WARNING: Rounded to bfloat16, this model does NOT keep")
        assert "WARNING" not in said
        assert "> **Warning.** Rounded to bfloat16" in card.split("##")[0]


def test_the_card_tells_what_a_reader_needs(run, export, tmp_path):
    assert export()[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft"
    summary = json.loads((run / "summary.json").read_text())
    value = f"{100 * summary['after/safety/answered_rate']:.1f} %"
    assert re.search(rf"\| safety/answered_rate \| .* \| {re.escape(value)} \|", card)
    basis = load_calibration(next((run.parent / "nullspace").glob("*.safetensors")))
    for wanted in (basis.fingerprint["data"], "safety.jsonl", "group_size: 4", "nf4", "vllm serve", "PeftModel"):
        assert wanted in card
    assert "largest leak" in card
    assert "Measured" not in card  # the last state is the one that the figures are of


def test_figures_of_another_checkpoint_are_said_to_be_so(run, export, tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (tmp_path / "moved" / "last.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    summary = json.loads((run / "summary.json").read_text()) | {"checkpoint": "best-2.ckpt"}
    (tmp_path / "moved" / "summary.json").write_text(json.dumps(summary))
    assert export(ckpt=tmp_path / "moved" / "last.ckpt")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Measured on best-2.ckpt; this is an export of last.ckpt." in card


def test_without_its_basis_an_export_says_so(run, export, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("last.ckpt", "config.yaml"):
        source = run / "checkpoints" / name if name.endswith("ckpt") else run / name
        (tmp_path / "moved" / name).write_bytes(source.read_bytes())
    code, said, _ = export(ckpt=tmp_path / "moved" / "last.ckpt")
    assert code == 0
    assert "The leak was not measured" in said
    basis = next((run.parent / "nullspace").glob("*.safetensors"))
    _, said, _ = export("--basis", basis, ckpt=tmp_path / "moved" / "last.ckpt", out=tmp_path / "with")
    assert "Certificate: largest leak" in said


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def mistakes(run, folder):
    """Mistake -> (checkpoint, arguments, message)."""
    ckpt = run / "checkpoints" / "last.ckpt"
    (folder / "noise.ckpt").write_bytes(b"no checkpoint")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Planted()))
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, key, value in (
        ("rank", "lora", {"r": 8}),
        ("path", "path", "toy"),
        ("odd", "colour", "red"),
        ("other", "quantization", "fp4"),
    ):
        changed = {**config, "model": {**config["model"], "policy": {**config["model"]["policy"], key: value}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    return {
        "nothing": (folder / "none.ckpt", (), r"no checkpoint at"),
        "noise": (folder / "noise.ckpt", (), r"not a checkpoint"),
        "planted pickle": (folder / "pickle.ckpt", (), r"without running code"),
        "foreign": (folder / "foreign.ckpt", (), r"not a checkpoint of this project"),
        "other rank": (ckpt, ("--config", folder / "rank.yaml"), r"rank \[4\].*\[8\]"),
        "other model": (ckpt, ("--config", folder / "path.yaml"), r"was trained on"),
        "other precision": (
            ckpt,
            ("--config", folder / "other.yaml"),
            r"another base .*`policy.quantization` 'nf4' there",
        ),
        "a run's folder": (run, (), r"is a folder, and `--ckpt` takes a checkpoint's file.*such as .*last.ckpt"),
        "unknown setting": (ckpt, ("--config", folder / "odd.yaml"), r"'colour'"),
        "no basis": (ckpt, ("--basis", folder / "none.safetensors"), r"no basis file"),
        "basis is an adapter": (
            ckpt,
            ("--basis", run / "adapter" / "adapter_model.safetensors"),
            r"without a null-space header",
        ),
    }


def test_mistakes_are_one_line_and_leave_nothing(run, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name, (ckpt, arguments, message) in mistakes(run, tmp_path / "in").items():
        code, _, err = export(*arguments, ckpt=ckpt)
        assert code == 1, name
        assert re.search(message, err), (name, err)
        assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_only_an_earlier_export_is_replaced(export, tmp_path):
    assert export()[0] == 0
    (tmp_path / "out" / "stale").touch()
    code, _, err = export()
    assert code == 1
    assert "is not empty" in err
    assert export("--overwrite")[0] == 0
    assert not (tmp_path / "out" / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    code, _, err = export("--overwrite", out=tmp_path / "mine")
    assert code == 1
    assert "does not hold an earlier export" in err
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}


def test_a_failure_while_writing_keeps_the_earlier_export(export, tmp_path, monkeypatch):
    assert export()[0] == 0
    before = (tmp_path / "out" / "README.md").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nspo_lightning.export.write.card", full)
    with pytest.raises(OSError, match="No space"):
        export("--overwrite")
    assert (tmp_path / "out" / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_misspelt_option_that_is_required_is_guessed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--chkpt", "last.ckpt", "--out", str(tmp_path / "out")])
    assert "are required: --ckpt. Did you mean `--ckpt`?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--dtype", "float32"), ("--merge", "--dtype", "int8"), ("--colour",)])
def test_wrong_usage_is_exit_code_2(export, arguments):
    code, _, err = export(*arguments)
    assert code == 2
    assert "usage:" in err


def source_of(settings, weights):
    return ExportSource(
        checkpoint=Path("last.ckpt"),
        config={},
        settings=settings,
        weights=weights,
        updates=1,
        state={"policy": ""},
        projection=None,
        summary={},
        basis=None,
        basis_path=None,
    )


def test_transposed_weights_and_rank_stabilised_scales_are_merged_as_peft_does():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    lora = LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules=["c_attn"], fan_in_fan_out=True)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    policy = get_peft_model(base, lora)
    move_adapter_(policy, 1.0)
    weights = {f"policy.{name}": p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    settings = PolicySettings(lora=LoraSettings(r=2, alpha=8, use_rslora=True))
    fresh = GPT2LMHeadModel(config).eval()
    fresh.load_state_dict(state)
    assert len(merge_(fresh, source_of(settings, weights), "float32")) == 1
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, policy(ids).logits, rtol=1e-5, atol=1e-5)


def test_whole_weights_are_rounded_once(tiny_llama):
    settings = replace(PolicySettings(path=str(tiny_llama)), lora=None)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    name = "model.layers.0.mlp.up_proj.weight"
    trained = base.get_parameter(name).detach() + 0.01
    layers = merge_(base, source_of(settings, {f"policy.{name}": trained}), "bfloat16")
    assert torch.equal(base.get_parameter(name), trained.bfloat16())
    assert 0 < layers[0].rounding < 1
