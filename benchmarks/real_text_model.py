"""Train a small language model of real instruction text: a spectrum without a tail, to judge criteria on.

    python benchmarks/real_text_model.py --alpaca alpaca_data.json --gsm8k train.jsonl --out /tmp/realtext --minutes 30

Llama architecture, 3.7 M parameters (hidden 256, 4 layers), a BPE tokenizer of 2,048 tokens trained on the same files.
The last 500 Alpaca rows and the last 473 GSM8K rows are never trained on. The schedule runs on CPU time, so a busy
machine changes how long it takes and not what comes out. Prints one line a minute and, at the end, JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_ALPACA, HELD_OUT_GSM8K = 500, 473


def load_pairs(alpaca: Path, gsm8k: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (prompt, answer) pairs of both files, split into training and held-out rows."""
    rows = json.loads(alpaca.read_text())
    first = [(r["instruction"] + ("\n" + r["input"] if r["input"] else ""), r["output"]) for r in rows]
    second = [(r["question"], r["answer"]) for r in map(json.loads, gsm8k.read_text().splitlines())]
    return {
        "alpaca": first[:-HELD_OUT_ALPACA],
        "gsm8k": second[:-HELD_OUT_GSM8K],
        "alpaca_held_out": first[-HELD_OUT_ALPACA:],
        "gsm8k_held_out": second[-HELD_OUT_GSM8K:],
    }


def text_of(prompt: str, answer: str) -> str:
    """Lay out one exchange."""
    return f"{USER}{prompt}{ASSISTANT}{answer}{END}"


def train_tokenizer(texts: list[str], out: Path, vocabulary: int = 2048):  # noqa: ANN201 - a transformers class
    """Train a byte-level BPE tokenizer and save it as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=END)
    fast.chat_template = TEMPLATE
    fast.padding_side = "left"
    fast.save_pretrained(out)
    return fast


def main() -> None:
    """Train, report and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU minutes of training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pairs = load_pairs(arguments.alpaca, arguments.gsm8k)
    train_texts = [text_of(*p) for name in ("alpaca", "gsm8k") for p in pairs[name]]
    tokenizer = train_tokenizer(train_texts, arguments.out)
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(train_texts), generator=generator).tolist()
    stream = torch.tensor([t for i in order for t in tokenizer(train_texts[i])["input_ids"]])
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    length, batch = 256, 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    budget, step, printed = arguments.minutes * 60, 0, -60.0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {stream.numel():,} tokens", flush=True)
    begin = time.process_time()
    while (used := time.process_time() - begin) < budget:
        share = used / budget
        rate = 3e-3 * min(step / 50, 1.0) * (0.5 * (1 + math.cos(math.pi * share)) * 0.95 + 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, stream.numel() - length, (batch,), generator=generator)
        ids = torch.stack([stream[s : s + length] for s in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if used - printed >= 60:
            printed = used
            print(
                f"{used / 60:5.1f} min  step {step:5d}  tokens {step * batch * length:>9,}  loss {loss.item():.3f}",
                flush=True,
            )
            model.save_pretrained(arguments.out)
    model.eval()
    report = {"parameters": sum(p.numel() for p in model.parameters()), "steps": step, "tokens": step * batch * length}
    with torch.no_grad():
        for name in ("alpaca_held_out", "gsm8k_held_out"):
            losses = []
            for prompt, answer in pairs[name][:100]:
                ids = tokenizer(text_of(prompt, answer), return_tensors="pt")["input_ids"][:, :512]
                losses.append(model(input_ids=ids, labels=ids).loss.item())
            report[f"nll_{name}"] = round(sum(losses) / len(losses), 4)
    model.save_pretrained(arguments.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
