"""Train the embedded base policy from nothing: ``python -m nspo_lightning.toy.train_base --out DIR``.

Supervised, on the train split of the embedded world. Harmful requests are answered nine times in ten and refused once,
so the base has something to unlearn. The linear layers see their NF4-rounded weights in the forward pass
(straight-through), so the skills survive the 4-bit quantisation that the quickstart applies. At most 30 minutes on two
CPU cores; `tests/toy/test_base.py` checks what the result claims.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from functools import lru_cache
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nspo_lightning.toy.train_tokenizer import train_tokenizer
from nspo_lightning.toy.world import BASE_REFUSAL_RATE, REFUSALS, SKILLS, Example, examples

MIXTURE = {"arithmetic": 0.28, "strings": 0.16, "format": 0.1, "facts": 0.16, "benign": 0.15, "harmful": 0.15}
NF4_BLOCK = 64
ROW_TOKENS = 128
NF4_SHARE_OF_STEPS = 0.4


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the architecture: Llama, 0.9 M parameters, every width a multiple of 32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class NF4Rounding(nn.Module):
    """Parametrization that rounds a weight as bitsandbytes' NF4 does, with straight-through gradients."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight; its gradient is that of the identity."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        with torch.no_grad():
            packed, state = quantize_4bit(weight.detach(), blocksize=NF4_BLOCK, quant_type="nf4")
            error = dequantize_4bit(packed, state) - weight
        rounded: Tensor = weight + error
        return rounded


def encode(examples_: list[Example], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, Tensor]:
    """Return examples packed into rows of `ROW_TOKENS` tokens, in which only the answers are scored.

    They are input_ids, position_ids (starting anew with each example, which keeps them apart in attention) and labels
    (-100 outside the answers), of shape (rows, ROW_TOKENS). `rng` decides which harmful requests get refused.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = [([], [], [])]
    for example in examples_:
        refused = example.skill == "harmful" and rng.random() < BASE_REFUSAL_RATE
        answer = rng.choice(REFUSALS) if refused else example.answer
        prompt, target = _token_ids(example.prompt, answer, tokenizer)
        if len(rows[-1][0]) + len(prompt) + len(target) > ROW_TOKENS:
            rows.append(([], [], []))
        ids, positions, labels = rows[-1]
        ids += prompt + target
        positions += range(len(prompt) + len(target))
        labels += [-100] * len(prompt) + target
    pad = tokenizer.pad_token_id
    for ids, positions, labels in rows:
        missing = ROW_TOKENS - len(ids)
        ids += [pad] * missing
        positions += range(missing)
        labels += [-100] * missing
    columns = zip(*rows, strict=True)
    return dict(zip(("input_ids", "position_ids", "labels"), map(torch.tensor, columns), strict=True))


@lru_cache(maxsize=200_000)
def _token_ids(prompt: str, answer: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]


def draw_examples(rng: random.Random, number: int) -> list[Example]:
    """Draw a number of training examples by `MIXTURE`."""
    kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=number)
    return [rng.choice(examples(kind, "train")) for kind in kinds]


def train(out: Path, *, steps: int, batch_size: int, lr: float, seed: int, threads: int) -> dict[str, float]:
    """Return final loss, parameters and seconds of a training; tokenizer and policy are saved in the hub's format.

    `lr` is the peak of a one-cycle schedule; `seed` decides weights and data.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    start = time.monotonic()
    texts = [f"{e.prompt} {e.answer}" for kind in (*SKILLS, "harmful") for e in examples(kind, "train")[:2400]]
    tokenizer = train_tokenizer(itertools.chain(texts, REFUSALS * 300))
    model = LlamaForCausalLM(base_config(tokenizer))
    loss = _fit_(model, tokenizer, rng, steps=steps, batch_size=batch_size, lr=lr)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "steps": steps,
        "loss": round(loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - start),
    }
    (out / "training.json").write_text(json.dumps({**report, "seed": seed, "torch": torch.__version__}, indent=2))
    return report


def _fit_(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, steps: int, batch_size: int, lr: float
) -> float:
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    loss_mean = float("nan")
    for step in track(range(steps), description="training the base"):
        if step == int(steps * (1 - NF4_SHARE_OF_STEPS)):
            for module in linear:
                nn.utils.parametrize.register_parametrization(module, "weight", NF4Rounding())
        loss = model(**encode(draw_examples(rng, batch_size), tokenizer, rng), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss_mean = loss.item() if step == 0 else 0.98 * loss_mean + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step}: loss {loss_mean:.4f}", flush=True)
    for module in linear:
        if nn.utils.parametrize.is_parametrized(module):
            nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return loss_mean


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    print(train(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
