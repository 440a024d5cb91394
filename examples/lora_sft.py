"""Supervised fine-tuning of a LoRA causal language model in a plain LightningModule.

    python examples/lora_sft.py

The model is tiny and random, so that the example needs no download; swap in ``AutoModelForCausalLM.from_pretrained``.
What it was "able to do" is its output on general text: after 60 steps that output has not moved, other output has.
"""

from __future__ import annotations

import json

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection

VOCABULARY = 128


class FineTuning(pl.LightningModule):
    """A causal language model with an adapter on every linear layer."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            initializer_range=0.1,
        )
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits, shape ``(batch, seq, vocabulary)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the language-model loss."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the adapter."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def main() -> dict[str, float]:
    """Fine-tune, print and return how far outputs moved (relative to the largest logit)."""
    pl.seed_everything(0, verbose=False)
    general, task = torch.randint(0, VOCABULARY, (4, 8)), torch.randint(0, VOCABULARY, (64, 16))
    module = FineTuning().eval()
    with torch.no_grad():
        before = module(general), module(task[:8])
    module.train()
    projection = NullSpaceProjection(
        calibration=[{"input_ids": general, "attention_mask": torch.ones_like(general)}],
        criterion="energy",
        threshold=1e-9,
        cache_dir=None,
    )
    trainer = pl.Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[projection],
    )
    trainer.fit(module, DataLoader(task, batch_size=16))
    module.eval()
    with torch.no_grad():
        after = module(general), module(task[:8])
    moved = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True)]
    leak = max(projection.certificate().values())
    result = {"general text moved": moved[0], "task text moved": moved[1], "largest leak": leak}
    print(json.dumps({key: float(f"{value:.3g}") for key, value in result.items()}))
    return result


if __name__ == "__main__":
    main()
