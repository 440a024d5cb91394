"""Presets of harmful prompts, and of harmless prompts that look harmful (over-refusal)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from nspo_lightning.datamodules.sources.cells import kind_of
from nspo_lightning.datamodules.sources.presets import Preset, Row, first_of
from nspo_lightning.datamodules.sources.rows import Message
from nspo_lightning.datamodules.sources.source import Kind

OVER_REFUSAL = "over_refusal"


def _harmbench_prompt(row: Row) -> str:
    behavior = row.get("Behavior") or row.get("prompt")
    context = row.get("ContextString") or row.get("context")
    return f"{context}\n\n---\n\n{behavior}" if isinstance(context, str) and context.strip() else str(behavior or "")


def _labelled_kind(row: Row) -> Kind:
    return kind_of(row["label"], "label")


def _labelled_skill(row: Row) -> str:
    return OVER_REFUSAL if _labelled_kind(row) == "benign" else "xstest_unsafe"


def _without_wrapper(row: Row) -> Any:
    # ALERT's prompts stand in the Alpaca wrapper, which the policy's own chat template replaces.
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        return prompt
    return re.sub(r"\A\s*### Instruction:\s*|\s*### Response:\s*\Z", "", prompt)


def _first_turn(row: Row) -> Any:
    turns = row["turns"]
    return turns[0] if isinstance(turns, list) and turns else turns


def human_assistant_messages(text: Any) -> list[Message]:
    r"""Return the turns of an HH-RLHF transcript (``\n\nHuman: ...\n\nAssistant: ...``); none of another text."""
    if not isinstance(text, str):
        return []
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _hh_prompt(row: Row) -> list[Message]:
    turns = human_assistant_messages(row["chosen"])
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


_PKU_JUDGED = ("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id")
_PKU_OLD = ("prompt", "response_0", "response_1", *_PKU_JUDGED)

_harmful = partial(Preset, kind="harmful")

SAFETY_PRESETS = (
    _harmful(
        name="pku_saferlhf",
        requires=((*_PKU_OLD, "prompt_source", "response_0_severity_level", "response_1_severity_level"), _PKU_OLD),
        keep=("prompt_source", *_PKU_JUDGED),
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        note="CC BY-NC 4.0. Configurations default, alpaca-7b, alpaca2-7b, alpaca3-8b; splits train, test.",
    ),
    _harmful(
        name="beavertails",
        requires=(("prompt", "response", "category", "is_safe"),),
        keep=("response", "is_safe", "category"),
        hub_id="PKU-Alignment/BeaverTails",
        hub_splits={"train": "30k_train", "test": "30k_test"},
        note="CC BY-NC 4.0. Several rows share a prompt; splits 30k_train, 30k_test, 330k_train, 330k_test.",
    ),
    _harmful(
        name="beavertails_evaluation",
        requires=(("prompt", "category", "category_id"),),
        keep=("category",),
        hub_id="PKU-Alignment/BeaverTails-Evaluation",
        hub_splits={"train": "test"},
        note="CC BY-NC 4.0. One split (test), 14 categories of 50.",
    ),
    _harmful(
        name="advbench",
        requires=(("goal", "target"), ("prompt", "target")),
        prompt=first_of("goal", "prompt"),
        target="target",
        recognise=lambda row: "goal" in row,  # prompt and target alone could be anything
        hub_id="walledai/AdvBench",
        note="MIT. The hub copy asks for access; harmful_behaviors.csv of llm-attacks is the original.",
    ),
    _harmful(
        name="harmbench",
        requires=(("Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID"), ("prompt", "category")),
        recognise=lambda row: "Behavior" in row,  # prompt and category alone could be anything
        prompt=_harmbench_prompt,
        keep=("FunctionalCategory", "SemanticCategory", "BehaviorID", "category"),
        id_column="BehaviorID",
        hub_id="walledai/HarmBench",
        hub_name="standard",
        note="MIT. Contextual behaviours stand after their context, as in HarmBench's own prompts.",
    ),
    _harmful(
        name="jailbreakbench",
        kind_of_part={"benign": "benign", "benign-behaviors": "benign"},
        requires=(
            ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
            ("Goal", "Target", "Behavior", "Category"),
        ),
        prompt="Goal",
        target="Target",
        keep=("Behavior", "Category", "Source"),
        hub_id="JailbreakBench/JBB-Behaviors",
        hub_name="behaviors",
        hub_splits={"train": "harmful"},
        note="MIT. Splits harmful and benign (recognised by its name).",
    ),
    _harmful(
        name="strongreject",
        requires=(("category", "source", "forbidden_prompt"), ("prompt", "category")),
        recognise=lambda row: "forbidden_prompt" in row,  # prompt and category alone could be anything
        prompt=first_of("forbidden_prompt", "prompt"),
        keep=("category",),
        hub_id="walledai/StrongREJECT",
        note="MIT. 313 forbidden prompts; the original csv has category, source, forbidden_prompt.",
    ),
    _harmful(
        name="sorry_bench",
        requires=(("question_id", "category", "turns"),),
        prompt=_first_turn,
        keep=("question_id", "category", "prompt_style"),
        hub_id="sorry-bench/sorry-bench-202503",
        note="Gated, under its own agreement. `question_id` repeats over prompt styles.",
    ),
    _harmful(
        name="harmfulqa",
        requires=(("topic", "subtopic", "id", "question"),),
        prompt="question",
        keep=("topic", "subtopic"),
        hub_id="declare-lab/HarmfulQA",
        note="Apache-2.0. The red and blue conversations are not used.",
    ),
    _harmful(
        name="catqa",
        requires=(("Category", "Subcategory", "Question"),),
        prompt="Question",
        keep=("Category", "Subcategory"),
        hub_id="declare-lab/CategoricalHarmfulQA",
        hub_splits={"train": "en"},
        note="Apache-2.0. Reads the nested JSON of the repository too; hub splits en, zh, vi.",
    ),
    _harmful(
        name="alert",
        requires=(("id", "prompt", "category", "attack_type"), ("id", "prompt", "category")),
        prompt=_without_wrapper,
        keep=("category", "attack_type"),
        hub_id="Babelscape/ALERT",
        hub_name="alert",
        hub_splits={"train": "test"},
        recognise=lambda row: "### Instruction:" in str(row["prompt"]) or "attack_type" in row,
        note="CC BY-NC-SA 4.0. The Alpaca wrapper around each prompt is taken off.",
    ),
    _harmful(
        name="do_not_answer",
        requires=(("risk_area", "types_of_harm", "specific_harms", "question"),),
        prompt="question",
        keep=("risk_area", "types_of_harm", "specific_harms"),
        id_column="id",
        hub_id="LibrAI/do-not-answer",
        note="Apache-2.0 on the publisher's card, CC BY-NC-SA 4.0 on a derived one.",
    ),
    _harmful(
        name="simple_safety_tests",
        requires=(("id", "harm_area", "category", "prompts_final"), ("id", "harm_area", "category", "prompt")),
        prompt=first_of("prompts_final", "prompt"),
        keep=("harm_area", "category"),
        id_column="id",
        hub_id="Bertievidgen/SimpleSafetyTests",
        hub_splits={"train": "test"},
        note="CC BY 4.0.",
    ),
    _harmful(
        name="hh_rlhf",
        requires=(("chosen", "rejected"),),
        prompt=_hh_prompt,
        recognise=lambda row: "Human:" in str(row["chosen"]),
        hub_id="Anthropic/hh-rlhf",
        hub_name="harmless-base",
        hub_data_dirs=True,
        note="MIT. Red-team side: the dialogue up to the last human turn.",
    ),
    Preset(
        name="xstest",
        kind=_labelled_kind,
        requires=(("prompt", "type", "label", "focus"),),
        skill=_labelled_skill,
        keep=("type", "label", "focus", "note"),
        id_column="id",
        hub_id="walledai/XSTest",
        hub_splits={"train": "test"},
        note="CC BY 4.0. 250 safe prompts (skill over_refusal, benign) and 200 unsafe contrasts (harmful).",
    ),
    Preset(
        name="or_bench",
        kind="benign",
        kind_of_part={"or-bench-toxic": "harmful"},
        requires=(("prompt", "category"),),
        skill=OVER_REFUSAL,
        keep=("category",),
        recognise=lambda row: False,  # these two columns alone say nothing about what a good answer is
        hub_id="bench-llm/or-bench",
        hub_name="or-bench-hard-1k",
        note="CC BY 4.0. The part or-bench-toxic is harmful.",
    ),
    Preset(
        name="coconot_contrast",
        kind="benign",
        kind_of_part={"original": "harmful"},
        requires=(("id", "category", "subcategory", "prompt"),),
        answer=lambda row: row.get("response") or "",
        free_text=True,
        skill=OVER_REFUSAL,
        keep=("category", "subcategory"),
        recognise=lambda row: False,  # the original set, which should not be complied with, has the same columns
        hub_id="allenai/coconot",
        hub_name="contrast",
        hub_splits={"train": "test"},
        note="ODC-BY. The contrast set: prompts that should be answered.",
    ),
)
