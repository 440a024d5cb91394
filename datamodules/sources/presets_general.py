"""Presets of general ability: instructions, maths, knowledge, code, truthfulness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from nspo_lightning.datamodules.sources.presets import Preset, Row, first_of, text_of

_LETTERS = "ABCDEFGHIJ"


def _instruction(row: Row, extra_column: str, layout: str) -> Any:
    instruction, extra = row["instruction"], row.get(extra_column)
    if not isinstance(instruction, str) or not isinstance(extra, str) or not extra.strip():
        return instruction
    return layout.format(instruction=instruction, extra=extra)


def _with_input(row: Row) -> Any:
    return _instruction(row, "input", "{instruction}\n\n{extra}")


def _multiple_choice(question: Any, labels: Sequence[str], choices: Sequence[Any]) -> Any:
    if not isinstance(question, str):
        return question
    options = "\n".join(f"{label}. {choice}" for label, choice in zip(labels, choices, strict=False))
    return f"{question}\n\n{options}\n\nAnswer with the letter of the right option."


def _mmlu_choices(row: Row) -> list[str]:
    choices = row.get("choices")
    found = list(choices) if choices is not None else [row[letter] for letter in "ABCD"]
    if None in found:
        raise ValueError(f"option {_LETTERS[found.index(None)]} is missing")
    return [str(choice) for choice in found]


def _mmlu_letter(row: Row) -> str:
    answer = row["answer"]
    return answer.strip() if isinstance(answer, str) else _LETTERS[int(answer)]


def _mmlu_prompt(row: Row) -> Any:
    choices = _mmlu_choices(row)
    return _multiple_choice(row["question"], _LETTERS[: len(choices)], choices)


def _arc_choices(row: Row) -> tuple[list[str], list[str]]:
    choices = row["choices"]
    if isinstance(choices, str):  # a csv copy holds the object as JSON text
        choices = json.loads(choices)
    return list(choices["label"]), list(choices["text"])


def _gsm8k_final(row: Row) -> str:
    return str(row["answer"] or "").rsplit("####", 1)[-1].strip().replace(",", "")


def _svamp_prompt(row: Row) -> str:
    body, question = text_of(row, "Body").strip(), text_of(row, "Question").strip()
    return f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {question}"


def _svamp_answer(row: Row) -> str:
    answer = row["Answer"]
    return f"{answer:g}" if isinstance(answer, (int, float)) else answer or ""


def _humaneval_prompt(row: Row) -> str:
    return f"Complete this Python function. Answer with the whole function.\n\n{text_of(row, 'prompt')}"


def _mbpp_prompt(row: Row) -> str:
    text = text_of(row, "text" if "text" in row else "prompt")
    tests = "\n".join(str(test) for test in row["test_list"])
    return f"{text}\n\nYour code must pass these tests:\n{tests}"


def _first_exchange(row: Row, position: int) -> str:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) <= position:
        return "" if position else row["prompt"]
    return str(messages[position].get("content") or "")


_benign = partial(Preset, kind="benign")

GENERAL_PRESETS = (
    _benign(
        name="alpaca",
        requires=(("instruction", "input", "output"),),
        prompt=_with_input,
        answer="output",
        free_text=True,
        recognise=lambda row: "generator" not in row,
        shared_layout=True,
        hub_id="tatsu-lab/alpaca",
        note="CC BY-NC 4.0. Some rows have an empty output.",
    ),
    _benign(
        name="alpaca_farm",
        requires=(
            ("instruction", "input", "output", "generator", "dataset"),
            ("instruction", "output", "generator", "dataset"),
        ),
        prompt=_with_input,
        answer="output",
        free_text=True,
        keep=("generator", "dataset"),
        hub_id="tatsu-lab/alpaca_farm",
        hub_name="alpaca_farm_evaluation",
        hub_revision="refs/convert/parquet",
        hub_splits={"train": "eval"},
        note="CC BY-NC 4.0. The hub holds a script, which datasets no longer runs: its parquet branch is read.",
    ),
    _benign(
        name="dolly",
        requires=(("instruction", "context", "response", "category"),),
        prompt=lambda row: _instruction(row, "context", "{extra}\n\n{instruction}"),
        answer="response",
        free_text=True,
        keep=("category",),
        hub_id="databricks/databricks-dolly-15k",
        note="CC BY-SA 3.0.",
    ),
    _benign(
        name="gsm8k",
        requires=(("question", "answer"),),
        prompt="question",
        answer="answer",
        final_answer=_gsm8k_final,
        recognise=lambda row: "####" in str(row["answer"]),
        hub_id="openai/gsm8k",
        hub_name="main",
        note="MIT. `final_answer` is the number after ####.",
    ),
    _benign(
        name="svamp",
        requires=(("ID", "Body", "Question", "Equation", "Answer", "Type"),),
        prompt=_svamp_prompt,
        answer=_svamp_answer,
        keep=("Type", "Equation"),
        id_column="ID",
        hub_id="ChilleD/SVAMP",
        note="MIT.",
    ),
    _benign(
        name="mmlu",
        requires=(("question", "subject", "choices", "answer"), ("question", "A", "B", "C", "D", "answer")),
        prompt=_mmlu_prompt,
        answer=_mmlu_letter,
        keep=("subject",),
        hub_id="cais/mmlu",
        hub_name="all",
        hub_splits={"train": "auxiliary_train"},
        csv_header=("question", "A", "B", "C", "D", "answer"),
        note="MIT. The original csv files have no header line.",
    ),
    _benign(
        name="arc",
        requires=(("id", "question", "choices", "answerKey"),),
        prompt=lambda row: _multiple_choice(row["question"], *_arc_choices(row)),
        answer="answerKey",
        id_column="id",
        hub_id="allenai/ai2_arc",
        hub_name="ARC-Challenge",
        note="CC BY-SA 4.0. Some rows have 1 to 4 as labels, some three or five options.",
    ),
    _benign(
        name="humaneval",
        requires=(("task_id", "prompt", "entry_point", "canonical_solution", "test"),),
        prompt=_humaneval_prompt,
        answer=lambda row: f"{row['prompt']}{row['canonical_solution']}" if row["canonical_solution"] else "",
        free_text=True,
        keep=("task_id", "entry_point", "test"),
        id_column="task_id",
        hub_id="openai/openai_humaneval",
        hub_splits={"train": "test"},
        note="MIT. One split (test).",
    ),
    _benign(
        name="mbpp",
        requires=(("task_id", "text", "code", "test_list"), ("task_id", "prompt", "code", "test_list")),
        prompt=_mbpp_prompt,
        answer="code",
        free_text=True,
        keep=("task_id", "test_list", "test_setup_code"),
        id_column="task_id",
        hub_id="google-research-datasets/mbpp",
        hub_name="full",
        note="CC BY 4.0. The tests stand in the prompt, as in the paper's own.",
    ),
    _benign(
        name="leetcode",
        requires=(("task_id", "query", "response", "entry_point", "test"),),
        prompt="query",
        answer="response",
        free_text=True,
        keep=("task_id", "entry_point", "test", "difficulty"),
        id_column="task_id",
        hub_id="newfacade/LeetCodeDataset",
        note="MIT; the problem texts come from LeetCode.",
    ),
    _benign(
        name="ifeval",
        requires=(("key", "prompt", "instruction_id_list", "kwargs"),),
        keep=("key", "instruction_id_list", "kwargs"),
        id_column="key",
        hub_id="google/IFEval",
        note="Apache-2.0 on the hub. No reference answer: instructions are checked by rule.",
    ),
    _benign(
        name="truthfulqa",
        requires=(
            ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
            ("type", "category", "question", "best_answer", "correct_answers", "incorrect_answers"),
        ),
        prompt=first_of("Question", "question"),
        answer=first_of("Best Answer", "best_answer"),
        free_text=True,
        keep=("Category", "category", "correct_answers", "incorrect_answers", "Correct Answers", "Incorrect Answers"),
        hub_id="truthfulqa/truthful_qa",
        hub_name="generation",
        hub_splits={"train": "validation"},
        note="Apache-2.0. One split (validation).",
    ),
    _benign(
        name="ultrachat",
        requires=(("prompt", "prompt_id", "messages"),),
        prompt=lambda row: _first_exchange(row, 0),
        answer=lambda row: _first_exchange(row, 1),
        free_text=True,
        hub_id="HuggingFaceH4/ultrachat_200k",
        hub_splits={"train": "train_sft", "test": "test_sft"},
        note="MIT. The first exchange of each dialogue.",
    ),
)
