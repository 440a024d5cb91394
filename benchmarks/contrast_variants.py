"""Forms of the criterion `contrast` that were tried, on the embedded policy, by supervised steps towards refusals.

    python benchmarks/contrast_variants.py [--limits 0.01,0.003]

An adapter of rank 8 (AdamW) is trained on the embedded world's harmful prompts and refusals until the first tokens of
its answers to held-out harmful ones begin a refusal with a probability of 0.95. Then: updates, KL(base || policy) in
nats a token on held-out general texts, at all positions and at answer starts, the latter on look-alikes too. The same
moments serve all forms. No sampling, no reward: what it costs to move the policy so far, not how fast GRPO finds the
way. Results in benchmarks/results/contrast_variants.json, where those of other runs stay.

With --limits nothing is trained: what is promised of the look-alikes under `domain_limits`, and the same of harmful
prompts, look-alikes and general text that directions do not come from.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from output_gradients import HERE, Sides, drawn_labels, leading, padded, refusals_of, two_sided
from torch import Tensor

from nspo_lightning.nullspace import TO_LEARN, BasisSettings, Calibration, ForwardCall, calibrate_modules, plan_layers
from nspo_lightning.nullspace.contrast import NEGLIGIBLE_SHARE, Candidates, candidates, contrast_basis
from nspo_lightning.nullspace.criteria import RankChoice
from nspo_lightning.nullspace.domains import STARTS_TO_LEARN, combine, starts_of
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.nullspace.layers import ProtectedLayer
from nspo_lightning.policy.settings import TOY_PATH
from nspo_lightning.toy.world import REFUSALS, rows

STARTS = 4
LOOK_ALIKES = "benign"
REACHED = 0.95
FORMS = (
    "no projection",
    "auto",
    "contrast",
    "contrast, nats",
    "contrast, nats and gradients",
    "contrast, all four directions",
    "contrast, one direction",
    "contrast, outputs too",
    "contrast, outputs at starts too",
    "contrast, four random outputs",
    "outputs alone",
)


def answered(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> dict[str, Tensor]:
    """Return ids, mask and where answers start, of pairs of prompt and answer."""
    texts, starts = [], []
    for prompt, answer in pairs:
        chat = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        whole = start + tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        texts.append(whole)
        starts.append([len(start) - 1 <= i < len(start) - 1 + STARTS for i in range(len(whole))])
    batch = padded(texts)
    marked = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for i, row in enumerate(starts):
        marked[i, : len(row)] = torch.tensor(row)
    return batch | {"starts": marked}


def chunks(items: Sequence[Any], size: int = 32) -> list[Sequence[Any]]:
    """Return parts of a list."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def own_answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Return prompts with the first tokens of the policy's greedy answers."""
    found = []
    for part in chunks(prompts):
        chats = [[{"role": "user", "content": p}] for p in part]
        texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        batch.pop("token_type_ids", None)
        out = model.generate(**batch, max_new_tokens=STARTS, do_sample=False)
        found += zip(part, tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :]), strict=True)
    return found


def weighted_choice(
    found: Mapping[str, Candidates], gains: Mapping[str, float], costs: Mapping[str, float]
) -> dict[str, RankChoice]:
    """Return the choice of `choose_free` where an input's gain and cost count by weights of its own."""
    best: tuple[float, dict[str, int]] | None = None
    for t in torch.logspace(-4, 8, 241, dtype=torch.float64).tolist():
        counts = {
            n: int((gains[n] * of.gain - t * costs[n] * (of.cost + NEGLIGIBLE_SHARE * of.gain)).argmax())
            for n, of in found.items()
        }
        gain = sum(gains[n] * float(of.gain[counts[n]]) for n, of in found.items())
        cost = sum(
            costs[n] * float(of.cost[counts[n]] + NEGLIGIBLE_SHARE * of.gain[counts[n]]) for n, of in found.items()
        )
        if best is None or cost / gain**2 < best[0]:
            best = (cost / gain**2, counts)
    assert best is not None
    return {n: choice_of(of, best[1][n] + 1) for n, of in found.items()}


