"""A run on a GGUF file: what it records, what it refuses to go on with, and what can be done with its export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("gguf")

import tiny_gguf
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from nspo_lightning.cli.app import main
from nspo_lightning.policy.gguf import content_hash


@pytest.fixture(scope="module")
def learnt():
    return tiny_gguf.learnt_page()


@pytest.fixture(scope="module")
def folder(learnt, tmp_path_factory):
    """Where a short run on `models/tiny.gguf` in 4 bits was made, with relative paths."""
    folder = tmp_path_factory.mktemp("gguf_run")
    (folder / "models").mkdir()
    tiny_gguf.write(folder / "models" / "tiny.gguf", *learnt)
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(12)]
    for name in ("safety", "general"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({**row, "skill": name}) + "\n" for row in rows))
    reward = {"class_path": "nspo_lightning.rewards.FunctionReward"}
    config = {
        "name": "tiny",
        "model": {
            "reward": {**reward, "init_args": {"path": "probes.even_tokens"}},
            "policy": {"path": "models", "gguf_file": "tiny.gguf", "dtype": "float32", "lora": {"r": 4, "alpha": 16}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3.0}},
            "group_size": 4,
            "sampling": {"max_new_tokens": 6},
            "general_max_new_tokens": 4,
        },
        "data": {"safety": "safety.jsonl", "general": "general.jsonl", "batch_size": 4, "val_size": 2, "test_size": 2},
        "nullspace": {"criterion": "rank", "threshold": 0.5},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "limit_val_batches": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NSPO_LIGHTNING_CACHE", str(folder / "cache"))
        main(["fit", "-c", "config.yaml"])
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run a command there; returns what it printed, and fails if its exit code is another one."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NSPO_LIGHTNING_CACHE", str(folder / "cache"))

    def call(*arguments, code=0):
        found: str | int | None = 0
        try:
            main([*arguments])
        except SystemExit as stop:
            found = stop.code
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.err if code else captured.out

    return call


LAST = "runs/tiny/checkpoints/last.ckpt"


def test_which_file_it_was_stands_in_config_and_checkpoint_and_beside_the_adapter(folder):
    """The card has a test of its own below."""
    policy = yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())["model"]["policy"]
    assert (policy["path"], policy["gguf_file"], policy["quantization"]) == ("models", "tiny.gguf", "nf4")
    wanted = {"gguf": "tiny.gguf", "gguf_sha256": content_hash(folder / "models" / "tiny.gguf")}
    state = torch.load(folder / LAST, weights_only=True)["nspo_lightning"]
    assert wanted.items() <= state["base"].items()
    beside = [json.loads(file.read_text()) for file in (folder / "runs/tiny/adapter").glob("*.json")]
    assert any(wanted.items() <= found.items() for found in beside if isinstance(found, dict))


def test_an_export_loads_where_transformers_and_peft_look(command, folder):
    command("export", "--ckpt", LAST, "--out", "out")
    for place in ("out", "runs/tiny/adapter"):
        AutoPeftModelForCausalLM.from_pretrained(place)
    card = Path("out/README.md").read_text()
    assert content_hash(folder / "models" / "tiny.gguf") in card
    assert "GGUF file `tiny.gguf`" in card
    cached = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert cached.startswith(str(folder / "cache" / "gguf"))
    assert f"from_pretrained('{cached}')" in card
    assert "convert_lora_to_gguf.py" in card
    command("export", "--ckpt", LAST, "--out", "merged", "--merge", "--dtype", "float32")
    AutoModelForCausalLM.from_pretrained("merged")
    assert "GGUF file `tiny.gguf`" in Path("merged/README.md").read_text()


def test_a_file_of_the_same_name_and_another_content_is_refused(command, folder, learnt):
    """The weights are the same, so it is the content of the file that tells."""
    path = folder / "models" / "tiny.gguf"
    kept = path.read_bytes()
    tiny_gguf.write(path, *learnt, fields=[("general.author", "someone else")])
    try:
        refused = {
            ("fit", "-c", "config.yaml", "--trainer.max_steps=2", "--ckpt_path", LAST): "GGUF file .SHA-256. '.* there",
            ("export", "--ckpt", LAST, "--out", "no"): "'tiny.gguf' of another content",
        }
        for arguments, says in refused.items():
            assert re.search(says, command(*arguments, code=1))
    finally:
        path.write_bytes(kept)
    assert not Path("no").exists()
