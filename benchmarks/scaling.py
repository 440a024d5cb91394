"""What a QLoRA GRPO run takes: measure each term of `scaling_formula` on small models, and fill in docs/scaling.md.

    python benchmarks/scaling.py            # measure, write results/scaling.json and the tables of docs/scaling.md
    python benchmarks/scaling.py --tables   # the tables alone, from what was measured before

Bytes and FLOPs are counted, not timed, so a busy machine changes nothing: bytes of the tensors that are there, of
those that autograd keeps, and of those alive at one time; FLOPs by torch's counter. All on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import scaling_formula as formula
import torch
from scaling_formula import Activations, Load, Shape
from scaling_tables import write_tables
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nspo_lightning.grpo import Rollout, accumulated_loss
from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules, plan_layers
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig, sample
from nspo_lightning.rollout.memory import SharedMemory

RESULTS = Path(__file__).with_name("results") / "scaling.json"
SMALL = Shape(name="small", hidden=256, intermediate=704, layers=4, heads=4, kv_heads=2, vocabulary=2048, head_size=64)
FITTED = tuple(
    replace(SMALL, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv, head_size=hidden // heads)
    for hidden, intermediate, heads, kv in (
        (64, 192, 4, 4),
        (64, 448, 2, 1),
        (128, 192, 4, 2),
        (128, 512, 4, 4),
        (192, 320, 6, 1),
        (192, 640, 4, 4),
    )
)
LOAD = Load(prompts=2, group=4, prompt_tokens=48, completion_tokens=24, microbatch_tokens=10**6, rank=16)


# ------------------------------------------------------------------------------------------------------- instruments


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time; views of weights, there before, don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        before = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.layout is torch.strided]
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and see what storages came out of it."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Count what autograd keeps of a forward pass, parameters and their views left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # held until the count is done, or storages would be freed and their addresses used again
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del result
    return total


class Flops(TorchDispatchMode):
    """FLOPs of the matrix products inside.

    torch's own mode follows modules with hooks, which `autograd.grad` refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add what it takes."""
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], Any]) -> int:
    """Count the FLOPs of matrix products; attention as products too."""
    with Flops() as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.total


# ------------------------------------------------------------------------------------------------------- small models


def save_model(shape: Shape, folder: Path) -> Path:
    """Write a random Llama of a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    path = folder / f"{shape.hidden}-{shape.intermediate}-{shape.kv_heads}-{shape.layers}"
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def policy(shape: Shape, folder: Path, *, quantised: bool = True, checkpointing: bool = False) -> nn.Module:
    """Load it as a run does: NF4 base in bfloat16 with double quantisation, float32 adapter."""
    settings = PolicySettings(
        path=str(save_model(shape, folder)),
        quantization="nf4" if quantised else "none",
        double_quantization=True,
        dtype="bfloat16" if quantised else "float32",
        gradient_checkpointing=checkpointing,
        lora=LoraSettings(r=LOAD.rank),
    )
    return load_policy(settings, torch.device("cpu"))


def rollout(shape: Shape, load: Load) -> Rollout:
    """Make prompts and completions of full length."""
    generator = torch.Generator().manual_seed(0)
    rows = load.prompts * load.group
    prompts = torch.randint(1, shape.vocabulary, (load.prompts, load.prompt_tokens), generator=generator)
    completions = torch.randint(1, shape.vocabulary, (rows, load.completion_tokens), generator=generator)
    return Rollout(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts).bool(),
        group_size=load.group,
        completion_ids=completions,
        completion_mask=torch.ones_like(completions).bool(),
        finished=torch.ones(rows).bool(),
    )


def score(model: nn.Module, judged: Rollout, *, autocast: bool = True, share: bool = True) -> Tensor:
    """Run the forward pass of an update, under bf16-mixed as the recipes do."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return score_completions(model, judged, share_prefix=share).log_probs.sum()


def draw(model: nn.Module, judged: Rollout) -> None:
    """Sample completions of full length to a rollout's prompts."""
    sample(
        model,
        judged.prompt_ids,
        judged.prompt_mask,
        group_size=LOAD.group,
        config=SamplingConfig(max_new_tokens=LOAD.completion_tokens, min_new_tokens=LOAD.completion_tokens),
        eos_token_ids=[0],
        pad_token_id=0,
    )


