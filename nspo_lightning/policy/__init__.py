"""The policy: a causal language model with its adapter, tokenizer and chat template, and how its text is scored."""

from nspo_lightning.policy.settings import TOY_PATH, LoraSettings, PolicyError, PolicySettings

__all__ = ["TOY_PATH", "LoraSettings", "PolicyError", "PolicySettings"]
