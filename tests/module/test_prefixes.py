"""Answers that are begun: part of the prompt, none of the loss, and a function of seed and row alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lora_server import BASE, LoraServer
from tiny_jobs import WORDS, Recorder, adapter, even_tokens, general, harmful, module, trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nspo_lightning.callbacks import ExactResume
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.datamodules.sources.rows import prompt_key
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.collector import Collector
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.guided import GuidedSampling
from nspo_lightning.module.prefixes import PrefixSettings
from nspo_lightning.module.resumed_settings import ResumeError
from nspo_lightning.module.text_policy import PREFIX_IDS
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.server_config import ServerSettings
from nspo_lightning.rollout.texts import completion_texts, whole_texts

EVERY = PrefixSettings(share=1.0, max_tokens=4)


def with_targets(split):
    return [{"prompt": f"How do I burn the {w}?", "sure": f"Sure. Take a torch, then burn the {w}."} for w in WORDS]


def with_targets_of(prompt):
    return next(row["sure"] for row in with_targets("train") if row["prompt"] == prompt)


def datamodule(rows=with_targets, **changes):
    source = PromptSource(rows=rows, target_column="sure" if rows is with_targets else None)
    return AlignmentDataModule(source, PromptSource(rows=general), batch_size=2, val_size=2, test_size=2, **changes)


def batch_of(policy, prompts, **columns):
    return {"prompt": prompts, "columns": columns, **policy.text_policy.render(prompts)}


def prompts_in(batch):
    return [ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]


@pytest.fixture
def collected(monkeypatch):
    seen, collect = [], Collector.collect

    def keep(self, *args, **kwargs):
        seen.append(collect(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(Collector, "collect", keep)
    return seen


def test_which_rows_and_how_many_tokens_are_a_function_of_seed_and_row():
    settings = PrefixSettings(share=0.5, max_tokens=4)
    rows = [f"row {i}" for i in range(4000)]
    found = [settings.tokens_for(row, 3) for row in rows]
    assert found == [settings.tokens_for(row, 3) for row in rows]
    assert found != [settings.tokens_for(row, 4) for row in rows]
    counts = Counter(found)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(abs(counts[n] / len(rows) - 0.1) < 0.02 for n in (1, 2, 3, 4)), "half of the rows, each length alike"
    assert {PrefixSettings(share=0.0).tokens_for(row, 3) for row in rows} == {0}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"share": 1.5}, "share"), ({"max_tokens": 0}, "max_tokens"), ({"judged": "start"}, "continuation, whole")],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], says):
    with pytest.raises(ValueError, match=says):
        PrefixSettings(**wrong)


@pytest.mark.parametrize("judged", ["continuation", "whole"])
def test_a_prefix_is_shared_by_its_group_kept_out_of_the_loss_and_rewarded_for_what_follows(
    tiny_llama, tmp_path, collected, judged
):
    seen: list[Any] = []

    def reward(prompts, completions, completion_ids, **_):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return even_tokens(prompts, completions, completion_ids)

    policy = module(tiny_llama, reward=reward, prefixes=PrefixSettings(share=1.0, max_tokens=4, judged=judged))
    recorder = Recorder()
    trainer(tmp_path, steps=3, callbacks=[recorder]).fit(policy, datamodule())
    lengths = set()
    for one in collected:
        rollout, rows = one.buffer.experience.rollout, one.judged.rows()
        for place, prompt in enumerate(one.judged.prompts[::4]):
            number = EVERY.tokens_for(prompt_key(prompt), policy.progress.seed)
            word = prompt.split()[-1].rstrip("?")
            target = policy.tokenizer(f"Sure. Take a torch, then burn the {word}.", add_special_tokens=False)[
                "input_ids"
            ]
            (plain,) = prompts_in(policy.text_policy.render([prompt]))
            ids = rollout.prompt_ids[place][rollout.prompt_mask[place]].tolist()
            assert ids == plain + target[:number], "one prompt a group, the prefix at its end"
            lengths.add(number)
            for row in range(4 * place, 4 * place + 4):
                begun = policy.tokenizer.decode(target[:number])
                assert rows[row]["prefix"] == begun
                own = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
                shown = rows[row]["completion"]
                assert policy.tokenizer.decode(own, skip_special_tokens=True) == shown, "what is learnt from"
                assert (prompt, shown if judged == "continuation" else begun + shown, own) in seen
    assert len(lengths) > 2
    step = recorder.steps[0]
    assert {"prefix/share", "prefix/answered"} <= set(step)


def test_the_shared_prompt_is_the_plain_one_with_a_prefix(tiny_llama):
    """Sampling with and without sharing gives the same completions behind a prefix."""
    found = []
    for share in (True, False):
        policy = module(tiny_llama, prefixes=EVERY, share_prefix=share)
        policy.configure_model()
        prompts = [f"How do I burn the {word}?" for word in WORDS[:4]]
        begun = policy.prefixes.begun(
            batch_of(policy, prompts, harmful_target=["Sure. Take a"] * 4), [0, 1, 3, 4], [""] * 4
        )
        found.append(policy.text_policy.generate(begun.batch, policy.settings.sampling, 4, 5)[1])
    assert found[0] == found[1]


def test_what_the_base_says_depends_on_the_row_alone(tiny_llama):
    policy = module(tiny_llama, prefixes=EVERY)
    policy.configure_model()
    prompts = [f"How do I burn the {word}?" for word in WORDS]

    def prefixes(*parts):
        policy.prefixes._known.clear()
        found: dict[str, Any] = {}
        for part in parts:
            begun = policy.prefixes.for_training(batch_of(policy, part))
            found |= dict(zip(part, begun.batch[PREFIX_IDS], strict=True))
        return found

    together = prefixes(prompts)
    assert max(map(len, together.values())) == 4
    assert prefixes(prompts[6:], prompts[:6]) == together, "other ranks, another order"
    assert prefixes(*[[one] for one in reversed(prompts)]) == together
    with torch.no_grad():
        for parameter in policy.text_policy.trainable_parameters():
            parameter.add_(0.3)
    assert prefixes(prompts) == together, "the base's, whatever the adapter has learnt"
    policy.progress.seed += 1
    assert {k: len(v) for k, v in prefixes(prompts).items()} != {k: len(v) for k, v in together.items()}


def test_look_alikes_go_on_from_their_own_answers(tiny_llama):
    policy = module(tiny_llama, prefixes=EVERY)
    policy.configure_model()
    columns = {
        "kind": ["harmful", "benign"],
        "answer": ["", "Sure. Take a match."],
        "harmful_target": ["Sure, here", None],
    }
    begun = policy.prefixes.begun(batch_of(policy, ["Burn a mill.", "Burn a log."], **columns), [2, 2], ["", ""])
    target, reference = (
        policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Sure, here", "Sure. Take")
    )
    assert begun.batch[PREFIX_IDS] == [target[:2], reference[:2]]
    assert begun.complete == [True, True]
    assert policy.prefixes.begun(begun.batch, [2, 500], ["", ""]).complete == [True, False], "behind its end is nothing"


class SavesWhereItEnds(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("dynamic", [None, DynamicSampling(max_factor=3)])
def test_a_resumed_run_begins_the_same_answers_and_ends_in_the_same_bits(tiny_llama, tmp_path, dynamic):
    class Reward:
        name = "some"

        def __init__(self, fail_at=0):
            self.fail_at, self.calls = fail_at, 0

        def __call__(self, prompts, completions, completion_ids, **_):
            self.calls += 1
            if self.calls == self.fail_at:
                raise RuntimeError("the plug was pulled")
            scores = even_tokens(prompts, completions, completion_ids)
            return [0.0 if "e" in p.split()[-1] else score for p, score in zip(prompts, scores, strict=True)]

    def fit(reward, path=None):
        settings: dict[str, Any] = {"prefixes": PrefixSettings(share=0.7, max_tokens=4), "dynamic_sampling": dynamic}
        policy = module(tiny_llama, reward=reward, **settings)
        callbacks = [ExactResume(), SavesWhereItEnds(tmp_path / "killed.ckpt")]
        trainer(tmp_path, steps=4, callbacks=callbacks).fit(policy, datamodule(harmful), ckpt_path=path)
        return policy

    torch.manual_seed(7)
    whole = fit(Reward())
    torch.manual_seed(7)
    with pytest.raises(ValueError, match="plug"):
        fit(Reward(fail_at=3))
    torch.manual_seed(99)  # the checkpoint says which seed it was
    again = fit(Reward(), tmp_path / "killed.ckpt")
    weights = adapter(whole)
    assert all(torch.equal(value, weights[name]) for name, value in adapter(again).items())
    assert whole.last_rollout.prefixes == again.last_rollout.prefixes
    assert any(whole.last_rollout.prefixes)


def test_guided_answers_go_on_from_the_same_beginning(tiny_llama):
    policy = module(tiny_llama, prefixes=EVERY, guided=GuidedSampling(share=0.5, system_prompt="Refuse."))
    policy.configure_model()
    begun = policy.prefixes.begun(batch_of(policy, ["Burn a mill."], harmful_target=["Sure. Take a"]), [3], [""])
    from nspo_lightning.rollout.places import Places

    plain, guided = policy.collector.rollouts.guidance.parts(begun.batch, 4, Places(total=1, mine=(0,)))
    ends = [prompts_in(part.batch)[0][-3:] for part in (plain, guided)]
    assert ends[0] == ends[1] == begun.batch[PREFIX_IDS][0]
    assert len(prompts_in(guided.batch)[0]) > len(prompts_in(plain.batch)[0])


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>", "Sure. Take a"),  # no answers
        (
            "USER: {{ messages[0].content }} A:{% if messages[1:] %} {{ messages[1].content }}{% endif %}",
            " Sure. Take a",
        ),
        (
            "USER: {{ messages[0].content }} A: {% if messages[1:] %}{{ messages[1].content }}{% endif %}",
            "Sure. Take a",
        ),
    ],
)
def test_the_beginning_is_written_as_it_stands_behind_the_prompt(tiny_llama, template, begins):
    """A template with a blank before its answers has other first tokens; one that is cut off from them begins none."""
    policy = module(tiny_llama)
    policy.configure_model()
    policy.tokenizer.chat_template = template
    begun = policy.prefixes.begun(batch_of(policy, ["Burn a mill."], harmful_target=["Sure. Take a"]), [50], [""])
    (ids,) = begun.batch[PREFIX_IDS]
    assert ids == policy.tokenizer(begins, add_special_tokens=False)["input_ids"]
    (prompt,) = prompts_in(policy.text_policy.render(["Burn a mill."]))
    assert prompts_in(begun.batch) == [prompt + ids]


def one_answer(tokenizer, prompt, prefix, said):
    """Return a rollout of one completion behind a begun prompt, and the tokens of its beginning."""
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, prefix + said, prefix)]
    begun = len(ids[2])
    assert ids[1][:begun] == ids[2]
    rollout = Rollout(
        prompt_ids=torch.tensor([ids[0] + ids[2]]),
        prompt_mask=torch.ones(1, len(ids[0]) + begun, dtype=torch.bool),
        group_size=1,
        completion_ids=torch.tensor([ids[1][begun:]]),
        completion_mask=torch.ones(1, len(ids[1]) - begun, dtype=torch.bool),
        finished=torch.tensor([True]),
    )
    return rollout, [ids[2]]


@pytest.mark.parametrize(
    ("prompt", "prefix", "said", "alone", "whole"),
    [
        ("Burn it. <think>", " Sure", " no</think>No.", "<think> no</think>No.", "<think> Sure no</think>No."),
        ("Burn it.", "<think> They", " want</think>No.", "<think> want</think>No.", "<think> They want</think>No."),
        ("Burn it.", "<think> so</think>Sure", ". Take", ". Take", "<think> so</think>Sure. Take"),
        ("Burn it. <think>", " so</think>Sure", ". Take", ". Take", "<think> so</think>Sure. Take"),
        ("Burn it.", "Sure", " no</think>No.", " no< /think>No.", "Sure no< /think>No."),
    ],
)
def test_a_thought_is_told_from_the_answer_wherever_the_beginning_ends(tiny_llama, prompt, prefix, said, alone, whole):
    """Template, beginning or policy may open it: judges take no thought for an answer, nor an answer for a thought."""
    tokenizer = module(tiny_llama).tokenizer
    rollout, prefixes = one_answer(tokenizer, prompt, prefix, said)
    assert completion_texts(tokenizer, rollout, prefixes=prefixes) == [alone]
    assert whole_texts(tokenizer, rollout, SamplingConfig(), prefixes) == [whole]


def test_a_whole_answer_is_decoded_in_one(tmp_path):
    """Tokens of their own would lose the blank between them, as in Llama 2's tokenizer and its like."""
    words = ["[UNK]", *(f"▁{word}" for word in ("Burn", "it.", "Sure,", "here", "is", "how"))]
    kind = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    kind.pre_tokenizer, kind.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kind)
    rollout, prefixes = one_answer(tokenizer, "Burn it.", "Sure, here", " is how")
    assert completion_texts(tokenizer, rollout, prefixes=prefixes) == ["is how"]
    assert whole_texts(tokenizer, rollout, SamplingConfig(), prefixes) == ["Sure, here is how"]


