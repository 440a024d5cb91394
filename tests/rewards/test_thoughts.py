"""A policy that thinks is judged, matched and shown to guards by its answer, never by its thought."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chat_templates import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nspo_lightning.datamodules.sources.cells import BadRow
from nspo_lightning.datamodules.sources.chats import message_text
from nspo_lightning.evaluation.answers import is_right
from nspo_lightning.evaluation.rates import Answers, RateTable, general_outcomes
from nspo_lightning.evaluation.report import observations_by_category
from nspo_lightning.evaluation.thoughts import THOUGHT_MARKS, answer_of, completion_with_thought, is_unfinished
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.judging import name_outcomes
from nspo_lightning.rewards import (
    FormatReward,
    OutcomeReward,
    RefusalReward,
    RewardSet,
    RulesJudge,
    SafetyAndAnswers,
)
from nspo_lightning.rewards.judges.judge_client import _text_of
from nspo_lightning.rewards.judges.server_judge import ServerJudge
from nspo_lightning.rewards.judges.verdicts import Verdict, outcomes_of, read_reply
from nspo_lightning.rewards.messages import as_chat, content_text
from nspo_lightning.rollout.texts import completion_texts

NO = "I'm sorry, but I can't help with that."
YES = "Sure, here is how: take a file and a vice."
GOOD, BAD = f"<think>\n{YES}\n</think>\n\n{NO}", f"<think>{NO}</think>{YES}"
CUT = f"<think>{NO} Or can I?"
PROMPT = "How do I pick a lock?"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (GOOD, NO),
        (BAD, YES),
        (f"{NO}</think>\n\n{YES}", YES),
        (CUT, ""),
        ("<think></think>\n\n5", "5"),
        ("<think>a</think>", ""),
        (f" \n[THINK]{NO}[/THINK]{YES}", YES),
        (YES, YES),
        ("", ""),
        (f"{YES} <think>{NO}", f"{YES} <think>{NO}"),
        (f"{YES} <think>{NO}</think> bye", f"{YES} <think>{NO}</think> bye"),
        (f"<think>a</think> {YES} </think> {NO}", f"{YES} < /think> {NO}"),
        (f"<think>a</think><think>{YES}</think>{NO}", f"< think>{YES}< /think>{NO}"),
        (f"<think>The tag </thinking> is XML; {YES}</think>{NO}", NO),
        (f"[THINK]<think>{YES}</think>{YES}[/THINK]{NO}", NO),
        (f"<think>{NO}</thinking>{YES}", ""),
        (f"{YES}[/THINK]{NO}", NO),
    ],
)
def test_the_answer_is_what_follows_the_thought(completion, answer):
    assert answer_of(completion) == answer
    assert is_unfinished(completion) is (completion in (CUT, f"<think>{NO}</thinking>{YES}"))


PIECES = st.sampled_from([*THOUGHT_MARKS, *THOUGHT_MARKS.values(), " ", "harm", "\n", "5", "<", "think>"])


@given(st.lists(PIECES, max_size=9).map("".join))
def test_an_answers_answer_is_itself_and_nothing_visible_is_lost(completion):
    answer = answer_of(completion)
    assert answer_of(answer) == answer
    shown = completion_with_thought(completion, "Say it.<|assistant|>")
    if not any(completion.strip().startswith(mark) for mark in THOUGHT_MARKS):
        assert answer_of(shown).replace(" ", "") == shown.replace(" ", ""), "no prompt opened a thought: all is answer"
    opened = completion_with_thought(completion, "Say it.<|assistant|><think>\n")
    assert opened == f"<think>\n{completion}"
    if not any(mark in completion for mark in THOUGHT_MARKS.values()):
        assert answer_of(opened) == ""


def test_rules_judge_the_answer():
    completions = [GOOD, BAD, CUT, f"{NO}</think>{YES}"]
    chats: list[Any] = [[{"role": "assistant", "content": text}] for text in completions]
    expected = ["refusal", "unsafe", "garbage", "unsafe"]
    for given_ in (completions, chats):
        assert RulesJudge().classify([PROMPT] * 4, given_) == expected
        assert RefusalReward()([PROMPT] * 4, given_) == [1.0, 0.0, 0.0, 0.0]
        result = RewardSet([OutcomeReward(RulesJudge())])([PROMPT] * 4, given_)
        assert result.outcomes == expected
        assert result.total.tolist() == [0.0, -1.0, -1.0, -1.0]
    assert name_outcomes(None, RulesJudge(), [PROMPT] * 4, completions, {}) == expected


def test_a_judge_of_ones_own_sees_the_answer_and_a_reward_of_ones_own_the_whole():
    seen: dict[str, Any] = {}

    class Mine:
        def classify(self, prompts, completions, **columns):
            seen["judge"] = list(completions)
            return ["safe"] * len(completions)

    def mine(prompts, completions, **columns):
        seen["reward"] = list(completions)
        return [0.0] * len(completions)

    judge: Any = Mine()
    RewardSet({"a": OutcomeReward(judge), "b": mine, "c": FormatReward("<think>.*</think>.*")})([PROMPT], [GOOD])
    assert seen == {"judge": [NO], "reward": [GOOD]}
    name_outcomes(None, judge, [PROMPT], [BAD], {})
    assert seen["judge"] == [YES]


def test_what_is_written_before_an_answer_does_not_count_as_one():
    assert is_right("<think>7, no, 8</think>It is 9", "9", None) is True
    assert is_right("<think>it is 9", "9", None) is None, "cut before an answer, which is neither right nor wrong"
    assert is_right("9</think>It is 8", None, "9") is False
    seen = general_outcomes(["<think>3</think>4"], [False], {"answer": ["4"]}, [])
    assert ("general/accuracy/general", 1.0) in seen
    reward = SafetyAndAnswers(RefusalReward(), answers_count=False, judge=RulesJudge())
    assert reward(["a", "b"], [GOOD, f"<think>{NO}</think>Water."], kind=["benign"] * 2) == [-1.0, 1.0]


def test_thoughts_that_were_cut_are_counted_by_skill_and_no_rate_is_about_them():
    columns = {"answer": ["4", "4", "4", ""], "skill": ["sums", "sums", "words", "essay"], "category": ["c"] * 4}
    texts, refused = ["<think>2+2 is 4", "<think>x</think>4", "<think>4", f"<think>{NO}"], [False, False, False, False]
    table = RateTable()
    given_ = Answers(
        completions=texts,
        outcomes=["garbage", "safe", "garbage", "garbage"],
        observations=general_outcomes(texts, refused, columns, []),
    )
    table.update([*given_.observations, *observations_by_category(given_, columns, harmful=False)], torch.device("cpu"))
    rates = table.compute_counts(torch.device("cpu"))
    found = {name: (rate.successes, rate.total) for name, rate in rates.items()}
    assert found == {
        "general/accuracy/sums": (1, 1),
        "general/over_refusal_rate": (0, 1),
        "general/refusal_rate": (0, 1),
        "general/refusal_by_category/c": (0, 1),
        "general/refusal_rate/sums": (0, 1),
        "general/truncated": (3, 4),
        "general/truncated/essay": (1, 1),
        "general/truncated/sums": (1, 2),
        "general/truncated/words": (1, 1),
        "general/unscored/essay": (1, 1),
    }
    table.update(general_outcomes(["4"], [False], {"answer": ["4"]}, []), torch.device("cpu"))
    assert not any("truncated" in name for name in table.compute(torch.device("cpu")))


def test_a_thought_that_was_cut_teaches_nothing_about_answers():
    safety = RefusalReward()
    for reward in (SafetyAndAnswers(safety), SafetyAndAnswers(safety, answers_count=False, judge=RulesJudge())):
        scores = reward(["a", "b"], [CUT, "<think>a</think>9"], kind=["benign"] * 2, answer=["9"] * 2)
        assert scores == [None, 1.0]
        assert reward(["a"], [CUT], kind=["benign"], answer=["9"]) == [None]


def test_guards_servers_and_classifiers_are_shown_the_answer():
    assert [turn["content"] for turn in as_chat(PROMPT, BAD)] == [PROMPT, YES]
    for reply_format, template in (("outcome", None), ("safe_unsafe", None), ("yes_no", "{prompt}|{completion}")):
        judge = ServerJudge("m", reply_format=reply_format, template=template)  # type: ignore[arg-type]
        request = str(judge._request(PROMPT, BAD))
        assert YES in request
        assert "sorry" not in request
    unsafe = Verdict(unsafe=0.0, outcome="safe")
    assert outcomes_of([unsafe, Verdict(unsafe=0.0), None], [CUT, CUT, CUT]) == ["garbage", "garbage", None]


def test_parts_of_a_content_are_read_the_same_everywhere():
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts: list[Any] = [
        "a",
        {"text": "b"},
        *({"type": f"{kind}text", "text": "c"} for kind in ("", "input_", "output_")),
    ]
    assert content_text([*parts, image, {"type": "text"}, {"type": "text", "text": None}, 5]) == "abccc"
    assert _text_of({"message": {"content": [*parts, image]}}) == "abccc"
    assert message_text({"role": "assistant", "content": parts}) == "abccc"
    with pytest.raises(BadRow, match="a part 'image_url'"):
        message_text({"role": "assistant", "content": [image]})


def test_a_judges_own_thought_is_no_reply():
    for reply in ("<think>unsafe?</think>safe", "unsafe?</think>\nsafe", "safe"):
        verdict = read_reply("safe_unsafe", reply)
        assert verdict is not None
        assert verdict.unsafe == 0.0
    assert read_reply("safe_unsafe", "<think>safe") is None


def thinking_tokenizer(special: str) -> PreTrainedTokenizerFast:
    fast = byte_tokenizer("<|assistant|>", *(["[THINK]", "[/THINK]"] if special == "by role" else []))
    fast.add_tokens(["<think>", "</think>"], special_tokens=special == "as added")
    return fast


@pytest.mark.parametrize("special", ["no", "by role", "as added"])
@pytest.mark.parametrize("opened", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_a_completion_shows_the_thought_that_its_prompt_opened(special, opened):
    tokenizer = thinking_tokenizer(special)
    begin, end = ("[THINK]", "[/THINK]") if special == "by role" else ("<think>", "</think>")
    prompts = [f"Hello there.<|assistant|>{opened}".replace("<think>", begin).replace("</think>", end)] * 2
    thought, starts = opened == "<think>\n", "" if opened else begin
    texts = [f"{starts}{NO}{end}{YES}<|end|>", f"{starts}{NO}<|end|>", f"{YES}<|end|>", f"{YES}{end}{NO}<|end|>"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*prompts, *texts)]
    width = max(map(len, ids[2:]))
    rollout = Rollout(
        prompt_ids=torch.tensor(ids[:2]),
        prompt_mask=torch.ones(2, len(ids[0]), dtype=torch.bool),
        group_size=2,
        completion_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids[2:]]),
        completion_mask=torch.arange(width) < torch.tensor([[len(row)] for row in ids[2:]]),
        finished=torch.ones(4, dtype=torch.bool),
    )
    found = completion_texts(tokenizer, rollout)
    if thought:
        assert [answer_of(text) for text in found] == [YES, "", "", NO]
        assert found[1].startswith(begin)
        assert "<|end|>" not in "".join(found)
    elif not opened:
        assert [answer_of(text) for text in found[:3]] == [YES, "", YES]
        assert answer_of(found[3]).startswith(YES), "a stray mark hides nothing"
    else:
        assert [answer_of(text) for text in found][1:3] == [NO, YES]
        assert answer_of(found[0]).startswith(NO), "the template closed the thought: all is answer"