def tokens_of(load: Load) -> int:
    """Tokens through the policy in scoring: the last one of a completion predicts nothing."""
    return load.prompts * load.prompt_tokens + load.prompts * load.group * (load.completion_tokens - 1)


# ------------------------------------------------------------------------------------------------------------ terms


def term(name: str, predicted: float, measured: float, unit: str = "bytes") -> dict[str, Any]:
    """One line of the comparison."""
    line = {"term": name, "predicted": predicted, "measured": measured, "unit": unit}
    line["deviation"] = predicted / measured - 1
    print(f"{name}: {predicted:,.0f} by formula, {measured:,.0f} measured ({line['deviation']:+.1%})", flush=True)
    return line


def weight_terms(folder: Path) -> list[dict[str, Any]]:
    """Bytes of the base, the adapter and what its optimizer holds."""
    model = policy(SMALL, folder)
    base = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        base += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            base += sum(part.nbytes for part in parts)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    adapter = sum(t.nbytes for t in [*trained, *(p.grad for p in trained), *moments])  # type: ignore[union-attr]
    lora = formula.lora_bytes(SMALL, LOAD.rank) * 4 / 5  # without the sum over micro-batches
    return [
        term("NF4 base, embeddings and head", formula.base_bytes(SMALL), base),
        term("adapter, gradient, Adam", lora, adapter),
    ]


def kept_a_layer(shape: Shape, folder: Path, load: Load, *, share: bool = True) -> float:
    """Bytes that one layer keeps for a load: what two more layers and as many prompts again add, halved.

    Differences leave out what does not grow with tokens, as the adapter's weights in 16 bit.
    """
    added = 0.0
    for layers, sign in ((3, 1), (1, -1)):
        model = policy(replace(shape, layers=layers), folder)
        loads = (replace(load, prompts=2 * load.prompts), load)
        counts = []
        for judged in (rollout(shape, one) for one in loads):
            score(model, judged, share=share)  # the first call tries out how the model can be run
            counts.append(kept_bytes(model, lambda m=model, j=judged: score(m, j, share=share)))
        added += sign * (counts[0] - counts[1])
    return added / 2


