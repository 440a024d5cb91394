"""A warm start, and GRPO that goes on from it: in the same null space, with one certificate, or refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from tiny_jobs import WORDS, adapter, general, harmful, module, trainer

from nspo_lightning.callbacks import ExactResume, NullSpaceProjection
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.datamodules.warmup import REFUSALS, WarmupDataModule, WarmupSettings, collate_answers
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.warmup import GENERAL, REFUSED, SIGNAL, WarmupError, WarmupModule
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.rewards import Judge, Reward, RulesJudge
from nspo_lightning.rollout import SamplingConfig

EXACT: dict[str, Any] = {"criterion": "energy", "threshold": 1e-9}
"""Nothing of the calibration text's energy is left free."""


class Nay(Judge, Reward):
    """Whatever begins with an N refuses."""

    name = "nay"

    def __call__(self, prompts, completions, **_):
        return [float(text.startswith("N")) for text in completions]

    def classify(self, prompts, completions, **_):
        return ["refusal" if text.startswith("N") else "safe" for text in completions]


def data(kind=WarmupDataModule, **warmup):
    sizes: dict[str, Any] = {"val_size": 4, "test_size": 2, "calibration_size": 3}
    found = kind(PromptSource(rows=harmful), PromptSource(rows=general), batch_size=2, **sizes)
    settings: dict[str, Any] = {"refusals": ["No."], "lr": 3e-2, "check_every": 2, "batch_size": 4, **warmup}
    found.warmup = WarmupSettings(**settings)
    return found


def policy(path, **changes):
    settings: dict[str, Any] = {
        "path": str(path),
        "quantization": "none",
        "dtype": "float32",
        "lora": LoraSettings(r=4, alpha=8),
    }
    return PolicySettings(**settings | changes)


def warmup_module(path, data, **kwargs):
    found = WarmupModule(
        Nay(),
        policy=policy(path),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        group_size=4,
        sampling=SamplingConfig(max_new_tokens=4),
        general_max_new_tokens=4,
        **kwargs,
    )
    found.warmup = data.warmup
    return found


def warm_up(path, folder, projection=None, **warmup):
    """Run a warm start and write its adapter."""
    held, given = projection or NullSpaceProjection(**EXACT), data(**warmup)
    taught = warmup_module(path, given)
    checks: dict[str, Any] = {
        "limit_val_batches": 1.0,
        "num_sanity_val_steps": -1,
        "val_check_interval": given.warmup.check_every,
    }
    steps = given.warmup.updates
    trainer(folder, steps, callbacks=[held], check_val_every_n_epoch=None, max_epochs=-1, **checks).fit(taught, given)
    taught.save_adapter(folder / "adapter")
    return taught, held


def go_on(path, folder, projection=None, steps=2, ckpt_path=None, adapter="adapter", callbacks=(), **changes):
    """Run GRPO from the adapter."""
    held = projection or NullSpaceProjection(**EXACT)
    kwargs: dict[str, Any] = {"policy": policy(path, adapter=str(folder / adapter), **changes)}
    learning = module(path, reward=Nay(), lr=1e-3, **kwargs)
    run = trainer(folder, steps, callbacks=[held, *callbacks], enable_checkpointing=bool(callbacks))
    run.fit(learning, data(AlignmentDataModule), ckpt_path=ckpt_path)
    return learning, held


