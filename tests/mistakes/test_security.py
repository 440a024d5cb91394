"""Data runs no code, and keys stay where they are."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from null_space_problems import Net, trainer
from workspace import Planted, build, run, write_lines

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.checkpoints import AtomicCheckpointIO, CheckpointError
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.hub import read_saved
from nspo_lightning.keys import mask_keys
from nspo_lightning.nullspace import load_calibration

LIBRARY = Path(__file__).parents[2] / "nspo_lightning"
SOURCES = sorted({
    p.resolve() for part in (LIBRARY, LIBRARY / "callbacks", LIBRARY / "datamodules") for p in part.rglob("*.py")
})
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_METHODS = {
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
    ("pickle", "load"),
}
SERVER = Path(__file__).parents[1] / "support" / "faulty_judge_server.py"
KEY = "sk-planted-9f8e7d6c5b4a"


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Path:
    build(tmp_path, tiny_llama)
    return tmp_path


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def offences(path: Path) -> list[str]:
    """Name what could run code out of data."""
    found: list[str] = []
    for call in calls(ast.parse(path.read_text())):
        where, function = f"{path.name}:{call.lineno}", call.func
        keywords = {k.arg: k.value for k in call.keywords}
        if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
            found.append(f"{where} {function.id}")
        if not isinstance(function, ast.Attribute):
            continue
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if (owner, function.attr) in UNSAFE_METHODS:
            found.append(f"{where} {owner}.{function.attr}")
        if (owner, function.attr) == ("torch", "load"):
            only = keywords.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                found.append(f"{where} torch.load without weights_only=True")
        pickles = keywords.get("allow_pickle")
        if isinstance(pickles, ast.Constant) and pickles.value:
            found.append(f"{where} allow_pickle")
        remote = keywords.get("trust_remote_code")
        if isinstance(remote, ast.Constant) and remote.value:
            found.append(f"{where} trust_remote_code")
        shell = keywords.get("shell")
        if isinstance(shell, ast.Constant) and shell.value:
            found.append(f"{where} shell")
    return found


def test_nothing_in_the_library_runs_code_out_of_data() -> None:
    assert len(SOURCES) > 80
    assert [offence for path in SOURCES for offence in offences(path)] == []


def test_pickle_is_only_named_to_catch_its_errors() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in FORBIDDEN_MODULES
            ):
                assert node.attr in {"UnpicklingError", "PicklingError"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
                assert {a.name for a in node.names} <= {"UnpicklingError", "PicklingError"}, path


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import torch, yaml\ntorch.load('x')\nyaml.load('x')\neval('1')\nf(trust_remote_code=True)\n")
    assert len(offences(bad)) == 3  # f() is nobody's method
    bad.write_text("m.f(trust_remote_code=True)\nn.load('x', allow_pickle=True)\n")
    assert len(offences(bad)) == 2


@pytest.mark.parametrize("name", ["basis.safetensors", "basis.pt"])
def test_code_planted_in_a_basis_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    for content in (pickle.dumps(Planted(tmp_path / "ran")), None):
        if content is None:
            torch.save({"x": Planted(tmp_path / "ran")}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable safetensors file|is no|must end"):
            load_calibration(tmp_path / name)
        assert not (tmp_path / "ran").exists()


def test_code_planted_in_a_finished_checkpoint_is_refused_and_not_run(job: Path) -> None:
    assert run(job, "fit", "-c", "config.yaml").code == 0
    last = job / "runs" / "job" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    state["callbacks"]["Evil"] = Planted(job / "ran")
    torch.save(state, last)
    for command in ("fit", "validate", "test", "predict"):
        shown = run(job, command, "-c", "config.yaml", f"--ckpt_path={last}")
        assert shown.code == 1
        assert "holds code" in shown.err
        assert not (job / "ran").exists()
    shown = run(job, "fit", "-c", "config.yaml", "--ckpt_path=last")
    assert shown.code == 1, "found by its word, the file is looked at when it is loaded"
    assert not (job / "ran").exists()


def test_a_models_own_code_is_not_run_unless_asked_for(job: Path, tiny_llama: Path) -> None:
    remote = job / "remote"
    remote.mkdir()
    for file in tiny_llama.iterdir():
        (remote / file.name).write_bytes(file.read_bytes())
    (remote / "modeling_evil.py").write_text(
        f"from pathlib import Path\nPath({str(job / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel\n"
    )
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["EvilModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    (remote / "config.json").write_text(json.dumps(config))
    shown = run(
        job, "fit", "-c", "config.yaml", f"--model.policy.path={remote}", f"--model.policy.tokenizer={tiny_llama}"
    )
    assert shown.code == 1
    assert "trust_remote_code" in shown.err
    assert "Traceback" not in shown.err
    assert not (job / "ran").exists()


def test_a_key_is_in_nothing_that_a_run_prints_or_leaves(job: Path) -> None:
    write_lines(job / "safety.jsonl", [{"prompt": f"How do I burn item {i}?"} for i in range(24)])
    write_lines(job / "general.jsonl", [{"prompt": f"Say item {i}.", "answer": f"{i}"} for i in range(24)])
    server = subprocess.Popen([sys.executable, str(SERVER), "0", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        judge = "--model.reward.judge"
        arguments = [
            *("fit", "-c", "config.yaml", "--model.reward=nspo_lightning.rewards.OutcomeReward"),
            *(f"{judge}=nspo_lightning.rewards.ServerJudge", f"{judge}.model=judge", f"{judge}.base_url={url}/v1"),
            f"{judge}.api_key_env=PLANTED_KEY",
        ]
        command = [sys.executable, "-m", "nspo_lightning", *arguments]
        environment = os.environ | {"PLANTED_KEY": KEY, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=job, env=environment, capture_output=True, timeout=200, check=False)
        with urllib.request.urlopen(f"{url}/stats") as answer:
            keys = json.load(answer)["keys"]
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert keys == [f"Bearer {KEY}"], "the key must have been used, or this test shows nothing"
    assert KEY.encode() not in done.stdout + done.stderr
    left = [path for path in job.rglob("*") if path.is_file()]
    assert any("events.out" in path.name for path in left)
    assert any(path.suffix == ".ckpt" for path in left)
    assert [path for path in left if KEY.encode() in path.read_bytes()] == []


JUDGE = "--model.reward.judge"
SERVER_OPTIONS = (
    "--model.rollout_server.base_url=http://127.0.0.1:9/v1",
    "--model.rollout_server.model=base",
    "--model.rollout_server.adapter_folder=adapters",
)
KEY_WITHOUT_MARKS = "hf9f8e7d6c5b4a3f2e1d0c"


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (f"{JUDGE}.api_key_env={KEY}", KEY),
        (f"{JUDGE}.api_key_env={KEY_WITHOUT_MARKS}", KEY_WITHOUT_MARKS),
        (f"{JUDGE}.api_key={KEY}", KEY),
        (f"{JUDGE}.base_url=http://me:{KEY}@localhost:9/v1", KEY),
        (f"{JUDGE}.base_url=http://localhost:9/v1?key={KEY}", KEY),
        (f"{JUDGE}.request_options={{extra_headers: {{Authorization: Bearer {KEY}}}}}", KEY),
        (f"--model.rollout_server.api_key_env={KEY}", KEY),
        (f"--model.rollout_server.api_key={KEY}", KEY),
        (f"--model.rollout_server.base_url=http://me:{KEY}@localhost:9/v1", KEY),
        (f"--model.api_key={KEY}", KEY),
        (f"--api_key={KEY}", KEY),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_key_written_into_a_config_is_refused_without_repeating_it(
    option: str, key: str, in_file: bool, job: Path
) -> None:
    reward = {
        "class_path": "nspo_lightning.rewards.OutcomeReward",
        "init_args": {"judge": {"class_path": "nspo_lightning.rewards.ServerJudge", "init_args": {"model": "judge"}}},
    }
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["model"]["reward"] = reward
    words = [] if "rollout_server" not in option else list(SERVER_OPTIONS)
    if in_file:
        path, _, value = option.removeprefix("--").partition("=")
        if words:
            config["model"]["rollout_server"] = {w.split(".")[2].split("=")[0]: w.partition("=")[2] for w in words}
        at = config
        for name in path.split(".")[:-1]:
            at = at.get("init_args", at)
            at = at.setdefault(name, {})
        at = at.get("init_args", at)
        at[path.split(".")[-1]] = yaml.safe_load(value)
        words = []
    else:
        words.append(option)
    (job / "with_judge.yaml").write_text(yaml.safe_dump(config))
    shown = run(job, "fit", "-c", "with_judge.yaml", *words)
    assert shown.code in (1, 2)
    assert "error: " in shown.err
    assert "Traceback" not in shown.err
    assert key not in shown.out + shown.err
    left = [p for p in job.rglob("*") if p.is_file() and p.name != "with_judge.yaml"]
    assert [p for p in left if key.encode() in p.read_bytes()] == []


def test_lightning_reads_checkpoints_as_data_even_if_told_otherwise(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Planted(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    for only in (None, True, False):
        trainer = Trainer(
            plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=1
        )
        with pytest.raises(CheckpointError, match="holds code"):
            trainer.fit(BoringModel(), ckpt_path=tmp_path / "evil.ckpt", weights_only=only)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["prompt", "answer", "image"])
def test_a_path_in_a_row_is_text_and_is_never_opened(kind: str, job: Path) -> None:
    secret = job / "secret.txt"
    secret.write_text("the secret word is swordfish")
    rows: list[dict[str, Any]] = [{"prompt": f"Burn {i}", kind: "./" * i + f"../{secret.name}"} for i in range(24)]
    (job / "data").mkdir()
    write_lines(job / "data" / "rows.jsonl", rows)
    shown = run(job, "data", "-c", "config.yaml", "--data.safety=data/rows.jsonl")
    assert shown.code == 0
    assert "swordfish" not in shown.out + shown.err


def test_a_link_out_of_a_data_folder_is_refused(job: Path) -> None:
    (job / "elsewhere").mkdir()
    write_lines(job / "elsewhere" / "rows.jsonl", [{"prompt": f"swordfish {i}"} for i in range(24)])
    (job / "data").mkdir()
    (job / "data" / "train.jsonl").symlink_to(job / "elsewhere" / "rows.jsonl")
    shown = run(job, "data", "-c", "config.yaml", "--data.safety=data")
    assert shown.code == 1
    assert "data" in shown.err
    assert "swordfish" not in shown.out + shown.err


@pytest.mark.parametrize(
    "text",
    [
        f"--model.api_key={KEY}",
        f"NestedArg(key='judge.api_key', val='{KEY}')",
        f"{{'Authorization': 'Bearer {KEY}'}}",
        f"hf_token: {KEY}",
        f"unrecognized arguments: --api_key {KEY}",
        f"unrecognized arguments: ['--judge.api_key', '{KEY}']",
    ],
)
def test_messages_blot_keys_out(text: str) -> None:
    assert KEY not in mask_keys(text)
    assert "***" in mask_keys(text)


@pytest.mark.parametrize(
    "text",
    [
        "`api_key_env` must be",
        "max_new_tokens=5",
        "has no EOS token, so no completion",
        "pad_token='<pad>'",
        "HF token: see docs",
    ],
)
def test_messages_keep_what_is_no_key(text: str) -> None:
    assert mask_keys(text) == text


def saved(folder: Path) -> Path:
    """Write a dataset with two splits, and a secret one beside it."""
    rows = datasets.Dataset.from_dict({"prompt": ["Say it."]})
    secret = datasets.Dataset.from_dict({"prompt": ["swordfish"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "data"))
    secret.save_to_disk(str(folder / "secret"))
    return folder / "data"


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    assert [row.data for row in read_saved(str(saved(tmp_path)), "train")] == [{"prompt": "Say it."}]


@pytest.mark.parametrize("way", ["file", "absolute file", "split", "link"])
def test_a_saved_dataset_cannot_lead_out_of_its_folder(way: str, tmp_path: Path) -> None:
    data = saved(tmp_path)
    secret = next((tmp_path / "secret").glob("*.arrow"))
    state = json.loads((data / "train" / "state.json").read_text())
    if way == "file":
        state["_data_files"] = [{"filename": f"../../secret/{secret.name}"}]
    elif way == "absolute file":
        state["_data_files"] = [{"filename": str(secret)}]
    elif way == "split":
        (data / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../secret"]}))
    else:
        arrow = data / "train" / state["_data_files"][0]["filename"]
        arrow.unlink()
        arrow.symlink_to(secret)
    (data / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="outside the folder"):
        list(read_saved(str(data), "../secret" if way == "split" else "train"))


def test_an_image_in_a_row_of_a_saved_dataset_is_not_opened(tmp_path: Path) -> None:
    image = {"path": str(tmp_path / "secret.png"), "bytes": None}
    rows = {"prompt": ["Say it."], "images": [[image]]}
    features = datasets.Features({
        "prompt": datasets.Value("string"),
        "images": [{"bytes": datasets.Value("binary"), "path": datasets.Value("string")}],
    })
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    info["features"]["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(Exception, match="secret.png"):
        datasets.load_from_disk(str(tmp_path / "data"))[0]
    assert [row.data for row in read_saved(str(tmp_path / "data"), "train")] == [{"prompt": "Say it."}]


def test_the_callback_reads_bases_as_data_too(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(ValueError, match="not a readable"):
        trainer(tmp_path, NullSpaceProjection(calibration=tmp_path / "b.safetensors")).fit(Net())
    assert not (tmp_path / "ran").exists()
