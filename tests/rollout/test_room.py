"""Out of memory in a rollout is one message, with numbers."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_sampler import draw
from tiny_policies import CONFIGS, tiny_base, tiny_policy
from transformers import BloomConfig, FalconMambaConfig, GPT2Config, MambaConfig, MptConfig

from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.rollout.draft import Draft
from nspo_lightning.rollout.memory import RowMemory, SharedMemory
from nspo_lightning.rollout.room import RolloutMemoryError, RolloutSize, bytes_per_token, too_large

QWEN = RolloutSize(
    prompts=8, group_size=8, prompt_tokens=512, new_tokens=256, shared=True, bytes_per_token=57344, vocab_size=152064
)


def test_numbers_of_a_7b_model():
    """28 layers, 4 key-value heads of 128, bf16: 57 kB a token."""
    said = too_large(QWEN, "CUDA out of memory.")
    assert QWEN.cache_bytes == (8 * 512 + 64 * 256) * 57344
    for part in (
        "CUDA out of memory.",
        "64 completions (8 prompts x 8), prompts of up to 512 tokens, up to 256 new ones",
        "1.17 GB (57.3 kB a token)",
        "`data.batch_size` 8 -> 4: 0.587 GB",
        "`group_size` 8 -> 4: 0.705 GB",
        "`sampling.max_new_tokens` 256 -> 128: 0.705 GB",
        "`policy.sampling_weights: quantized`",
        "The last checkpoint stands",
    ):
        assert part in said
    assert len(said.splitlines()) <= 4


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bytes_are_those_of_a_cache(name):
    model = tiny_base(name)
    cache = model(input_ids=torch.arange(3)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert bytes_per_token(model) == held / 3


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("decoding", ["dynamic", "static"])
@pytest.mark.parametrize("where", ["prefill", "step"])
def test_it_is_said_wherever_it_happens_and_memory_is_free_again(monkeypatch, share, decoding, where):
    policy = tiny_policy()
    held = []
    for kind in (SharedMemory, RowMemory):

        def full(self, *args):
            held.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore.")

        monkeypatch.setattr(kind, where, full)
    with pytest.raises(RolloutMemoryError, match="CUDA out of memory. Tried to allocate 20.00 MiB.\n") as error:
        draw(policy, share, decoding=decoding)
    size = RolloutSize(
        prompts=3,
        group_size=4,
        prompt_tokens=7,
        new_tokens=9,
        shared=share,
        bytes_per_token=bytes_per_token(policy_parts(policy).model),
        vocab_size=97,
    )
    assert f"{size.cache_bytes / 1e9:.3g} GB" in str(error.value)
    gc.collect()
    assert held
    assert held[0]() is None, "while a checkpoint is written nothing holds the rollout"


def test_room_for_the_draft_itself_may_be_missing(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Draft, "begin", full)
    with pytest.raises(RolloutMemoryError, match=r"CUDA out of memory\.\nThe rollout: 12 completions"):
        draw(tiny_policy())


@pytest.mark.parametrize(
    "config", [MambaConfig(), FalconMambaConfig(), GPT2Config(), MptConfig(), BloomConfig()], ids=lambda c: c.model_type
)
def test_what_a_config_does_not_say_is_left_out_of_the_message(config):
    model = SimpleNamespace(config=config, dtype=torch.float32)
    number = bytes_per_token(model)
    said = too_large(replace(QWEN, bytes_per_token=number), "CUDA out of memory.")
    assert "`data.batch_size` 8 -> 4" in said
    assert ("kB a token" in said) == ("keys and values then" in said) == (number is not None)
    assert (number is None) == (not isinstance(getattr(config, "num_attention_heads", None), int))
    assert "None" not in said


def test_other_errors_are_left_alone(monkeypatch):
    def broken(self, *args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(SharedMemory, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        draw(tiny_policy())
