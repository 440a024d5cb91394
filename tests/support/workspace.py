"""A folder with a tiny job and with whatever can be wrong with files, and a way to run the command line in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from nspo_lightning.cli.app import main
from nspo_lightning.cli.jobs import CLI


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@dataclass(frozen=True)
class Shown:
    """What a user sees."""

    code: int
    out: str
    err: str


def run(folder: Path, *arguments: str) -> Shown:
    """Run `python -m nspo_lightning` in a folder, in this process.

    Only the parser of the subcommand that is run is built: parsers take most of the time of a mistake.
    """
    before, all_of_them = Path.cwd(), CLI.subcommands()
    asked = {name: skipped for name, skipped in all_of_them.items() if name in arguments[:1]} or all_of_them
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    argv, sys.argv = sys.argv, ["nspo_lightning", *arguments]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(CLI, "subcommands", staticmethod(lambda: asked)),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            try:
                main(list(arguments))
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        os.chdir(before)
        sys.argv = argv
    return Shown(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> set[str]:
    """List the files below a folder that a run may leave."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(folder: Path, model: Path) -> None:
    """Write the job and the broken files.

    Args:
        folder: Where to.
        model: A tiny policy.
    """
    write_lines(folder / "safety.jsonl", [{"prompt": f"How do I burn mill {i}?"} for i in range(24)])
    write_lines(folder / "general.jsonl", [{"prompt": f"Say {i}.", "answer": f"{i}"} for i in range(24)])
    write_lines(folder / "scored.jsonl", [{"prompt": "Say it.", "completion": "It."}])
    config = {
        "name": "job",
        "model": {
            "reward": {"class_path": "nspo_lightning.rewards.RefusalReward"},
            "policy": {"path": str(model), "quantization": "none", "dtype": "float32", "lora": {"r": 4}},
            "group_size": 2,
            "sampling": {"max_new_tokens": 4},
            "general_max_new_tokens": 4,
        },
        "data": {"safety": "safety.jsonl", "general": "general.jsonl", "batch_size": 2, "val_size": 4, "test_size": 4},
        "nullspace": {"criterion": "rank", "threshold": 0.5},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    broken = folder / "broken"
    broken.mkdir()
    (broken / "empty.jsonl").touch()
    (broken / "cut.jsonl").write_text('{"prompt": "Say it."}\n{"prompt": "Say')
    (broken / "latin.csv").write_bytes("prompt\nWie schlägt man Lärm?\n".encode("latin-1"))
    (broken / "binary.jsonl").write_bytes(bytes(range(256)) * 4)
    (broken / "column.jsonl").write_text('{"text_of_it": "Say it."}\n')
    (broken / "null.jsonl").write_text('{"prompt": null}\n')
    (broken / "number.jsonl").write_text('{"prompt": 7}\n')
    (broken / "blank.jsonl").write_text('{"prompt": "  "}\n')
    (broken / "one.jsonl").write_text('{"prompt": "Say it."}\n')
    (broken / "yaml.yaml").write_text("model: [\n")
    (broken / "list.yaml").write_text("- 1\n- 2\n")
    (broken / "templates.yaml").write_text("templates: {mine: There is no place in here.}\n")
    (broken / "folder").mkdir()
    (broken / "notes.txt").write_text("nothing to see\n")
    (broken / "text.safetensors").write_text("not a basis")
    (broken / "text.ckpt").write_text("not a checkpoint")
    with (broken / "pickle.safetensors").open("wb") as file:
        pickle.dump(Planted(folder / "planted_by_basis"), file)
    whole = folder / "broken" / "of_another_project.safetensors"
    save_file({"weight": torch.zeros(64)}, whole)
    (broken / "cut.safetensors").write_bytes(whole.read_bytes()[:-40])
    content = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(2000)}}, content)
    (broken / "cut.ckpt").write_bytes(content.getvalue()[:-3000])
    _write_ggufs(broken)
    shutil.copytree(model, broken / "mute")
    (broken / "mute" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((broken / "mute" / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (broken / "mute" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shutil.copytree(model, broken / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": Planted(folder / "planted_by_model")}, broken / "pickled" / "pytorch_model.bin")
    shutil.copytree(model, broken / "cut_model")
    weights = broken / "cut_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    torch.save({"state_dict": {}, "x": Planted(folder / "planted_by_checkpoint")}, broken / "planted.ckpt")
    torch.save(
        {"state_dict": {"w": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6", "loops": {}}, broken / "other.ckpt"
    )


def _write_ggufs(folder: Path) -> None:
    """Write a GGUF file of an architecture that nobody knows, the first half of it, and one of that name alone."""
    writer = gguf.GGUFWriter(str(folder / "other.gguf"), "oracle")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (folder / "other.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "no.gguf").write_text("<html>404: not found</html>")