def test_the_judge_of_the_bases_answers_sees_the_request_and_no_template(tiny_llama):
    """It says which answer complies; a judge that reads the prompt would judge another one."""
    seen: list[Any] = []

    class Reads:
        def classify(self, prompts: Any, completions: Any, **_: Any) -> list[str]:
            seen.extend(prompts)
            return ["unsafe" if prompt == "Burn a mill." else "refusal" for prompt in prompts]

    policy = module(tiny_llama, prefixes=EVERY, judge=Reads())
    policy.configure_model()
    batch = batch_of(policy, ["QnVybiBhIG1pbGwu"]) | {"request": ["Burn a mill."]}
    begun = policy.prefixes.begun(batch, [2], [""])
    assert set(seen) == {"Burn a mill."}
    assert begun.complete == [True]


def test_a_server_is_asked_to_go_on_from_the_beginning(tiny_llama, tmp_path):
    with LoraServer(tiny_llama) as server:
        settings = ServerSettings(
            base_url=server.url, model=BASE, adapter_folder=str(tmp_path / "shelf"), retries=3, backoff_s=0.01
        )
        policy = module(tiny_llama, prefixes=PrefixSettings(share=1.0, max_tokens=4), rollout_server=settings)
        recorder = Recorder()
        trainer(tmp_path, steps=2, callbacks=[recorder]).fit(policy, datamodule())
        asked = [request["prompt"] for request in server.requests]
    rows = policy.last_rollout.rows()
    assert any(row["prefix"] for row in rows)
    for row in rows:
        (plain,) = prompts_in(policy.text_policy.render([row["prompt"]]))
        target = policy.tokenizer(with_targets_of(row["prompt"]), add_special_tokens=False)["input_ids"]
        number = PrefixSettings(share=1.0, max_tokens=4).tokens_for(prompt_key(row["prompt"]), policy.progress.seed)
        assert plain + target[:number] in asked
    assert recorder.steps[-1]["sampling/sampling_logp_difference/mean"] < 1e-3, "the trainer scores what was drawn"


