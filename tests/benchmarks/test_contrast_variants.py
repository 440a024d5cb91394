"""The benchmark of the forms of `contrast`, as its docs have it run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "contrast_variants.py"


@pytest.mark.slow  # a minute and a half of one core: moments of gradients, and two updates of each form
def test_forms_are_trained_and_measured(tmp_path):
    out = tmp_path / "found.json"
    forms = ["contrast", "contrast, nats", "contrast, outputs too"]
    command = [sys.executable, str(BENCHMARK), "--forms", *forms, "--most", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    found = json.loads(out.read_text())
    assert [run["form"] for run in found] == forms
    assert all(run["updates"] == 2 and 0 < run["kl"] < 1 and run["refusing"] > 0 for run in found)
