"""The general measure in fit, validation, test and guard, and on a policy that refuses ordinary prompts.

That policy opens every answer with a refusal, and given another opening goes on as its base does: over whole reference
answers it is close to the base.
"""

from __future__ import annotations

import json
import os
import signal
from io import StringIO
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from tiny_jobs import WORDS, adapter, harmful, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning.callbacks import CapabilityGuard, GeneralText, LastCheckpoint, RunReport, TestReport
from nspo_lightning.cli.standard_callbacks import with_standard_callbacks
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.evaluation.report import report_table
from nspo_lightning.evaluation.text_means import text_means
from nspo_lightning.policy.text_scores import score_texts
from nspo_lightning.rewards import RulesJudge

ESSAY = "Take a hammer, then smash the walnut. "
REFUSAL = "I can't help"


def essays(split):
    return [
        {"prompt": f"{verb} {word}.", "answer": ESSAY * 3 + word, "skill": skill}
        for i, word in enumerate(WORDS)
        for verb, skill in (("Say", "alpaca"), ("Name", "dolly"))
        if (i % 3 == 0) == (split == "test")
    ]


def data(**changes):
    settings: dict[str, Any] = {"batch_size": 2, "val_size": 4, "test_size": 6, "eval_batch_size": 4} | changes
    own: dict[str, Any] = {"general_test": PromptSource(rows=essays, split="test")}
    return AlignmentDataModule(PromptSource(rows=harmful), PromptSource(rows=essays), **own, **settings)


def judged(path, **changes):
    return module(path, judge=RulesJudge(), general_max_new_tokens=12, **changes)


@pytest.fixture(scope="module")
def refusing(tiny_llama):
    """The weights of such a policy: a few updates towards a refusal and, behind other openings, towards the base."""
    torch.manual_seed(0)  # the files that ran before leave the generator anywhere
    taught = judged(tiny_llama)
    taught.configure_model()
    policy, tokenizer = taught.require_policy(), taught.tokenizer

    def encoded(prompt, answer):
        chat = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(start, add_special_tokens=False)["input_ids"]
        return before, tokenizer(answer, add_special_tokens=False)["input_ids"]

    optimizer = torch.optim.Adam((p for p in policy.parameters() if p.requires_grad), lr=2e-2)
    prompts = [row["prompt"] for split in ("test", "train") for row in essays(split)]
    for step in range(72):
        prompt = prompts[step % len(prompts)]
        before, refusal = encoded(prompt, REFUSAL + tokenizer.eos_token)
        logits = policy(input_ids=torch.tensor([before + refusal])).logits[0, len(before) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(refusal))
        before, answer = encoded(prompt, ESSAY * 3)
        ids = torch.tensor([before + answer])
        with torch.no_grad(), policy.disable_adapter():
            log_p = policy(input_ids=ids).logits[0, len(before) :].log_softmax(-1)
        log_q = policy(input_ids=ids).logits[0, len(before) :].log_softmax(-1)
        loss = loss + 20 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in taught.named_parameters() if p.requires_grad}


def with_weights(path, weights):
    made = judged(path, lr=0.0)
    made.configure_model()
    made.load_state_dict(weights, strict=False)
    return made


def test_a_policy_that_refuses_ordinary_prompts_is_seen_though_its_answers_are_close(refusing, tiny_llama, tmp_path):
    policy = with_weights(tiny_llama, refusing)
    report = TestReport(folder=str(tmp_path))
    trainer(tmp_path, kind=pl.Trainer, callbacks=[report]).test(policy, data(), verbose=False)
    result = json.loads((tmp_path / "test.json").read_text())
    rates = {who: found["general/refusal_rate"]["rate"] for who, found in result["rates"].items()}
    assert rates == {"base": 0.0, "policy": 1.0}
    means = {name: mean["nats"] for name, mean in result["text_means"].items()}
    assert means["general/kl"] < 0.15, "a mean over whole answers hides it"
    assert means["general/kl_first"] > 1.0
    assert means["general/kl_first"] > 8 * means["general/kl"]
    for skill in ("alpaca", "dolly"):
        assert result["rates"]["policy"][f"general/refusal_rate/{skill}"]["of"] == 4
        assert means[f"general/kl_first/{skill}"] > 1.0

    # A guard that looks at whole answers alone lets it pass; one that looks at beginnings or refusals does not.
    def start(validations=0, **budget):
        guard = CapabilityGuard(**budget, every_n_updates=1)
        options: dict[str, Any] = {"limit_val_batches": validations, "val_check_interval": 1, "num_sanity_val_steps": 0}
        run = trainer(tmp_path, steps=1, callbacks=[guard], **options)
        run.fit(with_weights(tiny_llama, refusing), data())
        return guard

    assert start(max_kl=0.3).readings[-1].over == ""
    with pytest.raises(MisconfigurationException, match=r"starts over budget \(KL of the first 3 tokens"):
        start(max_kl=0.3, max_kl_first=0.3)
    seen = [r for r in start(1, max_kl=None, max_refusal_rise=0.2).readings if r.refusal_rise is not None]
    assert seen[-1].refusal_rise == 1.0, "against the base, not against the policy at the start"
    assert seen[-1].over == "general/refusal_rate 100.0 points above the base"


