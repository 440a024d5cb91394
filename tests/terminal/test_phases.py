"""Whatever takes long says at once, in a log, what it does and how many of what there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from workspace import build, run, write_lines


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job that shows how far it is, and a file of answers."""
    folder = tmp_path_factory.mktemp("phases")
    build(folder, tiny_llama)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["reward"] = {
        "class_path": "nspo_lightning.rewards.FunctionReward",
        "init_args": {"path": "probes.even_tokens"},
    }
    config["trainer"]["enable_progress_bar"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"prompt": f"How do I burn mill {i}?", "completion": "I can't help with that."} for i in range(3)]
    write_lines(folder / "answers.jsonl", rows)
    return folder


CHECKPOINT = "runs/job/checkpoints/last.ckpt"
PHASES = {
    "fit": (
        ("fit", "-c", "config.yaml"),
        [
            "Loading the policy ...",
            "Measuring before training: 8 rows ...",
            r"Scoring general text: \d+ rows ...",
            r"Calibrating, pass 1: \d+ batch(es)? ...",
            r"Making bases: \d+ layers ...",
            "Training: 1 step ...",
            "Measuring after training: 8 rows ...",
        ],
    ),
    "validate": (("validate", "-c", "config.yaml", "--ckpt_path", CHECKPOINT), ["Validation: 8 rows ..."]),
    "test": (
        ("test", "-c", "config.yaml", "--ckpt_path", CHECKPOINT),
        ["Testing: 8 rows ...", r"Scoring general text: \d+ rows ..."],
    ),
    "predict": (("predict", "-c", "config.yaml", "--ckpt_path", CHECKPOINT), ["Predicting: 8 rows ..."]),
    "calibrate": (
        ("calibrate", "-c", "config.yaml", "--out", "basis.safetensors"),
        ["Loading the policy ...", r"Calibrating, pass 1: \d+ batch(es)? ...", r"Making bases: \d+ layers ..."],
    ),
    "export": (("export", "--ckpt", CHECKPOINT, "--out", "merged", "--merge"), ["Merging: 5 steps ..."]),
    "judge": (("judge", "-c", "judge-rules", "--input", "answers.jsonl"), ["Scoring: 3 rows ..."]),
    "preview": (
        ("judge", "-c", "config.yaml", "--preview", "2"),
        ["Loading the policy ...", "Answering training prompts: 2 rows ..."],
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_says_how_much_there_is_to_do(job: Path, phase: str) -> None:
    """In their order: all but `fit` need what it leaves."""
    arguments, wanted = PHASES[phase]
    if phase != "fit" and not (job / CHECKPOINT).exists():
        run(job, *PHASES["fit"][0])
    shown = run(job, *arguments)
    assert shown.code == 0, shown.err
    lines, place = shown.err.splitlines(), -1
    for line in wanted:
        found = [i for i, said in enumerate(lines) if i > place and re.fullmatch(line.replace("...", r"\.\.\."), said)]
        assert found, f"{line} in this order in:\n{shown.err}"
        place = found[0]
    told = [line for line in lines if line.endswith(" ...")]
    assert len(told) <= len(wanted) + 2, "short work has one line, and no bar"
    assert "\r" not in shown.err
