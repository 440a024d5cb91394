"""Mixtures of experts: what is trained is held by outputs, and what is refused has a cure that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_jobs import datamodule, module
from tiny_jobs import trainer as job
from tiny_policies import largest_change, logits
from transformers import AutoModelForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.checkpoints import STATE_KEY
from nspo_lightning.export.card import rounding_sentences
from nspo_lightning.export.merge import merge_, unquantised_base
from nspo_lightning.export.trained import ExportSource, export_source
from nspo_lightning.nullspace import SecondMoment, plan_layers
from nspo_lightning.nullspace.collect import InputCollector
from nspo_lightning.policy.adapter import load_adapter_
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_base, load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings

CPU = torch.device("cpu")
IDS = torch.arange(10, 50).view(4, 10)
OTHER = torch.arange(60, 124).view(8, 8)
PADDED = {
    "input_ids": torch.cat([torch.full((4, 3), 7), IDS], 1),
    "attention_mask": torch.cat([torch.zeros(4, 3, dtype=torch.long), torch.ones_like(IDS)], 1),
    "domain": ["even", "odd", "even", "odd"],
}
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda **options: transformers.Qwen3MoeConfig(
        **COMMON,
        **options,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": lambda **options: transformers.MixtralConfig(
        **COMMON, **options, intermediate_size=96, num_local_experts=4
    ),
}


@pytest.fixture(scope="session", params=CONFIGS)
def tiny_experts(request, tokenizer, tmp_path_factory):
    """A random mixture of experts."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp(request.param)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = CONFIGS[request.param](vocab_size=len(tokenizer), **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(path: Any, targets: Any, **options: Any) -> PolicySettings:
    lora = None if targets is None else LoraSettings(r=4, target_modules=targets)
    return PolicySettings(**{"path": str(path), "quantization": "none", "dtype": "float32", "lora": lora} | options)


def fit(path: Any, folder: Any, targets: Any, steps: int = 4, **options: Any) -> tuple[Any, NullSpaceProjection]:
    policy = module(path, policy=settings_of(path, targets))
    defaults: dict[str, Any] = {"calibration": [{"input_ids": IDS}], "criterion": "energy", "threshold": 0.0}
    callback = NullSpaceProjection(**defaults | {"cache_dir": None} | options)
    job(folder, steps=steps, callbacks=[callback]).fit(policy, datamodule())
    return policy.require_policy(), callback


def check_held(path: Any, trained: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(path)
    assert largest_change(logits(trained, OTHER), logits(base, OTHER)) > 1e-2
    assert largest_change(logits(trained, IDS), logits(base, IDS)) < 1e-5


@pytest.mark.parametrize("text", [{"input_ids": IDS}, PADDED], ids=["no mask", "padding"])
def test_adapters_of_experts_and_routers_are_held(tiny_experts, tmp_path, text):
    trained, callback = fit(tiny_experts, tmp_path, "all-linear", calibration=[text])
    check_held(tiny_experts, trained)
    assert callback.verification is not None
    assert callback.calibration is not None
    held = {name.partition(".mlp.")[2] for name in callback.calibration.layer_names()} - {""}
    adapted = {n.partition(".mlp.")[2] for n, p in trained.named_parameters() if ".mlp." in n and p.requires_grad}
    assert held
    assert {name.partition(".lora_")[0] for name in adapted} == held
    assert callback.verification.layers == 2 * (4 + len(held))
    assert callback.verification.change < 1e-5
    widths = {name: callback.calibration.basis_of(name).width for name in callback.calibration.layer_names()}
    assert {widths[name] for name in widths if name.endswith(".experts")} <= {96}  # what the down projections read
    trained.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_experts)
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert largest_change(logits(loaded, OTHER), logits(trained, OTHER)) < 1e-6
    assert largest_change(logits(loaded.merge_and_unload(), OTHER), logits(trained, OTHER)) < 1e-5
    again = load_policy(settings_of(tiny_experts, "all-linear"), CPU)
    load_adapter_(again, tmp_path / "adapter")
    assert largest_change(logits(again, OTHER), logits(trained, OTHER)) < 1e-6


