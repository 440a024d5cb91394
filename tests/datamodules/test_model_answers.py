"""Calibration on a policy's own answers: they stand in the text as they were written, their thoughts too."""

from __future__ import annotations

import pytest
import tiny_jobs
from chat_templates import FAMILIES, family_tokenizer

from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.text.collate import calibration_text, collate_calibration, is_cut_by_template
from nspo_lightning.datamodules.text.render import ChatRenderer

WRITTEN = (
    "It is 7.",
    " 7",
    "\n\n7 \n",
    "Six and one.\n</think>\n\nIt is 7.",
    "<think>\nHm.\n</think>\n\n7",
    "<think>Hm",
)


def row(answer, prompt="How much is 6 + 1?"):
    return PromptRow(prompt=prompt, answer=answer, skill="math", kind="benign", source="test", where="here")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("written", WRITTEN)
def test_a_policys_own_answer_is_whole_behind_its_prompt(name, written):
    tokenizer = family_tokenizer(name)
    renderer = ChatRenderer(tokenizer)
    text = calibration_text(row(written), "prompt_and_model_answer", renderer)
    read = renderer.text("How much is 6 + 1?") + written
    assert text.startswith(read)
    assert text[len(read) :].strip().startswith(FAMILIES[name].end.strip())
    (ids,) = collate_calibration([row(written)], "prompt_and_model_answer", renderer, "right")["input_ids"].tolist()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("answer", WRITTEN)
def test_reference_answers_that_a_template_cuts_are_known(answer):
    for name, family in FAMILIES.items():
        dropped = family.drops_thought and "</think>" in answer
        assert is_cut_by_template(row(answer), ChatRenderer(family_tokenizer(name))) is dropped, name


def test_they_are_counted_in_the_report():
    data = tiny_jobs.datamodule()
    tokenizer = family_tokenizer("qwen2.5", "{% for m in messages %}{{ m.content[:2] }}{% endfor %}")
    data.general.tokenizer = tokenizer
    rows = data.general.calibration_rows()
    assert all(len(row.answer) > 2 for row in rows)
    assert data.general.calibration_report.notes == [
        f"of {len(rows)} answers the chat template drops a part, such as a thought"
    ]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    data.general.calibration_rows()
    assert data.general.calibration_report.notes == []