def activation_terms(folder: Path) -> tuple[list[dict[str, Any]], Activations]:
    """Fit bytes a token on six shapes, and predict a seventh, with and without shared prompts."""
    length = LOAD.prompt_tokens + LOAD.completion_tokens - 1
    rows = LOAD.prompts * LOAD.group
    matrix, values = [], []
    for shape in FITTED:
        kept = kept_a_layer(shape, folder, LOAD) - formula.key_copies_bytes(shape, rows, length)
        matrix.append([1.0, shape.hidden, shape.intermediate, shape.key])
        values.append(kept / tokens_of(LOAD))
    system, seen = torch.tensor(matrix, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    constant, h, i, k = torch.linalg.lstsq(system, seen).solution.tolist()
    found = Activations(constant=constant, h=h, i=i, k=k)
    print(f"kept a token and layer: {constant:.0f} + {h:.2f} H + {i:.2f} I + {k:.2f} K bytes", flush=True)
    copies = formula.key_copies_bytes(SMALL, rows, length)
    predicted = found.layer_bytes(SMALL, tokens_of(LOAD)) + copies
    shared = kept_a_layer(SMALL, folder, LOAD)
    plain = kept_a_layer(SMALL, folder, LOAD, share=False)
    lines = [
        term("activations of a layer, prompts shared (shape not fitted)", predicted, shared),
        term("the same, each row with its own prompt", found.layer_bytes(SMALL, rows * length), plain),
    ]
    return lines, found


def chunk_term() -> tuple[list[dict[str, Any]], float]:
    """Measure how many float32 copies of a chunk of logits are alive at one time: on two vocabularies' difference."""
    from nspo_lightning.policy.log_probs import chosen_log_probs

    most = []
    width, positions = 64, 64
    for vocabulary in (4096, 8192):
        head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        hidden = torch.randn(positions, width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(positions, dtype=torch.long)
        with Alive() as alive:
            chosen_log_probs(
                hidden,
                targets,
                head,
                vocab_size=vocabulary,
                head_is_frozen=True,
                with_entropy=True,
            )
        most.append(alive.most)
    copies = (most[1] - most[0]) / (positions * 4096 * 4)
    # 16-bit logits, float32 logits, their softmax, and one temporary of each kind.
    return [term("chunk of logits, in float32 copies", 3.5, copies, "copies")], copies


def cache_term(folder: Path) -> list[dict[str, Any]]:
    """Bytes of keys and values at the end of sampling."""
    model = policy(SMALL, folder)
    judged = rollout(SMALL, LOAD)
    held: list[int] = []
    original = SharedMemory.step

    def counted(self: SharedMemory, token: Tensor) -> Tensor:
        out = original(self, token)
        held.append(sum(t.nbytes for pair in [*self._prompts.values(), *self._own.values()] for t in pair))
        return out

    SharedMemory.step = counted  # type: ignore[method-assign]
    try:
        draw(model, judged)
    finally:
        SharedMemory.step = original  # type: ignore[method-assign]
    return [term("keys and values while sampling", formula.cache_bytes(SMALL, LOAD), max(held))]


def null_space_terms(folder: Path) -> list[dict[str, Any]]:
    """Bytes of the bases."""
    model = policy(SMALL, folder)
    modules = {layer.name: layer.module for layer in plan_layers(model, None).layers}
    ids = torch.randint(1, SMALL.vocabulary, (16, 64), generator=torch.Generator().manual_seed(1))
    calls = [ForwardCall(args=(), kwargs={"input_ids": ids})]

    def forward(**kwargs: Any) -> Any:
        with torch.no_grad():
            return model(**kwargs)

    found = calibrate_modules(modules, forward, lambda: calls, BasisSettings(criterion="rank", threshold=0.25))
    bases = sum(basis.vectors.nbytes for basis in found.bases.values())
    return [term("bases, 3/4 null", formula.basis_bytes(SMALL, 0.75), bases)]


def work_terms(folder: Path) -> list[dict[str, Any]]:
    """FLOPs of the three parts of a step, on an unquantised base (the counter knows no 4-bit product)."""
    model = policy(SMALL, folder, quantised=False)
    judged = rollout(SMALL, LOAD)
    draw(model, judged)
    losses: list[Tensor] = []
    lines = [
        term("sampling", formula.sampling_flops(SMALL, LOAD), flops(lambda: draw(model, judged)), "FLOPs"),
        term(
            "scoring",
            formula.scoring_flops(SMALL, LOAD),
            flops(lambda: losses.append(score(model, judged, autocast=False))),
            "FLOPs",
        ),
    ]
    backward = formula.backward_flops(SMALL, LOAD, attention_factor=2.0)
    lines.append(term("backward", backward, flops(losses[0].backward), "FLOPs"))
    return lines


def step_term(folder: Path, kept: Activations) -> list[dict[str, Any]]:
    """Measure the most bytes alive in one micro-batch of an update, with checkpointing, and add the terms up."""
    shape = replace(SMALL, layers=8)
    model = policy(shape, folder, checkpointing=True)
    judged = rollout(shape, LOAD)
    trained = [p for p in model.parameters() if p.requires_grad]
    score(model, judged)
    with Alive() as alive:
        accumulated_loss(trained, [judged], lambda chunk: score(model, chunk))
    tokens, rows = tokens_of(LOAD), LOAD.prompts * LOAD.group
    layer = kept.layer_bytes(shape, tokens) + formula.key_copies_bytes(
        shape, rows, LOAD.prompt_tokens + LOAD.completion_tokens - 1
    )
    inputs = shape.layers * tokens * shape.hidden * 2
    gradients = formula.lora_parameters(shape, LOAD.rank) * 4
    total = inputs + layer + formula.dequantised_bytes(shape) + gradients
    return [
        term(
            "most alive in a micro-batch: layers' inputs, one layer's own, largest matrix, adapter's gradients",
            total,
            alive.most,
        )
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the tables of docs/scaling.md")
    arguments = parser.parse_args()
    if not arguments.tables:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as models:
            folder = Path(models)
            kept_lines, kept = activation_terms(folder)
            chunk_lines, copies = chunk_term()
            terms = [*weight_terms(folder), *kept_lines, *chunk_lines, *cache_term(folder), *null_space_terms(folder)]
            terms += [*work_terms(folder), *step_term(folder, kept)]
        result = {
            "terms": terms,
            "activations": {"constant": kept.constant, "h": kept.h, "i": kept.i, "k": kept.k},
            "logit_copies": copies,
            "environment": {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"},
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_tables(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