def test_an_adapter_of_experts_is_certified_as_the_dense_update_is(tiny_experts, tmp_path):
    trained, callback = fit(tiny_experts, tmp_path, "all-linear")
    certificates = {c.name: c for c in callback.certificates()}
    wrappers = [(n, m) for n, m in trained.named_modules() if hasattr(m, "parameter_name") and hasattr(m, "lora_A")]
    assert wrappers
    for name, wrapper in wrappers:
        dense = wrapper.get_delta_weight("default").double()
        found = certificates[f"policy.{name}"]
        assert found.update_norm == pytest.approx(float(dense.norm()), rel=1e-4)
        assert found.leak < 1e-5


def test_what_is_said_to_enter_experts_is_what_their_weights_read(tiny_experts):
    """Against the eager implementation, whose linear maps can be listened to one by one."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_experts, experts_implementation="eager").requires_grad_(True)
    layers = [layer for layer in plan_layers(model).layers if ".experts." in layer.name]
    assert sorted({layer.name.rpartition(".")[2] for layer in layers}) == ["down_proj", "gate_up_proj"]
    reader = model.model.layers[0].mlp.experts
    read: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}

    class Listening(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear:
                for part, seen in read.items():
                    whole = reader.get_parameter(part)
                    if args[1].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                        seen.append(args[0].detach())
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Listening():
        model(input_ids=IDS)
    collector: InputCollector[SecondMoment] = InputCollector({layer.name: layer.module for layer in layers})
    with torch.no_grad(), collector:
        collector.begin()
        model(input_ids=IDS)
        collector.end()
    for part, seen in read.items():
        (moment,) = collector.moments[f"model.layers.0.mlp.experts.{part}"].values()
        rows = torch.cat(seen)
        if part == "gate_up_proj":  # once a token here, once an expert there: the same directions
            rows = rows.unique(dim=0)
        wanted = rows.double().T @ rows.double() / len(rows)
        assert float((moment.take() - wanted).norm() / wanted.norm()) < 1e-5


@torch.no_grad()
def test_experts_are_computed_again_once_a_block_and_not_for_other_inputs(tiny_experts):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_experts).requires_grad_(True)
    modules = {layer.name: layer.module for layer in plan_layers(model).layers}
    ran: list[int] = []
    for block in model.model.layers:
        block.mlp.experts.act_fn.register_forward_hook(lambda *_: ran.append(1))

    def activations(names: list[str], **options: Any) -> InputCollector[SecondMoment]:
        ran.clear()
        collector: InputCollector[SecondMoment] = InputCollector({name: modules[name] for name in names}, **options)
        with collector:
            collector.begin()
            model(input_ids=IDS)
            collector.end()
        return collector

    activations([])
    alone = len(ran)
    down = [name for name in modules if name.endswith("down_proj") and ".experts." in name]
    activations(down)
    once = len(ran)
    assert once > alone
    groups = activations(list(modules)).groups
    assert len(ran) == once
    name = "model.layers.0.mlp"
    assert groups[f"{name}.gate.weight"] == [f"{name}.gate.weight", f"{name}.experts.gate_up_proj"]
    activations(list(modules), groups=groups, only=["model.layers.0.self_attn.q_proj"])
    assert len(ran) == alone


def test_experts_of_another_form_are_refused_with_names_that_train(tokenizer, tmp_path):
    """GPT-OSS: transposed weights, biases and an activation of its own."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.GptOssConfig(
        **COMMON, **ids, vocab_size=len(tokenizer), head_dim=16, intermediate_size=96, num_local_experts=4
    )
    path = tmp_path / "gpt_oss"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    adapted = get_peft_model(
        load_base(settings_of(path, None, attn_implementation="eager"), CPU),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    )
    refusals = plan_layers(adapted).refusals
    assert refusals
    assert all("`target_modules: [q_proj, k_proj, v_proj, o_proj]`" in str(refusal) for refusal in refusals)


