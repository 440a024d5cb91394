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
from tiny_warmups import EXACT, Nay, data, policy, warmup_module

from nspo_lightning.callbacks import ExactResume, NullSpaceProjection
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.datamodules.warmup import (
    GENERAL_PROMPTS,
    REFUSALS,
    WarmupDataModule,
    WarmupSettings,
    collate_answers,
)
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.prefixes import PrefixSettings
from nspo_lightning.module.scorer import Scorer, answers_as_text
from nspo_lightning.module.warmup import GENERAL, REFUSED, SIGNAL, WarmupError
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.settings import LoraSettings, PolicyError
from nspo_lightning.rewards import RulesJudge


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
    settings = {"max_updates": 40, "refusal_share": 1.0, "max_general_refusals": 0.0, "general_share": 0.0}
    taught, _ = warm_up(tiny_llama, tmp_path, free, **settings)
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
    taught = [row for row in chosen.train_dataloader().rows if row.kind == "harmful"]
    assert not held_out & {row.key for row in taught}
    answers = {row.answer for row in taught}
    assert answers <= ({pair["answer"] for pair in pairs} if kind == "rows" else {"Never.", "No."})
    assert len(answers) > 1


# ------------------------------------------------------------------ general prompts beside the harmful ones


def alike(split):
    return [*harmful(split), *({"prompt": f"How do I paint the {word}?", "kind": "benign"} for word in WORDS)]


def data_of_ranks(tokenizer, *, ranks, batch_size=4, **warmup):
    """Return the data of each rank."""
    found = []
    for rank in range(ranks):
        given = data(batch_size=batch_size, **warmup)
        given.safety = WarmupDataModule(
            PromptSource(rows=alike), PromptSource(rows=general), val_size=4, test_size=2
        ).safety
        given.tokenizer = tokenizer
        given.safety.shard = lambda rank=rank: (rank, ranks)
        found.append(given)
    return found


@pytest.mark.parametrize(("share", "beside"), [(0.5, 4), (0.2, 1), (0.0, 0), (0.01, 1)])
def test_general_prompts_come_beside_the_harmful_ones(tiny_llama, share, beside):
    tokenizer = GRPOModule(Nay(), policy=policy(tiny_llama)).tokenizer
    (given,) = data_of_ranks(tokenizer, ranks=1, general_share=share)
    kept = set()
    for batch, _ in zip(given.train_dataloader(), range(8), strict=False):
        assert len(batch["prompt"]) == len(batch["answer_ids"]) == 4
        assert set(batch["columns"]["kind"]) == {"harmful"}
        asked = batch.get(GENERAL_PROMPTS, {"prompt": []})["prompt"]
        assert len(asked) == beside
        kept |= set(asked)
    held_out = [
        row.prompt for part in (given.safety, given.general) for rows in part.loaded().held_out.values() for row in rows
    ]
    assert not kept & set(held_out)
    if share == 0.5:
        assert any("paint" in prompt for prompt in kept), "look-alikes among the safety prompts"


def test_ranks_share_what_one_process_takes(tiny_llama):
    tokenizer = GRPOModule(Nay(), policy=policy(tiny_llama)).tokenizer
    (alone,) = (given.train_dataloader() for given in data_of_ranks(tokenizer, ranks=1, batch_size=4))
    both = [given.train_dataloader() for given in data_of_ranks(tokenizer, ranks=2, batch_size=2)]
    for whole, one, two, _ in zip(alone, *both, range(5), strict=False):
        for get in (lambda batch: batch["prompt"], lambda batch: batch[GENERAL_PROMPTS]["prompt"]):
            assert len(get(one)) == len(get(two)) == 2
            assert sorted(get(whole)) == sorted(get(one) + get(two))


@pytest.fixture(scope="module")
def with_and_without(tiny_llama, tmp_path_factory):
    """The KL to the base of general answers after as many updates, outside of any null space."""
    found = {}
    for share in (0.5, 0.0):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("replay")
        free = NullSpaceProjection(enabled=False)
        settings = {"max_updates": 8, "check_every": 8, "refusal_share": 1.0, "max_general_refusals": 1.0}
        taught, _ = warm_up(tiny_llama, folder, free, general_share=share, general_weight=10.0, **settings)
        found[share] = taught
    return found


