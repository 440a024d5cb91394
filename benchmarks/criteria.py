"""What a criterion costs on general text that was not in K: the small model of real text learns to refuse.

    python benchmarks/criteria.py --model DIR --alpaca alpaca_data.json --gsm8k train.jsonl --harmful behaviors.csv

Every run trains the same rank-8 adapter (AdamW, 1e-3) on "prompt -> refusal" for harmful prompts until held-out harmful
prompts are refused to the same degree (NLL of the refusal <= ``--target``), and measures NLL on held-out Alpaca and
GSM8K answers. K is training text of both files, never the held-out rows. JSON goes to ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from real_text_model import ASSISTANT, END, USER, load_pairs

from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules, plan_layers
from nspo_lightning.nullspace.basis_set import mean_null_share
from nspo_lightning.nullspace.keeper import NullSpaceKeeper

REFUSAL = "I'm sorry, but I can't help with that."
RUNS: dict[str, dict[str, object] | None] = {
    "no projection": None,
    "auto": {},
    "energy 1e-3": {"criterion": "energy", "threshold": 1e-3},
    "energy 0.1": {"criterion": "energy", "threshold": 0.1},
    "energy 0.3": {"criterion": "energy", "threshold": 0.3},
    "soft 0.01": {"form": "soft", "softness": 0.01},
    "soft 0.1": {"form": "soft", "softness": 0.1},
    "random, as many as auto": {"subspace": "random"},
}


def batch(tokenizer, pairs, length: int = 160):  # noqa: ANN001, ANN201
    """Return ids, mask and labels (answers only) of (prompt, answer) pairs, right-padded."""
    rows = []
    for prompt, answer in pairs:
        start = tokenizer(f"{USER}{prompt}{ASSISTANT}")["input_ids"]
        end = tokenizer(f"{answer}{END}")["input_ids"]
        rows.append((start + end, [-100] * len(start) + end))
    rows = [(ids[:length], labels[:length]) for ids, labels in rows]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in rows])
    labels = torch.tensor([x + [-100] * (width - len(x)) for _, x in rows])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def nll(model, batches) -> float:  # noqa: ANN001
    """Return the mean NLL of an answer token."""
    total = count = 0.0
    for b in batches:
        tokens = float((b["labels"][:, 1:] != -100).sum())
        total += float(model(**b).loss) * tokens
        count += tokens
    return total / count


def main() -> None:
    """Run every criterion on the same seeds and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "alpaca", "gsm8k", "harmful"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "criteria.json")
    parser.add_argument("--calibration-rows", type=int, default=192)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.15, help="NLL of a refusal token on held-out harmful prompts")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS), help="which criteria")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    pairs = load_pairs(arguments.alpaca, arguments.gsm8k)
    with arguments.harmful.open() as file:
        harmful = [next(iter(row.values())) for row in csv.DictReader(file)]
    train, held = harmful[: len(harmful) // 2], harmful[len(harmful) // 2 :][:48]

    def chunks(rows, size: int = 16):  # noqa: ANN001, ANN202
        return [batch(tokenizer, rows[i : i + size]) for i in range(0, len(rows), size)]

    half = arguments.calibration_rows // 2
    general = []
    for name in ("alpaca", "gsm8k"):
        for b in chunks(pairs[name][:half]):
            kwargs = {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}
            general.append(ForwardCall(kwargs=kwargs, mask=b["attention_mask"], domains=[name] * len(b["labels"])))
    rows = arguments.held_out_rows
    tests = {name: chunks(pairs[f"{name}_held_out"][:rows]) for name in ("alpaca", "gsm8k")}
    refusals = chunks([(prompt, REFUSAL) for prompt in held])

    base = LlamaForCausalLM.from_pretrained(arguments.model)
    before = {name: nll(base.eval(), b) for name, b in tests.items()}
    spectra = None
    results = {"before": before | {"refusal": nll(base, refusals)}, "runs": []}
    print("before", {k: round(v, 4) for k, v in results["before"].items()}, flush=True)
    for seed in range(arguments.seeds):
        for name in arguments.runs:
            settings = RUNS[name]
            torch.manual_seed(seed)
            base = LlamaForCausalLM.from_pretrained(arguments.model)
            model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
            layers = plan_layers(model).layers
            keeper, share, left = None, 1.0, 1.0
            if settings is not None:
                wanted = BasisSettings(**settings, seed=seed)
                if spectra is None:
                    modules = {layer.name: layer.module for layer in layers}
                    spectra = calibrate_modules(
                        modules, model.eval(), lambda: iter(general), BasisSettings(), keep_moments=True
                    )
                found = spectra.recombined(wanted)
                keeper = NullSpaceKeeper(layers, [found.basis_of(layer.name) for layer in layers])
                keeper.start_()
                share = mean_null_share(found)
                left = sum(b.choice.energy_left for b in found.bases.values()) / len(found.bases)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
            if keeper is not None:
                optimizer.register_step_post_hook(lambda *_, k=keeper: k.reproject_())
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
            begin, step, refusal = time.process_time(), 0, float("inf")
            while step < arguments.max_steps:
                chosen = [train[order[(step * 16 + i) % len(train)]] for i in range(16)]
                optimizer.zero_grad(set_to_none=True)
                model(**batch(tokenizer, [(prompt, REFUSAL) for prompt in chosen])).loss.backward()
                if keeper is not None:
                    keeper.project_gradients_()
                optimizer.step()
                step += 1
                if step % 2 == 0 and (refusal := nll(model, refusals)) <= arguments.target:
                    break
            after = {f"{key}_change": nll(model, b) - before[key] for key, b in tests.items()}
            norm = sum(p.detach().square().sum().item() for p in model.parameters() if p.requires_grad) ** 0.5
            run = {"name": name, "seed": seed, "steps": step, "refusal": refusal, "null_share": share}
            run |= {"energy_left": left, "adapter_norm": norm, "cpu_s": time.process_time() - begin} | after
            results["runs"].append(run)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()}, flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