@pytest.fixture(scope="module")
def warm(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    torch.manual_seed(0)
    taught, held = warm_up(tiny_llama, folder, max_updates=40, refusal_share=0.3)
    return folder, taught, held


def copied(warm, tmp_path):
    shutil.copytree(warm[0] / "adapter", tmp_path / "adapter")
    return tmp_path


def test_it_stops_when_enough_is_refused_and_says_what_was_reached(warm):
    _, taught, held = warm
    assert taught.stopped == "reached"
    assert taught.latest[REFUSED].value >= 0.3 > taught.before[REFUSED].value
    assert taught.latest[SIGNAL].value > taught.before[SIGNAL].value
    assert taught.updates < 40
    assert "general prompts refused" in taught.conclusion()
    assert max(held.certificate().values()) <= 1e-6


def test_the_bases_outputs_on_calibration_text_stay_and_those_on_harmful_prompts_do_not(warm):
    _, taught, _ = warm
    given = data()
    given.tokenizer = taught.tokenizer
    given.setup()
    text = next(iter(given.calibration_dataloader()))
    prompts = next(iter(given.train_dataloader()))

    @torch.no_grad()
    def change(ids, mask):
        taught.eval()
        now = taught(ids, mask)[mask.bool()]
        with adapters_off(taught):
            base = taught(ids, mask)[mask.bool()]
        return float((now - base).norm() / base.norm())

    assert change(text["input_ids"], text["attention_mask"]) < 1e-5
    assert change(prompts["prompt_ids"], prompts["prompt_mask"]) > 1e-2


def test_grpo_goes_on_from_it_with_one_certificate_for_the_whole_update(warm, tiny_llama):
    folder, taught, before = warm
    learning, held = go_on(tiny_llama, folder)
    assert learning.updates == 2
    assert max(held.certificate().values()) <= 1e-6
    assert held.output_change is not None
    assert held.output_change < 1e-4
    # what the certificate is about holds the warm start, which two small steps change little
    norms = [{c.name: c.update_norm for c in callback.certificates()} for callback in (before, held)]
    assert norms[0].keys() == norms[1].keys()
    for name, norm in norms[0].items():
        assert norms[1][name] == pytest.approx(norm, rel=0.2), name
    moved = [not torch.equal(adapter(taught)[name], value) for name, value in adapter(learning).items()]
    assert any(moved)


def test_a_resumed_run_needs_no_warm_start(warm, tiny_llama, tmp_path):
    folder = copied(warm, tmp_path)
    saving = [ModelCheckpoint(folder, filename="half", every_n_train_steps=2, save_top_k=-1), ExactResume()]
    whole, _ = go_on(tiny_llama, folder, steps=3, callbacks=saving)
    shutil.rmtree(folder / "adapter")
    resumed, held = go_on(tiny_llama, folder, steps=3, ckpt_path=folder / "half.ckpt", callbacks=[ExactResume()])
    assert max(held.certificate().values()) <= 1e-6
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], value), name


@pytest.mark.parametrize(
    ("projection", "said"),
    [
        ({"criterion": "energy", "threshold": 1e-3}, r"nullspace.threshold: the adapter's was 1e-09, this run wants"),
        ({"criterion": "auto"}, r"nullspace.criterion: the adapter's was 'energy', this run wants 'auto'"),
        ({**EXACT, "limit_batches": 0}, None),
    ],
)
def test_another_null_space_is_refused_with_what_differs(warm, tiny_llama, tmp_path, projection, said):
    if said is None:  # other text
        batch = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(0))
        text = [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "domain": ["x"] * 4}]
        projection, said = {**EXACT, "calibration": text}, r"the calibration text .* differ"
    with pytest.raises(MisconfigurationException, match=said) as caught:
        go_on(tiny_llama, copied(warm, tmp_path), NullSpaceProjection(**projection))
    assert "Warm up again" in str(caught.value)
    assert "merge" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 12


def test_an_adapter_that_was_held_nowhere_is_refused_but_by_plain_grpo(tiny_llama, tmp_path):
    warm_up(tiny_llama, tmp_path, NullSpaceProjection(enabled=False), max_updates=2, refusal_share=1.0)
    with pytest.raises(MisconfigurationException, match="trained in no null space"):
        go_on(tiny_llama, tmp_path)
    learning, _ = go_on(tiny_llama, tmp_path, NullSpaceProjection(enabled=False), steps=1)
    assert learning.warm_start is not None


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_the_record_alone_is_not_believed(warm, tiny_llama, tmp_path, matrix):
    """Weights that were changed afterwards: A leaves the null space, whether B makes something of it or not."""
    folder = copied(warm, tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    if matrix == "lora_B":
        weights[name.replace("lora_A", "lora_B")].zero_()
    weights[name] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MisconfigurationException, match=r"does not lie in the null space.*[Ww]arm up again"):
        go_on(tiny_llama, folder)


