"""Would general outputs let an update in where general inputs do not? The output side of the null space, measured.

    python benchmarks/output_gradients.py
    REAL_DATA=DATA python benchmarks/output_gradients.py --model FOLDER

To second order the general KL of an update D of one layer is tr(G D C D^T) / 2 nats a token: C is the second moment of
the layer's inputs, G that of the gradients at its outputs, of the negative log-likelihood of labels that are *sampled
from the model* (Fisher; K-FAC's `expand` form). The null space is the case G = 1. Printed for each kind of layer, of
both: effective rank exp(entropy) over width, shares of the trace in the leading 1, 5, 10 and 30 % of directions, and
the energy of *other* texts in the 50 % of directions that have the least; then the harm (general KL for a given gain,
1 = no projection, on other texts and other harmful prompts than directions come from) of a gradient step towards a
refusal, cut on the input side, on the output side, and on both. Without --model the embedded policy and its own
world; with it, every tenth decoder layer. Results in benchmarks/results/output_gradients.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
REFUSAL = "I'm sorry, but I can't help with that."
POSITIONS = 4  # the last prompt token and the first three of an answer
SHARES = (0.01, 0.05, 0.1, 0.3)
DAMPING = 0.1  # of the mean eigenvalue, as the criterion `contrast`
Labels = Callable[[Tensor], Tensor]


def drawn_labels(seed: int) -> Labels:
    """Return a function that draws a label from each row of logits."""
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@dataclass
class Sides:
    """What one layer's inputs and output gradients sum up to."""

    inputs: Tensor
    gradients: Tensor
    rows: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return C and G, means over rows."""
        return self.inputs / self.rows, self.gradients / self.rows


def two_sided(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    labels: Labels,
    *,
    keep: bool = False,
) -> dict[str, Sides]:
    """Sum up x x^T and g g^T over all positions that a mask counts.

    Args:
        model: Returns an object with ``logits``, shape ``(rows, tokens, vocabulary)``, which need gradients.
        modules: Name -> linear layer.
        batches: ``input_ids`` and ``attention_mask``; where there is ``targets`` (token ids, -100 = none), its
            likelihood is meant instead of that of drawn labels; where there is ``rows``, only these are summed.
        labels: Draws labels from logits of shape ``(positions, vocabulary)``.
        keep: Keep inputs and gradients where ``targets`` are, instead of their sums; shape ``(rows, POSITIONS, n)``.

    Returns:
        Name -> sums. The loss is summed over positions, so G is that of one token's KL.
    """
    found: dict[str, Sides] = {}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: gradients.__setitem__(name, gradient.detach()))

        return hook

    handles = [module.register_forward_hook(listen(name)) for name, module in modules.items()]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch.get("targets")
        if targets is None:
            flat = logits[mask]
            loss = nn.functional.cross_entropy(flat.float(), labels(flat.detach().float()), reduction="sum")
        else:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            mask = targets != -100
        mask = batch.get("rows", mask)
        loss.backward()
        for name in modules:
            x, g = inputs[name][mask].double(), gradients[name][mask].double()
            of = found.setdefault(name, Sides(x.new_zeros(()), x.new_zeros(())))
            of.rows += len(x)
            if keep:
                of.kept.append((x.unflatten(0, (-1, POSITIONS)), g.unflatten(0, (-1, POSITIONS))))
            else:
                of.inputs = of.inputs + (inputs[name][mask].T @ inputs[name][mask]).double()
                of.gradients = of.gradients + g.T @ g
    for handle in handles:
        handle.remove()
    return found


def spectrum(moment: Tensor) -> Tensor:
    """Return eigenvalues, descending, as shares of the trace."""
    values = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
    return values / values.sum()


def shape_of(moment: Tensor, other: Tensor) -> dict[str, float]:
    """Return the figures of one side of one layer; ``other`` is the same of other texts."""
    values, vectors = torch.linalg.eigh(moment)
    shares = values.flip(0).clamp_min(0) / values.clamp_min(0).sum()
    n = len(shares)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    row = {"effective_rank": float(entropy.exp()) / n}
    row |= {f"leading_{share:g}": float(shares[: max(round(share * n), 1)].sum()) for share in SHARES}
    held_out = ((vectors.T @ other) * vectors.T).sum(1).clamp_min(0) / other.trace()
    row["least_half_held_out"] = float(held_out[: n // 2].sum())
    free = torch.arange(1, n + 1, dtype=torch.float64) / n
    row["least_e_over_f2_held_out"] = float((held_out.cumsum(0) / free.square())[:-1].min())
    return row


def damped(moment: Tensor) -> Tensor:
    """Return the moment plus `DAMPING` of its mean eigenvalue everywhere."""
    return moment + DAMPING * moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype)


def leading(learnt: Tensor, general: Tensor) -> Tensor:
    """Return the projector on the span that `contrast` frees: (C + r I)^-1 times the rows to learn from."""
    directions = torch.linalg.solve(damped(general), learnt.T)
    basis = torch.linalg.qr(directions / directions.norm(dim=0)).Q
    return basis @ basis.T


def harms(
    found: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], learnt: Sequence[Tensor], aimed: Sequence[Tensor]
) -> dict[str, float]:
    """Return form of update -> general KL for a given gain, relative to a plain gradient step, on unseen text.

    Args:
        found: C and G that directions are found on.
        unseen: C and G that the cost is measured on.
        learnt: Inputs and output gradients of harmful prompts at answer starts, shape ``(prompts, POSITIONS, n)``.
        aimed: The same of other prompts, which the gain is measured on.
    """
    c, g = found
    step, target = (torch.einsum("rpo,rpi->oi", y, x) / len(x) for x, y in (learnt, aimed))
    p, q = (leading(rows.mean(0), moment) for rows, moment in zip(learnt, found, strict=True))
    solved_in = torch.linalg.solve(damped(c), step.T).T
    forms = {
        "none": step,
        "inputs": step @ p,
        "outputs": q @ step,
        "inputs and outputs": q @ step @ p,
        "inputs, or else outputs": step @ p + q @ (step - step @ p),
        "inputs, damped": solved_in,
        "outputs, damped": torch.linalg.solve(damped(g), step),
        "both, damped": torch.linalg.solve(damped(g), solved_in),
    }
    unseen_c, unseen_g = unseen
    cost = {n: float(((unseen_g @ d @ unseen_c) * d).sum() / (d * target).sum().square()) for n, d in forms.items()}
    return {name: value / cost["none"] for name, value in cost.items()}


def texts_of(rows: Sequence[tuple[str, str]], tokenizer: Any, longest: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Return batches of rendered (prompt, answer) pairs, cut at the end, of like length."""
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in rows]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False)[:longest] for chat in chats]
    ids.sort(key=len)
    return [padded(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]


def refusals_of(prompts: Sequence[str], refusal: str, tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Return batches of prompts with a refusal behind them, whose first tokens are the targets."""
    rows = []
    answer = tokenizer(refusal, add_special_tokens=False).input_ids[:POSITIONS]
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        rows.append((start + answer[:-1], [-100] * (len(start) - 1) + answer))
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        targets = padded([target for _, target in part], pad=-100)["input_ids"]
        batches.append(padded([ids for ids, _ in part]) | {"targets": targets})
    return batches


def padded(ids: Sequence[Sequence[int]], pad: int = 0) -> dict[str, Tensor]:
    """Return right-padded ids and their mask."""
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }


def toy_texts() -> tuple[list[tuple[str, str]], list[str], str]:
    """Return general pairs, harmful prompts and a refusal of the embedded world."""
    from nspo_lightning.toy.world import REFUSALS, rows

    general = [(row["prompt"], row["answer"]) for row in rows("general", "train", per_skill=160)]
    return general, [row["prompt"] for row in rows("harmful", "train")][:240], REFUSALS[0]


def real_texts(data: Path, rows: int) -> tuple[list[tuple[str, str]], list[str], str]:
    """Return general pairs of four public sets in turn, AdvBench's goals and a refusal."""
    from real_model_comparison import FILES, read_rows

    columns = {
        "alpaca": ("instruction", "output"),
        "gsm8k": ("question", "answer"),
        "dolly": ("instruction", "response"),
        "mbpp": ("text", "code"),
    }
    sets = []
    for name, file in FILES["general"].items():
        read = read_rows(data / file)
        random.Random(0).shuffle(read)
        prompt, answer = columns[name]
        sets.append([(row[prompt], row[answer]) for row in read[:rows]])
    harmful = [row["goal"] for row in read_rows(data / FILES["safety"]["advbench"])]
    random.Random(0).shuffle(harmful)
    return [pair for group in zip(*sets, strict=True) for pair in group], harmful[:128], REFUSAL


def main() -> None:
    """Measure one model and print its tables; the other model's stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a chat model of the Llama family; default: the embedded one")
    parser.add_argument("--data", type=Path, default=os.environ.get("REAL_DATA"))
    parser.add_argument("--rows", type=int, default=32, help="general rows of each public set")
    parser.add_argument("--tokens", type=int, default=96, help="the longest text")
    parser.add_argument("--every", type=int, default=10, help="decoder layers of a model that are looked at: each n-th")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "output_gradients.json")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nspo_lightning.policy.settings import TOY_PATH

    torch.set_num_threads(1)
    folder = args.model or str(TOY_PATH)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.requires_grad_())
    general, harmful, refusal = real_texts(Path(args.data), args.rows) if args.model else toy_texts()
    every = args.every if args.model else 1
    layers = range(2 if every > 2 else 0, len(model.model.layers), every)
    modules = {
        f"{number}.{name.rpartition('.')[2].removesuffix('_proj')}": module
        for number in layers
        for name, module in model.model.layers[number].named_modules()
        if isinstance(module, nn.Linear)
    }
    halves = []
    for half in (0, 1):
        rows, asked = [pair for i, pair in enumerate(general) if i // 4 % 2 == half], harmful[half::2]
        seen = two_sided(model, modules, texts_of(rows, tokenizer, args.tokens, 8), drawn_labels(half))
        safety = two_sided(model, modules, refusals_of(asked, refusal, tokenizer, 8), drawn_labels(half), keep=True)
        kept = {name: [torch.cat(part) for part in zip(*of.kept, strict=True)] for name, of in safety.items()}
        halves.append(({name: of.moments() for name, of in seen.items()}, kept, next(iter(seen.values())).rows))
    rows, forms = [], {}
    kinds = list(dict.fromkeys(name.partition(".")[2] for name in modules))
    for kind in kinds:
        names = [name for name in modules if name.partition(".")[2] == kind]
        for side, letter in enumerate("CG"):
            of = [shape_of(halves[0][0][name][side], halves[1][0][name][side]) for name in names]
            width = len(halves[0][0][names[0]][side])
            rows.append({"layer": kind, "side": letter, "width": width, **{k: mean(o[k] for o in of) for k in of[0]}})
        ratios = [harms(halves[0][0][n], halves[1][0][n], halves[0][1][n], halves[1][1][n]) for n in names]
        forms[kind] = {form: geometric(r[form] for r in ratios) for form in ratios[0]}
    traces = [float(halves[0][0][name][1].trace()) for name in modules]
    forms["all"] = {form: geometric(f[form] for f in forms.values()) for form in forms[kinds[0]]}
    label = Path(folder).name if args.model else "embedded"
    print(f"{label}: {halves[0][2]} and {halves[1][2]} rows")
    for row in rows:
        print(
            "  {layer:5} {side} ".format(**row)
            + " ".join(f"{v:.3f}" for k, v in row.items() if k[0] in "el"[:2] and not isinstance(v, str))
        )
    for kind, found in forms.items():
        print(f"  {kind:5} " + ", ".join(f"{form} {value:.3f}" for form, value in found.items()))
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["SmolLM2-135M-Instruct" if args.model else "embedded"] = {
        "rows": [halves[0][2], halves[1][2]],
        "trace_of_G": [min(traces), max(traces)],
        "spectra": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        "harm": {kind: {f: round(v, 5) for f, v in found.items()} for kind, found in forms.items()},
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def geometric(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return float(torch.tensor(list(values), dtype=torch.float64).log().mean().exp())


if __name__ == "__main__":
    main()