def test_in_16_bits_adapters_of_experts_are_refused_with_ways_out(tiny_experts, tmp_path):
    """PEFT adds their update to the weight, in the weight's dtype: rounding alone leaks about 4e-3 of it."""
    policy = module(tiny_experts, policy=settings_of(tiny_experts, "all-linear", dtype="bfloat16"))
    callback = NullSpaceProjection(calibration=[{"input_ids": IDS}], cache_dir=None)
    cure = r"(?s)rounded to torch\.bfloat16.*float32, or adapt attention.*\[q_proj, k_proj, v_proj, o_proj\]"
    with pytest.raises(MisconfigurationException, match=cure):
        job(tmp_path, steps=1, callbacks=[callback]).fit(policy, datamodule())


def test_an_export_of_such_an_adapter_names_the_one_that_the_run_wrote(tiny_experts, tmp_path):
    settings = settings_of(tiny_experts, "all-linear")
    weights = {f"policy.{n}": p for n, p in load_policy(settings, CPU).named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in weights)
    state = {"state_dict": weights, STATE_KEY: {"policy_path": str(tiny_experts)}}
    with pytest.raises(PolicyError, match=r"fused weights.*/run/adapter"):
        export_source(Path("last.ckpt"), state, tmp_path / "run" / "config.yaml", {}, settings)


def test_merged_experts_are_certified_and_the_sentence_says_of_how_many(tiny_experts, tmp_path):
    trained, callback = fit(tiny_experts, tmp_path, None, unprotected="warn")
    settings = settings_of(tiny_experts, None)
    source = ExportSource(
        checkpoint=Path("last.ckpt"),
        config={},
        settings=settings,
        weights={f"policy.{n}": p.detach() for n, p in trained.named_parameters() if p.requires_grad},
        updates=4,
        state={"policy": policy_fingerprint(load_policy(settings, CPU))},
        projection=None,
        summary={},
        basis=callback.calibration,
        basis_path=None,
    )
    held = {c.name: c for c in callback.certificates()}
    merged = merge_(unquantised_base(source), source, "float32")
    measured = {f"policy.{layer.name}": layer for layer in merged if layer.after is not None}
    assert {name.removesuffix(".weight") for name in measured} == {name.removesuffix(".weight") for name in held}
    assert any(name.endswith("experts.gate_up_proj") for name in measured)
    for name, layer in measured.items():
        certificate = held.get(name) or held[name.removesuffix(".weight")]
        assert layer.before is not None
        assert layer.after is not None
        assert layer.before.update_norm == pytest.approx(certificate.update_norm, rel=1e-4)
        assert layer.after.leak == pytest.approx(certificate.leak, abs=1e-6)
    said = "\n".join(rounding_sentences(merged, "float32", "no basis"))
    assert f"measured on {len(held)} of {len(merged)} matrices" in said
    alone = rounding_sentences([layer for layer in merged if layer.after is not None], "float32", "no basis")
    assert " matrices" not in "\n".join(alone)


def test_names_of_attention_layers_leave_experts_out(tiny_experts, tmp_path):
    trained, callback = fit(tiny_experts, tmp_path, ["q_proj", "k_proj", "v_proj", "o_proj"])
    check_held(tiny_experts, trained)
    assert callback.verification is not None
    assert callback.verification.layers == 8


def test_whole_weights_of_experts_and_routers_are_held(tiny_experts, tmp_path):
    trained, callback = fit(tiny_experts, tmp_path, None, unprotected="freeze")
    check_held(tiny_experts, trained)
    base = AutoModelForCausalLM.from_pretrained(tiny_experts)
    after, before = (model.model.layers[0].mlp for model in (trained, base))
    assert not torch.equal(after.experts.down_proj, before.experts.down_proj)
    assert not torch.equal(after.experts.gate_up_proj, before.experts.gate_up_proj)
    assert not torch.equal(after.gate.weight, before.gate.weight)
    assert callback.calibration is not None
    assert any("experts.down_proj" in name for name in callback.calibration.layer_names())
    assert max(leak for name, leak in callback.certificate().items() if "gate" in name) < 1e-4


def test_a_matrix_that_stands_beside_no_experts_is_refused(tiny_experts):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_experts)
    model.model.layers[0].odd = model.model.layers[0].mlp.gate.requires_grad_(True)
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    refused = [str(refusal) for refusal in plan_layers(model).refusals]
    assert any(text.startswith("model.layers.0.odd.weight: a parameter of shape") for text in refused)