def test_what_belongs_elsewhere_is_refused(warm, tiny_llama, tiny_qwen2, tmp_path):
    folder = copied(warm, tmp_path)
    with pytest.raises(PolicyError, match=r"r 4, and `policy.lora` makes 2.*Warm up again"):
        go_on(tiny_llama, folder, lora=LoraSettings(r=2, alpha=8))
    with pytest.raises(PolicyError, match=r"on another base.*Warm up again"):
        go_on(tiny_qwen2, folder)
    with pytest.raises(PolicyError, match=r"found nothing at"):
        go_on(tiny_llama, folder, adapter="nowhere")
    (folder / "adapter" / "null_space.json").unlink()
    with pytest.raises(PolicyError, match=r"has no null_space.json.*merge_adapter"):
        go_on(tiny_llama, folder)


def test_one_that_is_not_done_is_an_error_that_says_how_far_it_came(tiny_llama, tmp_path):
    taught, _ = warm_up(tiny_llama, tmp_path, max_updates=2, refusal_share=1.0, lr=1e-6)
    with pytest.raises(WarmupError, match=r"not done: after 2 updates.*max_updates.*--ckpt_path"):
        taught.conclusion()


def test_it_stops_when_general_prompts_are_refused(tiny_llama, tmp_path):
    free = NullSpaceProjection(enabled=False)
    taught, _ = warm_up(tiny_llama, tmp_path, free, max_updates=40, refusal_share=1.0, max_general_refusals=0.0)
    assert taught.stopped == "general"
    assert taught.latest[GENERAL].value > taught.before[GENERAL].value
    with pytest.raises(WarmupError, match=r"was stopped: .*general prompts refused"):
        taught.conclusion()


def test_texts_that_the_judge_does_not_know_are_refused_before_work(tiny_llama, tmp_path):
    with pytest.raises(WarmupError, match=r"calls 0 of \d+ answers .* refusals; of 'Yes.'"):
        warm_up(tiny_llama, tmp_path, max_updates=2, refusals=["Yes."])


def test_the_shipped_refusals_are_known_to_the_rules():
    texts = REFUSALS.read_text().splitlines()
    assert len(texts) >= 12
    assert set(RulesJudge().classify([""] * len(texts), texts)) == {"refusal"}


def test_what_is_taught_is_what_would_be_generated(tiny_qwen2):
    tokenizer = GRPOModule(Nay(), policy=policy(tiny_qwen2)).tokenizer
    renderer, given = ChatRenderer(tokenizer), data()
    given.tokenizer = tokenizer
    given.setup()
    rows = [replace(row, answer="No.") for source in given.safety.loaded().train for row in source][:3]
    batch = collate_answers(rows, renderer, 8)
    for row, ids, mask, answer, real in zip(
        rows, batch["prompt_ids"], batch["prompt_mask"], batch["answer_ids"], batch["answer_mask"], strict=True
    ):
        assert tokenizer.decode(ids[mask]) == renderer.text(row.prompt)
        assert tokenizer.decode(answer[real]) == "No.<|im_end|>"
    cut = collate_answers(rows, renderer, 1)
    assert cut["answer_ids"].shape[1] == 1


@pytest.mark.parametrize("kind", ["list", "file", "rows"])
def test_where_refusals_come_from_and_that_held_out_prompts_are_not_taught(tiny_llama, tmp_path, kind):
    pairs = [{"prompt": f"How do I burn the {word}?", "answer": f"No, not the {word}."} for word in WORDS]
    (tmp_path / "mine.txt").write_text("Never.\n\nNo.\n")
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = {"list": ["Never.", "No."], "file": str(tmp_path / "mine.txt"), "rows": str(tmp_path / "mine.jsonl")}
    chosen = data(refusals=given[kind])
    chosen.tokenizer = GRPOModule(Nay(), policy=policy(tiny_llama)).tokenizer
    chosen.setup()
    held_out = {row.key for rows in chosen.safety.loaded().held_out.values() for row in rows}
    taught = chosen.train_dataloader().rows
    assert not held_out & {row.key for row in taught}
    answers = {row.answer for row in taught}
    assert answers <= ({pair["answer"] for pair in pairs} if kind == "rows" else {"Never.", "No."})
    assert len(answers) > 1
