"""What a calibration holds at one time, where, and in how many passes it reads the text."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules
from nspo_lightning.nullspace.budget import (
    device_budget,
    peak_bytes,
    plan_passes,
    sketch_bytes,
    sketch_columns,
    sketched_together,
)
from nspo_lightning.nullspace.collect import InputCollector
from nspo_lightning.nullspace.contrast import MOST_FREE
from nspo_lightning.nullspace.covariance import SecondMoment, fold_rows
from nspo_lightning.nullspace.domains import TO_LEARN
from nspo_lightning.nullspace.experts import ExpertInputs
from nspo_lightning.nullspace.passes import CalibrationText, PassPlan

GB = 1e9
SEVEN_B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 64}


class Watched(TorchDispatchMode):
    """Counts kernels and contracted rows, and adds up the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.longest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.")
        self.seen[name] += 1
        if name in ("mm", "addmm") and args[-1].dtype == torch.float32:
            self.longest = max(self.longest, args[-1].shape[0])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def test_every_input_has_one_pass_that_has_room_for_it():
    layer = {"q": 3584, "o": 3584, "gate": 3584, "down": 18944}
    widths = {f"{number}.{name}": width for number in range(28) for name, width in layer.items()}
    for domains in (1, 2, 3, 5):
        for budget in (5 * GB, 8 * GB, 20 * GB, 200 * GB):
            passes, too_wide = plan_passes(widths, domains, budget, "cuda")
            assert sorted([name for members in passes for name in members] + too_wide) == sorted(widths)
            for members in passes:
                assert peak_bytes([widths[name] for name in members], domains, "cuda") <= budget
            for name in too_wide:
                assert peak_bytes([widths[name]], domains, "cuda") > budget
    assert len(plan_passes(widths, 1, 200 * GB, "cuda")[0]) == 1


def test_sketches_that_fit_share_their_passes():
    wide = dict.fromkeys("abcdefghijkl", 18944) | {"other": 14336}
    for domains in (1, 3):
        together = sketched_together(wide, domains, 8 * GB)
        columns = sketch_columns(18944, 8 * GB, domains)
        assert together == list("abcdefghijkl")[: len(together)]
        assert 1 < len(together) < 12
        assert sketch_bytes(18944, columns, domains, len(together)) <= 8 * GB
        assert sketch_bytes(18944, columns, domains, len(together) + 1) > 8 * GB


