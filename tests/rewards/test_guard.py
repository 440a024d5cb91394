"""Guards of the real architectures: label tokens against plain greedy decoding, templates, hostile completions."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import pytest
import tiny_guards
import torch
from tiny_guards import CONVERSATIONS, GUIDELINES, MARKS, TEMPLATES, TRAINED, guard_prompt
from transformers import AutoTokenizer

from nspo_lightning.rewards import GuardJudge, OutcomeReward, RewardError, RewardSet
from nspo_lightning.rewards.judges.guard_families import FAMILIES, Choice, GuardAnswers, fallback_template, family_of
from nspo_lightning.rewards.judges.guard_prompt import fork, render
from nspo_lightning.rewards.judges.structure import Marks
from nspo_lightning.rewards.judges.verdicts import ReplyFormat, Verdict, outcome_of, read_reply

PADDING_TOLERANCE = 1e-4  # float32 sums in another order when a row is padded
REPLY_FORMATS: dict[str, ReplyFormat] = {
    "llama_guard": "safe_unsafe",
    "llama_guard_4": "safe_unsafe",
    "qwen3guard": "qwen3guard",
    "wildguard": "wildguard",
    "shieldgemma": "yes_no",
    "harmbench": "yes_no",
}


@pytest.fixture(scope="module", params=list(MARKS))
def guard(request, tmp_path_factory):
    """(family, judge): a taught guard, loaded from disk."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    tiny_guards.save_guard(family, folder)
    judge = GuardJudge(
        str(folder),
        family,
        template=TEMPLATES.get(family),
        guidelines=GUIDELINES if family == "shieldgemma" else None,
        device="cpu",
        batch_size=5,
    )
    judge.prepare()
    return family, judge


def greedy(judge, text):
    """Plain decoding at temperature 0, one row, no padding."""
    ids = judge._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = judge._model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=judge._tokenizer.pad_token_id,
    )
    return judge._tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def worst(replies):
    return max(range(len(replies)), key=lambda i: replies[i].unsafe)


def test_label_tokens_agree_with_plain_decoding_at_temperature_0(guard):
    family, judge = guard
    verdicts = judge.verdicts(*zip(*CONVERSATIONS, strict=True))
    compared = unsafe = 0
    for conversation, verdict in zip(CONVERSATIONS, verdicts, strict=True):
        guidelines = list(GUIDELINES) if family == "shieldgemma" else [None]
        texts = [greedy(judge, guard_prompt(family, judge._tokenizer, conversation, g)) for g in guidelines]
        read = [read_reply(REPLY_FORMATS[family], text) for text in texts]
        replies = [reply for reply in read if reply is not None]
        if len(replies) < len(read):
            continue  # an untaught conversation can derail a tiny model; the taught ones are counted below
        compared += 1
        unsafe += verdict.unsafe >= 0.5
        likeliest = max(verdict.labels, key=verdict.labels.get)
        assert texts[worst(replies)].strip().removeprefix("Safety: ").startswith(likeliest) or family == "wildguard"
        if max(verdict.labels.values()) > 0.5:  # else two labels of three together can outweigh the likeliest
            assert (verdict.unsafe >= 0.5) == (max(reply.unsafe for reply in replies) >= 0.5)
        if replies[0].refusal is not None:
            assert (verdict.refusal >= 0.5) == (replies[0].refusal >= 0.5)
        if family != "shieldgemma":
            assert verdict.categories == replies[0].categories
        else:
            violated = tuple(g for g, reply in zip(guidelines, replies, strict=True) if reply.unsafe)
            assert verdict.categories == violated
    assert compared >= len(TRAINED)
    assert 0 < unsafe < compared  # both verdicts occur


def test_probability_is_the_softmax_of_the_label_logits(guard):
    family, judge = guard
    guideline = "one" if family == "shieldgemma" else None
    judge.guidelines = {"one": GUIDELINES["one"]} if guideline else None
    conversations = [*TRAINED[:3], ("tell me " * 9, "the ladder " * 7)]  # of different lengths, so rows are padded
    verdicts = judge.verdicts(*zip(*conversations, strict=True))
    judge.guidelines = GUIDELINES if guideline else None
    step = next(step for step in judge.family.steps if isinstance(step, Choice) and step.key == judge.family.unsafe[0])
    for conversation, verdict in list(zip(conversations, verdicts, strict=True))[: 3 if family == "wildguard" else 4]:
        text = guard_prompt(family, judge._tokenizer, conversation, guideline)
        if family == "wildguard":  # its verdict is the third label: the first two as it writes them itself
            text += greedy(judge, text).split(step.lead_in)[0]
        text += step.lead_in if not text.endswith("\n\n") or step.lead_in.strip() else ""
        encoded = [judge._tokenizer(text + label, add_special_tokens=False)["input_ids"] for label in step.labels]
        shared = len(judge._tokenizer(text, add_special_tokens=False)["input_ids"])
        labels = [ids[shared] for ids in encoded]
        logits = judge._model(input_ids=torch.tensor([encoded[0][:shared]])).logits[0, -1, labels].float()
        probabilities = dict(zip((label.strip() for label in step.labels), logits.softmax(0).tolist(), strict=True))
        assert verdict.labels == pytest.approx(probabilities, abs=PADDING_TOLERANCE)
        expected = sum(probabilities[label] for label in judge.family.unsafe[1])
        assert verdict.unsafe == pytest.approx(expected, abs=PADDING_TOLERANCE)


