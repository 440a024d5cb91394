"""Jobs drawn from what people have: files, tokenizers, tiny models and settings, and what is true of them."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from chat_templates import FAMILIES, family_tokenizer
from hypothesis import strategies as st
from tokenizers import processors

Chat = list[dict[str, str]]
WORDS = ("mill", "bridge", "ferry", "tower", "well", "gate", "cart", "bell", "oven", "loom")
REFUSAL, COMPLIANCE = "I can't help with that.", "Sure, here is how to do it."
KINDS: tuple[tuple[Any, Any], ...] = (
    ("harmful", "benign"),
    (True, False),
    (1, 0),
    (1.0, 0.0),
    ("unsafe", "safe"),
    ("1", "0"),
    ("Toxic ", "Harmless"),
    ("yes", "no"),
)
# A reference, what a policy says, and whether people would call it right.
SAID: tuple[tuple[Any, str, bool], ...] = (
    ("29", "It costs $29.00.", True),
    (72, "72.0", True),
    (72.0, "72", True),
    ("1234", "So there are 1,234 of them.", True),
    ("1,234", "1234", True),
    ("0.5", "1/2", True),
    ("50%", "50 %", True),
    ("-3", "\u22123", True),
    ("3-5", "3 to 5", True),
    ("B", "B) a word", True),
    ("Paris", "paris.", True),
    ("7 * 6 = 42 #### 42", "#### 42", True),
    ("29", "$29.50", False),
    ("1234", "1,243", False),
    ("-3", "3", False),
    ("13", "3", False),
    ("Paris", "London", False),
    ("B", "A", False),
    ("B", "<think>A or B</think>\n\nB", True),
    ("B", "<think>B</think>\n\nA", False),
    ("72", "<think>So 72", False),
)
LAYOUTS = (
    "plain.jsonl",
    "plain.json",
    "plain.csv",
    "plain.tsv",
    "plain.parquet",
    "alpaca.json",
    "messages.jsonl",
    "messages.parquet",
    "parts.jsonl",
    "sharegpt.json",
    "trl.jsonl",
    "trl.parquet",
    "verl.parquet",
    "instructions.json",
)
_NO_KIND = ("alpaca", "instructions")
_NO_ANSWER = "instructions"
_TEXT_ONLY = ("plain", "alpaca", "instructions")


@dataclass(frozen=True)
class Row:
    """A row as it was meant: a chat, its reference answer, whether it is harmful, what a policy will say, rightly?"""

    chat: Chat
    answer: Any  # None = none
    harmful: bool
    said: str
    right: bool


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one job."""

    family: str
    architecture: str
    tied: bool
    spare_rows: int
    pad: str
    adds_bos: bool
    added: bool
    template_in: str
    head: bool
    whole: bool
    layout: str
    general_layout: str
    kinds: tuple[Any, Any]
    system: bool
    turns: int
    setting_system: bool
    thinks: bool
    spaces: str
    unanswered: bool
    calibration_text: str
    padding: str
    sampling_weights: str
    share_prefix: bool
    said: tuple[int, ...]
    seed: int

    def has_system(self) -> bool:
        """Whether the family takes system turns and one was drawn."""
        return self.system and FAMILIES[self.family].system


def jobs() -> st.SearchStrategy[Drawn]:
    """Return a strategy of jobs, each from a seed: choices one by one, Hypothesis would mostly repeat the first."""
    return st.integers(0, 2**32 - 1).map(drawn_job)


def drawn_job(seed: int) -> Drawn:
    """Return the job of a seed."""
    choose = random.Random(seed)

    def either() -> bool:
        return choose.random() < 0.5

    return Drawn(
        seed=seed,
        family=choose.choice(list(FAMILIES)),
        architecture=choose.choice(list(MODELS)),
        tied=either(),
        spare_rows=choose.choice([0, 6]),
        pad=choose.choice(["own", "eos", "none"]),
        adds_bos=choose.random() < 0.8,
        added=either(),
        template_in=choose.choice(["tokenizer", "tokenizer", "policy", "data"]),
        head=either(),
        whole=choose.random() < 0.2,
        layout=choose.choice(LAYOUTS),
        general_layout=choose.choice([name for name in LAYOUTS if not name.startswith(_NO_ANSWER)]),
        kinds=choose.choice(KINDS),
        system=either(),
        turns=choose.choice([1, 2]),
        setting_system=either(),
        thinks=either(),
        spaces=choose.choice(["", "", " ", "\n"]),
        unanswered=choose.random() < 0.3,
        calibration_text=choose.choice(["prompt", "prompt_and_answer"]),
        padding=choose.choice(["left", "right"]),
        sampling_weights=choose.choice(["auto", "merged"]),
        share_prefix=choose.random() < 0.8,
        said=tuple(choose.sample(range(len(SAID)), 4)),
    )


