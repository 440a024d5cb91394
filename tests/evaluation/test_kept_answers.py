"""A few answers of each kind are kept, evenly spread, and the later ones join the earlier ones of the same prompts."""

from __future__ import annotations

from nspo_lightning.evaluation.kept_answers import KeptAnswers, evenly, read_answers, with_earlier, write_answers
from nspo_lightning.evaluation.rates import Answers


def seen(said, count=9, skills=None):
    kept = KeptAnswers()
    prompts = [f"prompt {i}" for i in range(count)]
    answers = Answers(completions=[f"{said} {i}" for i in range(count)], outcomes=["safe"] * count, observations=[])
    columns = {"skill": skills or ["a"] * count}
    kept.see({"prompt": prompts, "columns": columns}, answers, harmful=False)
    return kept


def test_they_are_spread_evenly_over_each_skill():
    kept = seen("yes", skills=["a", "a", "a", "a", "a", "a", "b", "b", "b"]).chosen("before", each=2)
    assert [(row["skill"], row["place"], row["before"]) for row in kept] == [
        ("a", 0, "yes 0"),
        ("a", 3, "yes 3"),
        ("b", 0, "yes 6"),
        ("b", 1, "yes 7"),
    ]
    assert evenly(0, 3) == []


def test_later_answers_stand_beside_earlier_ones_of_the_same_prompt(tmp_path):
    file = tmp_path / "answers.jsonl"
    write_answers(seen("old").chosen("before", each=3), file)
    with file.open("a") as half:
        half.write('{"kind": "gen')
    joined = with_earlier(seen("new").chosen("after", each=3), read_answers(file))
    assert [(row["before"], row["after"]) for row in joined] == [(f"old {i}", f"new {i}") for i in (0, 3, 6)]
    other = with_earlier(seen("new", count=8).chosen("after", each=3), read_answers(file))
    assert [row.get("before") for row in other] == ["old 0", None, None], "another prompt stood at that place"
