"""`evaluate` gives a public model the score that was published for it.

Slow, and needs the extras `lm-eval` and `gguf`, a network or the model's file, and `REAL_DATA` (see `make real`):

    REAL_DATA=FOLDER pytest -m slow tests/cli/test_published_scores.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from examples.real_model import fetch_model
from nspo_lightning.cli.evaluate import main

PUBLISHED = 0.2773
"""acc_norm of SmolLM2-135M-Instruct on ARC-Challenge, lm-evaluation-harness, no examples, as in the model card of
SmolLM2-135M-Reasoning-SLERP-Champion. The model's own card has the mean of easy and challenge set alone (37.3)."""
POINTS = 0.03


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_arc_challenge_of_the_base_is_what_was_published(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason='needs `pip install -e ".[lm-eval]"`')
    pytest.importorskip("gguf", reason='needs `pip install -e ".[gguf]"`')
    data = os.environ.get("REAL_DATA")
    if data is None:
        pytest.skip("REAL_DATA names no folder with general/arc_challenge/test.jsonl")
    rows = Path(data).resolve() / "general" / "arc_challenge" / "test.jsonl"
    model = fetch_model(Path("runs/real")).resolve()
    monkeypatch.chdir(tmp_path)
    policy = {"path": str(model), "quantization": "nf4", "dtype": "float32", "lora": {"r": 4}}
    Path("arc.yaml").write_text(yaml.safe_dump({"name": "arc", "model": {"policy": policy}}))
    main(["-c", "arc.yaml", "--tasks", "arc_challenge", "--data", f"arc_challenge={rows}", "--no_chat_template"])
    found = json.loads(Path("runs/arc/benchmarks.json").read_text())["results"]["base"]["arc_challenge"]
    documents = len(rows.read_text().splitlines())
    sampling = (PUBLISHED * (1 - PUBLISHED) / documents) ** 0.5  # the file may have a part of the 1,172 questions
    assert abs(found["acc_norm"] - PUBLISHED) <= max(POINTS, 2 * sampling)
