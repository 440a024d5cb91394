"""The function itself does not move: with everything protected, logits on calibration text stay, others change."""

from __future__ import annotations

import copy
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from null_space_problems import trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection

peft = pytest.importorskip("peft")

KEPT = 1e-5  # change of logits on calibration text, relative to the largest logit
MOVED = 1e-2  # change of logits on other text that makes the first number mean something
VOCABULARY, TOKENS = 64, 24  # fewer calibration tokens than any layer is wide


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,  # NF4 packs blocks of 64
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32, initializer_range=0.1)
    return GPT2LMHeadModel(config)


def lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))


def nf4(model: nn.Module) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            quantised = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            # bitsandbytes' CPU inference kernel computes in bfloat16, whose rounding turns 1e-7 of change into 1e-3.
            quantised.support_avx512bf16_for_cpu = False
            setattr(parent, name.rpartition(".")[2], quantised.to("cpu"))
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.uint8
    return model


def only(model: nn.Module, kind: type | str) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        matches = type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind)
        if matches and "lm_head" not in name:
            module.weight.requires_grad_(True)
    return model


class Language(pl.LightningModule):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        generator = torch.Generator().manual_seed(1)
        self.general = torch.randint(0, VOCABULARY, (3, TOKENS // 3), generator=generator)
        self.other = torch.randint(0, VOCABULARY, (32, 10), generator=generator)

    def forward(self, input_ids, attention_mask=None):
        return self.policy(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch, batch_idx):
        return self.policy(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)

    def train_dataloader(self):
        return DataLoader(cast("Dataset[Any]", self.other), batch_size=8)

    def calibration_dataloader(self):
        return [{"input_ids": self.general, "attention_mask": torch.ones_like(self.general)}]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: lora(llama()), id="LoRA on float32"),
        pytest.param(lambda: lora(nf4(llama())), id="LoRA on NF4"),
        pytest.param(lambda: only(llama(), nn.Linear), id="full Linear"),
        pytest.param(lambda: only(gpt2(), "Conv1D"), id="full Conv1D"),
        pytest.param(lambda: lora(gpt2()), id="LoRA on Conv1D"),
    ],
)
def test_logits_on_calibration_text_do_not_move(tmp_path, build):
    model = Language(build())
    callback = NullSpaceProjection(criterion="energy", threshold=0.0, cache_dir=None)
    with torch.no_grad():
        model.eval()
        before, other_before = model(model.general), model(model.other)
    model.train()
    trainer(tmp_path, callback, max_steps=100).fit(model)
    with torch.no_grad():
        model.eval()
        after, other_after = model(model.general), model(model.other)
    kept = float((after - before).abs().max() / before.abs().max())
    moved = float((other_after - other_before).abs().max() / other_before.abs().max())
    assert moved > MOVED
    assert kept < KEPT, f"{kept:.2g} while other text moved by {moved:.2g}"
    assert callback.output_change == pytest.approx(kept, rel=0.05, abs=1e-8)


def test_without_the_callback_the_same_run_moves_them(tmp_path):
    model = Language(lora(llama()))
    before = copy.deepcopy(model).eval()(model.general).detach()
    trainer(tmp_path, max_steps=100).fit(model)
    after = model.eval()(model.general).detach()
    assert float((after - before).abs().max() / before.abs().max()) > MOVED


def test_padding_does_not_count(tmp_path):
    """Left-padded text of the same tokens protects the same directions as the text itself."""

    class Padded(Language):
        def calibration_dataloader(self):
            pad = torch.full((3, 5), 7)
            ids = torch.cat([pad, self.general], 1)
            mask = torch.cat([torch.zeros_like(pad), torch.ones_like(self.general)], 1)
            return [{"input_ids": ids, "attention_mask": mask}]

    callback = NullSpaceProjection(criterion="energy", threshold=0.0, cache_dir=None)
    trainer(tmp_path, callback, max_steps=2).fit(Padded(lora(llama())))
    assert callback.calibration is not None
    assert callback.calibration.domain_tokens == {"general": TOKENS}
    assert all(basis.protected <= TOKENS for basis in callback.calibration.bases.values())