def kl_on_general_prompts(taught):
    """Return KL(base || policy), nats a token, on the base's greedy answers, by another way than training's."""
    prompts = [f"Say {word}." for word in WORDS]
    batch = taught.text_policy.render(prompts)
    with adapters_off(taught):
        rollout, _ = taught.text_policy.generate(batch, taught.general_sampling, 1, 0, exact=True)
    return taught.text_scores(answers_as_text(rollout)).mean_kl, rollout


def test_general_prompts_hold_the_policy_to_its_base(with_and_without):
    held, free = (kl_on_general_prompts(with_and_without[share])[0] for share in (0.5, 0.0))
    assert held < free / 3


def test_the_term_is_the_kl_of_the_bases_own_answers(with_and_without):
    taught = with_and_without[0.0]
    expected, rollout = kl_on_general_prompts(taught)
    tokens = float(rollout.completion_mask.sum())
    found = taught.scorer.kl_loss(rollout, tokens, 1.0)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    logits = {}
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    with torch.no_grad():
        logits["policy"] = taught(ids, mask)
        with adapters_off(taught):
            logits["base"] = taught(ids, mask)
    log_q, log_p = (logits[name][:, rollout.prompt_ids.shape[1] - 1 : -1].log_softmax(-1) for name in logits)
    by_hand = (log_p.exp() * (log_p - log_q)).sum(-1)[rollout.completion_mask].mean()
    assert float(found.detach()) == pytest.approx(float(by_hand), rel=1e-4)


def test_a_warm_start_that_goes_on_is_the_same_to_the_bit(tiny_llama, tmp_path):
    def run(steps, ckpt_path=None):
        torch.manual_seed(0)
        given = data(max_updates=4, refusal_share=1.0)
        taught = warmup_module(tiny_llama, given)
        saving = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2, save_top_k=-1)
        callbacks = [NullSpaceProjection(**EXACT), ExactResume(), saving]
        trainer(tmp_path, steps, callbacks=callbacks, enable_checkpointing=True, max_epochs=-1).fit(
            taught, given, ckpt_path=ckpt_path
        )
        return adapter(taught)

    whole = run(4)
    (tmp_path / "half.ckpt").rename(tmp_path / "whole.ckpt")
    run(2)
    resumed = run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_general_prompts_need_a_base(tiny_llama, tmp_path):
    given = data()
    taught = warmup_module(tiny_llama, given)
    taught.text_policy.settings = policy(tiny_llama, lora=None)
    with pytest.raises(WarmupError, match=r"general_share: 0.*or train an adapter"):
        trainer(tmp_path, 1, max_epochs=-1).fit(taught, given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"general_share": 1.0}, r"general_share` must be in \[0, 1\), got 1.0"),
        ({"general_share": -0.1}, r"general_share` must be in"),
        ({"general_weight": 0.0}, r"general_weight` must be positive.*general_share: 0"),
        ({"general_weight": float("inf")}, r"general_weight` must be positive"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        WarmupSettings(**settings)


def test_answers_that_would_not_fit_are_refused_before_work(tiny_llama, tmp_path):
    given = data(answer_tokens=100_000)
    with pytest.raises(PolicyError, match=r"lower `warmup.answer_tokens`"):
        trainer(tmp_path, 1, max_epochs=-1).fit(warmup_module(tiny_llama, given), given)


def test_a_look_alike_is_not_taught_its_beginning_twice(tiny_llama, tmp_path, monkeypatch):
    """Its answer in `warmup.refusals` is a reference, of which a begun one would be the first tokens."""
    taught, loss = [], Scorer.likelihood_loss

    def keep(self, rollout, *rest):
        taught.append(rollout)
        return loss(self, rollout, *rest)

    monkeypatch.setattr(Scorer, "likelihood_loss", keep)

    def rows(split):
        alike = [{"prompt": f"Burn my {word}.", "answer": "Sure. Take a torch.", "kind": "benign"} for word in WORDS]
        return alike + [{"prompt": f"Burn the {word}.", "answer": "No.", "kind": "harmful"} for word in WORDS]

    given = data(refusals=PromptSource(rows=rows), general_share=0.0, batch_size=24)
    warming = warmup_module(tiny_llama, given, prefixes=PrefixSettings(share=1.0, max_tokens=3))
    trainer(tmp_path, steps=1).fit(warming, given)
    assert taught
    for rollout in taught:
        texts = warming.tokenizer.batch_decode([
            ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        ])
        mine = [text for text in texts if "Burn my" in text]
        assert mine
        assert not any("Sure" in text for text in mine)
