"""GGUF files as policies and judges: found, converted once into a cache, checked, then loaded as any folder."""

from nspo_lightning.policy.gguf.cache import model_folder
from nspo_lightning.policy.gguf.file import GGUFError, content_hash, find_gguf

__all__ = ["GGUFError", "content_hash", "find_gguf", "model_folder"]