@pytest.fixture(scope="module")
def seven_b() -> CalibrationText:
    """Qwen2.5-7B's linear maps without their weights: tensors that have a shape alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SEVEN_B, num_attention_heads=28, num_key_value_heads=4, attn_implementation="eager")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    modules = {name: module for name, module in model.named_modules() if name.endswith("proj")}
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    call = ForwardCall(kwargs={"input_ids": ids, "attention_mask": {"full_attention": None}, "use_cache": False})
    return CalibrationText(modules=modules, forward=model, calls=lambda: [call], sharded=False, report=lambda *_: None)


def test_a_7b_model_is_calibrated_exactly_within_8_gb(seven_b):
    plan = PassPlan(seven_b, 8 * GB)
    assert plan.groups is not None
    assert len(plan.groups) == 4 * 28
    assert plan.too_wide == []
    widths = [[seven_b.modules[first].in_features for first in only or ()] for only in plan.passes]
    assert Counter(width for members in widths for width in members) == {3584: 84, 18944: 28}
    assert max(peak_bytes(members, 1, "cuda") for members in widths) <= 8 * GB
    assert len(widths) <= 17
    assert "28 of width 18944 (float32)" in plan.describe()
    assert f"{len(widths)} passes" in plan.describe()


def test_three_domains_of_text_cost_passes_and_not_exactness(seven_b):
    call = next(iter(seven_b.calls()))
    calls = [replace(call, domains=[domain]) for domain in ("code", "facts", "maths")]
    plan = PassPlan(replace(seven_b, calls=lambda: calls), 8 * GB)
    assert plan.domains == 3
    assert plan.too_wide == []
    assert len(plan.passes) <= 30


def test_a_7b_model_that_is_sketched_shares_passes(seven_b):
    plan = PassPlan(seven_b, 5 * GB)
    assert len(plan.too_wide) == 28
    assert "sketched in further passes: 28 of width 18944" in plan.describe()
    groups = []
    while plan.too_wide:
        groups.append(plan.next_sketches())
    assert sum(len(group) for group in groups) == 28
    assert len(groups) <= 14
    with pytest.raises(ValueError, match="Raise `memory_budget_gb`"):
        sketch_columns(18944, 1e6)


def test_a_gpu_gives_a_share_of_what_is_free(seven_b, monkeypatch):
    monkeypatch.setattr(CalibrationText, "device", lambda self: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)  # torch holds it, and 3 GB are unused
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GB)
    plan = PassPlan(seven_b, None)
    assert plan.budget == device_budget(15 * GB) == 9 * GB
    assert None not in plan.passes
    assert PassPlan(seven_b, 8 * GB).budget == 8 * GB


@pytest.mark.parametrize("part", ["experts.gate_up_proj", "experts.down_proj", "gate.weight"])
def test_inputs_of_experts_are_planned_for_where_the_experts_are(part):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 4}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, vocab_size=8, num_hidden_layers=1))
    module, _, parameter = part.partition(".")
    inputs = ExpertInputs.of(model, f"model.layers.0.mlp.{module}", parameter)
    assert inputs is not None
    text = CalibrationText(modules={part: inputs}, forward=model, calls=list, sharded=False, report=lambda *_: None)
    assert text.device() == torch.device("meta")


@pytest.mark.parametrize("domains", [1, 2, 5])
@pytest.mark.parametrize("width", [300, 700])
@pytest.mark.parametrize("at_a_time", [3, 1], ids=["no budget", "a budget for one input"])
@pytest.mark.parametrize("criterion", ["rank", "contrast", "limits"])
def test_a_calibration_holds_no_more_than_the_plan_says(width, domains, at_a_time, criterion):
    layers = nn.ModuleList([nn.Linear(width, 1, bias=False) for _ in range(3)])
    modules = {str(index): layer for index, layer in enumerate(layers)}
    texts = [torch.randn(500, width) for _ in range(12)]

    def forward(x):
        for layer in layers:
            layer(x + 0)

    calls = [ForwardCall(args=(x,), domains=[str(i % domains)] * 500) for i, x in enumerate(texts)]
    weighed, limited = criterion != "rank", criterion == "limits"
    if weighed:
        calls.append(ForwardCall(args=(torch.randn(500, width),), domains=[TO_LEARN] * 500))
    planned = peak_bytes([width] * at_a_time, domains + weighed, "cpu", limits=int(limited) if weighed else None)
    budget = None if at_a_time == 3 else planned / GB
    passes: list[int] = []

    def again():
        passes.append(1)
        return calls

    settings = BasisSettings(criterion="rank", threshold=5)
    if weighed:
        settings = BasisSettings(criterion="contrast", domain_limits={"0": 10.0} if limited else None)
    with Watched() as watched:
        calibrate_modules(modules, forward, again, settings, memory_budget_gb=budget)
    one_batch = 3 * 500 * width * 4
    bases = 3 * ((MOST_FREE * width if weighed else 6) + 96 * limited) * width * 4
    assert len(passes) == 1 if budget is None else len(passes) > 2  # the look at who shares inputs is one more
    assert watched.peak <= planned + one_batch + bases
    assert watched.peak >= 0.4 * planned  # and the plan is no empty one


def test_the_device_is_asked_once_for_a_mask_and_once_for_a_fold():
    layers = nn.ModuleList([nn.Linear(300, 300) for _ in range(4)])
    mask = torch.ones(4, 300)
    mask[:, :7] = 0
    x = torch.randn(4, 300, 300)
    collector: InputCollector[SecondMoment] = InputCollector({str(i): layer for i, layer in enumerate(layers)})
    with collector, Watched() as watched, torch.no_grad():
        for _ in range(5):
            collector.begin(mask)
            nn.Sequential(*layers)(x)
            collector.end()
    folds = 4 * (5 * 4 * 293 // fold_rows(300))
    assert folds == 8
    assert watched.seen["nonzero"] == 5
    assert watched.seen["_local_scalar_dense"] <= folds


def test_float32_products_are_folded_before_they_grow():
    rows = torch.randn(30_000, 300)
    moment = SecondMoment(300)
    with Watched() as watched:
        moment.update(rows[:29_000])
        moment.update(rows[29_000:])
        total = moment.total()
    assert watched.longest == fold_rows(300)
    exact = rows.double().T @ rows.double()
    # Rounding grows with the square root of the rows of a product, not of the text.
    assert float((total - exact).abs().max() / exact.abs().max()) < 5e-7


def test_sums_are_taken_and_not_copied():
    moment = SecondMoment(40)
    moment.update(torch.randn(100, 40))
    expected, memory = moment.total() / 100, moment.total().data_ptr()
    taken = moment.take()
    assert torch.equal(taken, expected)
    assert taken.data_ptr() == memory


class Wide(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 1, bias=False) for _ in range(count)])
        self.calls = 0

    def forward(self, *inputs: torch.Tensor) -> None:
        self.calls += 1
        for layer, x in zip(self.layers, inputs, strict=True):
            layer(x)


def test_sketches_made_together_are_those_made_alone():
    width, columns = 128, 40
    scale = torch.arange(1, width + 1).float().pow(-0.5)
    texts = [[torch.randn(400, width) * scale * (i + 1) for i in range(3)] for _ in range(2)]
    settings = BasisSettings(criterion="rank", threshold=12)

    def bases(inputs: list[int], budget: float):
        model = Wide(len(inputs), width)
        calls = [ForwardCall(args=tuple(text[i] for i in inputs)) for text in texts]
        modules = {str(i): layer for i, layer in zip(inputs, model.layers, strict=True)}
        found = calibrate_modules(modules, model, lambda: calls, settings, memory_budget_gb=budget / GB)
        return found.bases, model.calls

    alone = [bases([i], sketch_bytes(width, columns, 1)) for i in range(3)]
    # The same columns, with room for three: a budget caps the columns, so the width of a sketch is held fixed.
    room = sketch_bytes(width, columns, 1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nspo_lightning.nullspace.budget._MAX_COLUMNS", columns)
        together, calls = bases([0, 1, 2], room)
    assert calls < sum(count for _, count in alone)
    assert calls == max(count for _, count in alone)
    for index, (single, _) in enumerate(alone):
        mine, theirs = together[str(index)], single[str(index)]
        assert torch.allclose(mine.values[:12], theirs.values[:12], rtol=1e-5)
        assert float((mine.vectors.T @ theirs.vectors).double().square().sum()) == pytest.approx(12, abs=1e-4)


def test_a_budget_without_room_for_a_sketch_is_refused_before_the_passes():
    model = nn.ModuleDict({"narrow": nn.Linear(16, 1), "wide": nn.Linear(40_000, 1, bias=False)})
    passes = 0

    def forward(x):
        nonlocal passes
        passes += 1
        model["narrow"](x[:, :16] + 0)
        model["wide"](x)

    budget = 1.1 * peak_bytes([16], 1, "cpu")
    assert budget < sketch_bytes(40_000, 16, 1)
    with pytest.raises(ValueError, match="Raise `memory_budget_gb`"):
        calibrate_modules(
            dict(model.items()),
            forward,
            lambda: [ForwardCall(args=(torch.randn(3, 40_000),))],
            BasisSettings(),
            memory_budget_gb=budget / GB,
        )
    assert passes == 1  # the look at who shares inputs


@pytest.mark.gpu
@pytest.mark.parametrize("criterion", ["auto", "energy"])
def test_the_card_finds_what_the_cpu_finds(criterion):
    width = 1536
    rows = torch.randn(6000, width) * torch.arange(1, width + 1).pow(-0.7)
    rows[::50, 3] = 1e3  # massive rows
    found = {}
    for device in ("cpu", "cuda"):
        layer = nn.Linear(width, 1, bias=False, device=device)
        calls = [ForwardCall(args=(part.to(device),)) for part in rows.split(700)]
        settings = BasisSettings(criterion=criterion)
        found[device] = calibrate_modules({"l": layer}, layer, partial(list, calls), settings).bases["l"]
    ours, theirs = found["cuda"], found["cpu"]
    assert ours.vectors.device.type == "cuda"
    assert ours.protected == theirs.protected
    assert torch.allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-6 * float(theirs.values[0]))
    u, v = ours.vectors.cpu().double(), theirs.vectors.double()
    assert float(torch.linalg.matrix_norm(u - v @ (v.T @ u), 2)) < 1e-2