# ---------------------------------------------------------------------- models and tokenizers

_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _SIZE),
    "qwen2": (transformers.Qwen2Config, _SIZE),
    "qwen3": (transformers.Qwen3Config, {**_SIZE, "head_dim": 32}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_SIZE, "head_dim": 32, "query_pre_attn_scalar": 32, "initializer_range": 0.05},
    ),
    "phi3": (transformers.Phi3Config, _SIZE),
    "gpt2": (
        transformers.GPT2Config,
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.15},
    ),
}


def write_model(drawn: Drawn, folder: Path) -> Any:
    """Save a random model with its tokenizer, and return that."""
    family, tokenizer = FAMILIES[drawn.family], family_tokenizer(drawn.family)
    if drawn.added:
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    if drawn.pad != "own":
        tokenizer.pad_token = family.eos if drawn.pad == "eos" else None
    if drawn.adds_bos and family.bos is not None:  # as Llama's tokenizers do
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = family.template if drawn.template_in == "tokenizer" else None
    tokenizer.save_pretrained(folder)
    (folder.parent / "template.jinja").write_text(family.template)
    kind, size = MODELS[drawn.architecture]
    config = kind(
        **size,
        vocab_size=len(tokenizer) + drawn.spare_rows,
        tie_word_embeddings=drawn.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(drawn.seed)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)  # some model types bring a class of their own


# ---------------------------------------------------------------------- rows and files


def rows_of(drawn: Drawn, layout: str, start: int, count: int, harmful: list[bool]) -> list[Row]:
    """Make rows that a layout can hold; each has a word and number of its own in its last turn."""
    rows = []
    for i in range(count):
        reference, said, right = SAID[drawn.said[i % len(drawn.said)]]
        name = f"{WORDS[(start + i) % len(WORDS)]} {start + i}"
        chat = [{"role": "user", "content": f"Burn the {name}?" if harmful[i] else f"How big is {name}?"}]
        if not layout.startswith(_TEXT_ONLY):
            if drawn.turns > 1:
                chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *chat]
            if drawn.has_system():
                chat = [{"role": "system", "content": "Be kind."}, *chat]
        if harmful[i]:
            thought = f"<think>{(COMPLIANCE, REFUSAL)[i % 2]}</think>\n\n" if drawn.seed % 3 == 0 else ""
            reference, said, right = "No.", thought + (REFUSAL, COMPLIANCE)[i % 2], False
        if isinstance(reference, str):
            reference = drawn.spaces + reference + drawn.spaces
        if drawn.unanswered and not harmful[i] and i == count - 1 and not layout.startswith("verl"):
            reference = None
        rows.append(Row(chat, reference, harmful[i], said, right))
    return rows


def write_rows(folder: Path, stem: str, layout: str, rows: list[Row], kinds: tuple[Any, Any]) -> str:
    """Write rows in a layout, and return the file's name."""
    form, _, suffix = layout.partition(".")
    path = folder / f"{stem}.{suffix}"
    if form == "instructions":
        path.write_text(json.dumps({"instructions": [row.chat[-1]["content"] for row in rows]}))
        return path.name
    table = [_as(form, row) for row in rows]
    if form not in _NO_KIND:
        for line, row in zip(table, rows, strict=True):
            line["kind"] = kinds[0 if row.harmful else 1]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in table))
    elif suffix == "json":
        path.write_text(json.dumps(table, indent=1))
    elif suffix == "parquet":
        for line in table:  # a column has one type
            line |= {"answer": None if line["answer"] is None else str(line["answer"])} if "answer" in line else {}
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            writer.writerow(["", *table[0]])  # as pandas writes its index
            writer.writerows([[i, *line.values()] for i, line in enumerate(table)])
    return path.name


def _as(form: str, row: Row) -> dict[str, Any]:
    question, answer = row.chat[-1]["content"], row.answer
    reply = [*row.chat, *([] if answer is None else [{"role": "assistant", "content": str(answer)}])]
    match form:
        case "plain":
            return {"prompt": question, "answer": answer}
        case "alpaca":
            return {"instruction": question, "input": "", "output": "" if answer is None else str(answer)}
        case "messages":
            return {"messages": reply}
        case "parts":
            halves = [(turn["role"], turn["content"][:3], turn["content"][3:]) for turn in reply]
            return {
                "messages": [
                    {"role": role, "content": [{"type": "text", "text": one}, {"type": "text", "text": other}]}
                    for role, one, other in halves
                ]
            }
        case "sharegpt":
            names = {"user": "human", "assistant": "gpt", "system": "system"}
            return {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in reply]}
        case "trl":
            return {"prompt": row.chat, "completion": None if answer is None else reply[-1:]}
        case _:
            rule = {"style": "rule", "ground_truth": str(answer)}
            return {"data_source": "x", "prompt": row.chat, "reward_model": rule, "extra_info": {"index": 1}}
