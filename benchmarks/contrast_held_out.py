"""What directions of the criterion `contrast` promise, and what they cost on text that they were not found on.

    REAL_DATA=DATA python benchmarks/contrast_held_out.py --model FOLDER

Inputs of every fifth decoder layer (but the wide ones of down_proj) at answer starts (the last prompt token and three
of the policy's own answer), of harmful prompts (AdvBench), general ones (Alpaca, GSM8K, Dolly, MBPP) and XSTest's
safe ones. Directions are found on one half; the harm of a step of a given gain is measured on that half (promised),
on the other half of the general prompts (kept), and on look-alikes of other types than any that were seen; each
relative to a step without projection, the geometric mean over inputs. At the end what the package itself chooses, with
limits on what it promises of look-alikes of the seen types (`domain_limits`). Results in
benchmarks/results/contrast_held_out.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from real_model_comparison import FILES, read_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo_lightning.nullspace import NoNullDirections
from nspo_lightning.nullspace.contrast import candidates, choose_free
from nspo_lightning.nullspace.domain_limits import Promise, within_limits

HERE = Path(__file__).resolve().parent

POSITIONS, LONGEST = 4, 160
Moments = dict[str, Tensor]


def prompts_of(data: Path, most: int) -> dict[str, list[str]]:
    """Return group -> prompts: harmful, each general set, look-alikes of seen and of unseen types."""
    found = {"harmful": [row["goal"] for row in read_rows(data / FILES["safety"]["advbench"])]}
    columns = {"alpaca": "instruction", "gsm8k": "question", "dolly": "instruction", "mbpp": "text"}
    for name, file in FILES["general"].items():
        found[name] = [row[columns[name]] for row in read_rows(data / file)]
    safe = [row for row in read_rows(data / FILES["safety_test"]["xstest"]) if row["label"] == "safe"]
    types = sorted({row["type"] for row in safe})
    for name, kinds in (("seen look-alikes", types[::2]), ("unseen look-alikes", types[1::2])):
        found[name] = [row["prompt"] for row in safe if row["type"] in kinds]
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return {name: rows[:most] for name, rows in found.items()}


@torch.no_grad()
def inputs_at_starts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return layer input -> values at answer starts, shape ``(prompts, POSITIONS, width)``."""
    seen: dict[str, list[Tensor]] = {}
    found: dict[str, list[Tensor]] = {}
    handles = []
    for number in range(2, len(model.model.layers), 5):
        layer = model.model.layers[number]
        for name, module in (
            ("q", layer.self_attn.q_proj),
            ("o", layer.self_attn.o_proj),
            ("gate", layer.mlp.gate_proj),
        ):
            key = f"{number}.{name}"
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, key=key: seen.setdefault(key, []).append(args[0][:, -1].clone())
                )
            )
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), 16):
        batch = tokenizer(
            ordered[start : start + 16],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        if batch["input_ids"].shape[1] > LONGEST:
            break
        seen.clear()
        model.generate(**batch, max_new_tokens=POSITIONS, min_new_tokens=POSITIONS, do_sample=False)
        for key, calls in seen.items():
            found.setdefault(key, []).append(torch.stack(calls, 1))
    for handle in handles:
        handle.remove()
    order = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(sum(len(part) for part in next(iter(found.values()))), generator=order)
    return {key: torch.cat(parts)[shuffled] for key, parts in found.items()}


def second_moment(values: Tensor) -> Tensor:
    """Return x x^T over all rows, trace 1."""
    rows = values.reshape(-1, values.shape[-1]).double()
    moment = rows.T @ rows
    return moment / moment.trace()


def leading(moment: Tensor, c: Tensor, r: float, count: int) -> Tensor:
    """Return an orthonormal basis of the first directions of S v = g (C + r I) v."""
    values, vectors = torch.linalg.eigh(c)
    white = vectors * (values.clamp_min(0) + r / len(c)).rsqrt()
    _, found = torch.linalg.eigh(white.T @ moment @ white)
    directions = white @ found.flip(1)[:, :count]
    return torch.linalg.qr(directions / directions.norm(dim=0)).Q


def ways(look_alikes: float) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return name -> the free space from C, the second moment S of harmful starts, and that of their means."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    for r in (1e-3, 0.1, 1.0):
        found[f"means of harmful starts, r = {r:g}"] = lambda c, s, m, r=r: leading(m, c, r, POSITIONS)
        for count in (4, 32):
            found[f"{count} directions of harmful starts, r = {r:g}"] = lambda c, s, m, r=r, k=count: leading(
                s, c, r, k
            )
    if not look_alikes:
        for share in (0.3, 0.6):
            found[f"{share:.0%} least general energy"] = lambda c, s, m, f=share: torch.linalg.eigh(c)[1][
                :, : int(f * len(c))
            ]
    return found


def harm(space: Tensor, learnt: Tensor, aimed: Tensor, c: Tensor) -> float:
    """Return what a step along confined means moves of C, for what it moves of the aimed means (median position)."""
    steps = (learnt @ space) @ space.T
    gain = (steps * aimed).sum(1).square()
    return float((((steps @ c) * steps).sum(1) / gain).median())


def limited_spaces(
    general: dict[str, Tensor], learnt: dict[str, Tensor], looks: dict[str, Tensor], limit: float | None
) -> tuple[dict[str, Tensor], Promise]:
    """Return input -> the free space that the package chooses under a limit on look-alikes, and its promise of them."""
    domains = {"look-alikes": limit} if limit else {}
    found = {
        key: candidates(c, learnt[key], tokens=1, domains={"look-alikes": looks[key]}, limited=["look-alikes"])
        for key, c in general.items()
    }
    held = within_limits(found, domains, choose_free)
    free = {key: len(of.values) - held.choices[key].protected for key, of in held.found.items()}
    return {key: of.directions[:, : free[key]].double() for key, of in held.found.items()}, held.promises["look-alikes"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model of the Llama family")
    parser.add_argument("--data", type=Path, default=os.environ.get("REAL_DATA"))
    parser.add_argument("--rows", default="32,100", help="general rows of each set that directions are found on")
    parser.add_argument(
        "--prompts", type=int, default=240, help="prompts of each group, half of them to find directions"
    )
    parser.add_argument("--limits", default="0.02,0.01,0.005", help="on what is promised of look-alikes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "contrast_held_out.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = prompts_of(Path(args.data), args.prompts)
    groups = {name: inputs_at_starts(model, tokenizer, rows) for name, rows in prompts.items()}
    del model
    rows = []
    for count in map(int, args.rows.split(",")):
        for share in (0.0, 0.3) if count > 32 else (0.0,):
            named: dict[str, list[list[float]]] = {}
            spaces: dict[str, dict[str, Tensor]] = {}
            if not share:
                seen = {key: second_moment(groups["seen look-alikes"][key]) for key in groups["harmful"]}
                own = [{k: second_moment(groups[n][k][0::2][:count]) for k in seen} for n in FILES["general"]]
                means = {key: second_moment(groups["harmful"][key][0::2].double().mean(0)) for key in seen}
                mixed = {key: torch.stack([of[key] for of in own]).mean(0) for key in seen}
                for limit in (None, *map(float, args.limits.split(","))):
                    try:
                        found, promise = limited_spaces(mixed, means, seen, limit)
                    except NoNullDirections as error:
                        print(error)
                        continue
                    label = f"limit {limit:g}" if limit else "no limit"
                    spaces[f"chosen, {label}: weight {promise.weight:.2g}, look-alikes {promise.harm:.2g}"] = found
            for key, harmful in groups["harmful"].items():
                general = [groups[name][key] for name in FILES["general"]]
                found = torch.stack([second_moment(g[0::2][:count]) for g in general]).mean(0)
                unseen = torch.stack([second_moment(g[1::2]) for g in general]).mean(0)
                c = (1 - share) * found + share * second_moment(groups["seen look-alikes"][key])
                learnt, aimed = (harmful[i::2].double().mean(0) for i in (0, 1))
                looks = second_moment(groups["unseen look-alikes"][key])
                everywhere = torch.eye(len(c), dtype=torch.float64)
                against = [(learnt, found), (aimed, unseen), (aimed, looks)]
                plain = [harm(everywhere, learnt, mean, moment) for mean, moment in against]
                s, m = second_moment(harmful[0::2]), second_moment(learnt)
                for name, way in ways(share).items():
                    space = way(c, s, m)
                    ratios = [harm(space, learnt, *a) / p for a, p in zip(against, plain, strict=True)]
                    named.setdefault(name, []).append(ratios)
                for name, of in spaces.items():
                    ratios = [harm(of[key], learnt, *a) / p for a, p in zip(against, plain, strict=True)]
                    named.setdefault(name, []).append(ratios)
            for name, ratios in named.items():
                means = torch.tensor(ratios).log().mean(0).exp().tolist()
                rows.append([4 * count, share, name, *(round(value, 4) for value in means)])
                print(
                    "{:4} rows, look-alikes {:3}: {:42} promised {:.4f} kept {:.4f} look-alikes {:.4f}".format(
                        *rows[-1]
                    )
                )
    columns = ["general_rows", "look_alike_share", "free_space", "promised", "kept", "unseen_look_alikes"]
    listed = ",\n  ".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{\n "columns": {json.dumps(columns)},\n "rows": [\n  {listed}\n ]\n}}\n')


if __name__ == "__main__":
    main()