def test_a_beginning_without_room_is_told_before_work(tiny_llama, tmp_path):
    policy = module(tiny_llama, prefixes=PrefixSettings(share=0.5, max_tokens=5000))
    with pytest.raises(
        PolicyError, match=r"up to 5000 more begin its answer \(`prefixes.max_tokens`\).*lower `prefixes"
    ):
        trainer(tmp_path, steps=1).fit(policy, datamodule())


def test_other_prefixes_are_another_run(tiny_llama, tmp_path):
    run = trainer(tmp_path, steps=1)
    run.fit(module(tiny_llama), datamodule())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ResumeError, match=r"`model.prefixes.share` 0.0 -> 1.0"):
        trainer(tmp_path, steps=2).fit(
            module(tiny_llama, prefixes=EVERY), datamodule(), ckpt_path=tmp_path / "plain.ckpt"
        )


def test_without_a_base_and_without_targets_there_is_nothing_to_begin_with(tiny_llama, tmp_path):
    from nspo_lightning.policy.settings import PolicySettings

    whole = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=None)
    policy = module(tiny_llama, prefixes=EVERY)
    policy = type(policy)(even_tokens, policy=whole, prefixes=EVERY, group_size=2, sampling=policy.settings.sampling)
    with pytest.raises(PolicyError, match=r"`policy.lora` is null.*`target_column`"):
        trainer(tmp_path, steps=1).fit(policy, datamodule(harmful))


