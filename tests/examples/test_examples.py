"""The examples run as a reader would run them, and show what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> tuple[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().rpartition("\n")[2], done.stderr


def test_continual_vision_keeps_the_first_task():
    pytest.importorskip("sklearn")
    result = json.loads(run("continual_vision.py")[0])
    assert result["A after B, null space"] >= result["A before B"] - 1.0
    assert result["A after B, plain"] < result["A before B"] - 10
    assert result["B, null space"] > 80


def test_lora_sft_moves_the_task_and_not_general_text():
    pytest.importorskip("peft")
    result = json.loads(run("lora_sft.py")[0])
    assert result["general text moved"] < 1e-4
    assert result["task text moved"] > 0.1
    assert result["largest leak"] <= 1e-6


def test_light_cli_by_class_path():
    _, log = run("cli_by_class_path.py", "fit", "-c", str(EXAMPLES / "cli_by_class_path.yaml"))
    assert "Null-space certificate: 2 layers" in log
