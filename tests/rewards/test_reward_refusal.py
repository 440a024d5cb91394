"""Refusal patterns by language, garbage, and the rules judge."""

from __future__ import annotations

import re

import pytest

from nspo_lightning.rewards import FormatReward, LengthReward, RefusalReward, RewardError, RewardSet, RulesJudge
from nspo_lightning.rewards.rules.garbage import is_garbage, repetition
from nspo_lightning.rewards.rules.patterns import is_refusal, load_patterns, refusal_matcher

REFUSALS = {
    "en": [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist with that request.",
        "Sorry, I won't do this.",
        "I cannot provide instructions for making weapons.",
        "I can't help with that.",
        "As an AI language model, I am not able to support such a plan.",
        "I must respectfully decline.",
        "I'd rather not go into that.",
        "No, I will not help you hurt anyone.",
        "I am not comfortable writing this.",
        "That's not something I can help with.",
        "It is not appropriate to ask for someone's password.",
        "Unfortunately, I am unable to fulfil this request.",
        "**I'm sorry, but I can't share that.**",
        "I do not condone violence.",
        "CAN'T HELP WITH THAT.",
    ],
    "de": [
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Tut mir leid, das kann ich nicht tun.",
        "Ich kann Ihnen dabei leider nicht weiterhelfen.",
        "Als KI kann ich diese Frage nicht beantworten.",
        "Das muss ich ablehnen.",
        "Ich bin nicht in der Lage, das zu tun.",
    ],
    "fr": [
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Désolée, je ne peux pas répondre à cette demande.",
        "Je ne suis pas en mesure d'aider.",
        "En tant qu'IA, je ne peux pas faire cela.",
        "Je refuse de participer à cela.",
    ],
    "es": [
        "Lo siento, pero no puedo ayudarte con eso.",
        "No puedo proporcionar esa información.",
        "Como modelo de lenguaje, no puedo hacer eso.",
        "Me niego a participar.",
    ],
    "pt": [
        "Desculpe, mas não posso ajudar com isso.",
        "Sinto muito, não posso fazer isso.",
        "Não posso fornecer essas instruções.",
        "Devo recusar este pedido.",
    ],
    "it": [
        "Mi dispiace, ma non posso aiutarti con questo.",
        "Non posso fornire queste informazioni.",
        "Devo rifiutare questa richiesta.",
        "Purtroppo non sono in grado di farlo.",
    ],
    "nl": [
        "Het spijt me, maar daar kan ik niet mee helpen.",
        "Sorry, dat kan ik niet doen.",
        "Ik kan je hier niet bij helpen.",
    ],
    "pl": ["Przykro mi, ale nie mogę w tym pomóc.", "Nie mogę udzielić takich informacji.", "Muszę odmówić."],
    "ru": [
        "Извините, но я не могу помочь с этим.",
        "К сожалению, я не могу выполнить эту просьбу.",
        "Я не могу предоставить такую информацию.",
        "Я вынужден отказать.",
    ],
    "tr": ["Üzgünüm, bu konuda yardımcı olamam.", "Maalesef bunu yapamam."],
    "vi": ["Xin lỗi, tôi không thể giúp bạn việc này.", "Tôi không thể cung cấp thông tin đó."],
    "zh": [
        "抱歉，我不能帮助你做这件事。",
        "对不起，我无法提供这方面的信息。",
        "我无法协助您。",
        "作为一个人工智能，我不能这样做。",
    ],
    "ja": ["申し訳ありませんが、お手伝いできません。", "そのご依頼にはお答えできません。", "お断りします。"],
    "ko": ["죄송하지만 도와드릴 수 없습니다.", "그 요청에는 답변할 수 없습니다."],
    "ar": ["آسف، لا أستطيع مساعدتك في ذلك.", "لا يمكنني تقديم هذه المعلومات."],
    "hi": ["माफ़ कीजिए, मैं इसमें मदद नहीं कर सकता।", "मैं इस बारे में जानकारी नहीं दे सकता।"],
}

ANSWERS = {
    "en": [
        "Sure! First, preheat the oven to 180 degrees.",
        "I'm sorry to hear that you feel unwell. Drink water and rest.",
        "I can't stress enough how useful a list is.",
        "You can't kill a Python process with that signal; use SIGKILL.",
        "To decline an invitation politely, thank the host first.",
        "It is illegal to park here on Sundays.",
        "Sorry for the delay. The capital of France is Paris.",
        "The engine cannot provide more than 90 kW.",
        "An AI cannot be a citizen in most countries.",
        "I have not been able to find a larger prime, so here is the largest I know: 97.",
    ],
    "de": ["Es tut mir leid, das zu hören. Versuchen Sie es mit Tee.", "Man kann Nudeln nicht ohne Wasser kochen."],
    "fr": ["Je suis désolé d'apprendre cela. Buvez de l'eau.", "Paris est la capitale de la France."],
    "es": ["Lo siento mucho por tu pérdida. Aquí tienes un poema.", "La capital de Francia es París."],
    "pt": ["Sinto muito pela sua perda. Aqui está um poema.", "A capital da França é Paris."],
    "it": ["Mi dispiace per la tua perdita. Ecco una poesia.", "La capitale della Francia è Parigi."],
    "nl": ["Het spijt me dat te horen. Drink wat water.", "De hoofdstad van Frankrijk is Parijs."],
    "pl": ["Przykro mi to słyszeć. Pij wodę.", "Stolicą Francji jest Paryż."],
    "ru": ["Мне жаль это слышать. Пейте воду.", "Столица Франции - Париж."],
    "tr": ["Bunu duyduğuma üzüldüm. Su için.", "Fransa'nın başkenti Paris'tir."],
    "vi": ["Tôi rất tiếc khi nghe điều đó. Hãy uống nước.", "Thủ đô của Pháp là Paris."],
    "zh": ["很遗憾听到这个消息，请多喝水。", "法国的首都是巴黎。"],
    "ja": ["それは残念です。水を飲んでください。", "フランスの首都はパリです。"],
    "ko": ["유감입니다. 물을 드세요.", "프랑스의 수도는 파리입니다."],
    "ar": ["يؤسفني سماع ذلك. اشرب الماء.", "عاصمة فرنسا هي باريس."],
    "hi": ["यह सुनकर दुख हुआ। पानी पिएँ।", "फ्रांस की राजधानी पेरिस है।"],
}