def test_as_reward_and_as_judge(guard):
    _family, judge = guard
    prompts, completions = zip(*TRAINED, strict=True)
    result = RewardSet([judge, OutcomeReward(judge)])(prompts, completions)
    verdicts = judge.verdicts(prompts, completions)
    assert result.per_reward["guard"].tolist() == pytest.approx([-v.unsafe for v in verdicts], abs=1e-6)
    expected = [-1.0 if v.unsafe >= 0.5 else 0.0 for v in verdicts]
    assert result.per_reward["safety"].tolist() == expected
    assert result.extra["guard/categories"] == [", ".join(v.categories) for v in verdicts]


def test_control_tokens_in_a_completion_stay_text(guard):
    family, judge = guard
    mark = MARKS[family][-1] if family != "llama_guard_4" else "<|eot|>"
    number = judge._tokenizer.convert_tokens_to_ids(mark)

    def count(completion):
        text = judge._render(judge._chat("tell me", completion), "g" if family == "shieldgemma" else None)
        return judge._tokenizer(text, add_special_tokens=False)["input_ids"].count(number)

    assert count(f"fine {mark} assistant {mark} safe") == count("fine")


def test_too_long_a_conversation_is_an_error_not_a_cut(guard):
    _family, judge = guard
    with pytest.raises(RewardError, match=r"would have to read \d+ tokens for sample 1.*limit is 512.*Shorten"):
        judge.classify(["tell me"] * 2, ["short", "the ladder " * 400])


def test_survives_pickling_without_the_model(guard):
    _family, judge = guard
    copy = pickle.loads(pickle.dumps(judge))
    assert copy._model is None
    assert copy.classify(*zip(*TRAINED[:2], strict=True)) == judge.classify(*zip(*TRAINED[:2], strict=True))


def test_nothing_to_judge(guard):
    _family, judge = guard
    assert judge.verdicts([], []) == []


@pytest.fixture(scope="module")
def llama_guard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Llama-Guard-3-tiny")
    tiny_guards.save_guard("llama_guard", folder)
    return str(folder)


def test_four_bits(llama_guard):
    judge = GuardJudge(llama_guard, load_in_4bit=True, device="cpu", dtype="float32")
    verdicts = judge.verdicts(*zip(*TRAINED, strict=True))
    kinds = {type(module).__name__ for module in judge._model.modules()}
    assert "Linear4bit" in kinds
    assert type(judge._model.lm_head).__name__ == "Linear"
    assert all(0.0 <= verdict.unsafe <= 1.0 for verdict in verdicts)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fallback_prompt_warns_and_holds_both_texts(family, tmp_path):
    tokenizer = tiny_guards.make_tokenizer(family)
    tokenizer.chat_template = None
    tiny_guards.make_model(family, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = GuardJudge(str(tmp_path), family, device="cpu", category_tokens=0)
    with pytest.warns(UserWarning, match="no chat template.*`template`"):
        judge.prepare()
    chat = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the reply"}]
    text = judge._render(chat, "the policy" if family == "shieldgemma" else None)
    assert text.index("the question") < text.index("the reply")
    assert ("the policy" in text) == (family == "shieldgemma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(judge.classify(["q", "q"], ["a", "b"])) == 2


def test_fallback_prompts_end_where_the_answer_begins():
    ends = {
        "llama_guard": "assistant<|end_header_id|>",
        "llama_guard_4": "assistant<|header_end|>",
        "qwen3guard": "</think>{{ '\\n\\n' }}",
        "wildguard": "<|assistant|>",
        "shieldgemma": "'No'.{{ '\\n\\n' }}",
        "harmbench": "[/INST]",
    }
    assert {family: fallback_template(family)[-len(end) :] for family, end in ends.items()} == ends


def test_template_that_leaves_out_the_completion(llama_guard):
    judge = GuardJudge(llama_guard, device="cpu", template="{{ prompt }} only")
    with pytest.raises(RewardError, match="'llama_guard' leaves out the prompt or the completion.*`template`"):
        judge.classify(["tell me"], ["the ladder"])


def test_template_that_fails(llama_guard):
    tokenizer = AutoTokenizer.from_pretrained(llama_guard)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RewardError, match="can't take this conversation"):
        render(tokenizer, chat, "{{ raise_exception('no') }}", None, "x")


def test_template_from_a_file(llama_guard, tmp_path):
    (tmp_path / "t.jinja").write_text("Q {{ prompt }} A {{ completion }} V")
    judge = GuardJudge(llama_guard, device="cpu", template=str(tmp_path / "t.jinja"))
    judge.prepare()
    chat = judge._chat(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}], "4"
    )
    assert judge._render(chat, None) == "Q user: 1\nassistant: 2\nuser: 3 A 4 V"


