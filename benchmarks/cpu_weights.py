"""What a forward and a backward pass of a policy take on one CPU thread, by quantisation, dtype and `training_weights`.

    python benchmarks/cpu_weights.py --model PATH [--tokens 32,256,1568] [--bfloat16]

CPU seconds of one thread, the least of three, which other processes change least. 32 tokens are a decoding step of 32
completions. Results in benchmarks/results/cpu_weights.json, in the place of those of the same kind and length.
`--bfloat16` adds that dtype, at the fewest tokens alone: a CPU without instructions for it takes minutes for more.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.settings import PolicySettings

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_weights.json"
KINDS = [("none", "float32", "auto"), ("nf4", "float32", "quantized"), ("nf4", "float32", "dequantized")]
BFLOAT16 = [("none", "bfloat16", "auto"), ("nf4", "bfloat16", "quantized")]


def one_pass(policy: Any, tokens: int) -> tuple[float, float]:
    """Return the CPU seconds of a forward pass over one text and of its backward pass to the adapter."""
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    policy.zero_grad()
    start = time.process_time()
    logits = policy(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    middle = time.process_time()
    logits.float().sum().backward()
    return middle - start, time.process_time() - middle


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--tokens", default="32,256,1568")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = sorted(map(int, args.tokens.split(",")))
    rows = {tuple(row[:4]): row for row in json.loads(args.out.read_text())["rows"]} if args.out.exists() else {}
    for quantization, dtype, weights in KINDS + (BFLOAT16 if args.bfloat16 else []):
        settings = PolicySettings(
            path=args.model,
            quantization=quantization,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            training_weights=weights,  # type: ignore[arg-type]
        )
        policy = TextPolicy(settings).load(torch.device("cpu"))
        for tokens in lengths if dtype == "float32" else lengths[:1]:
            one_pass(policy, tokens)
            forward, backward = map(min, zip(*(one_pass(policy, tokens) for _ in range(3)), strict=True))
            row = [quantization, dtype, weights, tokens, round(forward, 2), round(backward, 2), torch.__version__]
            rows[quantization, dtype, weights, tokens] = row
            print("{:5} {:9} {:12} {:5} tokens: forward {:6.2f} s, backward {:6.2f} s".format(*row), flush=True)
    columns = ["quantization", "dtype", "training_weights", "tokens", "forward_s", "backward_s", "torch"]
    listed = ",\n  ".join(json.dumps(row) for row in rows.values())
    args.out.write_text(f'{{\n "columns": {json.dumps(columns)},\n "rows": [\n  {listed}\n ]\n}}\n')


if __name__ == "__main__":
    main()
