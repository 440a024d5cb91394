"""The same step by TRL's GRPOTrainer with HF generate, at its own best documented settings.

bf16, NF4 base with its adapter in bf16 (as TRL does), key/value cache, sdpa or FlashAttention 2 where it is installed,
its fused output head, `adamw_torch_fused`, the micro-batch of our side. Variants: its default gradient checkpointing;
none; transformers' continuous batching; Liger's layer kernels where they are installed.
"""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from device import Device, Spent, listening
from made_model import make_base, policy_settings
from record import Record
from workload import LEARNING_RATE, Scale, as_text, even_ids, load_tokenizer, random_ids, write_folder

FIRST = ["checkpointing"]
REST = ["plain", "liger", "continuous"]  # the last one may hang: nothing is to come after it
STEPS = 2
NEEDED = ("trl", "datasets", "accelerate")


def measure(scale: Scale, device: Device, record: Record, folder: Path, variant: str) -> dict[str, Any]:
    """Train a few steps.

    Raises:
        NotImplementedError: If a variant's library or device is missing.
        RuntimeError: If no step was measured, or one with completions of another length.
    """
    if variant == "liger" and find_spec("liger_kernel") is None:
        raise NotImplementedError("liger-kernel is not installed")
    if variant == "continuous" and not device.is_cuda:
        raise NotImplementedError("continuous batching is for a card")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.utils import is_flash_attn_2_available
    from trl import GRPOConfig, GRPOTrainer

    device.clear()
    torch.manual_seed(0)
    flash = device.is_cuda and is_flash_attn_2_available()
    settings = policy_settings(folder, scale.rank, checkpointing=False)
    settings.attn_implementation = "flash_attention_2" if flash else "sdpa"
    model = make_base(settings, device.torch)
    spent, peaks = Spent(device), {"sampling": 0.0}
    found: list[dict[str, float]] = []
    lengths: list[set[int]] = []  # of each step's completions

    def sampled() -> None:
        peaks["sampling"] = device.peak_gb()
        device.reset_peak()

    def counted(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **more: Any
    ) -> list[float]:
        lengths.append({len(ids) for ids in completion_ids})
        return even_ids(prompts, completions, completion_ids, **more)

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times steps; the first one, a short one, only warms up."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            length(trainer, scale.new_tokens if found else scale.warm_up_tokens)
            spent.take()
            device.reset_peak()
            self.begin = device.now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = device.now() - self.begin
            one = {"seconds": seconds, "sampling_s": spent.take()["generate"], "sampling_gb": peaks["sampling"]}
            found.append(one | {"training_gb": device.peak_gb()})
            if len(found) > 1 and record.left() < 1.5 * seconds:
                control.should_training_stop = True

    rows = random_ids(scale, scale.prompts * (1 + STEPS), scale.prompt_tokens).tolist()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=counted,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=scale.microbatch,
            gradient_accumulation_steps=scale.rows // scale.microbatch,  # all are sampled in one call of generate
            num_generations=scale.group,
            max_completion_length=scale.new_tokens,
            generation_kwargs={"min_new_tokens": scale.new_tokens, "use_cache": True},
            use_transformers_continuous_batching=variant == "continuous",
            use_liger_kernel=variant == "liger",
            max_steps=1 + STEPS,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused" if device.is_cuda else "adamw_torch",
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            top_k=0,
            gradient_checkpointing=variant == "checkpointing",
            bf16=True,
            use_cpu=not device.is_cuda,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            shuffle_dataset=False,
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": [as_text(ids) for ids in rows]}),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=scale.rank, lora_alpha=2 * scale.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    generate = "generate_batch" if variant == "continuous" else "generate"
    timed = spent.wrap("generate", getattr(trainer.model, generate), sampled)
    setattr(trainer.model, generate, timed)
    with listening() as heard:
        trainer.train()
    measured = found[1:]
    if not measured or not all(step["sampling_s"] for step in measured):
        raise RuntimeError(f"No step was measured whole: {found}.")
    if set().union(*lengths[1:]) != {scale.new_tokens}:
        raise RuntimeError(f"Expected completions of {scale.new_tokens} tokens, got lengths {lengths[1:]}.")
    middle = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
    return {
        "seconds_a_step": middle["seconds"],
        "sampling_s": middle["sampling_s"],
        "training_s": middle["seconds"] - middle["sampling_s"],
        "sampling_tokens_a_second": scale.rows * scale.new_tokens / middle["sampling_s"],
        "sampling_gb": middle["sampling_gb"],
        "training_gb": middle["training_gb"],
        "peak_gb": max(max(step["sampling_gb"], step["training_gb"]) for step in found),
        "reserved_gb": device.reserved_gb(),
        "attention": settings.attn_implementation,
        "steps": found,
        "said": heard,
    }


def length(trainer: Any, tokens: int) -> None:
    """Set how long completions become, without an end before."""
    trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = tokens
    trainer.max_completion_length = tokens


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Measure TRL's variants, its default first."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        record.end("skipped", reason=f"{', '.join(missing)} not installed")
        return
    write_folder(scale, folder)
    variants = [*(v for v in FIRST if v not in earlier), *REST] if rest else FIRST
    slowest = 0.0
    for variant in variants:
        found = record.attempt(variant, lambda v=variant: measure(scale, device, record, folder, v), 2 * slowest)
        if found is not None:
            slowest = max(slowest, found["seconds_a_step"])