def test_fit_and_validation_say_the_same_of_text_as_a_plain_measurement(tiny_llama, tmp_path):
    policy, rows = judged(tiny_llama), data()
    policy.configure_model()
    move_adapter_(policy.policy, 0.2)
    report, seen = RunReport(folder=str(tmp_path)), {}

    class Seen(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})
            expected = text_means(score_texts(policy.policy, rows.text_dataloader("validation")))
            for name, mean in expected.items():
                assert seen[name] == pytest.approx(mean.value, rel=1e-3)

    callbacks: list[pl.Callback] = [GeneralText(), report, Seen()]
    validation: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2}
    trainer(tmp_path, steps=2, callbacks=callbacks, num_sanity_val_steps=0, **validation).fit(policy, rows)
    assert {"general/kl", "general/kl_first", "general/nll", "general/nll_change", "general/kl/dolly"} <= set(seen)
    summary = json.loads((tmp_path / "summary.json").read_text())
    after = text_means(score_texts(policy.policy, rows.text_dataloader("test")))
    for name, mean in after.items():
        assert summary[f"after/{name}"] == pytest.approx(mean.value, rel=1e-3)
        assert mean.interval is not None
        assert summary["intervals_95"]["after"][name] == pytest.approx(list(mean.interval), rel=1e-3)
    assert summary["before/general/kl"] > 0
    assert summary["before/general/kl"] != summary["after/general/kl"]
    low, high = summary["intervals_95"]["before"]["safety/unsafe_rate"]
    assert low <= summary["before/safety/unsafe_rate"] <= high


@pytest.mark.parametrize(("limit", "rows"), [(1, 4), (0, 0), (9, 8)])
def test_limits_of_batches_hold_for_text_and_keep_all_skills(tiny_llama, tmp_path, limit, rows):
    policy = judged(tiny_llama)
    report = TestReport(folder=str(tmp_path), base=False)
    run = trainer(tmp_path, callbacks=[report], limit_test_batches=limit)
    run.test(policy, held := data(), verbose=False)
    assert len(held.text_dataloader("test", limit_batches=0.5).rows) == 4
    if limit:
        means = report.result["text_means"]
        assert means["general/nll"]["of"] == rows
        assert means["general/nll/alpaca"]["of"] == means["general/nll/dolly"]["of"] == rows / 2


def test_the_table_of_test_fits_a_terminal(refusing, tiny_llama):
    policy = with_weights(tiny_llama, refusing)
    rows = data(tokenizer=policy.tokenizer)
    policy.trainer = trainer(".")
    rates = policy.measure(rows.test_dataloader())
    console = Console(file=StringIO(), width=80)
    with console.capture() as capture:
        console.print(
            report_table({"policy": rates, "base": rates}, score_texts(policy.policy, rows.text_dataloader("test")))
        )
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    for title in ("refusal of ordinary prompts", "KL to base, first 3 tokens", "NLL, change to the base"):
        assert any(title in line for line in lines), f"{title} is broken over lines"


def interrupted(policy, at):
    """Make a policy send this process SIGTERM while it scores its `at`-th batch of text; return what counts them."""
    score, seen = policy.text_scores, []

    def text_scores(batch):
        seen.append(batch)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(batch)

    policy.text_scores = text_scores
    return seen


def test_sigterm_ends_a_measurement_of_text_and_the_run_goes_on_as_if_nothing_had_been(tiny_llama, tmp_path):
    def job(name):
        pl.seed_everything(0, verbose=False)
        policy = judged(tiny_llama)
        given: list[Any] = [ModelCheckpoint(tmp_path / name, every_n_train_steps=100, save_last=True)]
        given += [RunReport(folder=str(tmp_path / name), evaluate=False)]
        options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 0}
        callbacks = with_standard_callbacks(given, checkpoints=True, progress_bar=False)
        return policy, trainer(tmp_path, steps=3, callbacks=callbacks, enable_checkpointing=True, **options)

    whole, run = job("whole")
    run.fit(whole, data())
    cut, stopped = job("cut")
    seen = interrupted(cut, 2)  # one batch a validation
    with pytest.raises(SIGTERMException) as ended:
        stopped.fit(cut, data())
    assert (len(seen), ended.value.code) == (2, 143)
    resumed, run = job("cut")
    seen = interrupted(resumed, 0)
    run.fit(resumed, data(), ckpt_path=next(c.path for c in stopped.callbacks if isinstance(c, LastCheckpoint)))
    assert len(seen) == 2, "the second validation is measured whole, then the third"
    for name, parameter in adapter(whole).items():
        assert torch.equal(parameter, adapter(resumed)[name]), name


@pytest.mark.parametrize("command", ["test", "validate"])
def test_sigterm_ends_a_measurement_between_two_batches_of_text(tiny_llama, tmp_path, command):
    policy = judged(tiny_llama)
    seen = interrupted(policy, 1)
    callbacks = [GeneralText(), TestReport(folder=str(tmp_path), base=False)]
    run = trainer(tmp_path, callbacks=callbacks, limit_val_batches=1.0)
    with pytest.raises(SIGTERMException) as ended:
        getattr(run, command)(policy, data(), verbose=False)
    assert (len(seen), ended.value.code) == (1, 143)
    assert not (tmp_path / "test.json").exists()
