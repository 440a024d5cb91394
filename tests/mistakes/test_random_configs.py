"""Random configurations, good and bad: a run or a message, never a traceback, never half a folder.

`MISTAKES_EXAMPLES=200 pytest tests/mistakes/test_random_configs.py` looks longer than the suite does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workspace import build, run, tree

EXAMPLES = int(os.environ.get("MISTAKES_EXAMPLES", "12"))

NUMBERS = [-1, 0, 1, 2, 3, 0.5, 1e-9, 1e9, "nan", "inf", "many", None]
OPTIONS: dict[str, list[Any]] = {
    "model.group_size": [2, 4, *NUMBERS],
    "model.num_iterations": [1, 2, *NUMBERS],
    "model.num_minibatches": [1, 2, *NUMBERS],
    "model.tokens_per_microbatch": [8, 64, *NUMBERS],
    "model.sampling.temperature": [0.7, 1.0, *NUMBERS],
    "model.sampling.top_p": [0.9, *NUMBERS],
    "model.sampling.top_k": [5, *NUMBERS],
    "model.sampling.max_new_tokens": [4, 300, -1, 0, "many"],
    "model.objective.beta": [0.04, *NUMBERS],
    "model.objective.clip_epsilon": [0.2, *NUMBERS],
    "model.objective.loss_type": ["grpo", "dapo", "dr_grpo", "bnpo", "ppo", None],
    "model.objective.importance_level": ["token", "sequence", "word"],
    "model.scale_rewards": ["group", "batch", "none", True, "std"],
    "model.policy.lora.r": [4, *NUMBERS],
    "model.policy.lora.target_modules": ["all-linear", ["q_proj"], ["none"], [], "x", "("],
    "model.policy.quantization": ["none", "nf4", "int8"],
    "model.policy.dtype": ["float32", "bfloat16", "float16", "float8"],
    "model.reward": ["nspo_lightning.rewards.RefusalReward", "RefusalReward", "nothing", 3],
    "data.batch_size": [2, *NUMBERS],
    "data.val_size": [4, *NUMBERS],
    "data.calibration_size": [8, *NUMBERS],
    "data.max_prompt_tokens": [50, *NUMBERS],
    "data.calibration_text": ["prompt", "prompt_and_answer", "prompt_and_model_answer", "poem"],
    "data.safety": ["safety.jsonl", "broken/null.jsonl", "broken", "nowhere", [], {"path": "safety.jsonl", "count": 4}],
    "data.general": ["general.jsonl", ["general.jsonl", "safety.jsonl"], "broken/empty.jsonl", {"preset": "x"}],
    "nullspace.criterion": ["auto", "energy", "relative", "absolute", "rank", "bound", "null_share", "guess"],
    "nullspace.threshold": [0.1, *NUMBERS],
    "nullspace.form": ["hard", "soft", "firm"],
    "nullspace.subspace": ["null", "random", "protected", "free"],
    "nullspace.enabled": [True, False, "perhaps"],
    "nullspace.freeze_down": [True, False],
    "nullspace.target_modules": ["q_proj", ["o_proj"], "(", "nothing"],
    "nullspace.unprotected": ["error", "warn", "freeze", "ignore"],
    "nullspace.calibration": [None, "broken/text.safetensors", "nowhere.safetensors"],
    "trainer.accumulate_grad_batches": [1, 2, *NUMBERS],
    "trainer.gradient_clip_val": [1.0, *NUMBERS],
    "trainer.precision": ["32-true", "bf16-mixed", "16-true", "8"],
    "trainer.max_steps": [1, -1, 0, "many"],
    "trainer.val_check_interval": [1, 0.5, *NUMBERS],
    "trainer.limit_val_batches": [0, 1, *NUMBERS],
    "ckpt_path": ["last", "nowhere.ckpt", "broken/text.ckpt", "broken/planted.ckpt", "broken/other.ckpt"],
}
CONFIGS = st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(OPTIONS[name]) for name in names})
)


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    build(folder, tiny_llama)
    return folder


@given(options=CONFIGS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_random_configuration_runs_or_is_explained(options: dict[str, Any], job: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=job.parent))
    try:
        shutil.copytree(job, folder, dirs_exist_ok=True)
        before = tree(folder)
        words = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]
        shown = run(folder, "fit", "-c", "config.yaml", *words)
        assert shown.code in {0, 1, 2}
        assert "Traceback" not in shown.out + shown.err
        if shown.code:
            assert re.search("^error: ", shown.err, re.MULTILINE), shown.err
            left = {name for name in tree(folder) - before if not name.startswith("runs/nullspace/")}
            assert left == set() or any(name.endswith(".ckpt") for name in left), left
        else:
            assert (folder / "runs" / "job" / "summary.json").is_file()
        assert not list(folder.rglob("*.partial"))
        assert not list(folder.glob("planted*"))
    finally:
        shutil.rmtree(folder)
