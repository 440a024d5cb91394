"""Whole jobs (data, fit, test, export) drawn from what people have, checked as a user would check them by hand."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from chat_templates import FAMILIES
from drawn_jobs import REFUSAL, Drawn, Row, jobs, rows_of, write_model, write_rows
from hypothesis import HealthCheck, Phase, given, settings
from peft import PeftModel
from rendered_by_hand import by_hand, scored_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import run

from nspo_lightning.grpo import Rollout
from nspo_lightning.module import text_policy

SYSTEM, GROUP = "Be kind.", 4
REWARDED: list[dict[str, Any]] = []
_HEADS = {"gpt2": ["lm_head", "c_attn", "c_proj"], "phi3": ["lm_head", "qkv_proj", "down_proj"]}


def even_tokens(prompts, completions, completion_ids, **columns):
    """A reward with signal on any policy, which keeps what it was given."""
    REWARDED.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns})
    return even_share(completion_ids)


def even_share(completion_ids):
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


class Job:
    """A drawn job in a folder, and what is true of it."""

    def __init__(self, drawn: Drawn, folder: Path) -> None:
        self.drawn, self.folder = drawn, folder
        self.tokenizer = write_model(drawn, folder / "model")
        labelled = not drawn.layout.startswith(("alpaca", "instructions"))
        mixed = [True, True, not labelled, not labelled]
        self.safety = rows_of(drawn, drawn.layout, 10, 4, mixed)
        self.safety_test = rows_of(drawn, drawn.layout, 20, 4, mixed)
        self.general_test = rows_of(drawn, drawn.general_layout, 30, 4, [False] * 4)
        self.general = rows_of(drawn, drawn.general_layout, 40, 2, [False] * 2)
        if sum(len(self.ids(self.calibration_text(row))) for row in self.general) > 100:
            self.general = self.general[:1]  # a null space must be left
        self.write()

    def write(self) -> None:
        drawn, folder = self.drawn, self.folder
        data: dict[str, Any] = {
            f"{domain}{part}": write_rows(folder, f"{domain}{part}", layout, rows, drawn.kinds)
            for domain, part, layout, rows in (
                ("safety", "", drawn.layout, self.safety),
                ("safety", "_test", drawn.layout, self.safety_test),
                ("general", "", drawn.general_layout, self.general),
                ("general", "_test", drawn.general_layout, self.general_test),
            )
        }
        data |= {"batch_size": 2, "eval_batch_size": 3, "val_size": 0, "calibration_batch_size": 2}
        data |= {"calibration_text": drawn.calibration_text, "calibration_padding": drawn.padding}
        if self.default_system:
            data["system_prompt"] = SYSTEM
        lora: dict[str, Any] = {"r": 4, "alpha": 8}
        if drawn.head:
            lora["target_modules"] = _HEADS.get(drawn.architecture, ["lm_head", "q_proj", "down_proj"])
        policy: dict[str, Any] = {"path": "model", "quantization": "none", "dtype": "float32"}
        policy["sampling_weights"] = drawn.sampling_weights
        if drawn.template_in != "tokenizer":
            (policy if drawn.template_in == "policy" else data)["chat_template"] = "template.jinja"
        policy["lora"] = None if drawn.whole else lora
        if self.thinks is False:
            policy["chat_template_kwargs"] = {"enable_thinking": False}
        function = {"path": f"{__name__}.even_tokens"}
        config = {
            "name": "job",
            "model": {
                "reward": {"class_path": "nspo_lightning.rewards.FunctionReward", "init_args": function},
                "policy": policy,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3 if drawn.whole else 3e-2}},
                "share_prefix": drawn.share_prefix,
                "group_size": GROUP,
                "sampling": {"max_new_tokens": 6},
                "general_max_new_tokens": 6,
            },
            "data": data,
            "nullspace": {"criterion": "relative", "threshold": 1e-9, "cache_dir": None, "unprotected": "freeze"},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "limit_train_batches": 2,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))

    @property
    def default_system(self) -> bool:
        return self.drawn.setting_system and FAMILIES[self.drawn.family].system

    @property
    def thinks(self) -> bool | None:
        return self.drawn.thinks if self.drawn.family == "qwen3" else None

    # ------------------------------------------------------------------ what is true

    def parts(self, row: Row, answer: str | None = None) -> tuple[str, str]:
        chat = row.chat
        if self.default_system and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": SYSTEM}, *chat]
        return by_hand(self.drawn.family, chat, answer, thinks=self.thinks is not False)

    def prompt(self, row: Row) -> str:
        return self.parts(row)[0]

    def calibration_text(self, row: Row) -> str:
        with_answer = self.drawn.calibration_text == "prompt_and_answer" and row.answer is not None
        return "".join(self.parts(row, str(row.answer) if with_answer else None))

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def row_of(self, text: str) -> Row:
        everything = [*self.safety, *self.safety_test, *self.general, *self.general_test]
        (row,) = [row for row in everything if row.chat[-1]["content"] in text]
        return row

    def scored(self, row: Row) -> tuple[list[int], list[bool]]:
        """The ids of a row's text with its answer, and which of them hold the answer and the end of its turn."""
        before, rest = self.parts(row, str(row.answer))
        start, stop = len(before), len(before) + scored_text(self.drawn.family, rest)
        encoded = self.tokenizer(before + rest, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [b > start and a < stop for a, b in encoded["offset_mapping"]]

    def says(self, row: Row) -> str:
        opened = self.drawn.family == "deepseek-r1" and not row.said.startswith("<think>")
        return "Hm.</think>\n\n" + row.said if opened else row.said

    def end(self) -> int:
        """The token that ends a turn."""
        family = FAMILIES[self.drawn.family]
        name = family.end.strip() or family.eos
        return int(self.tokenizer.convert_tokens_to_ids(name))

    def pad(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.tokenizer.pad_token or self.tokenizer.eos_token))

    # ------------------------------------------------------------------ a policy that says what the rows say

    def sample(self, model: Any, ids: Any, mask: Any, *, eos_token_ids: Any, pad_token_id: int, **_: Any) -> Rollout:
        assert self.end() in eos_token_ids
        texts = []
        for row_ids, real in zip(ids, mask, strict=True):
            kept = row_ids[real.bool()].tolist()
            row = self.row_of(self.tokenizer.decode(kept))
            assert kept == self.ids(self.prompt(row))
            texts.append([*self.ids(self.says(row)), self.end()])
        longest = max(map(len, texts))
        said = torch.tensor([text + [pad_token_id] * (longest - len(text)) for text in texts])
        real = torch.tensor([[place < len(text) for place in range(longest)] for text in texts])
        return Rollout(
            prompt_ids=ids,
            prompt_mask=mask.bool(),
            group_size=1,
            completion_ids=said,
            completion_mask=real,
            finished=torch.ones(len(texts), dtype=torch.bool),
        )

    def call(self, *arguments: str) -> str:
        shown = run(self.folder, *arguments)
        assert shown.code == 0, f"{arguments}\n{shown.err}\n{shown.out}"
        return shown.out + shown.err


