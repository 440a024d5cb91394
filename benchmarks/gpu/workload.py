"""What is measured: the shapes of Qwen2.5-7B on a card, or the same in miniature, and the rows that both sides read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LEARNING_RATE = 1e-5
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TOKENIZER = "tokenizer"
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of everything."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt_tokens: int
    new_tokens: int
    """Forced: no completion ends before."""
    prompts: int
    group: int
    microbatch: int
    """Completions in one forward and backward pass, the same on both sides: one prompt's group."""
    rank: int
    protected: int
    """Protected directions of the random bases that training steps project with; docs/scaling.md assumes as many."""
    texts: int
    text_tokens: int
    text_batch: int
    warm_up_tokens: int
    profiled_tokens: int
    updates: int
    """Of the quickstart."""
    compared_steps: int
    compared_seeds: int

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group


SCALES = {
    "full": Scale(  # Qwen2.5-7B
        layers=28,
        hidden=3584,
        intermediate=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        prompt_tokens=512,
        new_tokens=256,
        prompts=8,
        group=8,
        microbatch=8,
        rank=16,
        protected=1024,
        texts=1000,
        text_tokens=256,
        text_batch=8,
        warm_up_tokens=8,
        profiled_tokens=8,
        updates=6,
        compared_steps=30,
        compared_seeds=3,
    ),
    "tiny": Scale(
        layers=2,
        hidden=64,
        intermediate=128,
        heads=4,
        kv_heads=2,
        vocabulary=512,
        prompt_tokens=16,
        new_tokens=6,
        prompts=2,
        group=4,
        microbatch=4,
        rank=4,
        protected=16,
        texts=16,
        text_tokens=16,
        text_batch=4,
        warm_up_tokens=2,
        profiled_tokens=3,
        updates=2,
        compared_steps=2,
        compared_seeds=1,
    ),
}


def model_config(scale: Scale) -> Any:
    """Return the configuration of a scale."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def write_folder(scale: Scale, folder: Path) -> Path:
    """Write a model's configuration, without weights: those are made on the device. Its tokenizer is in a subfolder.

    Raises:
        RuntimeError: If the tokenizer that is read back is another one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model_config(scale).save_pretrained(folder)
    words = {name: number for number, name in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), scale.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, padding_side="left"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / TOKENIZER)
    ids = random_ids(scale, 1, scale.prompt_tokens).tolist()[0]
    if load_tokenizer(folder)(as_text(ids))["input_ids"] != ids:
        raise RuntimeError("The tokenizer does not read its own words: TRL would train on other prompts.")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer; beside a configuration, transformers would put that model's own class in its place."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / TOKENIZER)


def random_ids(scale: Scale, count: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Draw token ids, shape (count, tokens), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), scale.vocabulary, (count, tokens), generator=generator)


def as_text(ids: list[int]) -> str:
    """Write ids as the text that the tokenizer reads as them."""
    return " ".join(f"w{number}" for number in ids)


def batches(scale: Scale, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Return one batch of prompts a step, as `GRPOModule` takes them."""
    rows = random_ids(scale, scale.prompts * steps, scale.prompt_tokens)
    made = []
    for ids in rows.split(scale.prompts):
        text = [as_text(row) for row in ids.tolist()]
        mask = torch.ones_like(ids).bool().to(device)
        made.append({"prompt": text, "prompt_ids": ids.to(device), "prompt_mask": mask, "columns": {}})
    return made


def even_ids(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward the share of even ids: cheap, and different for each completion."""
    return [sum(number % 2 == 0 for number in ids) / max(len(ids), 1) for ids in completion_ids]


def linear_numbers(scale: Scale) -> tuple[int, int]:
    """Return the numbers in the decoder's linear maps, and in the output head."""
    size = scale.hidden // scale.heads * scale.kv_heads
    layer = 2 * scale.hidden * (scale.hidden + size) + 3 * scale.hidden * scale.intermediate
    return scale.layers * layer, scale.hidden * scale.vocabulary


def bf16_roofline(scale: Scale, bytes_a_second: float) -> float:
    """Return the tokens a second at which reading all weights once a step in bf16 takes all of the memory's speed."""
    return scale.rows * bytes_a_second / (2 * sum(linear_numbers(scale)))
