"""The two sides of the GRPO step benchmark; started by grpo_step.py, each in its own process."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

VOCABULARY = 8192
LEARNING_RATE = 1e-5
CPU_SECONDS: list[float] = []  # of each step, all threads: what a busy machine stretches least
PHASES: dict[str, float] = {}  # CPU seconds of ours, of all steps since it was last cleared
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Prefer even words, or words of even length: cheap, and different for each completion."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    numbers = [[int(word[1:]) if word[1:].isdigit() else len(word) for word in text.split()] for text in texts]
    return [sum(n % 2 == 0 for n in row) / max(len(row), 1) for row in numbers]


def make_policy(folder: Path, stop_tokens: int, thin: bool = False) -> Path:
    """Save a random policy and its tokenizer once, for both sides to load the same files; `thin` = hardly any width."""
    path = folder / "policy"
    if path.exists():
        return path
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64 if thin else VOCABULARY,
        hidden_size=16 if thin else 512,
        intermediate_size=16 if thin else 1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # A random policy stops by chance: with 330 ids that stop, each new token does with probability 0.04.
    stop = [2, *range(VOCABULARY - stop_tokens + 1, VOCABULARY)]
    model.generation_config.eos_token_id = stop if stop_tokens > 1 else 2
    model.save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    if thin:
        return path
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def make_prompts(tokens: int, count: int) -> list[list[int]]:
    """Draw prompts as token ids."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(3, VOCABULARY - 400, (count, tokens), generator=generator).tolist()
    return ids


def real_prompts(path: Path, tokens: int, count: int) -> list[list[int]]:
    """Draw prompts of whole English-looking words, which a real tokenizer reads back as the same ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    words = [i for t, i in sorted(tokenizer.get_vocab().items()) if re.fullmatch(r"Ġ[a-z]{3,8}", t)]
    picked = torch.randint(len(words), (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [[words[i] for i in row] for row in picked]
    if any(tokenizer(tokenizer.decode(ids))["input_ids"] != ids for ids in prompts):
        raise RuntimeError(f"The tokenizer of {path} does not read these words back as it wrote them.")
    return prompts


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the CPU seconds of a block, less those of phases inside it."""
    start, inside = time.process_time(), sum(PHASES.values())
    yield
    spent = time.process_time() - start - (sum(PHASES.values()) - inside)
    PHASES[name] = PHASES.get(name, 0.0) + spent