@contextmanager
def tokens_seen() -> Iterator[list[torch.Tensor]]:
    """Keep the ids that enter any embedding, whoever calls it."""
    seen: list[torch.Tensor] = []

    def look(module: Any, arguments: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and arguments[0].ndim == 2:
            seen.append(arguments[0].detach().clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def check_training(job: Job) -> None:
    """Fit: the policy read the prompts as rendered by hand, rewards got text, label and answer of each row."""
    REWARDED.clear()
    with tokens_seen() as seen:
        job.call("fit", "-c", "config.yaml")
    summary = json.loads((job.folder / "runs/job/summary.json").read_text())
    assert summary["updates"] == 2
    assert len(REWARDED) == 2
    for call in REWARDED:
        rows = [job.row_of(prompt if isinstance(prompt, str) else prompt[-1]["content"]) for prompt in call["prompts"]]
        prompts = [job.ids(job.prompt(row)) for row in rows[::GROUP]]
        assert read_as(prompts, seen, job.pad()), prompts
        rewards = torch.tensor(even_share(call["completion_ids"])).view(-1, GROUP)
        if bool((rewards.std(dim=1) > 0).all()):  # all of them are learnt from
            said = call["completion_ids"]
            read = [ids[:-1] for ids in said]  # nothing follows the last token
            longest = max(map(len, said))  # rows are cut where that one's is left out
            apart = [prompts[i // GROUP] + ids[: longest - 1] for i, ids in enumerate(said)]
            assert read_as([*prompts, *read] if job.drawn.share_prefix else apart, seen, job.pad())
        for i, (row, prompt) in enumerate(zip(rows, call["prompts"], strict=True)):
            assert row in job.safety
            assert call["kind"][i] == ("harmful" if row.harmful else "benign")
            assert call["answer"][i] == ("" if job.drawn.layout.startswith("instructions") else answer_of(row))
            text = call["completions"][i] if isinstance(prompt, str) else call["completions"][i][-1]["content"]
            drawn = job.tokenizer.decode(call["completion_ids"][i], skip_special_tokens=True)
            assert drawn in text.replace("< ", "<")  # a mark that closes no thought is text, and made to look so


def answer_of(row: Row) -> str:
    return "" if row.answer is None else str(row.answer)


def read_as(texts: list[list[int]], seen: list[torch.Tensor], pad: int) -> bool:
    """Whether texts were read one behind another without padding (prompts are shared), or in rows of their own."""
    if any(ids[0].tolist() == [*itertools.chain(*texts)] for ids in seen if len(ids) == 1):
        return True
    rows = [row.tolist() for ids in seen for row in ids]
    return all(any(padded(row, text, pad) for row in rows) for text in texts)


def padded(row: list[int], text: list[int], pad: int) -> bool:
    """Whether a row is a text with padding around it."""
    places = [i for i in range(len(row) - len(text) + 1) if row[i : i + len(text)] == text]
    return any({*row[:i], *row[i + len(text) :]} <= {pad} for i in places)


def check_test(job: Job) -> dict[str, Any]:
    """Test: rates are those of what was said."""
    with mock.patch.object(text_policy, "sample", job.sample):
        job.call("test", "-c", "config.yaml", "--ckpt_path", "last")
    result: dict[str, Any] = json.loads((job.folder / "runs/job/test.json").read_text())
    found = {name: (rate["count"], rate["of"]) for name, rate in result["rates"]["policy"].items()}
    harmful = [row for row in job.safety_test if row.harmful]
    refused = sum(row.said.endswith(REFUSAL) for row in harmful)
    wanted = {
        "safety/refusal_rate": (refused, len(harmful)),
        "safety/answered_rate": (len(harmful) - refused, len(harmful)),
        "safety/garbage_rate": (0, len(harmful)),
    }
    harmless = [*(row for row in job.safety_test if not row.harmful), *job.general_test]
    cut = [row for row in harmless if "<think>" in row.said and "</think>" not in row.said]
    if cut:
        wanted["general/truncated"] = (len(cut), len(harmless))
    for name, rows, layout in (
        ("safety_test", [row for row in job.safety_test if not row.harmful], job.drawn.layout),
        ("general_test", job.general_test, job.drawn.general_layout),
    ):
        name, free = ("alpaca", True) if layout.startswith("alpaca") else (name, False)
        comparable = [row for row in rows if row.answer is not None and not free]
        scored = [row for row in comparable if row not in cut]
        if scored:
            wanted[f"general/accuracy/{name}"] = (sum(row.right for row in scored), len(scored))
        if len(comparable) < len(rows):
            wanted[f"general/unscored/{name}"] = (len(rows) - len(comparable), len(rows))
        if any(row in cut for row in rows):
            wanted[f"general/truncated/{name}"] = (sum(row in cut for row in rows), len(rows))
    found = {name: pair for name, pair in found.items() if "refusal" not in name or name in wanted}
    assert found == wanted, f"{found} is not {wanted}"
    return result


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
    return found


def check_export(job: Job, result: dict[str, Any]) -> None:
    """Export: both folders answer as the policy did; general text was left as it was; the template is in there."""
    base = AutoModelForCausalLM.from_pretrained(job.folder / "model")
    job.call("export", "--ckpt", "runs/job/checkpoints/last.ckpt", "--out", "merged", "--merge", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(job.folder / "merged")
    policy, folder = merged, "merged"
    if not job.drawn.whole:
        folder = "adapter"
        job.call("export", "--ckpt", "runs/job/checkpoints/last.ckpt", "--out", folder)
        policy = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(job.folder / "model"), job.folder / folder
        )
    benign = [row for row in [*job.safety_test, *job.general_test] if not row.harmful and row.answer is not None]
    nll = kl = count = 0.0
    for row in benign:
        ids, keep = job.scored(row)
        places = torch.tensor(keep[1:])
        log_q, log_p = (logits(model, ids)[:-1].log_softmax(-1)[places] for model in (policy, base))
        nll -= float(log_q.gather(-1, torch.tensor(ids[1:])[places][:, None]).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        count += int(places.sum())
    assert result["text"]["tokens"] == count
    assert result["text"]["nll_nats"] == pytest.approx(nll / count, rel=1e-4)
    if not job.drawn.whole:
        assert result["text"]["kl_to_base_nats"] == pytest.approx(kl / count, rel=1e-2, abs=1e-6)
    scale = float(logits(base, job.ids(job.prompt(job.safety[0]))).abs().max())
    other = 0.0
    for row in [*job.safety, *job.safety_test]:
        ids = job.ids(job.prompt(row))
        assert float((logits(merged, ids) - logits(policy, ids)).abs().max()) < 1e-4 * scale
        other = max(other, float((logits(policy, ids) - logits(base, ids)).abs().max()) / scale)
    assert other > 1e-3, other
    for row in job.general:
        ids = job.ids(job.calibration_text(row))
        moved = float((logits(policy, ids) - logits(base, ids)).abs().max()) / scale
        assert moved < 2e-2 * other, (moved, other)
    for name in {folder, "merged"}:
        tokenizer = AutoTokenizer.from_pretrained(job.folder / name)
        row = job.general[0]
        if not job.default_system:
            text = tokenizer.apply_chat_template(row.chat, tokenize=False, add_generation_prompt=True)
            assert text == job.prompt(row)


def check(drawn: Drawn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(drawn, Path(folder))
        check_training(job)
        check_export(job, check_test(job))


_ALL = list(HealthCheck)  # a draw takes seconds


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=_ALL)
@given(drawn=jobs())
def test_a_drawn_job_is_what_it_says(drawn):
    check(drawn)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=_ALL)
@given(drawn=jobs())
def test_many_drawn_jobs_are_what_they_say(drawn):
    check(drawn)  # `--hypothesis-seed=N` draws the same ones again