def choice_of(of: Candidates, free: int) -> RankChoice:
    """Return the choice that frees so many directions."""
    n = len(of.values)
    left = float(of.energy[free - 1])
    return RankChoice(protected=n - free, energy_left=left, null_share=free / n, gain=of.harm(free), reason="")


class World:
    """Model, texts and moments that all forms share."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(TOY_PATH)
        self.load = lambda: AutoModelForCausalLM.from_pretrained(TOY_PATH, dtype=torch.float32).eval()
        self.base = self.load()
        tokenizer = self.tokenizer
        general = rows("general", "train", per_skill=120)
        harmful = [row["prompt"] for row in rows("harmful", "train")]
        self.learnt, self.held = harmful[:480], [row["prompt"] for row in rows("harmful", "validation")][:64]
        tests = rows("general", "validation", per_skill=40)
        self.tests = [answered(part, tokenizer) for part in chunks([(r["prompt"], r["answer"]) for r in tests])]
        benign = [(r["prompt"], r["answer"]) for r in tests if r["skill"] == LOOK_ALIKES]
        self.look_alikes = [answered(part, tokenizer) for part in chunks(benign)]
        self.modules = {layer.name: layer.module for layer in plan_layers(self.base).layers}
        self.settings = BasisSettings(criterion="contrast", domain_limits={LOOK_ALIKES: 1e9})
        self.text = self.calls(general, harmful[480:736])
        self.unseen_text = self.calls(tests, self.held)
        self.found = self.calibrated(self.text)

    def calibrated(self, calls: Sequence[ForwardCall]) -> Calibration:
        """Return a calibration on text, with its moments."""
        return calibrate_modules(self.modules, self.base, lambda: iter(calls), self.settings, keep_moments=True)

    def calls(self, general: Sequence[Mapping[str, str]], harmful: Sequence[str]) -> list[ForwardCall]:
        """Return calibration text: general rows with their answers, harmful prompts with the policy's own."""
        asked = own_answers(self.base, self.tokenizer, harmful)
        texts = [((r["prompt"], r["answer"]), r["skill"]) for r in general] + [(pair, TO_LEARN) for pair in asked]
        calls = []
        for part in chunks(texts):
            batch = answered([pair for pair, _ in part], self.tokenizer)
            starts, mask = batch.pop("starts"), batch["attention_mask"]
            calls.append(
                ForwardCall(kwargs=batch, mask=mask, domains=[d for _, d in part], starts=starts & mask.bool())
            )
        return calls

    def limited(self, unseen: Calibration, limit: float | None) -> dict[str, float]:
        """Return what is promised of look-alikes under a limit, and of look-alikes and all text that were not seen."""
        limits = None if limit is None else {LOOK_ALIKES: limit}
        found = self.found.recombined(BasisSettings(criterion="contrast", domain_limits=limits))
        sums: dict[str, list[float]] = {}
        for name, basis in found.bases.items():
            v, seen = basis.vectors.double(), {d: m.double() for d, m in unseen.moments[name].items()}
            s = seen[STARTS_TO_LEARN]
            looks = 0.1 * seen[LOOK_ALIKES] + 0.9 * seen[starts_of(LOOK_ALIKES)]
            inside = v.T @ s @ v
            sums.setdefault("gain", []).append(float(inside.trace() / s.trace()))
            for label, c in (("look-alikes", looks), ("general", combine(seen, self.settings.shares(seen)))):
                scale = float(s.trace() * c.trace())
                sums.setdefault(label, []).append(float((inside * (v.T @ c @ v)).sum()) / scale)
                sums.setdefault(f"{label}, plain", []).append(float((s * c).sum()) / scale)
        mean = {name: sum(values) / len(values) for name, values in sums.items()}
        kept = {n: mean[n] / mean["gain"] ** 2 / mean[f"{n}, plain"] for n in ("look-alikes", "general")}
        promise = found.promises[LOOK_ALIKES]
        return {"weight": promise.weight, "promised": promise.harm, "gain": mean["gain"]} | {
            f"unseen {name}": value for name, value in kept.items()
        }

    def prepare(self) -> None:
        """Take the moments of gradients, and the candidates of today's criterion."""
        tokenizer, modules = self.tokenizer, self.modules
        self.auto = self.found.recombined(BasisSettings())
        self.plain = self.found.recombined(BasisSettings(criterion="contrast"))  # no input is left alone
        general_calls = [c for c in self.text if TO_LEARN not in (c.domains or ())]
        general_ids = [dict(c.kwargs) for c in general_calls]
        self.gradients = two_sided(self.base, modules, general_ids, drawn_labels(0))
        at_starts = [dict(c.kwargs) | {"rows": c.starts} for c in general_calls]
        self.start_gradients = two_sided(self.base, modules, at_starts, drawn_labels(1))
        refused = [
            batch
            for i, refusal in enumerate(REFUSALS)
            for batch in refusals_of(self.learnt[i :: len(REFUSALS)], refusal, tokenizer, 32)
        ]
        self.safety = two_sided(self.base, modules, refused, drawn_labels(0), keep=True)
        self.base.zero_grad(set_to_none=True)
        self.candidates = {}
        for name, by_domain in self.found.moments.items():
            c = combine(by_domain, self.settings.shares(by_domain))
            self.candidates[name] = candidates(c, by_domain[STARTS_TO_LEARN], tokens=1)
            self.found.moments[name]["C"] = c

    def sides(self, name: str) -> tuple[Sides, Tensor]:
        """Return sums on general text, and the mean gradients of refusals by position, of one layer."""
        return self.gradients[name], torch.cat([g for _, g in self.safety[name].kept]).mean(0)

    def choices(self, form: str) -> dict[str, RankChoice]:
        """Return how many directions of each input are free."""
        if "nats" not in form and "direction" not in form:
            return {name: basis.choice for name, basis in self.plain.bases.items()}
        if "direction" in form:
            return {n: choice_of(of, 1 if "one" in form else len(of.energy)) for n, of in self.candidates.items()}
        gains, costs = {}, {}
        for name, by_domain in self.found.moments.items():
            learnt, general = float(by_domain[STARTS_TO_LEARN].trace()), float(by_domain["C"].trace())
            per_layer = []
            for layer in self.found.groups[name]:
                of, wanted = self.sides(layer)
                g = of.moments()[1]
                size = float(wanted.square().sum()) / STARTS if "gradients" in form else 1.0
                per_layer.append((size, size * float(g.trace()) / len(g)))
            gains[name] = learnt * sum(size for size, _ in per_layer)
            costs[name] = learnt * general * sum(cost for _, cost in per_layer)
        return weighted_choice(self.candidates, gains, costs)

    def outputs(self, form: str, name: str, seed: int) -> Tensor | None:
        """Return a projector of a layer's outputs, None for all of them."""
        of, wanted = self.sides(name)
        g = of.moments()[1]
        if "at starts" in form:  # as `contrast` weighs them in C
            g = 0.1 * g + 0.9 * self.start_gradients[name].moments()[1]
        if "random" in form:
            drawn = torch.randn(len(g), STARTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            basis = torch.linalg.qr(drawn).Q
            return (basis @ basis.T).float()
        return leading(wanted, g).float() if "outputs" in form else None

    @torch.no_grad()
    def predicted(self, name: str, layer: ProtectedLayer) -> float:
        """Return tr(G D C D^T) / 2 of a layer's update D, nats a token."""
        c, g = self.gradients[name].moments()
        assert layer.output is not None
        d = layer.scale * layer.output.double() @ layer.matrix.double()
        return float(((g @ d @ c) * d).sum() / 2)

    @torch.no_grad()
    def kl(self, model: Any, batches: Sequence[Mapping[str, Tensor]], *, starts: bool) -> float:
        """Return KL(base || policy), nats a token."""
        total = count = 0.0
        for batch in batches:
            counted = batch["starts"] if starts else batch["attention_mask"].bool()
            kwargs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            p, q = (of(**kwargs).logits[counted].log_softmax(-1) for of in (self.base, model))
            total += float((p.exp() * (p - q)).sum())
            count += float(counted.sum())
        return total / count

    @torch.no_grad()
    def refusing(self, model: Any) -> float:
        """Return the probability that an answer to a held-out harmful prompt begins a refusal (its first tokens)."""
        total = 0.0
        for refusal in REFUSALS:
            for batch in refusals_of(self.held, refusal, self.tokenizer, 64):
                targets = batch.pop("targets")
                logs = model(**batch).logits.log_softmax(-1)
                found = logs.gather(2, targets.clamp_min(0)[..., None]).squeeze(-1)
                total += float((found * (targets != -100)).sum(1).exp().sum())
        return total / len(self.held)

    def train(self, form: str, seed: int, lr: float, most: int) -> dict[str, Any]:
        """Train one adapter in one form and measure it."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(self.load(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
        layers = plan_layers(model).layers
        own = {layer.name.split("base_model.model.")[-1]: layer for layer in layers}
        keeper, share = None, 1.0
        if form not in ("no projection", "outputs alone"):
            if form == "auto":
                bases = self.auto.bases
            else:
                choices = self.choices(form)
                bases = {name: contrast_basis(of, choices[name]) for name, of in self.candidates.items()}
            leaders = self.found.leaders()
            keeper = NullSpaceKeeper(layers, [bases[leaders[name]] for name in own])
            keeper.start_()
            share = sum(b.null_dims for b in bases.values()) / sum(b.width for b in bases.values())
        outs = {name: q for name in own if (q := self.outputs(form, name, seed)) is not None}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        rng, updates, reached = random.Random(seed), 0, 0.0
        while updates < most:
            pairs = [(prompt, rng.choice(REFUSALS)) for prompt in rng.sample(self.learnt, 24)]
            batch = [refusals_of([prompt], refusal, self.tokenizer, 1)[0] for prompt, refusal in pairs]
            ids = padded([b["input_ids"][0].tolist() for b in batch])
            targets = padded([b["targets"][0].tolist() for b in batch], pad=-100)["input_ids"]
            loss = torch.nn.functional.cross_entropy(model(**ids).logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            if keeper is not None:
                keeper.project_gradients_()
            for name, q in outs.items():
                up = own[name].output
                assert up is not None
                assert up.grad is not None
                up.grad.copy_(q @ up.grad)
            optimizer.step()
            if keeper is not None:
                keeper.reproject_()
            with torch.no_grad():
                for name, q in outs.items():
                    up = own[name].output
                    assert up is not None
                    up.copy_(q @ up)
            updates += 1
            if updates % 2 == 0 and (reached := self.refusing(model)) >= REACHED:
                break
        return {
            "form": form,
            "seed": seed,
            "lr": lr,
            "free": round(share, 4),
            "updates": updates,
            "refusing": round(reached, 4),
            "kl": self.kl(model, self.tests, starts=False),
            "predicted_kl": sum(self.predicted(name, layer) for name, layer in own.items()),
            "kl_starts": self.kl(model, self.tests, starts=True),
            "kl_look_alikes": self.kl(model, self.look_alikes, starts=True),
        }


def main() -> None:
    """Train all forms and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limits", help="limits on the look-alikes, separated by commas; nothing is trained")
    parser.add_argument("--most", type=int, default=80, help="updates of a run at most")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "contrast_variants.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = World()
    print(f"before: begins a refusal {world.refusing(world.base):.3f}", flush=True)
    if args.limits:
        unseen = world.calibrated(world.unseen_text)
        for limit in (None, 1e9, *map(float, args.limits.split(","))):
            found = world.limited(unseen, limit)
            print(f"limit {limit}:", {name: round(value, 5) for name, value in found.items()}, flush=True)
        return
    world.prepare()
    for form in (form for form in args.forms if "nats" in form or form == "contrast"):
        print(form, {n: len(world.candidates[n].values) - c.protected for n, c in world.choices(form).items()})
    runs = json.loads(args.out.read_text()) if args.out.exists() else []
    for form in args.forms:
        for seed in range(args.seeds):
            found = world.train(form, seed, args.lr, args.most)
            found = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
            print(found, flush=True)
            runs = [run for run in runs if any(run[key] != found[key] for key in ("form", "seed", "lr"))] + [found]
            args.out.write_text("[\n " + ",\n ".join(json.dumps(run) for run in runs) + "\n]\n")


if __name__ == "__main__":
    main()