MATCHER = refusal_matcher()


def test_every_language_has_examples_of_both_kinds():
    assert set(load_patterns()) == set(REFUSALS) == set(ANSWERS)


@pytest.mark.parametrize(("language", "text"), [(lang, t) for lang, texts in REFUSALS.items() for t in texts])
def test_refusals_are_found_by_their_own_language(language, text):
    assert is_refusal(text, refusal_matcher([language]), 300)


@pytest.mark.parametrize("text", [t for texts in ANSWERS.values() for t in texts])
def test_answers_are_found_by_no_language(text):
    assert not is_refusal(text, MATCHER, 300)


def test_every_pattern_compiles_alone_and_matches_no_empty_text():
    for patterns in load_patterns().values():
        for pattern in patterns:
            assert not re.compile(pattern).search("")


def test_only_the_opening_counts():
    late = "Here is the recipe. " * 30 + "I'm sorry, but I can't help with that."
    assert not is_refusal(late, MATCHER, 300)
    assert is_refusal(late, MATCHER, 2000)


def test_matching_a_huge_completion_is_quick():
    assert not is_refusal("sorry " * 200_000, MATCHER, 300)


@pytest.mark.parametrize("text", ["", "  \n", "!!! ???", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "the cat " * 30, "水" * 40])
def test_garbage(text):
    assert is_garbage(text)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "no, no, no",
        "-" * 60 + "\ntable",
        "42",
        "Paris is the capital. " * 2,
        "法国的首都是巴黎，位于塞纳河畔。",
    ],
)
def test_not_garbage(text):
    assert not is_garbage(text)


def test_repetition_by_hand():
    # "a b a b a": 3-grams aba, bab, aba: one of three stood there before.
    assert repetition("a b a b a") == pytest.approx(1 / 3)
    assert repetition("a b") == 0.0


def test_rules_judge_names_all_four_outcomes():
    completions = ["I can't help with that.", "Step one: mix.", "Step one: mix.", ""]
    outcomes = RulesJudge().classify(["p"] * 4, completions, kind=[True, "benign", 1, False])
    assert outcomes == ["refusal", "safe", "unsafe", "garbage"]


def test_rules_judge_takes_prompts_as_harmful_unless_told():
    assert RulesJudge().classify(["p"], ["Step one"]) == ["unsafe"]
    assert RulesJudge(harmful_column="label").classify(["p"], ["Step one"], label=["safe"]) == ["safe"]


def test_rules_judge_reads_chat():
    assert RulesJudge().classify(["p"], [[{"role": "assistant", "content": "I can't help with that."}]]) == ["refusal"]


def test_unreadable_harm_label():
    with pytest.raises(RewardError, match=r"'kind' must say.*sample 1 has 'maybe'.*another column"):
        RulesJudge().classify(["p"] * 2, ["c"] * 2, kind=[True, "maybe"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": ["en", "xx"]}, "`languages` must be among en, .*got xx"),
        ({"extra_patterns": ["("]}, "`extra_patterns` must be regular expressions"),
        ({"window_chars": 0}, "`window_chars` must be at least 1"),
    ],
)
def test_bad_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        RulesJudge(**arguments)


def test_refusal_reward_with_own_pattern():
    reward = RefusalReward(refused=2.0, otherwise=-1.0, languages=["en"], extra_patterns=[r"^nope\b"])
    assert reward(["p"] * 3, ["Nope, never.", "I can't help with that.", "Tut mir leid, das kann ich nicht."]) == [
        2.0,
        2.0,
        -1.0,
    ]


def test_length_reward_by_hand():
    reward = LengthReward(minimum=2, maximum=4, slope=4)
    assert reward(["p"] * 4, ["one", "a b c", "a b c d e f", "x " * 50]) == [-0.25, 0.0, -0.5, -1.0]
    tokens = RewardSet([LengthReward(maximum=1, slope=2, unit="tokens")])
    assert tokens(["p"], ["c"], completion_ids=[[5, 6]]).total.tolist() == [-0.5]
    with pytest.raises(RewardError, match="no `completion_ids`"):
        tokens(["p"], ["c"])


@pytest.mark.parametrize("arguments", [{"minimum": -1}, {"minimum": 3, "maximum": 2}, {"slope": 0}, {"unit": "bytes"}])
def test_bad_length_bounds(arguments):
    with pytest.raises(ValueError, match="`(minimum|slope|unit)`"):
        LengthReward(**arguments)


def test_format_reward():
    assert FormatReward(r"<think>.*</think>.+")(["p"] * 2, ["<think>\nx</think> y\n", "y"]) == [1.0, 0.0]
    assert FormatReward(r"\d", whole=False)(["p"] * 2, ["a 1 b", "a"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="`pattern` must be a regular expression"):
        FormatReward("(")
