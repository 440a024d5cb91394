"""How to load what a run has trained: code to copy, for the adapter and for an export."""

from __future__ import annotations

from nspo_lightning.policy.settings import TOY
from nspo_lightning.report.records import Run


def loading(run: Run) -> dict[str, str]:
    """Return title -> code; empty where the run left no adapter."""
    if run.adapter is None or not run.base:
        return {}
    toy = run.base == TOY
    where = "str(TOY_PATH)" if toy else repr(run.base)
    imports = "from nspo_lightning.policy import TOY_PATH\n" if toy else ""
    return {
        "PEFT": (
            f"{imports}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({where})\n"
            f"model = PeftModel.from_pretrained(base, {run.adapter.as_posix()!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({where})"
        ),
        "A folder with a model card, or a merged model": (
            f"python -m nspo_lightning export --ckpt {run.folder.as_posix()}/checkpoints/last.ckpt --out my-adapter\n"
            f"python -m nspo_lightning export --ckpt {run.folder.as_posix()}/checkpoints/last.ckpt --out my-model "
            "--merge --dtype float32"
        ),
    }