def time_phases() -> None:
    """Count what the parts of our step take, in PHASES."""
    from nspo_lightning.module.rollouts import LocalRollouts
    from nspo_lightning.module.scorer import Scorer
    from nspo_lightning.nullspace.keeper import NullSpaceKeeper

    def timed(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            with phase(name):
                return inner(*args, **kwargs)

        setattr(owner, method, run)

    timed(LocalRollouts, "draw", "sample")
    timed(Scorer, "_score", "score")
    timed(Scorer, "loss", "backward")  # what is left of it
    timed(NullSpaceKeeper, "project_gradients_", "projection")
    timed(NullSpaceKeeper, "reproject_", "projection")


def as_text(ids: list[int]) -> str:
    """Write a prompt as the text that the tokenizer reads as these ids."""
    return " ".join(f"w{i}" for i in ids)


def texts_of(job: dict[str, Any], path: Path, steps: int) -> list[tuple[list[int], str]]:
    """Return the prompts of all steps, each as token ids and as text."""
    if not job["model"]:
        return [(ids, as_text(ids)) for ids in make_prompts(job["prompt_tokens"], job["prompts"] * steps)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    return [(i, tokenizer.decode(i)) for i in real_prompts(path, job["prompt_tokens"], job["prompts"] * steps)]


def run_trl(job: dict[str, Any], path: Path) -> tuple[list[float], float]:
    """Train with TRL.

    Returns:
        Seconds of each step, and completion tokens a rollout.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if job["quantization"] == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        kwargs["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    for module in model.modules():
        # Otherwise bitsandbytes turns the layers to bfloat16 for good when they first sample, and no gradient passes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    class Timer(TrainerCallback):
        seconds: ClassVar[list[float]] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            CPU_SECONDS.append(time.process_time() - self.cpu_start)

    lengths: list[int] = []

    def counted(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kw: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return reward(prompts, completions, **kw)

    steps = job["warmup"] + job["steps"]
    prompts = texts_of(job, path, steps)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=counted,
        args=GRPOConfig(
            output_dir=str(Path(job["folder"]) / "trl"),
            per_device_train_batch_size=job["prompts"] * job["group"],
            num_generations=job["group"],
            max_completion_length=job["max_new_tokens"],
            generation_kwargs={"min_new_tokens": job["min_new_tokens"]},
            num_iterations=job["num_iterations"],
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            top_k=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            shuffle_dataset=False,
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": [text for _, text in prompts]}),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Timer()],
    )
    trainer.train()
    return Timer.seconds, sum(lengths) * job["num_iterations"] / steps


def run_ours(job: dict[str, Any], path: Path) -> tuple[list[float], float]:
    """Train with GRPOModule, a Lightning Trainer and the null-space projection.

    Returns:
        Seconds of each step, and completion tokens a rollout.
    """
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from nspo_lightning.callbacks import NullSpaceProjection
    from nspo_lightning.grpo import ObjectiveConfig
    from nspo_lightning.module.grpo_module import GRPOModule
    from nspo_lightning.policy.settings import LoraSettings, PolicySettings
    from nspo_lightning.rollout import SamplingConfig

    class Timer(pl.Callback):
        seconds: ClassVar[list[float]] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == job["warmup"]:
                PHASES.clear()
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            CPU_SECONDS.append(time.process_time() - self.cpu_start)

    lengths: list[int] = []

    def counted(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kw: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return reward(prompts, completions, **kw)

    steps = job["warmup"] + job["steps"]
    prompts = texts_of(job, path, steps)
    batches = []
    for step in range(steps):
        start = step // job["num_iterations"] * job["prompts"]
        rows = prompts[start : start + job["prompts"]]
        ids = torch.tensor([row for row, _ in rows])
        text = [text for _, text in rows]
        batches.append({"prompt": text, "prompt_ids": ids, "prompt_mask": torch.ones_like(ids).bool(), "columns": {}})
    calibration = [{"input_ids": torch.tensor(make_prompts(128, 8)), "attention_mask": torch.ones(8, 128).long()}]
    time_phases()
    module = GRPOModule(
        reward=counted,
        policy=PolicySettings(
            path=str(path),
            quantization=job["quantization"],
            training_weights=job["training_weights"],
            dtype="float32",
            lora=LoraSettings(r=16, alpha=32, dropout=0.0, target_modules="all-linear"),
        ),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0),
        group_size=job["group"],
        sampling=SamplingConfig(max_new_tokens=job["max_new_tokens"], min_new_tokens=job["min_new_tokens"]),
        objective=ObjectiveConfig(loss_type="grpo"),
        num_iterations=job["num_iterations"],
        tokens_per_microbatch=job.get("tokens_per_microbatch", 1024),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,  # TRL's default
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job["folder"],
        callbacks=[
            NullSpaceProjection(calibration, criterion="rank", threshold=job["protected"], cache_dir=None),
            Timer(),
        ],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return Timer.seconds, sum(lengths) * job["num_iterations"] / steps


def main() -> None:
    """Run one side and write what was measured."""
    kind, job = sys.argv[1], json.loads(sys.argv[2])
    path = Path(job["model"]) if job["model"] else make_policy(Path(job["folder"]), job["stop_tokens"])
    torch.manual_seed(0)
    seconds, tokens = {"trl": run_trl, "ours": run_ours}[kind](job, path)
    # A rollout feeds num_iterations steps, only the first of which samples: their mean is the cost of a step.
    iterations = job["num_iterations"]
    measured = seconds[job["warmup"] :]
    if len(measured) != job["steps"]:
        raise RuntimeError(f"Expected {job['steps']} measured steps after {job['warmup']}, got {len(measured)}.")
    steps = [sum(measured[i : i + iterations]) / iterations for i in range(0, len(measured), iterations)]
    mean = sum(steps) / len(steps)
    result = {
        "step_seconds": steps,
        "seconds_per_step": sorted(steps)[len(steps) // 2] if len(steps) % 2 else mean,
        "cpu_seconds_per_step": sum(CPU_SECONDS[job["warmup"] :]) / job["steps"],
        "completion_tokens_per_step": tokens / iterations,
        "tokens_per_second": tokens / iterations / mean,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "first_step_seconds": seconds[0],
        "phases": {name: spent / job["steps"] for name, spent in PHASES.items()},
    }
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