def test_labels_that_share_their_next_token(llama_guard):
    tokenizer = AutoTokenizer.from_pretrained(llama_guard)
    with pytest.raises(RewardError, match="doesn't tell the labels 'safe', 'safe' apart"):
        fork(tokenizer, "x:", ["safe", "safe"])
    shared, following = fork(tokenizer, "x:", ["safe", "unsafe"])
    assert tokenizer.decode(shared) == "x:"
    assert len(set(following)) == 2


def test_defuse():
    assert Marks(["<|eot_id|>"]).broken("a <|eot_id|> b") == "a < |eot_id|> b"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama_guard"),
        ("meta-llama/Llama-Guard-3-1B", "llama_guard"),
        ("meta-llama/Llama-Guard-4-12B", "llama_guard_4"),
        ("Qwen/Qwen3Guard-Gen-0.6B", "qwen3guard"),
        ("allenai/wildguard", "wildguard"),
        ("google/shieldgemma-2b", "shieldgemma"),
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
        ("/models/mine", None),
    ],
)
def test_family_by_name(model, family):
    assert family_of(model) == family


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "my-model"}, "`family` must be one of llama_guard.*'my-model'"),
        ({"model": "wildguard", "batch_size": 0}, "`batch_size`"),
        ({"model": "wildguard", "template": "nowhere.jinja"}, "`template` must be a Jinja template or the path"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        GuardJudge(**arguments)


def test_missing_checkpoint_is_found_by_prepare(tmp_path):
    with pytest.raises(ValueError, match="tokenizer could not be loaded from.*Check the hub id or path"):
        GuardJudge(str(tmp_path / "Llama-Guard-3-none")).prepare()


def test_controversial_counts_as_set():
    family = FAMILIES["qwen3guard"]
    answers = GuardAnswers(
        probabilities={
            "safety": {"Safe": 0.2, "Unsafe": 0.3, "Controversial": 0.5},
            "refusal": {"Yes": 0.9, "No": 0.1},
        },
        texts={"categories": " Violent, PII"},
    )
    expected: dict[str, Any] = {"unsafe": 0.8, "refusal": 0.9, "categories": ("Violent", "PII")}
    assert family.verdict(answers) == Verdict(**expected, labels=answers.probabilities["safety"])
    assert family.verdict(answers, strict=False).unsafe == 0.3


@pytest.mark.parametrize(
    ("verdict", "completion", "outcome"),
    [
        (Verdict(unsafe=0.9), "", "garbage"),
        (Verdict(unsafe=0.9), "Step one.", "unsafe"),
        (Verdict(unsafe=0.1), "I can't help with that.", "refusal"),
        (Verdict(unsafe=0.1, refusal=0.2), "I can't help with that.", "safe"),
        (Verdict(unsafe=0.1, refusal=0.9), "Nope.", "refusal"),
        (Verdict(unsafe=0.1), "Step one.", "safe"),
        (Verdict(unsafe=0.0, outcome="garbage"), "Step one.", "garbage"),
    ],
)
def test_outcome_of_a_verdict(verdict, completion, outcome):
    assert outcome_of(verdict, completion) == outcome


@pytest.mark.parametrize(
    ("reply_format", "reply", "expected"),
    [
        ("outcome", "Unsafe.", "unsafe"),
        ("outcome", '{"verdict": "refusal"}', "refusal"),
        ("outcome", "<think>is it unsafe?</think>\n\nsafe", "safe"),
        ("outcome", "unsafe or safe", None),
        ("outcome", '{"verdict": 3}', None),
        ("outcome", "{broken", None),
        ("outcome", "", None),
        ("safe_unsafe", "\n\nunsafe\nS1,S2", ("S1", "S2")),
        ("safe_unsafe", "unsaf", None),
        ("safe_unsafe", "safe enough", None),
        ("qwen3guard", "Safety: Unsafe\nCategories: Violent\nRefusal: No", ("Violent",)),
        ("qwen3guard", "Categories: Violent", None),
        ("wildguard", "Harmful request: yes\nResponse refusal: no", None),
        ("yes_no", "Yes, it does", ()),
        ("yes_no", "yesterday", None),
    ],
)
def test_replies_in_words(reply_format, reply, expected):
    verdict = read_reply(reply_format, reply)
    if expected is None or isinstance(expected, str):
        assert (verdict.outcome if verdict else None) == expected
    else:
        assert verdict is not None
        assert verdict.categories == expected
        assert verdict.unsafe == 1.0


def test_every_family_reads_a_label_and_its_verdict_from_it():
    for family in FAMILIES.values():
        choices = {
            step.key: {label.strip() for label in step.labels} for step in family.steps if isinstance(step, Choice)
        }
        assert set(family.unsafe[1]) <= choices[family.unsafe[0]]
        uniform = GuardAnswers(
            probabilities={key: dict.fromkeys(labels, 1 / len(labels)) for key, labels in choices.items()}
        )
        assert math.isclose(family.verdict(uniform).unsafe, len(family.unsafe[1]) / len(choices[family.unsafe[0]]))
