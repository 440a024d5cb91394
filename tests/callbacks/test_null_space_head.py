"""A trained output head is held at every position: logits on calibration text stay, by the plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from tiny_jobs import datamodule, module
from tiny_jobs import trainer as job
from tiny_policies import largest_change, logits, move_adapter_
from transformers import AutoModelForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.policy.adapter import load_adapter_
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicySettings

KEPT, MOVED = 1e-5, 1e-2  # of the largest logit, on calibration text and on other text
IDS = torch.arange(10, 50).view(4, 10)  # fewer tokens than the head has inputs
OTHER = torch.arange(60, 124).view(8, 8)
BATCHES: dict[str, list[dict[str, torch.Tensor]]] = {
    "no mask": [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}],
    "no padding": [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}],
    "padding": [
        {
            "input_ids": torch.cat([torch.full((4, 3), 7), IDS], 1),
            "attention_mask": torch.cat([torch.zeros(4, 3, dtype=torch.long), torch.ones_like(IDS)], 1),
        }
    ],
}


@pytest.fixture(scope="session")
def tied_llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with its embedding as head."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tied_llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def settings(path: Any, targets: list[str] | None) -> PolicySettings:
    lora = None if targets is None else LoraSettings(r=4, target_modules=targets)
    return PolicySettings(path=str(path), quantization="none", dtype="float32", lora=lora)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize(
    ("checkpoint", "targets"),
    [
        ("tiny_llama", ["lm_head"]),
        ("tied_llama", ["lm_head", "q_proj", "down_proj"]),
        ("tiny_llama", None),
        ("tied_llama", None),
    ],
)
def test_logits_on_calibration_text_stay_at_every_position(tmp_path, request, checkpoint, targets, batches):
    path = request.getfixturevalue(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(path)
    callback = NullSpaceProjection(
        calibration=BATCHES[batches], criterion="energy", threshold=0.0, cache_dir=None, unprotected="freeze"
    )
    policy = module(path, policy=settings(path, targets), lr=1e-2)
    job(tmp_path, steps=6, callbacks=[callback]).fit(policy, datamodule())
    after, before = logits(policy.require_policy(), IDS), logits(base, IDS)
    assert largest_change(logits(policy.require_policy(), OTHER), logits(base, OTHER)) > MOVED
    assert largest_change(after, before) < KEPT
    assert callback.output_change is not None
    assert callback.output_change < KEPT
    assert callback.calibration is not None
    assert {basis.tokens for basis in callback.calibration.bases.values()} == {IDS.numel()}
    head_is_held = any("lm_head" in name for name in callback.calibration.layer_names())
    assert head_is_held == (checkpoint == "tiny_llama" or targets is not None)


def test_all_weights_with_a_shared_head_are_refused_by_both_names(tmp_path, tied_llama):
    policy = module(tied_llama, policy=settings(tied_llama, None))
    callback = NullSpaceProjection(calibration=BATCHES["no mask"], cache_dir=None)
    with pytest.raises(MisconfigurationException, match=r"(?s)embed_tokens\.weight.*shared with.*lm_head\.weight"):
        job(tmp_path, steps=1, callbacks=[callback]).fit(policy, datamodule())


def test_an_adapted_head_is_saved_without_the_weight_that_it_adapts(tmp_path, tied_llama):
    policy = module(tied_llama, policy=settings(tied_llama, ["lm_head"]))
    policy.load(torch.device("cpu"))
    move_adapter_(policy, 1.0)
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(name.split(".")[-2] for name in saved) == ["lora_A", "lora_B"]
    again = load_policy(settings(tied_llama, ["lm_head"]), torch.device("cpu"))
    load_adapter_(again, tmp_path)
    assert torch.equal(logits(again, IDS), logits(policy.require_policy(), IDS))


def test_with_a_frozen_head_no_more_logits_are_made_than_before(tiny_llama):
    policy = module(tiny_llama, policy=settings(tiny_llama, ["q_proj"]))
    policy.load(torch.device("cpu"))
    seen: list[tuple[int, ...]] = []
    head = policy.require_policy().get_base_model().lm_head
    head.register_forward_hook(lambda _m, _a, output: seen.append(tuple(output.shape[:2])))
    policy.calibration_forward(IDS)
    assert seen == [(4, 1)]