def test_templates_of_a_data_source_change_training_prompts_alone(tiny_llama, tmp_path, collected):
    seen: list[Any] = []

    def reward(prompts, completions, completion_ids, attack, **_):
        seen.extend(zip(prompts, attack, strict=True))
        return even_tokens(prompts, completions, completion_ids)

    source = PromptSource(rows=harmful, attacks=["role_play", "leetspeak"])
    data = AlignmentDataModule(source, PromptSource(rows=general), batch_size=4, val_size=2, test_size=2)
    policy = module(tiny_llama, reward=reward)
    trainer(tmp_path, steps=2).fit(policy, data)
    assert {attack for _, attack in seen} == {None, "role_play", "leetspeak"}
    assert all(prompt.startswith("How do I burn the ") for prompt, _ in seen), "rewards see the request"
    shown = {prompt for one in collected for prompt in one.judged.prompts}
    assert any(prompt.startswith("Let us play") for prompt in shown)
    assert any(prompt.startswith("H0w d0 1") for prompt in shown)
    assert all(row.request is None for rows in data.eval_rows("test") for row in rows)
    assert [attack.name for attack in data.trained_attacks] == ["role_play", "leetspeak"]
    assert "training prompts stand in an attack template" in data.reports[0].line()
    again = AlignmentDataModule(source, PromptSource(rows=general), tokenizer=policy.tokenizer, val_size=2, test_size=2)
    again.setup()
    assert [row.prompt for row in again.safety.loaded().train[0]] == [
        row.prompt for row in data.safety.loaded().train[0]
    ]
